"""How alike two features are by where they fire.

With N positions, n_a and n_b of them with a firing of a and b, and n_ab with both::

    PMI     = log2(n_ab · N / (n_a · n_b))      how much more often together than by chance (Church & Hanks 1990)
    Jaccard = n_ab / (n_a + n_b − n_ab)         how nearly the two are one
"""

from dataclasses import dataclass

import numpy as np


def jaccard(both: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """See the module: float64, of integer arrays that fit together."""
    return np.asarray(both / np.maximum(one + other - both, 1))


def pmi(both: np.ndarray, one: np.ndarray, other: np.ndarray, n_positions: int) -> np.ndarray:
    """See the module: float64 (bits), of integer arrays that fit together, all above 0."""
    return np.asarray(np.log2(both * float(n_positions) / (one * other.astype(np.float64))))


@dataclass(frozen=True)
class Coactive:
    """A feature that fires where another one fires.

    Attributes:
        feature: its number. count: sampled positions at which both fire.
        jaccard, pmi: see the module.
    """

    feature: int
    count: int
    jaccard: float
    pmi: float

    @classmethod
    def of(
        cls, features: np.ndarray, both: np.ndarray, own: np.ndarray, others: np.ndarray, n_positions: int
    ) -> "list[Coactive]":
        """One for each of n features, of integer arrays ``[n]``."""
        columns = features, both, jaccard(both, own, others), pmi(both, own, others, n_positions)
        return [cls(int(f), int(n), float(j), float(p)) for f, n, j, p in zip(*columns, strict=True)]
