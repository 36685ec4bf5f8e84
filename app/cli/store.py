"""``sae store``: look for damage in stored activations, and repair it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.cli.arguments import parse

DAMAGED = 1  # exit status of verify when it finds something


@dataclass(frozen=True)
class Arguments:
    """Find every missing file and flipped bit of a store, or make just that again."""

    action: Positional[Literal["verify", "repair"]]
    """verify: read everything, name what is damaged (exit status 1). repair: capture what is damaged again."""
    folder: Positional[Path]
    """The store."""
    model: str | None = None
    """For repair: the model it was captured with, where that lies elsewhere now."""
    device: str | None = None
    """For repair: cuda, mps or cpu."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "store", arguments)
    if given.action == "verify":
        _verify(given.folder)
    else:
        _repair(given)


def _verify(folder: Path) -> None:
    from activations.verify import verify_store
    from app.cli.terminal import console, progress

    damaged = verify_store(folder, progress=progress)
    for damage in damaged:
        console.print(f"  {damage.file} {damage.what}", soft_wrap=True)
    if damaged:
        console.print(
            f"\n{len(damaged)} damaged: sae store repair {folder} makes them again.", soft_wrap=True
        )
        sys.exit(DAMAGED)
    console.print(f"Every file in {folder} is as it was written.", soft_wrap=True)


def _repair(given: Arguments) -> None:
    from dataclasses import replace

    from activations.job import load_model, text_again
    from activations.verify import captured_with, repair_store
    from app.cli.terminal import console, progress

    config = captured_with(given.folder)
    model = load_model(replace(config, model=given.model or config.model), device=given.device)
    repair = repair_store(given.folder, model, text_again(model), progress=progress)
    if not repair.files:
        console.print(
            f"Nothing to repair: every file in {given.folder} is as it was written.", soft_wrap=True
        )
        return
    console.print(f"Made again: {', '.join(repair.files)}.", soft_wrap=True)
    if repair.other_bits:
        console.print(
            f"This machine gives other bits than the one that captured {', '.join(repair.other_bits)}: the same"
            " activations up to rounding, under new hashes.",
            soft_wrap=True,
        )
    else:
        console.print("Bit for bit as before.")
