"""Train one or many SAEs on one stream of activations; checkpoint; resume to the same bits.

Runs that are trained side by side share the stream and what depends on the activations alone; each has its own
weights, optimiser, schedule and folder, and ends in the bits in which it ends when trained alone.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import is_finished, write_manifest
from activations.progress import Progress, silent
from sae.checkpoint import Checkpoint, newest_checkpoint, write_checkpoint
from sae.config import TrainConfig
from sae.log import MetricsLog
from sae.model import SparseAutoencoder
from sae.run import RunFolder
from sae.scaling import Scaling
from sae.trainer import Trainer

LOG_LINES = 100
CHECKPOINT_EVERY_LINES = 10


class Batches(Protocol):
    """What training reads: batches ``[n, d_in]`` of raw activations, and where it stands."""

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
        return {"config": asdict(self.config), **self.inputs}

    @property
    def finished(self) -> bool:
        """Whether the folder holds the SAE that this run would make."""
        return is_finished(RunFolder(self.folder).sae, "sae", self.made_from)


def train(run: Run, batches: Batches, scaling: Scaling, *, progress: Progress = silent) -> SparseAutoencoder:
    """Train one SAE: :func:`train_side_by_side` with one run."""
    return train_side_by_side([run], batches, scaling, progress=progress)[0]


def train_side_by_side(
    runs: Sequence[Run], batches: Batches, scaling: Scaling, *, progress: Progress = silent
) -> list[SparseAutoencoder]:
    """Train SAEs on one stream, each writing ``metrics.jsonl``, ``checkpoints/`` and at the end ``sae/``.

    A run whose ``sae/`` is finished is skipped. One that was interrupted goes on from its newest checkpoint, to the
    same bits: the stream begins where the run stands that has come least far, and the others join when it reaches
    them.

    Args:
        runs: they must have the same hooks, batch size, number of steps and order of activations.
        batches: the activations. scaling: the units to train in.

    Returns:
        the SAEs in the order of the runs, on the device of ``scaling``.

    Raises:
        InputError: settings that cannot work, runs that do not go together, or activations that end too early.
    """
    for run in runs:
        run.config.check()
        run.config.sae.check()
    _refuse_unequal(runs)
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        _train(unfinished, batches, scaling, progress)
    return [SparseAutoencoder.load(RunFolder(run.folder).sae).to(scaling.mean.device) for run in runs]


def _refuse_unequal(runs: Sequence[Run]) -> None:
    """Runs side by side must read the same batches, and write into different folders."""
    shared: dict[str, list[Any]] = {
        "hook_name": [run.config.hook_name for run in runs],
        "hook_out": [run.config.hook_out for run in runs],
        "batch_tokens": [run.config.resolved_batch_tokens() for run in runs],
        "number of steps": [run.config.n_steps() for run in runs],
        "order_seed": [run.config.order_seed for run in runs],
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


def _train(runs: Sequence[Run], batches: Batches, scaling: Scaling, progress: Progress) -> None:
    trainings = [_Training(run, scaling) for run in runs]
    first = min(trainings, key=lambda training: training.trainer.steps_done)
    done, n_steps = first.trainer.steps_done, first.trainer.n_steps
    if first.stream is not None:
        batches.load_state_dict(first.stream)
    with progress("train", total=runs[0].config.tokens_read(), unit="tokens") as advance:
        advance(first.trainer.tokens_done)
        for batch in itertools.islice(batches, n_steps - done):
            x, y = scaling.apply(batch)
            power = torch.linalg.vector_norm(y).square() / len(y)
            for training in trainings:
                if training.trainer.steps_done == done:
                    training.step(x, y, power, batches)
            done += 1
            advance(len(batch))
    if done < n_steps:
        raise InputError(
            f"The activations ended after {first.trainer.tokens_done:,} of {runs[0].config.tokens_read():,} training"
            " tokens."
        )
    for training in trainings:
        training.finish()


class _Training:
    """A run on its way, taken up where it was left.

    Attributes:
        stream: where the activations stood at the checkpoint that it goes on from; None at the beginning.
    """

    def __init__(self, run: Run, scaling: Scaling) -> None:
        self.run = run
        self.folder = RunFolder(run.folder)
        self.trainer = Trainer(run.config, scaling)
        self.stream: dict[str, Any] | None = None
        checkpoint = newest_checkpoint(self.folder.checkpoints, run.made_from)
        if checkpoint is not None:
            self.trainer.load_state(checkpoint.tensors, checkpoint.plain["trainer"])
            self.stream = checkpoint.stream
        elif self.folder.checkpoints.is_dir():
            shutil.rmtree(self.folder.checkpoints)
        self.log = MetricsLog(self.folder.metrics, self.trainer.tokens_done)
        if checkpoint is not None:
            self.log.load_state(checkpoint.tensors, checkpoint.plain["log"], self.trainer.device)
        self._log_every = max(self.trainer.n_steps // LOG_LINES, 1)
        self._checkpoint_every = self._log_every * CHECKPOINT_EVERY_LINES

    def step(self, x: Tensor, y: Tensor, power: Tensor, batches: Batches) -> None:
        """One step, with the line and the checkpoint that are due after it."""
        self.log.add(self.trainer.step(x, y), power, len(x))
        done, n_steps = self.trainer.steps_done, self.trainer.n_steps
        if done == n_steps or done % self._log_every == 0:
            self.log.close_line(self.trainer)
        if done < n_steps and done % self._checkpoint_every == 0:
            self.save(batches)

    def save(self, batches: Batches) -> None:
        """Write a checkpoint of this moment."""
        tensors, plain = self.trainer.state()
        log_tensors, log_plain = self.log.state()
        checkpoint = Checkpoint(
            tensors | log_tensors, {"trainer": plain, "log": log_plain}, batches.state_dict()
        )
        write_checkpoint(self.folder.checkpoints, self.trainer.tokens_done, checkpoint, self.run.made_from)

    def finish(self) -> None:
        """Write the SAE; its manifest comes last."""
        self.log.flush()
        trainer = self.trainer
        facts = {
            "training_tokens": trainer.tokens_done,
            "dead": int(trainer.dead.mask().sum()),
            "dead_window_tokens": trainer.dead.window,
        }
        sae = trainer.folded({**self.run.metadata, **facts})
        sae.save(self.folder.sae)
        write_manifest(self.folder.sae, "sae", self.run.made_from, sae_hash=sae.hash, **facts)
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
