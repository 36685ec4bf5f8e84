"""Which positions an SAE does not see, and the moments of the activations at the others.

Language models keep a few positions with norms hundreds of times the usual (attention sinks: Sun et al. 2024,
"Massive activations in large language models"), most often at the first token. They would fill an SAE's loss,
so special tokens and outliers are left out of training, statistics and reconstruction metrics alike.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Exclusion:
    """The rule that says which positions count.

    special_ids: tokens that stand for no text (BOS, end of text); empty if they are not to be left out.
    max_norm: positions whose activation has a larger Euclidean norm are left out; infinite for no such bound.
    """

    special_ids: frozenset[int]
    max_norm: float

    def kept(self, ids: Tensor, x: Tensor) -> Tensor:
        """Which positions count: bool [...], for token ids [...] and activations [..., d]."""
        return is_text(ids.to(x.device), self.special_ids) & (norms(x) <= self.max_norm)


def norms(x: Tensor) -> Tensor:
    """Euclidean norms of activations [..., d]: [...], in float32 or better."""
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def is_text(ids: Tensor, special_ids: frozenset[int]) -> Tensor:
    """Which of ``ids`` [...] are not special: bool [...]."""
    return ~torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device))


class Moments:
    """Mean and scale of activations, summed in float64 as rows pass by.

    ``mean`` float32 [d] and ``scale`` make E‖(x − mean)·scale‖² = d.
    """

    def __init__(self, width: int):
        self.n_rows = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = 0.0

    def add(self, x: Tensor) -> None:
        """Count the rows of ``x`` [n, d]."""
        for part in x.detach().split(_ROWS_AT_ONCE):
            rows = part.cpu().double()  # MPS has no float64, so the sums are made on the CPU
            self.n_rows += len(rows)
            self._sum += rows.sum(0)
            self._squares += float(rows.square().sum())

    @property
    def mean(self) -> Tensor:
        return (self._sum / max(self.n_rows, 1)).float()

    @property
    def scale(self) -> float:
        mean = self._sum / max(self.n_rows, 1)
        variance = self._squares / max(self.n_rows, 1) - float(mean.square().sum())
        # All rows alike (a hook that reads a single repeated token): any scale does, 1 is finite.
        return (
            math.sqrt(len(mean) / variance) if variance > 1e-12 * self._squares / max(self.n_rows, 1) else 1.0
        )
