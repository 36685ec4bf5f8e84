"""One SAE in training: its weights, its optimiser, and the step that advances them.

Inputs are centred and scaled (:mod:`sae.scaling`), counters are in tokens and schedules are fractions of the run.
Decoder rows of architectures with ``unit_decoder`` stay at norm 1: the gradient's component along each row is
removed before the optimiser's step, and rows are rescaled after it (Bricken et al. 2023).
"""

from typing import Any

import torch
from torch import Tensor

from sae.architectures.base import Loss, Moment, Weights
from sae.architectures.registry import architecture_from
from sae.config import TrainConfig
from sae.dead import DeadFeatures
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.schedule import rate_factor
from sae.sparse import row_dots

DEAD_WINDOW_TOKENS = 10_000_000  # at most; 20% of shorter runs


class Trainer:
    """The state of one training run and the step that advances it. Nothing in a step waits for the device.

    Args:
        config: what to train; ``config.check()`` must pass.
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
        window = min(DEAD_WINDOW_TOKENS, max(config.tokens_read() // 5, 1))
        self.dead = DeadFeatures(config.sae.d_sae, window, self.n_steps, self.device)

    def step(self, x: Tensor, y: Tensor) -> Loss:
        """One optimiser step on a batch as :meth:`sae.scaling.Scaling.apply` gave it; leaves x and y as they are.

        Args:
            x: ``[n, d_in]``. y: ``[n, d_out]``, x itself for an SAE.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.steps_done)
        moment = Moment(
            self.steps_done / self.n_steps, self.dead.at(self.steps_done), self.architecture_state
        )
        loss = self.architecture.loss(self.weights, x, y, moment)
        loss.total.backward()
        with torch.no_grad():
            decoder = self.weights.W_dec
            if self.architecture.unit_decoder and decoder.grad is not None:
                _remove_radial(decoder.grad, decoder)
            self.optimizer.step()
            if self.architecture.unit_decoder:
                _normalise(decoder)
            self.dead.update(loss.fired, len(x))
        self.optimizer.zero_grad(set_to_none=True)
        self.architecture_state = loss.state
        self.steps_done += 1
        self.tokens_done += len(x)
        return loss

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step; 0 is the first."""
        return self.learning_rate * rate_factor(step, self.n_steps, self.config.warmup, self.config.decay)

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
        tensors |= {f"dead.{k}": v for k, v in self.dead.state().items()}
        return tensors, {"steps_done": self.steps_done, "tokens_done": self.tokens_done}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` gave."""
        with torch.no_grad():
            for name, parameter in self.weights.tensors().items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True)
                    for key, value in _below(tensors, f"adam.{name}.").items()
                }
        self.architecture_state = {
            key: value.to(self.device, copy=True) for key, value in _below(tensors, "architecture.").items()
        }
        self.dead.load_state(_below(tensors, "dead."))
        self.steps_done, self.tokens_done = plain["steps_done"], plain["tokens_done"]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, by the rest of their name."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


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
