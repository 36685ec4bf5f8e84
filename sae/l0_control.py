"""Reach a chosen L0 and hold it.

The measurement is ``u = log(L0 of the batch / target)``: L0 answers to a penalty's weight, and to a threshold, by
something like a power law. What a controller carries from step to step is a few scalars, part of the checkpoint.

:class:`WeightControl` (relu, gated) moves the sparsity weight λ, proportionally to u and to its integral over
time. Time is the fraction of the run that has passed: how fast weights answer depends on the learning rate, which
is chosen from the length of the run.

:class:`ThresholdControl` (jumprelu) has a faster lever: it adds one number s to the logarithms of all thresholds,
on which L0 depends at once, and moves log λ along with it, more slowly. If λ is too small, gradients lower the
thresholds, s rises against them, and λ rises with s until they stay where they are: then λ is the price at which
the target is best.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Moment
from sae.config import SAEConfig
from sae.mesh import mesh_in_force

_PROPORTIONAL, _INTEGRAL = 1.0, 20.0
_MEMORY = 0.9  # of the measurement, from batch to batch
_SHIFT_GAIN, _WEIGHT_GAIN = (
    0.3,
    0.06,
)  # per step; L0 falls about as s rises, so a third of an error goes in a step
_LARGEST_ERROR = 1.0  # of u that one step heeds
_SMALLEST_WEIGHT = 1e-6  # from which a controller can still rise


@dataclass(frozen=True)
class Control(ABC):
    """λ from batch to batch; without a ``target_l0`` it only warms up from 0, and there is no state.

    Class attributes:
        warmup: fraction of the run over which λ rises.
    """

    config: SAEConfig
    warmup: ClassVar[float]

    def initial_state(self) -> dict[str, Tensor]:
        """Scalars, before the first batch: ``log_weight``, the logarithm of λ."""
        return {} if self.config.target_l0 is None else {"log_weight": torch.tensor(self._first())}

    def _first(self) -> float:
        return math.log(max(self.config.resolved_sparsity_weight(), _SMALLEST_WEIGHT))

    def sparsity_weight(self, moment: Moment) -> Tensor | float:
        """λ for a batch at this moment."""
        if self.config.target_l0 is None:
            return self.config.resolved_sparsity_weight() * min(moment.done / self.warmup, 1.0)
        return self._controlled(moment)

    def next_state(self, moment: Moment, l0: Tensor) -> dict[str, Tensor]:
        """The state after a batch with this L0 (scalar, this process's); the rest of ``moment.state`` stays in it."""
        if self.config.target_l0 is None:
            return moment.state
        most = math.exp(_LARGEST_ERROR)
        mesh = mesh_in_force()
        l0 = mesh.mean_over_data(mesh.sum_over_features(l0))
        off = (l0 / self.config.target_l0).clamp(1 / most, most).log()
        return moment.state | self._answer(moment, off)

    @abstractmethod
    def _controlled(self, moment: Moment) -> Tensor: ...

    @abstractmethod
    def _answer(self, moment: Moment, off: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class WeightControl(Control):
    """Moves λ; ``log_weight`` is the integral part of its logarithm, ``off`` the smoothed u, ``done`` when that was."""

    warmup: ClassVar[float] = 0.05

    def initial_state(self) -> dict[str, Tensor]:
        """See the class."""
        state = super().initial_state()
        return state | {"off": torch.zeros(()), "done": torch.zeros(())} if state else state

    def _controlled(self, moment: Moment) -> Tensor:
        weight = (moment.state["log_weight"] + _PROPORTIONAL * moment.state["off"]).exp()
        return weight * min(moment.done / self.warmup, 1.0)

    def _answer(self, moment: Moment, off: Tensor) -> dict[str, Tensor]:
        state = moment.state
        off = torch.lerp(off, state["off"], _MEMORY)
        return {
            "log_weight": state["log_weight"] + _INTEGRAL * (moment.done - state["done"]) * off,
            "off": off,
            "done": torch.full_like(off, moment.done),
        }


@dataclass(frozen=True)
class ThresholdControl(Control):
    """Moves a common ``shift`` of all log-thresholds, and λ after it."""

    warmup: ClassVar[float] = 1.0

    def initial_state(self) -> dict[str, Tensor]:
        """See the class."""
        state = super().initial_state()
        return state | {"shift": torch.zeros(())} if state else state

    def _controlled(self, moment: Moment) -> Tensor:
        return moment.state["log_weight"].exp()

    def _answer(self, moment: Moment, off: Tensor) -> dict[str, Tensor]:
        state = moment.state
        return {
            "shift": state["shift"] + _SHIFT_GAIN * off,
            "log_weight": state["log_weight"] + _WEIGHT_GAIN * off,
        }
