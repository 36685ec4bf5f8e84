"""An exponential mean of the weights, corrected for its start at 0 (2406.04093, appendix A.6).

m_t = decay · m_{t−1} + (1 − decay) · w_t,    mean_t = m_t / (1 − decay^t)
"""

import torch
from torch import Tensor

from sae.architectures.base import Weights


class WeightMean:
    """The mean of the weights after each step.

    Attributes:
        sums: m_t, by name.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        self.decay = decay
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in weights.tensors().items()}

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """Take in the weights after a step."""
        for name, tensor in weights.tensors().items():
            self.sums[name].lerp_(tensor, 1 - self.decay)

    def mean(self, steps: int) -> Weights:
        """The mean after so many steps, at least one."""
        correction = 1 - self.decay**steps
        return Weights(**{name: tensor / correction for name, tensor in self.sums.items()})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up sums that were saved."""
        for name, tensor in tensors.items():
            self.sums[name].copy_(tensor)
