"""``sae train``: train, and evaluate when done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from app.cli.arguments import parse
from sae.config import TrainConfig


@dataclass(frozen=True)
class Arguments:
    """Train a sparse autoencoder on the activations of a model, and measure it on held-out text."""

    out: Path
    """The run folder to make, or to continue."""
    train: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=TrainConfig
    )


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "train", arguments)
    from app.cli.report import print_evaluation
    from app.cli.terminal import console, progress, stage
    from features.pipeline import Pipeline

    pipeline = Pipeline(given.out, given.train, progress=progress)
    pipeline.start()
    config = pipeline.config
    stage(f"Training on {config.tokens_read():,} tokens at {config.hook_name} of {config.model}")
    store = pipeline.store
    if store is not None and not store.store.complete:
        console.print(f"  {store.folder} is unfinished: training reads what is there.", soft_wrap=True)
    if store is not None and config.order == "external":
        from activations.shuffled import external_bytes

        console.print(
            f"  A copy in training order takes up to {external_bytes(store) / 1e6:,.1f} MB beside the store.",
            soft_wrap=True,
        )
    for note in pipeline.corpus.notes:
        console.print(f"  {note}", soft_wrap=True)
    available = pipeline.train_blocks.n_tokens if store is None else store.n_kept
    if available < config.resolved_tokens():
        console.print(
            f"  {'The corpus' if store is None else 'The store'} holds {available:,} training tokens: it is read"
            f" {config.tokens_read() / available:.1f} times over."
        )
    sae = pipeline.train()
    stage("Evaluating on the test split")
    print_evaluation(pipeline.evaluate(sae))
    console.print(f"\nThe SAE is in {pipeline.run.sae}. Next: sae index {given.out}", soft_wrap=True)
