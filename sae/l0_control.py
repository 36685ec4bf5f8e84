"""Reach a chosen L0 and hold it.

The measurement is ``u = log(L0 of the batch / target)``. It moves two levers, and what a controller carries from step
to step is small and part of the checkpoint:

* a *shift* of what decides on firing, on which L0 depends at once. It is part of the finished SAE;
* the sparsity weight λ, more slowly. If λ is too small, gradients make features fire more, the shift works against
  them, and λ rises until they stay where they are: then λ is the price at which the target is best.

λ alone would not do: weights answer to it late, and features that an overshoot silences never fire again.

:class:`ThresholdControl` (jumprelu) shifts the logarithms of all thresholds. :class:`BiasControl` (relu, gated) shifts
(gate) biases, in steps measured by the mean excess m above 0 of what fires: where excesses are distributed
exponentially, lowering a bias by m divides L0 by e.
"""

import math
from abc import ABC
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Moment, Weights
from sae.config import SAEConfig
from sae.mesh import mesh_in_force

_SHIFT_GAIN = 0.3  # per step: L0 falls about as the shift says, so a third of an error goes in a step
_LARGEST_ERROR = 1.0  # of u that one step heeds
_SMALLEST_WEIGHT = 1e-6  # from which a controller can still rise
_DESCENT = 0.1  # of the run, over which a BiasControl's L0 falls to the target
_FIRST_SHARE = 1 / 16  # of all features, that fire at its beginning
_SILENT_FOR = 0.02  # of the run: a feature silent for longer is raised
_RISE = 50.0  # times m, in a whole run


def firing_quantile(l0: float, d_sae: int) -> float:
    """What a standard normal number exceeds with probability ``l0 / d_sae``; never below 0."""
    return NormalDist().inv_cdf(1 - min(l0 / d_sae, 0.5))


@dataclass(frozen=True)
class Control(ABC):
    """λ from batch to batch; without a ``target_l0`` it only warms up from 0, and there is no state.

    Class attributes:
        warmup: fraction of the run over which λ rises. weight_gain: per step, of log λ.
    """

    config: SAEConfig
    warmup: ClassVar[float]
    weight_gain: ClassVar[float]

    def initial_state(self) -> dict[str, Tensor]:
        """Before the first batch: the scalar ``log_weight``, the logarithm of λ, and ``shift``."""
        if self.config.target_l0 is None:
            return {}
        first = max(self.config.resolved_sparsity_weight(), _SMALLEST_WEIGHT)
        return {"log_weight": torch.tensor(math.log(first)), "shift": torch.zeros(())}

    def sparsity_weight(self, moment: Moment) -> Tensor | float:
        """λ for a batch at this moment."""
        if self.config.target_l0 is None:
            return self.config.resolved_sparsity_weight() * min(moment.done / self.warmup, 1.0)
        return moment.state["log_weight"].exp()


@dataclass(frozen=True)
class ThresholdControl(Control):
    """The ``shift`` is one number for all log-thresholds."""

    warmup: ClassVar[float] = 1.0
    weight_gain: ClassVar[float] = 0.06

    def next_state(self, moment: Moment, l0: Tensor) -> dict[str, Tensor]:
        """The state after a batch with this L0 (scalar, of this process's part); the rest of ``moment.state`` stays."""
        if self.config.target_l0 is None:
            return moment.state
        mesh, state = mesh_in_force(), moment.state
        off = _off(mesh.mean_over_data(mesh.sum_over_features(l0)), self.config.target_l0)
        return state | {
            "shift": state["shift"] + _SHIFT_GAIN * off,
            "log_weight": state["log_weight"] + self.weight_gain * off,
        }


@dataclass(frozen=True)
class BiasControl(Control):
    """The ``shift [d_sae]`` is added to biases: one movement for all, but features long silent rise until they fire.

    A run starts with a sixteenth of all features firing (or the target, if that is more), and L0 follows a line to the
    target that is straight in its logarithm: features need time to find what they are for. Meanwhile λ may fall, not
    rise. ``last_fired [d_sae]`` says when each feature fired last, ``done`` when the last batch was, both as fractions
    of the run; ``excess`` is m.
    """

    warmup: ClassVar[float] = 0.05
    weight_gain: ClassVar[float] = 0.3

    def initial_state(self) -> dict[str, Tensor]:
        """See the class."""
        state, d_sae = super().initial_state(), self.config.d_sae
        own = {
            "shift": torch.zeros(d_sae),
            "last_fired": torch.zeros(d_sae),
            "done": torch.zeros(()),
            "excess": torch.zeros(()),
        }
        return state | own if state else state

    def first_quantile(self) -> float | None:
        """How far above 0, in standard deviations, pre-activations have to begin to fire; None without a target."""
        return (
            None if self.config.target_l0 is None else firing_quantile(self._target(0.0), self.config.d_sae)
        )

    def shifted(self, weights: Weights, state: dict[str, Tensor]) -> Weights:
        """The weights with the shift in ``b_enc``; its gradient is that of theirs."""
        if self.config.target_l0 is None:
            return weights
        return replace(weights, b_enc=weights.b_enc + mesh_in_force().own(state["shift"]))

    def next_state(self, moment: Moment, n: int, firings: Tensor, excess: Tensor) -> dict[str, Tensor]:
        """The state after a batch; the rest of ``moment.state`` stays.

        Args:
            n: rows of the batch. firings, excess: how often each feature fired and the sum of its pre-activations
                above 0, ``[d_sae]``; all of this process's part.
        """
        if self.config.target_l0 is None:
            return moment.state
        mesh, state = mesh_in_force(), moment.state
        own = torch.stack([firings.sum().to(excess.dtype), excess.sum()]) / n
        l0, total = mesh.mean_over_data(mesh.sum_over_features(own))
        off = _off(l0, self._target(moment.done))
        mean = torch.where(l0 > 0, total / l0, state["excess"])
        last_fired = torch.where(mesh.any_feature(firings > 0), moment.done, state["last_fired"])
        silent = moment.done - last_fired > _SILENT_FOR
        rise = silent * (_RISE * (moment.done - state["done"]))
        by_weight = off if moment.done > _DESCENT else off.clamp_max(0)
        return state | {
            "log_weight": state["log_weight"] + self.weight_gain * by_weight,
            "shift": state["shift"] + mean * (rise - _SHIFT_GAIN * off),
            "last_fired": last_fired,
            "done": torch.full_like(off, moment.done),
            "excess": mean,
        }

    def _target(self, done: float) -> float:
        assert self.config.target_l0 is not None
        target = self.config.target_l0
        first = max(target, _FIRST_SHARE * self.config.d_sae)
        return float(target * (first / target) ** max(1 - done / _DESCENT, 0.0))


def _off(l0: Tensor, target: float) -> Tensor:
    """u, bounded."""
    most = math.exp(_LARGEST_ERROR)
    return (l0 / target).clamp(1 / most, most).log()
