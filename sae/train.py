"""Train one sparse autoencoder on a stream of activations; checkpoint; resume to the same bits.

Activations are centred and scaled by one number, so that the mean of ‖x‖² is d_in, and both are folded into the
weights afterwards: nobody downstream sees them. Counters are in tokens and schedules are fractions of the run.
Decoder rows of architectures with ``unit_decoder`` stay at norm 1: the gradient's component along each row is
removed before the optimiser's step, and rows are rescaled after it (Bricken et al. 2023).
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from activations.errors import InputError
from activations.files import is_finished, read_manifest, write_bytes, write_manifest
from activations.progress import Progress, silent
from sae.architectures.base import Loss, Moment, Weights
from sae.architectures.registry import architecture_from
from sae.config import TrainConfig
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.sparse import row_dots

DEAD_WINDOW_TOKENS = 10_000_000  # at most; 20% of shorter runs
LOG_LINES = 100
CHECKPOINT_EVERY_LINES = 10  # so that a checkpoint never falls between two lines of the log
_STATE = "state.safetensors"


class Batches(Protocol):
    """What training reads: batches ``[n, d_in]`` of raw activations, and where it stands."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """The state of one training run and the step that advances it.

    Args:
        config: what to train; ``config.sae.check()`` must pass.
        scaling: of what is read and written; says the widths and the device.
    """

    def __init__(self, config: TrainConfig, scaling: Scaling) -> None:
        _keep_freed_memory()
        self.config, self.scaling = config, scaling
        self.device = scaling.mean.device
        self.architecture = architecture_from(config.sae)
        generator = torch.Generator().manual_seed(config.seed)
        initial = self.architecture.initial_weights(scaling.d_in, scaling.d_out, generator).tensors()
        self.weights = Weights(**{k: v.to(self.device).requires_grad_() for k, v in initial.items()})
        self.architecture_state = {k: v.to(self.device) for k, v in self.architecture.initial_state().items()}
        self.learning_rate = config.resolved_learning_rate()
        self.optimizer = torch.optim.Adam(self.weights.tensors().values(), lr=self.learning_rate, fused=True)
        self.n_steps = config.n_steps()
        self.steps_done = 0
        self.tokens_done = 0
        self.silent_tokens = torch.zeros(config.sae.d_sae, dtype=torch.int64, device=self.device)
        self.dead_window = min(DEAD_WINDOW_TOKENS, max(config.tokens_read() // 5, 1))

    def step(self, x: Tensor, y: Tensor) -> tuple[Loss, Tensor]:
        """One optimiser step on a batch as :meth:`sae.scaling.Scaling.apply` gave it; leaves x and y as they are.

        Args:
            x: ``[n, d_in]``. y: ``[n, d_out]``, x itself for an SAE.

        Returns:
            the loss, and the mean squared norm of y (what the mse is compared with).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._schedule()
        dead = (self.silent_tokens > self.dead_window).nonzero().flatten()
        moment = Moment(self.steps_done / self.n_steps, dead, self.architecture_state)
        loss = self.architecture.loss(self.weights, x, y, moment)
        loss.total.backward()
        with torch.no_grad():
            decoder = self.weights.W_dec
            if self.architecture.unit_decoder and decoder.grad is not None:
                _remove_radial(decoder.grad, decoder)
            self.optimizer.step()
            if self.architecture.unit_decoder:
                _normalise(decoder)
            self.silent_tokens += len(x)
            self.silent_tokens[loss.fired] = 0
        self.optimizer.zero_grad(set_to_none=True)
        self.architecture_state = loss.state
        self.steps_done += 1
        self.tokens_done += len(x)
        return loss, torch.linalg.vector_norm(y).square() / len(y)

    def _schedule(self) -> float:
        """Linear warm-up, constant, linear decay to 0, as a factor on the learning rate."""
        done = (self.steps_done + 1) / self.n_steps
        rise = done / self.config.warmup if self.config.warmup else 1.0
        fall = (1 - done + 1 / self.n_steps) / self.config.decay if self.config.decay else 1.0
        return min(rise, fall, 1.0)

    def folded(self, metadata: dict[str, Any]) -> SparseAutoencoder:
        """The SAE as it stands, for inference, in the units of the model's activations."""
        config, weights = self.architecture.finished(self.weights, self.architecture_state)
        return SparseAutoencoder(config, self.scaling.folded(weights), metadata)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and plain values."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.weights.tensors().items()}
        for name, parameter in self.weights.tensors().items():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state[parameter].items()}
        tensors |= {f"architecture.{k}": v for k, v in self.architecture_state.items()}
        tensors["silent_tokens"] = self.silent_tokens
        return tensors, {"steps_done": self.steps_done, "tokens_done": self.tokens_done}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` gave."""
        with torch.no_grad():
            for name, parameter in self.weights.tensors().items():
                parameter.copy_(tensors[f"weights.{name}"])
                prefix = f"adam.{name}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): value.to(parameter.device, copy=True)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
            for name, value in self.architecture_state.items():
                value.copy_(tensors[f"architecture.{name}"])
            self.silent_tokens.copy_(tensors["silent_tokens"])
        self.steps_done, self.tokens_done = plain["steps_done"], plain["tokens_done"]


def _remove_radial(gradient: Tensor, rows: Tensor) -> None:
    """Take out of each row of ``gradient [d_sae, d_in]`` its component along the unit vector in the same row."""
    gradient.addcmul_(rows, row_dots(gradient, rows)[:, None], value=-1)


def _normalise(rows: Tensor) -> None:
    """Give each row norm 1, in place."""
    rows.div_(row_dots(rows, rows).sqrt_().clamp_min_(1e-8)[:, None])


def _keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees for the next step.

    glibc returns large freed blocks to the system, and every step would fault its gradients in again page by page
    (5% of its time). Freeing a block just below 32 MiB moves that threshold to its upper limit (mallopt(3),
    M_MMAP_THRESHOLD); with other C libraries nothing changes.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


def train(
    config: TrainConfig,
    batches: Batches,
    scaling: Scaling,
    folder: Path,
    *,
    metadata: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> SparseAutoencoder:
    """Train, writing ``metrics.jsonl``, ``checkpoints/`` and at the end ``sae/`` into a run folder.

    A finished ``sae/`` whose manifest matches ``inputs`` is loaded instead; an unfinished run with a matching
    checkpoint goes on from it, to the same bits.

    Args:
        config: what to train. batches: the activations. scaling: the units to train in.
        folder: the run folder. metadata: goes into the SAE's cfg.json.
        inputs: hashes and settings that the result depends on, besides ``config``.

    Raises:
        InputError: settings that cannot work, or activations that end too early.
    """
    config.check()
    config.sae.check()
    inputs = {"config": asdict(config), **(inputs or {})}
    metadata = metadata or {}
    if is_finished(folder / "sae", "sae", inputs):
        return SparseAutoencoder.load(folder / "sae")
    trainer = Trainer(config, scaling)
    _resume(trainer, batches, folder, inputs)
    log = _Log(folder / "metrics.jsonl", trainer.tokens_done)
    log_every = max(trainer.n_steps // LOG_LINES, 1)
    checkpoint_every = log_every * CHECKPOINT_EVERY_LINES
    remaining = trainer.n_steps - trainer.steps_done
    with progress("train", total=config.tokens_read(), unit="tokens") as advance:
        advance(trainer.tokens_done)
        for batch in itertools.islice(batches, remaining):
            log.add(*trainer.step(*scaling.apply(batch)), n=len(batch))
            advance(len(batch))
            last = trainer.steps_done == trainer.n_steps
            if last or trainer.steps_done % log_every == 0:
                log.write(trainer)
            if not last and trainer.steps_done % checkpoint_every == 0:
                _write_checkpoint(trainer, batches, folder, inputs)
    if trainer.steps_done < trainer.n_steps:
        raise InputError(
            f"The activations ended after {trainer.tokens_done:,} of {config.tokens_read():,} training tokens."
        )
    dead = int((trainer.silent_tokens > trainer.dead_window).sum())
    facts = {"training_tokens": trainer.tokens_done, "dead": dead, "dead_window_tokens": trainer.dead_window}
    sae = trainer.folded({**metadata, **facts})
    sae.save(folder / "sae")
    write_manifest(folder / "sae", "sae", inputs, sae_hash=sae.hash, **facts)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return sae


class _Log:
    """``metrics.jsonl``: means over the steps since the last line, summed on the device and read only when written."""

    def __init__(self, path: Path, tokens_done: int) -> None:
        self.path = path
        kept = []
        if path.exists() and tokens_done:
            # A line that a full disk cut short has no end.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line.rstrip("\n") for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["tokens"] <= tokens_done]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.n = 0

    def add(self, loss: Loss, power: Tensor, n: int) -> None:
        terms = {**loss.terms, "power": power, "entries": loss.entries / n}
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * n
        self.n += n

    def write(self, trainer: Trainer) -> None:
        means = {name: float(total) / self.n for name, total in self.sums.items()}
        power, l0 = means.pop("power"), means.pop("entries")
        line = {
            "tokens": trainer.tokens_done,
            "explained_variance": 1 - means["mse"] / power,
            "l0": l0,
            **means,
            "dead": int((trainer.silent_tokens > trainer.dead_window).sum()),
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()


def _write_checkpoint(trainer: Trainer, batches: Batches, folder: Path, inputs: dict[str, Any]) -> None:
    tensors, plain = trainer.state()
    target = folder / "checkpoints" / f"{trainer.tokens_done:012d}"
    write_bytes(target / _STATE, save({k: v.contiguous() for k, v in tensors.items()}))
    write_manifest(target, "checkpoint", inputs, trainer=plain, stream=batches.state_dict())
    for old in sorted(target.parent.iterdir())[:-2]:
        shutil.rmtree(old)


def _resume(trainer: Trainer, batches: Batches, folder: Path, inputs: dict[str, Any]) -> None:
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return
    for path in sorted(checkpoints.iterdir(), reverse=True):
        if is_finished(path, "checkpoint", inputs):
            manifest = read_manifest(path, "checkpoint")
            try:
                tensors = load_file(path / _STATE)
            except (OSError, SafetensorError):
                continue  # the one before it will do
            trainer.load_state(tensors, manifest["trainer"])
            batches.load_state_dict(manifest["stream"])
            return
    shutil.rmtree(checkpoints)
