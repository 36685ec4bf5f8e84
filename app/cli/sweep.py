"""``sae sweep``: many SAEs from one pass over the activations, compared."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from activations.errors import InputError
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
    sparsity-weight=2,5,10 trains nine. The same command, or --out alone, continues an interrupted sweep.
    """

    out: Path
    """The sweep's folder; every run is a folder in it."""
    file: Positional[Path | None] = None
    """A TOML file of a run's settings, [[grid]] and [[run]] tables; without --grid, the folder's own sweep.toml."""
    grid: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE,… [FIELD=…]: all combinations are trained; may be given several times."""
    find: str | None = None
    """l0=NUMBER: instead of a grid, find by short trainings the sparsity weight that ends with this L0."""
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
    if given.find is not None:
        _find(given, arguments)
        return
    config = SweepConfig(given.train)
    file = given.file
    if file is None and not given.grid and (given.out / SWEEP_FILE).is_file():
        file = given.out / SWEEP_FILE
    if file is not None:
        config = SweepConfig.read(file)
        # Flags change what the file says.
        given = parse(Arguments, "sweep", arguments, default=replace(given, train=config.base, grid=()))
        config = replace(config, base=given.train)
    config = replace(config, grids=(*config.grids, *map(grid_from_words, given.grid)))
    config.expand()  # refuses settings that cannot work before anything heavy is imported
    from app.cli.live import TrainingView
    from app.cli.report import print_sweep
    from app.cli.terminal import console, stage
    from features.sweep import PARETO, Sweep
    from sae.log import Diverged

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
    diverged: Diverged | None = None
    try:
        sweep.train(lambda names: stage(f"Training {', '.join(names)}"), view.watch)
    except Diverged as error:
        if not sweep.saes():
            raise
        diverged = error  # said at the end, after what the others came to
    stage("Evaluating on the test split")
    evaluations = sweep.evaluate()
    print_sweep(evaluations)
    console.print(
        f"\nThe plot is {given.out / PARETO}, the settings {given.out / SWEEP_FILE}. Next: sae index"
        f" {given.out}/{next(iter(evaluations))}",
        soft_wrap=True,
    )
    if diverged is not None:
        raise diverged


def _find(given: Arguments, arguments: Sequence[str]) -> None:
    """Look for the sparsity weight of one training, and say with which command to use it."""
    name, _, value = (given.find or "").partition("=")
    if name != "l0" or not _is_number(value):
        raise InputError(f"--find takes l0=NUMBER, and {given.find!r} is not of that form.")
    if given.grid or given.file is not None or given.keep_activations or given.dry_run:
        raise InputError(
            "--find looks for one training's sparsity weight: give its settings as for sae train."
        )
    from app.cli.live import TrainingView
    from app.cli.terminal import console, stage, table
    from features.find import L0Search

    search = L0Search(given.out, given.train, float(value), progress=TrainingView().progress)
    stage(f"Looking for an L0 of {float(value):g} after {search.config.tokens_read():,} tokens")
    found = search.find()
    rows = [[f"{t.sparsity_weight:.4g}", f"1/{1 / t.part:.0f}", f"{t.l0:.4g}"] for t in found.trials]
    table(["sparsity weight", "of the tokens", "L0"], rows)
    weight = f"{found.sparsity_weight:.4g}"
    console.print(f"\nFor an L0 of {float(value):g} on training text at the end of the whole training:")
    words = _without(arguments, "--find", "--out", "--sparsity-weight")
    console.print(f"  sae train --out RUN --sparsity-weight {weight} {shlex.join(words)}", soft_wrap=True)


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _without(arguments: Sequence[str], *flags: str) -> list[str]:
    """The words that were typed, less these flags and their values."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word.replace("_", "-") in flags:
            next(words, None)
        elif word.partition("=")[0].replace("_", "-") not in flags:
            kept.append(word)
    return kept


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
