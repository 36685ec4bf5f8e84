"""``sae push``: an SAE to the Hugging Face hub, with a card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Upload an SAE to the Hugging Face hub, in SAELens' format, with a card that says what it is and how good.

    Of a run, the SAE and its evaluation are uploaded and nothing else. Log in first: hf auth login.
    """

    folder: Positional[Path]
    """A run, or an SAE of any format that is read."""
    repository: Positional[str]
    """org/name on the hub; made if it is not there."""
    private: bool = False
    """Whether a repository that is made now is private."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "push", arguments)
    from app.cli.terminal import console
    from sae.formats.hub import push

    address = push(given.folder, given.repository, private=given.private)
    console.print(f"{address}: SparseAutoencoder.load('hf:{given.repository}')", soft_wrap=True)
