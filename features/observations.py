"""What counts as one observation where texts belong together, and which test is for that.

Texts of one author, or copies of each other, are no independent evidence: a test that takes each for an observation
finds differences between any two sets of authors. So the mean over a group's texts in a set is one observation.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from features.separation import Values, paired_p, separation


def joined(texts: Sequence[str], groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """The group of each text, int64 ``[n]`` from 0: given ones, joined where they share a text; else equal texts alone.

    Texts are equal if they are but for the space around them.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(texts)
    of = [_numbered([text.strip() for text in texts])]
    if groups is not None:
        of.append(_numbered(groups))
    # A graph of texts and what they have: its connected parts are the groups.
    first = np.cumsum([n, *(each.max() + 1 for each in of)])
    ends = np.concatenate([each + start for each, start in zip(of, first, strict=False)])
    edges = (np.ones(len(ends)), (np.tile(np.arange(n), len(of)), ends))
    part = connected_components(coo_array(edges, shape=(first[-1], first[-1])), directed=False)[1]
    return np.unique(part[:n], return_inverse=True)[1].astype(np.int64)


def _numbered(items: Sequence[Hashable]) -> np.ndarray:
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(item, len(number)) for item in items], dtype=np.int64)


@dataclass(frozen=True)
class Observations:
    """The u observations that n texts come to.

    Attributes:
        unit: int64 ``[n]``, the observation that each text is of; -1 if it is left out.
        in_a: bool ``[u]``, which are of set a.
        pair: int64 ``[u]``, the number of each one's pair, one of each set; None where they are compared unmatched.
        left_out: number of groups that are left out.
    """

    unit: np.ndarray
    in_a: np.ndarray
    pair: np.ndarray | None
    left_out: int

    @classmethod
    def of(cls, group: np.ndarray, in_a: np.ndarray) -> "Observations":
        """Groups with texts in both sets are compared within, others with each other; the fewer are left out.

        Args:
            group: int64 ``[n]`` from 0.
            in_a: bool ``[n]``, which texts are of set a.
        """
        has_a, has_b = (np.bincount(group[which], minlength=group.max() + 1) > 0 for which in (in_a, ~in_a))
        both = has_a & has_b
        is_paired = bool(both.any()) and both.sum() >= min((has_a & ~both).sum(), (has_b & ~both).sum())
        taken = both if is_paired else ~both
        used = taken[group]
        cell, number = np.unique(2 * group[used] + in_a[used], return_inverse=True)
        unit = np.full(len(group), -1)
        unit[used] = number
        pair = np.unique(cell // 2, return_inverse=True)[1] if is_paired else None
        return cls(unit, cell % 2 == 1, pair, int((~taken).sum()))

    @property
    def test(self) -> str:
        """The test that :meth:`p` is of."""
        return "Mann-Whitney" if self.pair is None else "signed-rank"

    def p(self, values: Values, features: np.ndarray) -> np.ndarray:
        """p-values ``[f]`` of ``features``, ascending; 1 for one that is silent in all texts that are not left out."""
        means = values.means(self.unit)
        found = separation(means, self.in_a)
        p = np.ones(len(features))
        p[np.searchsorted(features, found.feature)] = (
            found.p if self.pair is None else paired_p(means, self.in_a, self.pair)
        )
        return p
