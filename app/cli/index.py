"""``sae index``: the feature index and the first labels of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Find out what makes each feature fire, and give every feature a first label with a score."""

    run: Positional[Path]
    """The run folder."""
    tokens: int | None = None
    """Tokens of the train split to read; 500,000 for a long run."""
    score_tokens: int | None = None
    """Tokens of the score split that labels are judged on; 100,000 for a long run."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "index", arguments)
    from app.cli.terminal import console, progress, stage
    from features.pipeline import Pipeline

    pipeline = Pipeline(given.run, progress=progress)
    if given.tokens is not None:
        pipeline.sizes = replace(pipeline.sizes, index_tokens=given.tokens)
    if given.score_tokens is not None:
        pipeline.sizes = replace(pipeline.sizes, score_tokens=given.score_tokens)
    sae = pipeline.sae()
    stage("Indexing")
    index = pipeline.index(sae)
    stage("Labelling")
    pipeline.label(sae, index)
    console.print(f"\nThe index is in {pipeline.run.index}. Next: sae explore {given.run}", soft_wrap=True)
