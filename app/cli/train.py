"""``sae train``: train, and evaluate when done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from app.cli.arguments import parse
from sae.config import TrainConfig

if TYPE_CHECKING:
    from features.pipeline import Pipeline
    from sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Arguments:
    """Train a sparse autoencoder on the activations of a model, and measure it on held-out text.

    Run again to continue. Ctrl-C and SIGTERM save a checkpoint first. Under torchrun the processes share every batch:
    torchrun --no-python --nproc-per-node 2 sae train --out RUN ...
    """

    out: Path
    """The run folder to make, or to continue."""
    train: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=TrainConfig
    )
    dry_run: bool = False
    """Measure a few steps, say what time, memory and disk the training takes, and write nothing."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "train", arguments)
    from activations.loading import resolve_device
    from activations.progress import silent
    from app.cli.live import TrainingView
    from features.pipeline import Pipeline
    from sae.mesh import Mesh

    given.train.check()
    mesh = Mesh.started(given.train.shards, resolve_device(given.train.device))
    view = TrainingView()
    shown = view.progress if mesh.rank == 0 else silent
    pipeline = Pipeline(given.out, given.train, mesh=mesh, progress=shown)
    if given.dry_run:
        _print_forecast(pipeline)
        return
    pipeline.start()
    if mesh.rank > 0:
        pipeline.train()
        return
    _announce(pipeline)
    sae = pipeline.train(view.watch)
    _report(pipeline, sae)


def _announce(pipeline: "Pipeline") -> None:
    """What is trained, and what is to be said about the text."""
    from app.cli.terminal import console, stage

    config = pipeline.config
    stage(f"Training on {config.tokens_read():,} tokens at {' → '.join(config.hook_names)} of {config.model}")
    store = pipeline.store
    if store is not None and not store.store.complete:
        console.print(f"  {store.folder} is unfinished: training reads what is there.", soft_wrap=True)
    if store is not None and config.order == "external":
        from activations.shuffled import external_bytes

        taken = sum(external_bytes(store.store.at(hook_name)) for hook_name in config.hook_names)
        console.print(
            f"  A copy in training order takes up to {taken / 1e6:,.1f} MB beside the store.", soft_wrap=True
        )
    batch = config.resolved_batch_tokens()
    left_out = config.tokens_read() % batch
    if left_out > 0.01 * config.tokens_read():
        console.print(
            f"  Steps are whole batches of {batch:,} tokens: the last {left_out:,} are left out.",
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


def _report(pipeline: "Pipeline", sae: "SparseAutoencoder") -> None:
    from app.cli.report import print_evaluation
    from app.cli.terminal import console, stage

    stage("Evaluating on the test split")
    print_evaluation(pipeline.evaluate(sae))
    console.print(f"\nThe SAE is in {pipeline.run.sae}. Next: sae index {pipeline.run.path}", soft_wrap=True)


def _print_forecast(pipeline: "Pipeline") -> None:
    from app.cli.terminal import stage, table
    from features.forecast import forecast

    found = forecast(pipeline)
    if pipeline.mesh.rank > 0:
        return
    stage("Nothing is written. The training would take about")
    minutes = found.seconds / 60
    rows = [
        ["time", f"{minutes:,.1f} minutes" if minutes < 120 else f"{minutes / 60:,.1f} hours"],
        [
            "  steps",
            f"{found.n_steps:,} of {found.batch_tokens:,} tokens, {found.step_seconds * 1e3:,.1f} ms each",
        ],
        ["  language model", f"{found.capture_seconds / 60:,.1f} minutes"],
        [
            "memory",
            f"{found.memory / 1e6:,.0f} MB, and {found.model_memory / 1e6:,.0f} MB for the language model",
        ],
        ["disk", f"{found.disk / 1e6:,.0f} MB of {found.free / 1e6:,.0f} MB free"],
    ]
    table(["", ""], rows)
