"""How well each feature tells two sets of texts apart, for all features at once and from sparse values.

A text in which a feature is silent has the value 0, and there are many: ranks are taken as if those zeros were written
out, but they never are.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from features.groups import group_starts

MOST_EXACT = 25
"""Pairs that differ, up to which the signed-rank test counts all signs instead of approximating."""

_DROPPED_BITS = 10  # of the 23 binary digits of a float32


@dataclass(frozen=True)
class Values:
    """One value per feature and text where it fires, sorted by feature and then by value; all positive.

    feature, text: int64 ``[m]``. value: float64 ``[m]``.
    """

    feature: np.ndarray
    text: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, feature: np.ndarray, text: np.ndarray, value: np.ndarray) -> "Values":
        """Sort entries of any order, each (feature, text) once."""
        order = np.lexsort((value, feature))
        return cls(feature[order], text[order], value[order].astype(np.float64))

    def only(self, texts: np.ndarray) -> "Values":
        """Those of some texts: bool ``[n]``."""
        kept = texts[self.text]
        return Values(self.feature[kept], self.text[kept], self.value[kept])

    def means(self, of: np.ndarray) -> "Values":
        """Mean values over groups of texts, silent ones too.

        Args:
            of: int64 ``[n]``, the group of each text, from 0; those of -1 are left out.
        """
        size, some = np.bincount(of[of >= 0]), self.only(of >= 0)
        cell, which = np.unique(some.feature * len(size) + of[some.text], return_inverse=True)
        feature, group = np.divmod(cell, len(size))
        return Values.of(feature, group, np.bincount(which, some.value, len(cell)) / size[group])

    def columns(self, features: np.ndarray, n_texts: int) -> np.ndarray:
        """Dense float64 ``[n_texts, len(features)]`` of a few features."""
        dense = np.zeros((n_texts, len(features)))
        for column, number in enumerate(features):
            mine = slice(*np.searchsorted(self.feature, [number, number + 1]))
            dense[self.text[mine], column] = self.value[mine]
        return dense


@dataclass(frozen=True)
class Separation:
    """Figures of the f features that fire in any of the texts, in ascending order; each array is ``[f]``.

    Attributes:
        feature: their numbers, int64.
        rate_a, rate_b: shares of the texts of each set in which it fires.
        auc: chance that a text of set a has a larger value than one of set b, ties counting half; 0.5 is chance.
        effect: Cohen's d of the values: difference of the means in units of the pooled standard deviation; infinite
            where both sets are constant and differ.
        p: of the two-sided Mann-Whitney test, by the normal approximation with tie and continuity correction, but never
            below the smallest that so few texts allow, 2 / C(n, n_a).
    """

    feature: np.ndarray
    rate_a: np.ndarray
    rate_b: np.ndarray
    auc: np.ndarray
    effect: np.ndarray
    p: np.ndarray


def separation(values: Values, in_a: np.ndarray, used: np.ndarray | None = None) -> Separation:
    """Compare set a with set b (Mann and Whitney 1947), for every feature that fires in a text of either.

    Args:
        in_a: bool ``[n]``, which texts are of set a; the others are of set b.
        used: bool ``[n]``, which texts take part; all by default. At least one of each set.
    """
    from scipy.special import ndtr

    if used is not None:
        values = values.only(used)
    taking_part = np.ones(len(in_a), dtype=bool) if used is None else used
    n_a, n_b = int((in_a & taking_part).sum()), int((~in_a & taking_part).sum())
    n = n_a + n_b
    starts = group_starts(values.feature)
    m = np.diff(starts, append=len(values.feature))
    if not len(starts):
        empty = np.zeros(0)
        return Separation(values.feature, empty, empty, empty, empty, empty)
    is_a = in_a[values.text]
    m_a = np.add.reduceat(is_a.astype(np.int64), starts)
    zeros = n - m

    ranks, ties = _midranks(values.value, starts)
    ranks += np.repeat(zeros, m)  # the silent texts come first, and are equal
    ties += zeros**3.0 - zeros
    rank_sum = np.add.reduceat(ranks * is_a, starts) + (n_a - m_a) * (zeros + 1) / 2
    u = rank_sum - n_a * (n_a + 1) / 2
    variance = n_a * n_b / 12 * (n + 1 - ties / max(n * (n - 1), 1))
    excess = np.abs(u - n_a * n_b / 2) - 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(variance > 0, 2 * ndtr(-excess / np.sqrt(variance)), 1.0)
    return Separation(
        feature=values.feature[starts],
        rate_a=m_a / n_a,
        rate_b=(m - m_a) / n_b,
        auc=u / (n_a * n_b),
        effect=_cohens_d(values.value, is_a, starts, n_a, n_b),
        p=p.clip(min(2 / comb(n, n_a), 1.0), 1.0),
    )


def paired_p(values: Values, in_a: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """p-values of the two-sided signed-rank test (Wilcoxon 1945) over matched pairs of one text of each set.

    What both texts of a pair have in common drops out, so that small differences show which the spread between pairs
    hides from :func:`separation`. Pairs without a difference are left out. Exact, ties included, where up to
    :data:`MOST_EXACT` pairs differ; else by the normal approximation with tie correction.

    Args:
        pair: int64 ``[n]``, the number of each text's pair.

    Returns:
        ``[f]``, for the features that fire in any text, in ascending order; 1 where no pair differs.
    """
    from scipy.special import ndtr

    features = values.feature[group_starts(values.feature)]
    n_pairs = int(pair.max()) + 1
    cell, which = np.unique(values.feature * n_pairs + pair[values.text], return_inverse=True)
    difference = np.bincount(which, np.where(in_a[values.text], values.value, -values.value), len(cell))
    feature, difference = cell[difference != 0] // n_pairs, difference[difference != 0]
    order = np.lexsort((np.abs(difference), feature))
    feature, difference = feature[order], difference[order]
    p = np.ones(len(features))
    starts = group_starts(feature)
    if not len(starts):
        return p
    rank, ties = _midranks(np.abs(difference), starts)
    n = np.diff(starts, append=len(feature)).astype(np.float64)
    positive = np.add.reduceat(rank * (difference > 0), starts)
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties / 48
    found = 2 * ndtr(-np.abs(positive - n * (n + 1) / 4) / np.sqrt(variance))
    for row in np.flatnonzero(n <= MOST_EXACT):
        doubled = (2 * rank[starts[row] : starts[row] + int(n[row])]).astype(np.int64)
        found[row] = _exact_p(tuple(doubled.tolist()), int(2 * positive[row]))
    p[np.searchsorted(features, feature[starts])] = found
    return p


def _exact_p(ranks: tuple[int, ...], positive: int) -> float:
    """The share of all choices of signs with a sum of positive ranks as far from the middle; ranks are doubled."""
    tail = _tails(ranks)[min(positive, sum(ranks) - positive)]
    return float(min(2 * tail, 1.0))


@lru_cache(maxsize=4096)
def _tails(ranks: tuple[int, ...]) -> np.ndarray:
    """The share of choices of signs whose sum of positive ranks is at most 0, 1, 2 …: features share ranks."""
    ways = np.zeros(sum(ranks) + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    return np.asarray(np.cumsum(ways) / 2.0 ** len(ranks))


def _midranks(value: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 within each feature, equal values sharing their mean, and Σ t³ − t over runs of t equal values.

    value: ``[m]``, sorted within each feature. starts: ``[f]``, where each feature begins.
    """
    is_new = np.diff(value, prepend=np.nan) != 0
    is_new[starts] = True
    runs = np.flatnonzero(is_new)
    length = np.diff(runs, append=len(value))
    first_run = np.searchsorted(runs, starts)
    place = runs - np.repeat(starts, np.diff(first_run, append=len(runs)))
    ties = np.add.reduceat(length.astype(np.float64) ** 3 - length, first_run)
    return np.repeat(place + (length + 1) / 2, length), ties


def _cohens_d(value: np.ndarray, is_a: np.ndarray, starts: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
    means, squares = [], np.zeros(len(starts))
    for mine, n in ((is_a, n_a), (~is_a, n_b)):
        mean = np.add.reduceat(value * mine, starts) / n
        deviation = (value - np.repeat(mean, np.diff(starts, append=len(value)))) ** 2
        fired = np.add.reduceat(mine.astype(np.int64), starts)
        squares += np.add.reduceat(deviation * mine, starts) + (n - fired) * mean**2
        means.append(mean)
    spread = np.sqrt(squares / max(n_a + n_b - 2, 1))
    difference = means[0] - means[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        effect: np.ndarray = np.where(difference == 0, 0.0, difference / spread)
    return effect


def to_four_digits(value: np.ndarray) -> np.ndarray:
    """Positive numbers rounded to 13 binary digits, float32: nearly equal ones become equal, but for a few."""
    bits = value.astype(np.float32).view(np.int32) + (1 << _DROPPED_BITS - 1)
    rounded: np.ndarray = (bits >> _DROPPED_BITS << _DROPPED_BITS).view(np.float32)
    return rounded


def false_discovery_rate(p: np.ndarray) -> np.ndarray:
    """q-values of p-values ``[f]`` (Benjamini and Hochberg 1995): the smallest rate at which each would be kept."""
    order = np.argsort(-p, kind="stable")
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return q
