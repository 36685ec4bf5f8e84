"""One SAE in training: its weights, its optimiser, and the step that advances them.

Inputs are centred and scaled (:mod:`sae.scaling`), counters are in tokens and schedules are fractions of the run.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from activations.errors import InputError
from sae.architectures.base import REPLICATED, Loss, Moment, Weights
from sae.architectures.registry import architecture_from
from sae.config import TrainConfig
from sae.constraints import Constraints
from sae.dead import DeadFeatures
from sae.ema import WeightMean
from sae.kernels.choice import using
from sae.median import geometric_median
from sae.mesh import ALONE, Mesh, spread_over
from sae.model import SparseAutoencoder
from sae.optimizer import make_optimizer
from sae.resample import resample
from sae.scaling import Scaling
from sae.schedule import rate_factor
from sae.sparse import decode

DEAD_WINDOW_TOKENS = 10_000_000  # at most; 20% of shorter runs


class Trainer:
    """The state of one training run and the step that advances it.

    Nothing in a step waits for the device, but for the few that resample dead features.

    Args:
        config: what to train; ``config.check()`` must pass.
        scaling: of what is read and written; says the widths and the device.
        mesh: the processes that train this SAE together; each has its shard of the weights and its part of every batch.

    Attributes:
        gradient_norm: of the last step that was asked to measure it (all weights, before clipping), on the device; with
            Triton's optimiser, the decoder's radial part still belongs to it.
    """

    def __init__(self, config: TrainConfig, scaling: Scaling, mesh: Mesh = ALONE) -> None:
        _refuse_mesh(config, mesh)
        self.config, self.scaling, self.mesh = config, scaling, mesh
        self.device = scaling.mean.device
        self.architecture = architecture_from(config.resolved_sae())
        generator = torch.Generator().manual_seed(config.seed)
        initial = self.architecture.initial_weights(scaling.d_in, scaling.d_out, generator).tensors()
        own = {k: v if k in REPLICATED else mesh.own(v) for k, v in initial.items()}
        self.weights = Weights(**{k: v.to(self.device).requires_grad_() for k, v in own.items()})
        self.constraints = Constraints(self.architecture.unit_decoder, config.sae.aligned)
        if config.sae.aligned:
            self.constraints.enforce(self.weights)
        self.architecture_state = {k: v.to(self.device) for k, v in self.architecture.initial_state().items()}
        self.learning_rate = config.resolved_learning_rate()
        self._clip_norm = config.resolved_clip_norm()
        self.optimizer, self._around_step = self._make_optimizer()
        self.mean = WeightMean(self.weights, config.ema) if config.ema else None
        self.gradient_norm = torch.zeros((), device=self.device)
        self.n_steps = config.n_steps()
        self.steps_done = 0
        self.tokens_done = 0
        window = min(DEAD_WINDOW_TOKENS, max(config.tokens_read() // 5, 1))
        self.dead = DeadFeatures(config.sae.d_sae, window, self.n_steps, self.device, mesh)
        self._warmup, self._decay = config.resolved_warmup(), config.resolved_decay()
        self._resample_steps = _in_steps(config.resample_every, config.resolved_batch_tokens())
        # to resample with: what the weights of shape [d_sae] begin with
        self._initial = {
            name: value.to(self.device, copy=True)
            for name, value in initial.items()
            if value.shape == (config.sae.d_sae,) and self._resample_steps is not None
        }

    def _make_optimizer(self) -> tuple[Optimizer, Constraints]:
        """The optimiser, and which constraints are left to be kept around its steps."""
        config, parameters = self.config, self.weights.tensors().values()
        if config.kernels == "torch" or config.moments != "float32" or config.sae.aligned or self._clip_norm:
            return make_optimizer(parameters, self.learning_rate, config.moments), self.constraints
        from sae.kernels.adam_rows import RowAdam

        unit = self.weights.W_dec if self.constraints.unit_decoder else None
        left = Constraints(unit_decoder=False, aligned=False)
        return RowAdam(parameters, self.learning_rate, unit=unit), left

    def step(self, x: Tensor, y: Tensor, *, measure: bool = False) -> Loss:
        """One optimiser step on a batch as :meth:`sae.scaling.Scaling.apply` gave it; leaves x and y as they are.

        Args:
            x: ``[n, d_in]``. y: ``[n, d_out]``, x itself for an SAE. Each process gives its part of the batch.
            measure: take down ``gradient_norm``, which costs a pass over the gradients; the weights come out the same.
        """
        if self.steps_done == 0:
            self._begin(y)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.steps_done)
        done = self.steps_done / self.n_steps
        moment = Moment(done, self.dead.at(self.steps_done), self.architecture_state, self.dead.elsewhere)
        with using(self.config.kernels, self.config.product), spread_over(self.mesh):
            loss = self.architecture.loss(self.weights, x, y, moment)
        loss.total.backward()
        if self.mesh.size > 1:
            self._average_gradients()
            loss = self._of_all_processes(loss)
        n_tokens = len(x) * self.mesh.n_data
        self._around_step.project(self.weights)
        self._clip(measure)
        self.optimizer.step()
        self._around_step.enforce(self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.dead.update(loss.fired, n_tokens)
        self.architecture_state = loss.state
        self.steps_done += 1
        self.tokens_done += n_tokens
        if self._resample_steps and self.steps_done % self._resample_steps == 0 and done < 1 - self._decay:
            self._resample(x, y)
        if self.mean is not None:
            self.mean.update(self.weights)
        return loss

    def _begin(self, y: Tensor) -> None:
        if self.config.resolved_init_b_dec() == "geometric_median":
            with torch.no_grad():
                self.weights.b_dec.copy_(geometric_median(y, self.mesh))

    def _clip(self, measure: bool) -> None:
        if self._clip_norm or measure:
            self.gradient_norm = self._norm_of_gradients()
            if self._clip_norm:
                clip_grads_with_norm_(self.weights.tensors().values(), self._clip_norm, self.gradient_norm)

    def _norm_of_gradients(self) -> Tensor:
        found = {k: v.grad for k, v in self.weights.tensors().items() if v.grad is not None}
        if self.mesh.n_shards == 1:
            return get_total_norm(found.values())
        own = get_total_norm([grad for name, grad in found.items() if name not in REPLICATED])
        everywhere = get_total_norm([grad for name, grad in found.items() if name in REPLICATED])
        return (self.mesh.sum_over_features(own.square()) + everywhere.square()).sqrt()

    def _average_gradients(self) -> None:
        for tensor in self.weights.tensors().values():
            if tensor.grad is not None:
                tensor.grad = self.mesh.mean_over_data(tensor.grad)

    def _of_all_processes(self, loss: Loss) -> Loss:
        """A loss of this process's rows and features as that of the whole batch; without gradients."""
        numbers = torch.stack([loss.total.detach(), *loss.terms.values()])
        total, *terms = self.mesh.mean_over_data(numbers).unbind()
        return replace(
            loss,
            total=total,
            terms=dict(zip(loss.terms, terms, strict=True)),
            entries=self.mesh.sum_over_all(loss.entries),
            fired=self.mesh.any_feature(loss.fired),
        )

    @torch.no_grad()
    def _resample(self, x: Tensor, y: Tensor) -> None:
        """Start dead features anew; this waits for the device."""
        self.dead.refresh()
        if not len(self.dead.indices):
            return
        config, weights = self.architecture.finished(self.weights, self.architecture_state)
        architecture = architecture_from(config)
        reads, writes = architecture.centred(weights, x), architecture.goal(weights, x, y) - weights.b_dec
        error = (
            decode(architecture.encode(weights, x), weights.W_dec, torch.zeros_like(weights.b_dec)) - writes
        )
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.steps_done)
        resampled = resample(
            self.weights,
            self.dead.indices,
            reads,
            writes,
            error.square().sum(1),
            self._initial,
            self.optimizer,
            generator,
        )
        self.constraints.enforce(self.weights)
        self.dead.revive(resampled)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step; 0 is the first."""
        return self.learning_rate * rate_factor(step, self.n_steps, self._warmup, self._decay)

    def folded(self, metadata: dict[str, Any]) -> SparseAutoencoder:
        """The SAE as it stands, for inference, in the units of the model's activations; the mean one with ``ema``.

        Where features are sharded, all processes must ask for it, and it is gathered on the host.
        """
        weights = self.weights
        if self.mean is not None and self.steps_done:
            weights = self.mean.mean(self.steps_done)
            self.constraints.enforce(weights)
        with spread_over(self.mesh):
            config, weights = self.architecture.finished(weights, self.architecture_state)
        if self.mesh.n_shards == 1:
            return SparseAutoencoder(config, self.scaling.folded(weights), metadata)
        whole = {
            k: v if k in REPLICATED else self.mesh.of_all_shards(v) for k, v in weights.tensors().items()
        }
        gathered = Weights(**{name: tensor.cpu() for name, tensor in whole.items()})
        return SparseAutoencoder(config, self.scaling.to("cpu").folded(gathered), metadata)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and plain values."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.weights.tensors().items()}
        for name, parameter in self.weights.tensors().items():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state[parameter].items()}
        tensors |= {f"architecture.{k}": v for k, v in self.architecture_state.items()}
        tensors |= {f"dead.{k}": v for k, v in self.dead.state().items()}
        if self.mean is not None:
            tensors |= {f"mean.{k}": v for k, v in self.mean.sums.items()}
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
        if self.mean is not None:
            self.mean.load(_below(tensors, "mean."))
        self.steps_done, self.tokens_done = plain["steps_done"], plain["tokens_done"]


def _refuse_mesh(config: TrainConfig, mesh: Mesh) -> None:
    """Refuse what several processes cannot do."""
    if config.shards != mesh.n_shards:
        raise InputError(
            f"shards is {config.shards}, and features are dealt out to {mesh.n_shards}: start the processes with"
            f" torchrun --no-python --nproc-per-node {config.shards} sae train …"
        )
    if config.resolved_batch_tokens() % mesh.size:
        raise InputError(
            f"batch_tokens is {config.resolved_batch_tokens()}, and must be a multiple of the number of processes,"
            f" {mesh.size}."
        )
    if config.resample_every is not None and mesh.size > 1:
        raise InputError("resample_every is for one process: leave it out, or train without torchrun.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, by the rest of their name."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _in_steps(tokens: int | None, batch_tokens: int) -> int | None:
    return None if tokens is None else max(round(tokens / batch_tokens), 1)
