"""``sae convert``: an SAE of any format that is read, into one that is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Read an SAE of any known format and write it in another.

    Read: SAELens (which is ours), dictionary_learning, sparsify, OpenAI, Gemma Scope and Llama Scope; the format shows
    in the content. What the target format cannot hold is refused.
    """

    source: Positional[str]
    """A folder, a file of weights, or hf:org/repo/path@revision on the Hugging Face hub."""
    target: Positional[Path]
    """The folder to make."""
    to: Literal["saelens", "dictionary_learning", "sparsify"] = "saelens"
    """The format to write."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "convert", arguments)
    from app.cli.terminal import console
    from sae.formats.convert import convert

    sae = convert(given.source, given.target, given.to)
    kind = f"{sae.config.architecture} {'transcoder' if sae.config.transcoder else 'SAE'}"
    console.print(
        f"{given.target}: a {kind} with {sae.d_sae:,} features on width {sae.d_in:,}, in the format of {given.to}",
        soft_wrap=True,
    )
    if "hook_name" not in sae.metadata:
        console.print("The file does not say where in a model it belongs.", soft_wrap=True)
