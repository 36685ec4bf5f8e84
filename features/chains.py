"""Which values of an aspect, or of several together, tell when a feature fires: all features at once.

A *chain* is a row of aspects of which each refines those before it: the token; the token and the one before it; and so
on. The values that occur along a chain are the nodes of a tree, a trie of n-grams in this example. A feature is
described by nodes of which none lies below another (an antichain): it fires where the values of one of them stand. A
node gives way to nodes below it only where these, being more precise, make F1 larger.

The best set is found as in fractional programming (Dinkelbach 1967): F1 = 2·hits / (predicted + fired) is largest for
the set that maximises Σ (hits − λ · predicted) at λ = F1/2, which is a sum over nodes and is solved from the leaves
up; λ is that of the set before. A node must be worth its words, so each of its aspects costs some hits
(:data:`ASPECT_COST`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from features.aspects import NONE, Aspect, Text
from features.firing_table import FiringTable
from features.groups import group_starts, place_in_group

Chain = tuple[Aspect, ...]

MAX_NODES = 10
"""In one description: what a person can take in."""
ASPECT_COST = 0.003
"""Share of a feature's firings that each aspect of a node must add, beyond one firing, to be worth its words."""
MIN_HITS = 2
"""Firings that a node must hold (all of them, if the feature has fewer): one may be chance."""
REFINED_BELOW = 0.9
"""Precision below which a node is refined; above, hardly anything is to be gained."""
_ROUNDS = 6


@dataclass(frozen=True)
class Keys:
    """The values along a chain at every position, as one number for each level.

    Attributes:
        chain: the aspects.
        at: int32 ``[n]`` for each level l: which values the first l + 1 aspects have there, NONE where one has none.
        parent: int64 ``[n_keys]`` for each level: the number of the same values at the level above.
        values: int32 ``[n_keys, l + 1]`` for each level: the numbers that the aspects themselves have.
    """

    chain: Chain
    at: list[np.ndarray]
    parent: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def of(cls, text: Text, chain: Chain) -> "Keys":
        """Number the values of a chain over a text."""
        at, parent, values = [], [], []
        above, above_values = np.zeros(len(text), dtype=np.int64), np.zeros((1, 0), dtype=np.int32)
        for aspect in chain:
            numbers, width = text.numbers(aspect), len(text.values(aspect))
            known = (above != NONE) & (numbers != NONE)
            pairs, inverse = np.unique(above[known] * width + numbers[known], return_inverse=True)
            level = np.full(len(text), NONE, dtype=np.int32)
            level[known] = inverse
            own = (pairs % width).astype(np.int32)
            at.append(level)
            parent.append(pairs // width)
            values.append(np.column_stack([above_values[parent[-1]], own]))
            above, above_values = level.astype(np.int64), values[-1]
        return cls(chain, at, parent, values)

    def totals(self, level: int, positions: np.ndarray) -> np.ndarray:
        """int64 ``[n_keys]``: at how many of some positions the values of each key stand."""
        keys = self.at[level][positions]
        return np.bincount(keys[keys != NONE], minlength=len(self.parent[level]))


@dataclass(frozen=True)
class Nodes:
    """Descriptions of features: nodes of a chain, those of one feature one after the other, the best first.

    Attributes:
        feature, level, key: int64 ``[m]``: the node ``key`` of that level (:class:`Keys`) describes the feature.
    """

    feature: np.ndarray
    level: np.ndarray
    key: np.ndarray

    def costs(self, d_sae: int) -> np.ndarray:
        """float64 ``[d_sae]``: what the aspects in each description cost, in terms of F1."""
        return ASPECT_COST * np.bincount(self.feature, self.level + 1.0, minlength=d_sae)

    def __len__(self) -> int:
        return len(self.feature)


@dataclass(frozen=True)
class _Level:
    """The (feature, key) pairs of one level that may describe the feature, ascending.

    Attributes:
        pair: int64 ``[m]``, feature · n_keys + key.
        feature, key: int64 ``[m]``.
        hits: float64 ``[m]``, firings there. predicted: float64 ``[m]``, positions there, in the same units.
        parent: int64 ``[m]``, which pair of the level above; empty for the first.
    """

    pair: np.ndarray
    feature: np.ndarray
    key: np.ndarray
    hits: np.ndarray
    predicted: np.ndarray
    parent: np.ndarray


def describe(
    keys: Keys,
    firings: FiringTable,
    scale: np.ndarray,
    allowed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Nodes:
    """The nodes that describe each feature best.

    Args:
        firings: what is known of the features, and the positions that values are counted on.
        scale: float64 ``[d_sae]``: firings known of each feature for one on these positions; 1 where they are all
            that there are, less where they are a choice of them, more where they are from elsewhere too.
        allowed: says of (feature, key) pairs of the first level which may be used: of int64 ``[m]`` each, bool ``[m]``.
    """
    levels = _levels(keys, firings, scale, allowed)
    fired = firings.count.astype(np.float64)
    cost = 1 + ASPECT_COST * fired
    price = np.zeros(firings.d_sae)  # λ, to begin with that of the best single node
    for level in levels:
        np.maximum.at(price, level.feature, level.hits / (level.predicted + fired[level.feature]))
    for _ in range(_ROUNDS):
        chosen = _best_antichain(levels, price, cost)
        hits, predicted = (
            np.bincount(
                chosen.feature,
                np.concatenate([getattr(level, name) for level in levels])[chosen.node],
                firings.d_sae,
            )
            for name in ("hits", "predicted")
        )
        whole = predicted + fired
        price = np.maximum(price, np.divide(hits, whole, out=np.zeros_like(whole), where=whole > 0))
    sizes = [len(level.feature) for level in levels]
    number = np.repeat(np.arange(len(levels)), sizes)[chosen.node]
    key = np.concatenate([level.key for level in levels])[chosen.node]
    return Nodes(chosen.feature, number, key)


def count_hits(keys: Keys, nodes: Nodes, firings: FiringTable) -> tuple[np.ndarray, np.ndarray]:
    """How the descriptions do on firings.

    Returns:
        bool ``[m]``: whether the feature's description holds at each firing; int64 ``[d_sae]``: at how many of the
        positions that count each description holds.
    """
    predicted = np.zeros(firings.d_sae, dtype=np.int64)
    hit = np.zeros(len(firings), dtype=bool)
    for level in range(len(keys.chain)):
        here = nodes.level == level
        feature, key = nodes.feature[here], nodes.key[here]
        if not len(feature):
            continue
        n_keys = len(keys.parent[level])
        np.add.at(predicted, feature, keys.totals(level, firings.kept)[key])
        pairs = np.sort(feature * n_keys + key)
        at = keys.at[level][firings.position]
        pair = firings.feature * np.int64(n_keys) + at
        hit |= _find(pairs, pair) & (at != NONE)
    return hit, predicted


def _find(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value stands in a sorted table that is not empty: bool."""
    return np.asarray(table[np.searchsorted(table, values).clip(max=len(table) - 1)] == values)


def _levels(
    keys: Keys,
    firings: FiringTable,
    scale: np.ndarray,
    allowed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
) -> list[_Level]:
    """Count the pairs that occur, level by level; below a node only what is worth refining."""
    fired = firings.count
    levels: list[_Level] = []
    feature, position = firings.feature.astype(np.int64), firings.position
    for number in range(len(keys.chain)):
        n_keys = len(keys.parent[number])
        at = keys.at[number][position]
        known = at != NONE
        feature, position, pair = feature[known], position[known], feature[known] * n_keys + at[known]
        ordered = np.sort(pair)
        starts = group_starts(ordered)
        hits, pairs = np.diff(starts, append=len(ordered)), ordered[starts]
        of_feature, key = pairs // n_keys, pairs % n_keys
        usable = hits >= np.minimum(MIN_HITS, fired[of_feature])
        if number == 0 and allowed is not None:
            usable &= allowed(of_feature, key)
        parent = np.zeros(0, dtype=np.int64)
        if levels:
            # What fires here fires at the parent, which was found worth refining: its pair is there.
            above = of_feature * len(keys.parent[number - 1]) + keys.parent[number][key]
            parent = np.searchsorted(levels[-1].pair, above)[usable]
        pairs, hits, of_feature, key = (each[usable] for each in (pairs, hits, of_feature, key))
        predicted = keys.totals(number, firings.kept)[key] * scale[of_feature]
        levels.append(_Level(pairs, of_feature, key, hits.astype(np.float64), predicted, parent))
        refined = pairs[(hits >= 2 * MIN_HITS) & (hits < REFINED_BELOW * predicted)]
        if not len(refined):
            break
        worth = _find(refined, pair)
        feature, position = feature[worth], position[worth]
    return levels


@dataclass(frozen=True)
class _Chosen:
    """feature int64 ``[m]``, and node int64 ``[m]``: its place among the pairs of all levels, one after the other."""

    feature: np.ndarray
    node: np.ndarray


def _best_antichain(levels: list[_Level], price: np.ndarray, cost: np.ndarray) -> _Chosen:
    """The nodes with the largest Σ (hits − price · predicted − aspects · cost), at most MAX_NODES of each feature."""
    own = [
        level.hits - price[level.feature] * level.predicted - (number + 1) * cost[level.feature]
        for number, level in enumerate(levels)
    ]
    below = [np.zeros(len(level.feature)) for level in levels]
    for number in range(len(levels) - 1, 0, -1):
        worth = np.maximum(np.maximum(own[number], below[number]), 0)
        np.add.at(below[number - 1], levels[number].parent, worth)
    taken = []
    reached = np.ones(len(levels[0].feature), dtype=bool)
    for number in range(len(levels)):
        take = reached & (own[number] > 0) & (own[number] >= below[number])
        taken.append(take)
        if number + 1 < len(levels):
            reached = (reached & ~take)[levels[number + 1].parent]
    node = np.flatnonzero(np.concatenate(taken))
    feature = np.concatenate([level.feature for level in levels])[node]
    order = np.lexsort((-np.concatenate(own)[node], feature))
    order = order[place_in_group(feature[order]) < MAX_NODES]
    return _Chosen(feature[order], node[order])
