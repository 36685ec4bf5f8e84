"""What the activations of every feature look like: how often, how strong, how distributed.

The histogram has fixed, log-spaced edges (ten bins to each factor of ten), so that it is filled in one pass,
means the same for every feature and every corpus, and gives quantiles to within a bin.
"""

from typing import TYPE_CHECKING

import numpy as np

from features.layout import HIGHEST_EXPONENT, LOWEST_EXPONENT, N_BINS

if TYPE_CHECKING:
    from features.firings import Firings

HISTOGRAM_EDGES = np.logspace(LOWEST_EXPONENT, HIGHEST_EXPONENT, N_BINS + 1).astype(np.float32)
"""float32 ``[N_BINS + 1]``, 0.001 to 100,000: wider than the activations of any model we know. Bin i holds
``edges[i] <= a < edges[i + 1]``; what lies outside is counted in the first or last bin."""


def histogram_bin(value: np.ndarray) -> np.ndarray:
    """The bin of each activation: uint8 of the shape of ``value``, which is float32 and positive."""
    # The upper half of a float's bits tells the bin, or the one before: numbers that share it are less than 1% apart.
    bins = _BIN_OF_UPPER_BITS.take(value.view(np.uint32) >> 16)
    bins += value >= _UPPER_EDGES.take(bins)
    return bins


def _bins_of_upper_bits() -> np.ndarray:
    smallest = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    bins = np.searchsorted(HISTOGRAM_EDGES, smallest, side="right") - 1
    bins[~(smallest >= 0)] = 0  # negative numbers, and what is none
    return bins.clip(0, N_BINS - 1).astype(np.uint8)


_BIN_OF_UPPER_BITS = _bins_of_upper_bits()
_UPPER_EDGES = np.append(HISTOGRAM_EDGES[1:-1], np.float32(np.nan))
"""Above which a number is in the next bin; the last bin has no end."""


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, maximum: float, q: float) -> float:
    """The activation below which a fraction ``q`` of a feature's firings lies, to within one bin.

    Log-linear within the bin; the last bin that is not empty ends at the feature's maximum.

    Args:
        counts: ``[n_bins]``, of one feature. edges: ``[n_bins + 1]``. maximum: its largest activation.
        q: 0 to 1.

    Returns:
        0.0 for a feature that never fired.
    """
    filled = np.flatnonzero(counts)
    if not len(filled):
        return 0.0
    below = np.cumsum(counts) - counts
    wanted = q * counts.sum()
    index = filled[np.searchsorted(below[filled], wanted, side="right") - 1]
    low = float(edges[index])
    high = maximum if index == filled[-1] else float(edges[index + 1])
    fraction = min(float((wanted - below[index]) / counts[index]), 1.0)
    return min(low * (high / low) ** fraction, maximum)


class ActivationStatistics:
    """Per-feature statistics, summed as firings pass by.

    Attributes:
        count: int64 ``[d_sae]``, number of firings.
        total, squares: float64 ``[d_sae]``, Σa and Σa².
        max: float32 ``[d_sae]``, 0 where nothing fired.
        histogram: int64 ``[d_sae, N_BINS]``.
    """

    def __init__(self, d_sae: int) -> None:
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae)
        self.squares = np.zeros(d_sae)
        self.max = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), dtype=np.int64)

    def add(self, firings: "Firings") -> None:
        """Count firings."""
        if not len(firings.feature):
            return
        firing, starts = firings.groups
        self.count[firing] += np.diff(starts, append=len(firings.feature))
        # add.at adds one by one in the order of the text, so the sums do not depend on how the text was cut.
        exact = firings.value.astype(np.float64)
        np.add.at(self.total, firings.feature, exact)
        exact *= exact
        np.add.at(self.squares, firings.feature, exact)
        self.max[firing] = np.maximum(self.max[firing], np.maximum.reduceat(firings.value, starts))
        cell = firings.feature * N_BINS
        cell += histogram_bin(firings.value)
        self.histogram += np.bincount(cell, minlength=self.histogram.size).reshape(self.histogram.shape)

    def merge(self, other: "ActivationStatistics") -> None:
        """Add what another process counted."""
        for name in ("count", "total", "squares", "histogram"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max = np.maximum(self.max, other.max)

    @property
    def mean(self) -> np.ndarray:
        """float64 ``[d_sae]``, over firings; 0 where nothing fired."""
        return self.total / self.count.clip(min=1)

    @property
    def std(self) -> np.ndarray:
        """float64 ``[d_sae]``, over firings (divided by their number, not by one less)."""
        variance = self.squares / self.count.clip(min=1) - self.mean**2
        return np.sqrt(variance.clip(min=0))
