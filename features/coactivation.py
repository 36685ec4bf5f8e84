"""Which features fire together: counted exactly on a sample of positions.

On a sampled position every pair of firing features counts once; :mod:`features.coactive` says what is made of it. The
sample is small, so it is kept as it is, and its pairs are counted when everything has been read.
"""

from collections.abc import Callable, Mapping

import numpy as np

from features.examples import splitmix64
from features.firings import Firings
from features.groups import group_starts, place_in_group
from features.pair_counts import Tally

SAMPLED_POSITIONS = 30_000
"""Positions that pairs are counted on, about: the number of those with a pair fits in 16 bits."""
MOST_PER_POSITION = 64
"""Of the features that fire at a position, so many take part, the strongest: pairs grow with their square."""
_PAIRS_AT_ONCE = 1 << 22
_NO_PAIRS = np.zeros(0, np.int64), np.zeros(0, np.int64)


class Coactivation:
    """The features that fire at sampled positions, as firings pass by.

    Attributes:
        n_sampled: how many positions were sampled.
    """

    def __init__(self, d_sae: int, n_positions: int) -> None:
        """n_positions: of the whole text, all processes together."""
        self.d_sae = d_sae
        self.n_sampled = 0
        self._features: list[np.ndarray] = []  # position by position
        self._n_firing: list[np.ndarray] = []  # how many of them belong to each position
        share = min(SAMPLED_POSITIONS / max(n_positions, 1), 1.0)
        self._bound = np.uint64(min(int(share * 2**64), 2**64 - 1))

    def add(self, firings: Firings) -> None:
        """Keep what fires at those positions that are in the sample."""
        sampled = splitmix64(firings.kept.astype(np.uint64)) <= self._bound
        if not sampled.any():
            return
        self.n_sampled += int(sampled.sum())
        chosen = np.flatnonzero(firings.among(firings.kept[sampled]))
        chosen = chosen[np.lexsort((-firings.value[chosen], firings.place[chosen]))]
        place = firings.place[chosen]
        fits = place_in_group(place) < MOST_PER_POSITION
        starts = group_starts(place[fits])
        self._features.append(firings.feature[chosen[fits]].astype(np.int32))
        self._n_firing.append(np.diff(starts, append=int(fits.sum())))

    def merge(self, later: "Coactivation") -> None:
        """Add the sample of another process."""
        self.n_sampled += later.n_sampled
        self._features += later._features
        self._n_firing += later._n_firing

    @property
    def count(self) -> np.ndarray:
        """Sampled positions at which each feature fires (and takes part): int64 ``[d_sae]``."""
        return np.bincount(_joined(self._features, np.int32), minlength=self.d_sae)

    def by_feature(self) -> Callable[[slice], Tally]:
        """A function that counts the pairs whose first member is in a range of features, each pair in both orders."""
        features, n_firing = _joined(self._features, np.int32), _joined(self._n_firing, np.int64)
        position = np.repeat(np.arange(len(n_firing)), n_firing)
        together = np.full((len(n_firing), int(n_firing.max(initial=0))), -1, np.int32)
        together[position, place_in_group(position)] = features
        by_feature = np.argsort(features, kind="stable")
        owner, at = features[by_feature], position[by_feature]
        below = np.append(0, self.count.cumsum())

        def counted(first: int, last: int, start: int) -> tuple[np.ndarray, np.ndarray]:
            """Those of entries ``first`` to ``last``. Keys count from feature ``start`` on: most fit 32 bits then."""
            own, others = owner[first:last, None], together[at[first:last]]
            n_keys = (int(own[-1, 0]) + 1 - start) * self.d_sae
            base = (own.astype(np.int64) - start) * self.d_sae
            key = (base.astype(np.int32) if n_keys < 1 << 31 else base) + others
            key = key[(others >= 0) & (others != own)]
            key.sort()
            begins = group_starts(key)
            return key[begins].astype(np.int64) + start * self.d_sae, np.diff(begins, append=len(key))

        def of(block: slice) -> Tally:
            enough = max(_PAIRS_AT_ONCE // max(together.shape[1], 1), 1)
            parts, first, end = [_NO_PAIRS], int(below[block.start]), int(below[block.stop])
            while first < end:
                # Whole features, at least one.
                last = int(below[np.searchsorted(below, first + enough, side="right") - 1])
                last = min(max(last, int(below[owner[first] + 1])), end)
                parts.append(counted(first, last, block.start))
                first = last
            key, times = (np.concatenate(column) for column in zip(*parts, strict=True))
            return Tally(key, times, np.zeros(0))

        return of

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that it holds, by name."""
        return {
            "features": _joined(self._features, np.int32),
            "n_firing": _joined(self._n_firing, np.int64),
            "n_sampled": np.array(self.n_sampled),
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`arrays` gave."""
        self._features, self._n_firing = [arrays["features"]], [arrays["n_firing"]]
        self.n_sampled = int(arrays["n_sampled"])


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])
