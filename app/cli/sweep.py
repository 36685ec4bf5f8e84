"""``sae sweep``: many SAEs from one pass over the activations, compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from app.cli.arguments import parse
from sae.config import TrainConfig
from sae.sweep import SWEEP_FILE, SweepConfig, grid_from_words

if TYPE_CHECKING:
    from features.sweep import Sweep

BYTES_PER_PARAMETER = 16  # itself, its gradient, and Adam's two moments, in float32


@dataclass(frozen=True)
class Arguments:
    """Train many sparse autoencoders on one stream of activations, measure and compare them.

    sae sweep --out runs/sweep --grid architecture=topk,batch_topk k=16,32,64 --grid architecture=relu
    sparsity-weight=2,5,10 trains nine. The same command continues an interrupted sweep.
    """

    out: Path
    """The sweep's folder; every run is a folder in it."""
    file: Positional[Path | None] = None
    """A TOML file as sweep.toml in the folder of a sweep: a run's settings, [[grid]] and [[run]] tables."""
    grid: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE,… [FIELD=…]: all combinations are trained; may be given several times."""
    keep_activations: bool = False
    """Write the activations to the sweep's folder, and leave them there for further runs."""
    dry_run: bool = False
    """Say what would be trained, and stop."""
    train: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=TrainConfig
    )


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "sweep", arguments)
    config = SweepConfig(given.train)
    if given.file is not None:
        config = SweepConfig.read(given.file)
        # Flags change what the file says.
        given = parse(Arguments, "sweep", arguments, default=replace(given, train=config.base))
        config = replace(config, base=given.train)
    config = replace(config, grids=(*config.grids, *map(grid_from_words, given.grid)))
    config.expand()  # refuses settings that cannot work before anything heavy is imported
    from app.cli.live import TrainingView
    from app.cli.report import print_sweep
    from app.cli.terminal import console, stage
    from features.sweep import PARETO, Sweep

    view = TrainingView()
    sweep = Sweep(given.out, config, keep_activations=given.keep_activations, progress=view.progress)
    if given.dry_run:
        sweep.check()
        _announce(sweep)
        _print_forecast(sweep)
        return
    sweep.start()
    _announce(sweep)
    for note in sweep.notes:
        console.print(f"  {note}", soft_wrap=True)
    sweep.train(lambda names: stage(f"Training {', '.join(names)}"), view.watch)
    stage("Evaluating on the test split")
    print_sweep(sweep.evaluate())
    console.print(
        f"\nThe plot is {given.out / PARETO}, the settings {given.out / SWEEP_FILE}. Next: sae index"
        f" {given.out}/{next(iter(sweep.runs))}",
        soft_wrap=True,
    )


def _announce(sweep: "Sweep") -> None:
    """What will be trained, and what memory that takes."""
    from app.cli.terminal import console, stage, table

    stage(f"{len(sweep.runs)} SAEs on {sweep.tokens_read:,} tokens of {sweep.model.name}")
    rows = []
    for name, run in sweep.runs.items():
        config = run.config
        rate = f"{config.resolved_learning_rate():.2g}"
        steps, batch = f"{config.n_steps():,}", f"{config.resolved_batch_tokens():,}"
        rows.append([name, f"{sweep.parameters(name):,}", steps, batch, rate])
    table(["run", "parameters", "steps", "of tokens", "rate"], rows)
    total = sum(sweep.parameters(name) for name in sweep.runs)
    beside = max(sum(sweep.parameters(name) for name in group) for group in sweep.groups)
    console.print(
        f"  {total:,} parameters in all; up to {beside:,} are trained side by side and take"
        f" {beside * BYTES_PER_PARAMETER / 1e6:,.0f} MB with gradients and the optimiser's state.",
        soft_wrap=True,
    )
    if len(sweep.groups) > 1:
        console.print(
            f"  They read {len(sweep.groups)} different streams, one after the other, from one store."
        )


def _print_forecast(sweep: "Sweep") -> None:
    """Time and disk, from a few steps of each SAE and one batch of the model."""
    from app.cli.terminal import console
    from features.forecast import forecast

    found = [forecast(run) for run in sweep.runs.values()]
    steps = sum(each.n_steps * each.step_seconds for each in found)
    minutes = (steps + max(each.capture_seconds for each in found)) / 60
    disk, free = sum(each.disk for each in found), found[0].free
    console.print(
        f"  Nothing is written. Training would take about {minutes:,.1f} minutes, and {disk / 1e6:,.0f} MB of the"
        f" {free / 1e6:,.0f} MB that are free.",
        soft_wrap=True,
    )
