"""Which features fire together: counted exactly on a sample of positions.

On a sampled position every pair of firing features counts once; :mod:`features.coactive` says what is made of it.
"""

from pathlib import Path

import numpy as np

from features.examples import splitmix64
from features.firings import Firings
from features.groups import place_in_group
from features.pair_counts import PairCounts

SAMPLED_POSITIONS = 30_000
"""Positions that pairs are counted on, about: the number of those with a pair fits in 16 bits."""
MOST_PER_POSITION = 64
"""Of the features that fire at a position, so many take part, the strongest: pairs grow with their square."""


class Coactivation:
    """Counts of pairs, as firings pass by.

    Attributes:
        pairs: of features; both orders of each.
        count: int64 ``[d_sae]``, sampled positions at which a feature fires (and takes part).
        n_sampled: how many positions were sampled.
    """

    def __init__(self, d_sae: int, n_positions: int, folder: Path) -> None:
        """n_positions: of the whole text, all processes together."""
        self.pairs = PairCounts(d_sae, folder, summed=False)
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.n_sampled = 0
        share = min(SAMPLED_POSITIONS / max(n_positions, 1), 1.0)
        self._bound = np.uint64(min(int(share * 2**64), 2**64 - 1))

    def add(self, firings: Firings) -> None:
        """Count the pairs at those positions that are in the sample."""
        sampled = splitmix64(firings.kept.astype(np.uint64)) <= self._bound
        if not sampled.any():
            return
        self.n_sampled += int(sampled.sum())
        first = int(firings.kept[0])
        is_sampled = np.zeros(int(firings.kept[-1]) - first + 1, dtype=bool)
        is_sampled[firings.kept[sampled] - first] = True
        chosen = np.flatnonzero(is_sampled[firings.position - first])
        chosen = chosen[np.lexsort((-firings.value[chosen], firings.position[chosen]))]
        chosen = chosen[place_in_group(firings.position[chosen]) < MOST_PER_POSITION]
        feature, position = firings.feature[chosen], firings.position[chosen]
        self.count += np.bincount(feature, minlength=len(self.count))
        # The entries of a position stand together: each is paired with the next, the next but one …
        for distance in range(1, MOST_PER_POSITION):
            together = np.flatnonzero(position[distance:] == position[:-distance])
            if not len(together):
                break
            one, other = feature[together], feature[together + distance]
            self.pairs.add(one, other)
            self.pairs.add(other, one)

    def merge(self, later: "Coactivation") -> None:
        """Add the counts of another process, its pairs apart."""
        self.count += later.count
        self.n_sampled += later.n_sampled
