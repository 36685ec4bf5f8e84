"""``sae demo``: the whole road on the bundled model, from text to a steered model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.cli.arguments import parse

LARGEST_KEPT_BYTES = 100_000_000  # stored activations beyond this are deleted at the end


@dataclass(frozen=True)
class Arguments:
    """Train a sparse autoencoder on the bundled model with the Python sources of this machine, and steer with it.

    Run again to continue, or with another setting to redo what depends on it.
    """

    out: Path = Path("runs/demo")
    """The run folder."""
    tokens: int = 2_000_000
    """Training tokens; everything else is scaled with them."""
    passes: int = 2
    """How often training reads them."""
    k: int = 32
    """How many features fire per token."""
    d_sae: int = 4096
    """Number of features."""
    packages: tuple[str, ...] = ()
    """Installed packages to train on besides the standard library, by import name."""
    seed: int = 0
    """Seeds the data order and the initial weights."""
    keep_activations: bool = False
    """Keep the captured activations (512 bytes a token), so that another --k need not capture again."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "demo", arguments)
    from activations.corpus import CorpusConfig
    from app.cli.live import TrainingView
    from app.cli.report import print_demonstration, print_evaluation
    from app.cli.terminal import console, progress, stage
    from features.demonstration import choose_demonstration
    from features.pipeline import Pipeline
    from sae.config import SAEConfig, TrainConfig

    config = TrainConfig(
        corpus=CorpusConfig(packages=given.packages, shuffle_seed=given.seed),
        sae=SAEConfig(d_sae=given.d_sae, k=given.k),
        tokens=given.tokens,
        passes=given.passes,
        seed=given.seed,
    )
    view = TrainingView()
    pipeline = Pipeline(given.out, config, store_activations=True, replace_other=True, progress=view.progress)
    stage(f"1/6  Reading the Python sources of this machine, {given.tokens:,} tokens")
    pipeline.start()
    _print_corpus(pipeline)
    stage(f"2/6  Training {given.d_sae:,} features on {config.hook_name}, {given.k} of them per token")
    sae = pipeline.train(view.watch)
    stage("3/6  Evaluating on files that neither the model nor the SAE has read")
    print_evaluation(pipeline.evaluate(sae))
    stage(f"4/6  Indexing what makes each feature fire, {pipeline.sizes.index_tokens:,} tokens")
    index = pipeline.index(sae)
    stage(f"5/6  Labelling every feature, scored on {pipeline.sizes.score_tokens:,} held-out tokens")
    labels = pipeline.label(sae, index)
    stage("6/6  Steering")
    shown = choose_demonstration(pipeline.model, sae, index, progress=progress)
    print_demonstration(shown, pipeline.model, labels, given.out)
    _tidy_up(pipeline, given.keep_activations)
    folder = given.out
    console.print(
        f"\nEverything is in {folder}/: sae/, evaluation.json, features/, labels.sqlite.", soft_wrap=True
    )
    console.print(f"Open the explorer with:  sae explore {folder}", soft_wrap=True)


def _print_corpus(pipeline: Any) -> None:
    from app.cli.terminal import console

    left_out = sum(pipeline.corpus.left_out.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in pipeline.corpus.left_out.items())
    blocks = pipeline.train_blocks
    console.print(
        f"  {blocks.n_tokens:,} tokens from {len(blocks.names):,} files; {left_out:,} files left out ({reasons})",
        soft_wrap=True,
    )


def _tidy_up(pipeline: Any, keep: bool) -> None:
    """Delete stored activations that are large: nothing but another training would read them."""
    from app.cli.terminal import console

    folder = pipeline.run.activations
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    if size > LARGEST_KEPT_BYTES and not keep:
        pipeline.drop_activations()
        console.print(
            f"\nDeleted {size / 1e6:,.0f} MB of captured activations;"
            " --keep-activations keeps them for other trainings.",
            soft_wrap=True,
        )
