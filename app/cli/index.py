"""``sae index``: the feature index and the first labels of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Find out what makes each feature fire, and give every feature a first label with a score.

    Several processes share the text: torchrun --no-python --nproc-per-node 4 sae index RUN.
    """

    run: Positional[Path]
    """The run folder."""
    tokens: int | None = None
    """Tokens of the train split to read; 500,000 for a long run."""
    score_tokens: int | None = None
    """Tokens of the score split that labels are judged on; 100,000 for a long run."""
    weights_only: bool = False
    """Only what needs no text: logit lens and nearest features."""
    map: Literal["auto", "umap", "tsne", "pca", "none"] = "none"
    """Draw a map of the decoder directions, for the explorer: auto takes UMAP if it is installed, else t-SNE, else
    principal components. Minutes for many features."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "index", arguments)
    from activations.errors import InputError
    from activations.processes import started_processes
    from app.cli.terminal import console, progress, stage
    from features.decoder_map import map_decoder, map_method
    from features.pipeline import Pipeline

    for name in ("tokens", "score_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, and must be at least 1.")
    pipeline = Pipeline(given.run, progress=progress)
    if given.tokens is not None:
        pipeline.sizes = replace(pipeline.sizes, index_tokens=given.tokens)
    if given.score_tokens is not None:
        pipeline.sizes = replace(pipeline.sizes, score_tokens=given.score_tokens)
    sae = pipeline.sae()
    is_first = started_processes().rank == 0
    if is_first:
        stage("Reading the weights")
        weights = pipeline.weights(sae)
    if not given.weights_only:
        stage("Indexing")
        index = pipeline.index(sae)
        if is_first:
            stage("Labelling")
            pipeline.label(sae, index)
    if is_first and given.map != "none":
        stage("Drawing the map")
        map_decoder(weights, sae, given.map)
        console.print(f"  by {map_method(weights)}")
    if is_first:
        where = pipeline.run.weights if given.weights_only else pipeline.run.index
        console.print(f"\nThe index is in {where}. Next: sae explore {given.run}", soft_wrap=True)
