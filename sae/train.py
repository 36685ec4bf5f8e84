"""Train one or many SAEs on one stream of activations; checkpoint; resume to the same bits.

Runs that are trained side by side share the stream and what depends on the activations alone; each has its own
weights, optimiser, schedule and folder, and ends in the bits in which it ends when trained alone.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import is_finished, write_manifest
from activations.progress import Progress, silent
from sae.checkpoint import Checkpoint, checkpoint_folders, newest_checkpoint, write_checkpoint
from sae.config import THRESHOLDED, TrainConfig
from sae.differences import refuse_other
from sae.held_out import held_out_metrics
from sae.interrupt import Interruptions
from sae.log import Diverged, MetricsLog
from sae.memory import keep_freed_memory
from sae.mesh import ALONE, Mesh
from sae.model import SparseAutoencoder
from sae.run import RunFolder
from sae.scaling import Scaling
from sae.sinks import check_sinks, open_sinks
from sae.trainer import Trainer

LOG_LINES = 100
CHECKPOINT_EVERY_LINES = 10
HELD_OUT_EVERY_LINES = 10


class Batches(Protocol):
    """What training reads: batches ``[n, d_in]`` of raw activations, and where it stands.

    ``state_dict`` speaks of the batches that were given out, also after a batch was interrupted while it was made.
    """

    def __iter__(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Run:
    """One SAE to train.

    Attributes:
        config: what to train. folder: the run folder.
        metadata: goes into the SAE's cfg.json.
        inputs: hashes and settings that the result depends on, besides ``config``.
    """

    config: TrainConfig
    folder: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def made_from(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {"config": asdict(self.config.resolved()), **self.inputs}

    @property
    def finished(self) -> bool:
        """Whether the folder holds the SAE that this run would make."""
        return is_finished(RunFolder(self.folder).sae, "sae", self.made_from)

    def refuse_other(self) -> None:
        """Raise InputError where the folder holds a training with other settings, finished or not."""
        refuse_trained_otherwise(self.folder, self.made_from)


Watch = Callable[[Run, Mapping[str, float]], None]
"""Hears every line of every run's ``metrics.jsonl``."""


def refuse_trained_otherwise(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Refuse a run folder whose training was begun or finished with other settings than ``made_from`` (or a part).

    Raises:
        InputError: lists every setting that differs.
    """
    run = RunFolder(folder)
    refuse_other(folder, [*checkpoint_folders(run.checkpoints), run.sae], made_from)


def train(
    run: Run,
    batches: Batches,
    scaling: Scaling,
    *,
    held_out: Tensor | None = None,
    replace_other: bool = False,
    mesh: Mesh = ALONE,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> SparseAutoencoder:
    """Train one SAE: :func:`train_side_by_side` with one run."""
    return train_side_by_side(
        [run],
        batches,
        scaling,
        held_out=held_out,
        replace_other=replace_other,
        mesh=mesh,
        progress=progress,
        watch=watch,
    )[0]


def train_side_by_side(
    runs: Sequence[Run],
    batches: Batches,
    scaling: Scaling,
    *,
    held_out: Tensor | None = None,
    replace_other: bool = False,
    mesh: Mesh = ALONE,
    progress: Progress = silent,
    watch: Watch | None = None,
) -> list[SparseAutoencoder]:
    """Train SAEs on one stream, each writing ``metrics.jsonl``, ``checkpoints/`` and at the end ``sae/``.

    A run whose ``sae/`` is finished is skipped. One that was interrupted goes on from its newest checkpoint, to the
    same bits: the stream begins where the run stands that has come least far, and the others join when it reaches
    them. Ctrl-C and SIGTERM save a checkpoint of the current step.

    Several processes train together: each calls this with the same runs and its place in the ``mesh``, and brings
    batches of its own, all of one size; one below the other, in the order of the ranks, they are the batch of the step.
    Process 0 writes, and shows ``progress`` and ``watch``; a run folder must be the same folder for all.

    Args:
        runs: they must have the same hooks, batch size, number of steps and order of activations.
        batches: the activations, this process's share of them. scaling: the units to train in.
        held_out: raw activations that training does not see, ``[n, d_in]``, for a transcoder ``[n, d_in + d_out]``;
            now and then a line of the metrics says how well they are reconstructed. Only that of process 0 is used.
        replace_other: train anew in a folder that holds a training with other settings, instead of refusing it.
        mesh: the processes that train together. watch: hears the lines of all metrics.

    Returns:
        the SAEs in the order of the runs, on the device of ``scaling``.

    Raises:
        InputError: settings that cannot work, runs that do not go together, a folder that holds something else, or
            activations that end too early.
        Diverged: runs left the numbers that they could come back from; others beside them were finished first.
    """
    for run in runs:
        run.config.check()
        check_sinks(run.config.log_to)
    _refuse_unequal(runs)
    unfinished = mesh.agreed(_unfinished(runs, replace_other) if mesh.rank == 0 else [])
    if unfinished:
        trainings = [_Training(runs[place], scaling, held_out, watch, mesh) for place in unfinished]
        _train(trainings, batches, scaling, progress if mesh.rank == 0 else silent, mesh)
    mesh.wait()  # for process 0, which writes
    return [SparseAutoencoder.load(RunFolder(run.folder).sae).to(scaling.mean.device) for run in runs]


def _unfinished(runs: Sequence[Run], replace_other: bool) -> list[int]:
    """Places of the runs that are not finished, after a look at what the folders hold."""
    if not replace_other:
        for run in runs:
            run.refuse_other()
    places = []
    for place, run in enumerate(runs):
        if run.finished:  # a kill in the last moment may have left checkpoints
            shutil.rmtree(RunFolder(run.folder).checkpoints, ignore_errors=True)
        else:
            places.append(place)
    return places


def _refuse_unequal(runs: Sequence[Run]) -> None:
    """Runs side by side must read the same batches, and write into different folders."""
    shared: dict[str, list[Any]] = {
        "hook_name": [run.config.hook_name for run in runs],
        "hook_out": [run.config.hook_out for run in runs],
        "passes": [run.config.passes for run in runs],
        "batch_tokens": [run.config.resolved_batch_tokens() for run in runs],
        "number of steps": [run.config.n_steps() for run in runs],
        "order_seed": [run.config.order_seed for run in runs],
        "buffer_tokens": [run.config.buffer_tokens for run in runs],
    }
    for name, values in shared.items():
        if len(set(values)) > 1:
            raise InputError(
                f"Runs side by side must have the same {name}, and these have"
                f" {', '.join(map(str, dict.fromkeys(values)))}: train them one after the other."
            )
    folders = [run.folder.absolute() for run in runs]
    if len(set(folders)) < len(folders):
        raise InputError("Two runs side by side have the same folder: give each its own.")


def _train(
    trainings: list["_Training"], batches: Batches, scaling: Scaling, progress: Progress, mesh: Mesh
) -> None:
    first = min(trainings, key=lambda training: training.trainer.steps_done)
    done, n_steps = first.trainer.steps_done, first.trainer.n_steps
    tokens = first.run.config.tokens_read()
    if first.stream is not None:
        batches.load_state_dict(first.stream)
    diverged: list[Diverged] = []
    keep_freed_memory()
    with Interruptions(mesh) as signals, progress("train", total=tokens, unit="tokens") as advance:
        advance(first.trainer.tokens_done)
        try:
            for batch in itertools.islice(batches, n_steps - done):
                with signals.held():
                    diverged += _step(trainings, done, batch, scaling, batches, mesh)
                    done += 1
                advance(len(batch) * mesh.size)
                if not trainings:
                    break
        except KeyboardInterrupt:
            for training in trainings:
                with suppress(Diverged):  # its checkpoints stay as they are, and the others are saved
                    training.save(batches)
            raise
    if trainings and done < n_steps:
        raise InputError(
            f"The activations ended after {trainings[0].trainer.tokens_done:,} of {tokens:,} training tokens."
        )
    for training in trainings:
        try:
            training.finish()
        except Diverged as error:
            diverged.append(error)
    if diverged:
        raise Diverged.of_all(diverged)


def _step(
    trainings: list["_Training"], done: int, batch: Tensor, scaling: Scaling, batches: Batches, mesh: Mesh
) -> list[Diverged]:
    """One step of every training that stands at this batch; those that diverge are taken out of the list."""
    x, y = scaling.apply(mesh.of_all_shards(batch.to(scaling.mean.device)))
    power = mesh.mean_over_data(torch.linalg.vector_norm(y).square() / len(y))
    diverged = []
    for training in list(trainings):
        if training.trainer.steps_done == done:
            try:
                training.step(x, y, power, batches)
            except Diverged as error:
                trainings.remove(training)
                diverged.append(error)
    return diverged


class _Training:
    """A run on its way, taken up where it was left.

    Attributes:
        stream: where the activations stood at the checkpoint that it goes on from; None at the beginning.
    """

    def __init__(
        self, run: Run, scaling: Scaling, held_out: Tensor | None, watch: Watch | None, mesh: Mesh
    ) -> None:
        self.run = run
        self.folder = RunFolder(run.folder)
        self.trainer = Trainer(run.config, scaling, mesh)
        self.stream: dict[str, Any] | None = None
        self._mesh, self._writes = mesh, mesh.rank == 0
        self._held_out = held_out if self._writes else None
        self._measures = mesh.agreed(held_out is not None)
        checkpoint = newest_checkpoint(self.folder.checkpoints, run.made_from, mesh)
        if checkpoint is not None:
            self.trainer.load_state(checkpoint.tensors, checkpoint.plain["trainer"])
            self.stream = checkpoint.stream
        elif self._writes and self.folder.checkpoints.is_dir():
            shutil.rmtree(self.folder.checkpoints)
        self._saved = self.trainer.steps_done
        sinks = []
        if self._writes:
            sinks = open_sinks(run.config.log_to, run.folder, run.config, self.trainer.tokens_done)
        if self._writes and watch is not None:
            sinks.append(lambda line: watch(run, line))
        self.log = MetricsLog(self.folder, self.trainer.tokens_done, sinks, writes=self._writes)
        if checkpoint is not None:
            self.log.load_state(checkpoint.tensors, checkpoint.plain["log"], self.trainer.device)
        self._log_every = max(self.trainer.n_steps // LOG_LINES, 1)
        self._checkpoint_every = self._log_every * CHECKPOINT_EVERY_LINES
        if run.config.checkpoint_every is not None:
            self._checkpoint_every = max(run.config.checkpoint_every // run.config.resolved_batch_tokens(), 1)

    def step(self, x: Tensor, y: Tensor, power: Tensor, batches: Batches) -> None:
        """One step, with the line and the checkpoint that are due after it.

        Raises:
            Diverged: see :meth:`sae.log.MetricsLog.flush`; the checkpoints stay as they are.
        """
        trainer = self.trainer
        last = trainer.steps_done + 1 == trainer.n_steps
        line, within = divmod(trainer.steps_done + 1, self._log_every)
        log = last or within == 0
        self.log.add(trainer.step(x, y, measure=log), power, len(x) * self._mesh.n_data)
        if log:
            held_out = last or line % HELD_OUT_EVERY_LINES == 0
            self.log.close_line(trainer, self._measure_held_out() if held_out else {})
        if trainer.steps_done % self._checkpoint_every == 0 and not last:
            self.save(batches)

    def _measure_held_out(self) -> dict[str, float]:
        if not self._measures or not (self._writes or self._mesh.n_shards > 1):
            return {}
        sae = self.trainer.folded({})  # to which all shards contribute
        return {} if self._held_out is None else held_out_metrics(sae, self._held_out)

    def save(self, batches: Batches) -> None:
        """Write a checkpoint of this moment, unless it is there or weights are not finite."""
        if self.trainer.steps_done == self._saved:
            return
        log_tensors, log_plain = self.log.state()
        tensors, plain = self.trainer.state()
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        if self._mesh.most(not finite):
            return  # the next line of the log says so
        checkpoint = Checkpoint(
            tensors | log_tensors, {"trainer": plain, "log": log_plain}, batches.state_dict()
        )
        write_checkpoint(
            self.folder.checkpoints, self.trainer.tokens_done, checkpoint, self.run.made_from, self._mesh
        )
        self._saved = self.trainer.steps_done

    def finish(self) -> None:
        """Write the SAE, by process 0; its manifest comes last.

        Raises:
            Diverged: in the last line.
        """
        self.log.flush()
        trainer = self.trainer
        facts = {
            "training_tokens": trainer.tokens_done,
            "dead": int(trainer.dead.mask().sum()),
            "dead_window_tokens": trainer.dead.window,
        }
        said = self.run.config.sae
        trained = (
            {"training_architecture": said.architecture, "k": said.k}
            if said.architecture in THRESHOLDED
            else {}
        )
        sae = trainer.folded({**self.run.metadata, **facts, **trained})
        if not self._writes:
            return
        sae.save(self.folder.sae)
        write_manifest(self.folder.sae, "sae", self.run.made_from, sae_hash=sae.hash, **facts)
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
