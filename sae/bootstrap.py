"""Figures with 95% intervals, from sums over documents.

Tokens of one document resemble each other, so documents are what is drawn again: a bootstrap sample holds as
many documents as the split, with repetition, and a figure is computed from the sample's sums as it is from
the whole split's (Efron and Tibshirani 1993, percentile interval). Every figure here is a function of sums
over documents, so all samples together are one matrix product.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000

Totals = Mapping[str, np.ndarray]
"""Sums by name: of the whole split (scalar or vector ``[d]``), or of R samples (``[R]`` or ``[R, d]``)."""


@dataclass(frozen=True)
class PartialSums:
    """Sums over a few documents, in float64.

    documents: int ``[m]``, distinct and ascending.
    sums: by name, each ``[m]`` or ``[m, d]``.
    """

    documents: np.ndarray
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, owners: np.ndarray, values: Mapping[str, Tensor]) -> None:
        """Sum ``values`` (each ``[n]`` or ``[n, d]``) over the rows of each document.

        Args:
            owners: ``[n]``, the document of each row.
        """
        place = torch.from_numpy(np.searchsorted(self.documents, owners))
        for name, value in values.items():
            rows = value.cpu().double()  # in this order: MPS has no float64
            sums = rows.new_zeros(len(self.documents), *rows.shape[1:]).index_add_(0, place, rows)
            self.sums[name] = sums.numpy()


class DocumentSums:
    """Sums by document over a whole split, in float64."""

    def __init__(self, n_documents: int) -> None:
        self.occurs = np.zeros(n_documents, dtype=bool)
        self.sums: dict[str, np.ndarray] = {}

    def add(self, part: PartialSums) -> None:
        """Add the sums of a part of the split."""
        self.occurs[part.documents] = True
        for name, sums in part.sums.items():
            if name not in self.sums:
                self.sums[name] = np.zeros((len(self.occurs), *sums.shape[1:]))
            self.sums[name][part.documents] += sums

    def totals(self) -> Totals:
        """Sums over the whole split."""
        return {name: sums.sum(axis=0) for name, sums in self.sums.items()}

    def resampled(self, seed: int) -> Totals:
        """Sums over each of 1,000 bootstrap samples of the documents that occur."""
        n = int(self.occurs.sum())
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        return {name: draws.astype(np.float64) @ sums[self.occurs] for name, sums in self.sums.items()}


Figure = float | None
"""A number that a computation gave, or None where it does not exist (0 / 0): JSON has no word for NaN."""


class Estimator:
    """Turns functions of sums into figures and intervals; all figures share the same bootstrap samples."""

    def __init__(self, sums: DocumentSums, seed: int) -> None:
        self.totals = sums.totals()
        self._resampled = sums.resampled(seed)

    def __call__(
        self, figures: Callable[[Totals], dict[str, np.ndarray]]
    ) -> tuple[dict[str, Figure], dict[str, list[Figure]]]:
        """Values and 95% intervals ``[low, high]`` of some figures, by name."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = figures(self.totals)
            draws = figures(self._resampled)
            bounds = {name: np.quantile(draw, [0.025, 0.975]) for name, draw in draws.items()}
        return (
            {name: _figure(value) for name, value in values.items()},
            {name: [_figure(bound) for bound in pair] for name, pair in bounds.items()},
        )


def _figure(value: np.ndarray) -> Figure:
    return float(value) if np.isfinite(value) else None
