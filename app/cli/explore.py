"""``sae explore``: open the explorer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Browse, label and steer the features of a run in the web browser."""

    run: Positional[Path] = Path("runs/demo")
    """The run folder."""
    port: int | None = None
    """Port on this machine; the next free one from 8501 by default."""
    browser: bool = True
    """Open the browser."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "explore", arguments)
    from app.launch import launch

    launch(given.run, port=given.port, browser=given.browser)
