"""``sae capture``: activations of a model on text, written once for many trainings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from activations.config import CaptureConfig
from app.cli.arguments import parse

if TYPE_CHECKING:
    from activations.job import CaptureJob


@dataclass(frozen=True)
class Arguments:
    """Capture the activations of a model at one or more hooks into a store that many trainings can read.

    The same command continues an interrupted capture. Under torchrun the processes share the work:
    torchrun --no-python --nproc-per-node 2 sae capture --out STORE ...
    """

    out: Path
    """The store's folder."""
    capture: Annotated[CaptureConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=CaptureConfig
    )
    append: bool = False
    """Add this text behind what the store holds."""
    dry_run: bool = False
    """Say what the store would hold and take, and stop."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "capture", arguments)
    from activations.job import CaptureJob, appending
    from activations.processes import started_processes
    from activations.progress import silent
    from app.cli.report import print_store
    from app.cli.terminal import console, progress

    processes = started_processes()
    config = appending(given.capture, given.out) if given.append else given.capture
    job = CaptureJob.prepare(config)
    if processes.rank == 0:
        _announce(job, given.out, given.append)
    if given.dry_run:
        return
    shown = progress if processes.rank == 0 else silent
    store = job.write(given.out, append=given.append, processes=processes, progress=shown)
    if processes.rank == 0:
        print_store(store)
        hook = f" --hook-name {store.hook_names[0]}" if len(store.hook_names) > 1 else ""
        console.print(
            f"\nThe activations are in {store.folder}. Next: sae train --out RUN --store {store.folder}{hook}",
            soft_wrap=True,
        )


def _announce(job: "CaptureJob", folder: Path, append: bool) -> None:
    """What will be captured, and what room that takes."""
    from app.cli.terminal import console, stage

    hooks = ", ".join(job.config.hook_names)
    stage(
        f"Capturing {job.blocks.n_tokens:,} tokens at {hooks} of {job.model.name} as {job.config.stored_as}"
    )
    more = "more " if append else ""
    needed, free = job.bytes_needed / 1e6, job.bytes_free(folder) / 1e6
    console.print(
        f"  {folder} will take {needed:,.1f} MB {more}of the {free:,.0f} MB that are free;"
        f" sequences of {job.blocks.context_length} tokens, {job.blocks.packing}",
        soft_wrap=True,
    )
    if job.blocks.n_tokens < job.config.tokens:
        console.print(f"  The text holds {job.blocks.n_tokens:,} training tokens, fewer than asked for.")
    for note in job.corpus.notes:
        console.print(f"  {note}", soft_wrap=True)
    for sentence in job.shortage:
        console.print(f"  For later evaluation or labels: {sentence}", soft_wrap=True)
