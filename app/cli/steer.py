"""``sae steer``: a text as the model writes it, and as it writes it with a feature turned up or down."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.cli.arguments import parse

DEFAULT_STRENGTH = {"clamp": 2.0, "add": 2.0, "ablate": 0.0}


@dataclass(frozen=True)
class Arguments:
    """Write a text twice from one seed: as the model would, and with one feature turned up or down."""

    run: Positional[Path]
    """The run folder."""
    feature: Positional[int]
    """The feature's number."""
    prompt: Positional[str]
    """The text to continue."""
    strength: float | None = None
    """How far to turn it, 2 by default: 1 is the largest activation seen in the index; below 0 suppresses."""
    method: Literal["clamp", "add", "ablate"] = "clamp"
    """clamp: set the activation; add: add the feature's direction; ablate: set the activation to 0."""
    unit: Literal["max", "activation", "residual"] = "max"
    """Unit of the strength: the feature's maximum, the activation itself, or the mean residual norm."""
    tokens: int = 64
    """New tokens to write."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    seed: int = 0
    """Seeds the sampling of both texts."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "steer", arguments)
    from rich.text import Text

    from app.cli.terminal import console, print_text
    from features.run import open_run
    from features.steering import steer

    run = open_run(given.run)
    strength = given.strength if given.strength is not None else DEFAULT_STRENGTH[given.method]
    edit = run.edit({given.feature: strength}, method=given.method, unit=given.unit)
    pair = steer(
        run.model,
        [edit],
        given.prompt,
        seed=given.seed,
        max_new_tokens=given.tokens,
        temperature=given.temperature,
    )
    label = run.labels.get(given.feature)
    name = f"feature {given.feature}" + (f" ({label.summary})" if label and label.text else "")
    what = "ablated" if given.method == "ablate" else f"{given.method} {strength:g} × {given.unit}"
    for title, text in (("default", pair.default), (f"steered: {name}, {what}", pair.steered)):
        console.print(Text(title, style="dim"), soft_wrap=True)
        print_text(Text(given.prompt + text))
