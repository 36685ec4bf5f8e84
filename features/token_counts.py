"""How often, and how strongly, each feature fires at each token of the vocabulary: exact, in one pass."""

from typing import NamedTuple

import numpy as np

from features.groups import group_starts, place_in_group


class _Run(NamedTuple):
    """Sums for (feature, token) pairs, by ascending key = feature · d_vocab + token, each once."""

    key: np.ndarray
    firings: np.ndarray
    total: np.ndarray


class TopTokens(NamedTuple):
    """The tokens of each feature with the largest total activation; arrays ``[d_sae, n]``.

    token: int32, -1 where there are fewer. firings: int64, at that token. mean: float32, over those.
    """

    token: np.ndarray
    firings: np.ndarray
    mean: np.ndarray


class TokenCounts:
    """Counts and Σa of every (feature, token) pair that occurs, summed as firings pass by.

    Kept as a few sorted runs; two are merged when they are of similar length, so that every pair is moved
    about log2(number of chunks) times. Sums are in float64, which is exact unless the activations of one pair
    differ by factors of millions, and so do not depend on how the text was cut.
    """

    def __init__(self, d_sae: int, d_vocab: int) -> None:
        self.d_sae = d_sae
        self.d_vocab = d_vocab
        self._runs: list[_Run] = []

    def add(self, feature: np.ndarray, token: np.ndarray, value: np.ndarray) -> None:
        """Count m firings: int64 ``[m]``, int64 ``[m]``, float32 ``[m]``."""
        if not len(feature):
            return
        # (pair, entry) in one word: sorting words is several times as fast as an argsort.
        bits = len(feature).bit_length()
        packed = np.sort((feature * self.d_vocab + token) << bits | np.arange(len(feature)))
        order = packed & ((1 << bits) - 1)
        ones = np.ones(len(order), dtype=np.int64)
        self._runs.append(_summed(_Run(packed >> bits, ones, value[order].astype(np.float64))))
        while len(self._runs) > 1 and 2 * len(self._runs[-1].key) >= len(self._runs[-2].key):
            self._merge_last_two()

    def top(self, n: int) -> TopTokens:
        """The ``n`` tokens of each feature with the largest Σa; of equals, the smaller id first."""
        while len(self._runs) > 1:
            self._merge_last_two()
        shape = (self.d_sae, n)
        best = TopTokens(np.full(shape, -1, np.int32), np.zeros(shape, np.int64), np.zeros(shape, np.float32))
        if not self._runs:
            return best
        key, firings, total = self._runs[0]
        feature, token = key // self.d_vocab, key % self.d_vocab
        order = np.lexsort((-total, feature))
        place = place_in_group(feature)  # keys ascend, so features are grouped before and after
        order, place = order[place < n], place[place < n]
        at = feature[order], place
        best.token[at] = token[order]
        best.firings[at] = firings[order]
        best.mean[at] = total[order] / firings[order]
        return best

    def _merge_last_two(self) -> None:
        newer, older = self._runs.pop(), self._runs.pop()
        pairs = zip(older, newer, strict=True)
        merged = _Run(*(np.concatenate(pair) for pair in pairs))
        order = np.argsort(merged.key, kind="stable")  # two sorted runs: a merge
        self._runs.append(_summed(_Run(*(column[order] for column in merged))))


def _summed(run: _Run) -> _Run:
    """Add up entries with the same key; ``run.key`` is ascending."""
    starts = group_starts(run.key)
    return _Run(run.key[starts], np.add.reduceat(run.firings, starts), np.add.reduceat(run.total, starts))
