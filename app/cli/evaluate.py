"""``sae evaluate``: the metrics of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Measure the SAE of a run on the test split, which neither model nor SAE has seen."""

    run: Positional[Path]
    """The run folder."""
    tokens: int | None = None
    """Tokens to measure on; 100,000 for a long run."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "evaluate", arguments)
    from app.cli.report import print_evaluation
    from app.cli.terminal import progress
    from features.pipeline import Pipeline

    pipeline = Pipeline(given.run, progress=progress)
    if given.tokens is not None:
        pipeline.sizes = replace(pipeline.sizes, test_tokens=given.tokens)
    print_evaluation(pipeline.evaluate(pipeline.sae()))
