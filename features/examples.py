"""Choosing examples for every feature in one pass: the strongest firings, a fair sample, and near misses.

All are the same thing, the candidates with the smallest *ranks*: by activation, by a hash of feature and position.
A hash as rank makes the table a uniform sample without replacement whatever the order and the cuts of the stream.
After the pass the sample is sorted into quantile bands.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from features.firings import Firings
from features.groups import group_starts, place_in_group
from features.layout import N_BANDS, N_BINS, WINDOW
from features.statistics import histogram_bin

RANK_BITS = 40
UNUSED = (1 << RANK_BITS) - 1
"""The rank of an empty place."""


def strength_rank(value: np.ndarray) -> np.ndarray:
    """Ranks that put larger activations first: the bits of a positive float grow with it."""
    return (0x7FFFFFFF - value.view(np.int32)).astype(np.int64)


def sampling_rank(feature: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Ranks in an order that is random, but the same in every run: a hash of feature and position."""
    return rank_of_hashes(feature_hash(feature), position_hash(position))


def rank_of_hashes(of_feature: np.ndarray, of_position: np.ndarray) -> np.ndarray:
    """:func:`sampling_rank` of features and positions whose hashes are known: int64, of two uint64 arrays."""
    mixed = of_feature ^ of_position
    mixed *= np.uint64(
        0x9E3779B97F4A7C15
    )  # features whose hashes begin alike must not choose the same positions
    mixed >>= np.uint64(64 - RANK_BITS)
    return np.minimum(mixed, np.uint64(UNUSED - 1), out=mixed).view(np.int64)


def feature_hash(feature: np.ndarray) -> np.ndarray:
    """uint64, of int64 numbers."""
    return splitmix64(~feature.astype(np.uint64))


def position_hash(position: np.ndarray) -> np.ndarray:
    """uint64, of int64 numbers; other than the :func:`feature_hash` of the same."""
    return splitmix64(position.astype(np.uint64))


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators": uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


@dataclass(frozen=True)
class Candidates:
    """Places in the text that compete to be an example of a feature, sorted by feature and then by position.

    Attributes:
        feature, position: int64 ``[m]``. value: float32 ``[m]``, the activation there. document: int32 ``[m]``.
        rank: int64 ``[m]``, the smaller the better; UNUSED never wins.
    """

    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray
    document: np.ndarray
    rank: np.ndarray

    def take(self, chosen: np.ndarray) -> "Candidates":
        """Some of them, ascending."""
        return Candidates(
            *(array[chosen] for array in (self.feature, self.position, self.value, self.document, self.rank))
        )


class ExampleTable:
    """For every feature the ``capacity`` candidates with the smallest ranks; of equal ranks, the earlier ones.

    Attributes:
        rank: int64 ``[d_sae, capacity]``, best first; the places left over have rank UNUSED.
        slot: int16, of the same shape: where the rest of each example is, which stays there while better ones come and
            go; each occurs once.
        position: int64, value: float32, document: int32, scale: float32, of the same shape, and window: uint8
            ``[d_sae, capacity, WINDOW]``, by slot; see :meth:`features.firings.Firings.windows`. Empty slots have
            position and document -1.
    """

    _ARRAYS = ("rank", "slot", "position", "value", "document", "scale", "window")

    def __init__(self, d_sae: int, capacity: int, *, one_per_document: bool) -> None:
        self.capacity = capacity
        self.one_per_document = one_per_document
        shape = (d_sae, capacity)
        self.rank = np.full(shape, UNUSED, np.int64)
        self.position = np.full(shape, -1, np.int64)
        self.value = np.zeros(shape, np.float32)
        self.document = np.full(shape, -1, np.int32)
        self.slot = np.broadcast_to(np.arange(capacity, dtype=np.int16), shape).copy()
        self.scale = np.zeros(shape, np.float32)
        self.window = np.zeros((*shape, WINDOW), np.uint8)

    def add(self, candidates: Candidates, firings: Firings) -> None:
        """Let candidates compete for the places.

        Args:
            candidates: later in the text than those before.
            firings: those of their stretch of text, which windows are cut out of.
        """
        # Later candidates lose ties, so only a strictly better rank displaces the worst of those kept.
        worst = self.rank[:, -1].copy()
        rivals = candidates.take(np.flatnonzero(candidates.rank < worst[candidates.feature]))
        if self.one_per_document:
            rivals = rivals.take(_first_of_document(rivals.feature, rivals.document, rivals.rank))
        if not len(rivals.feature):
            return
        where, slots, chosen = self._merge(rivals)
        if len(chosen):  # windows are cut out for those that won only: most rivals never need one
            self.window[where, slots], self.scale[where, slots] = firings.windows(
                rivals.feature[chosen], rivals.position[chosen]
            )

    def merge(self, other: "ExampleTable", features: slice) -> None:
        """Let the examples of another table compete, of text behind this one's; for some features."""
        row, place = np.nonzero(other.rank[features] != UNUSED)
        row += features.start
        slot = other.slot[row, place]
        position, value, document = (
            array[row, slot] for array in (other.position, other.value, other.document)
        )
        where, slots, chosen = self._merge(Candidates(row, position, value, document, other.rank[row, place]))
        self.window[where, slots] = other.window[row[chosen], slot[chosen]]
        self.scale[where, slots] = other.scale[row[chosen], slot[chosen]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that it holds, by name."""
        return {name: getattr(self, name) for name in self._ARRAYS}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`arrays` gave."""
        for name, array in arrays.items():
            setattr(self, name, array)

    def examples(self, features: slice) -> dict[str, np.ndarray]:
        """position, value, scale and window of some features' examples, best first: ``[n, capacity, …]``."""
        slot = self.slot[features].astype(np.int64)
        by_place = {
            name: np.take_along_axis(getattr(self, name)[features], slot, axis=1)
            for name in ("position", "value", "scale")
        }
        return by_place | {"window": np.take_along_axis(self.window[features], slot[..., None], axis=1)}

    def one_of_each(self, number: int) -> np.ndarray:
        """The position of one example of each feature, another one for every number: int64 ``[d_sae]``, -1 for none."""
        held = (self.rank != UNUSED).sum(axis=1)
        feature = np.arange(len(held))
        return self.position[feature, self.slot[feature, number % held.clip(min=1)]]

    def _merge(self, rivals: Candidates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find places for the rivals that win them.

        Returns:
            int64 ``[w]`` each: feature and slot of every winner, and which of the rivals it is.
        """
        if not len(rivals.feature):
            return rivals.feature, rivals.feature, rivals.feature
        starts = group_starts(rivals.feature)
        features = rivals.feature[starts]
        rival_row = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rivals.feature)))
        held_rank = self.rank[features]
        if self.one_per_document:
            rivals_stay = self._settle_documents(rivals, features, rival_row, held_rank)
        else:
            rivals_stay = np.arange(len(rivals.feature))
        # Both in the order of (row, rank): of equals the held first, then the earlier rivals.
        rival_key = rival_row[rivals_stay] << RANK_BITS | rivals.rank[rivals_stay]
        by_key = np.argsort(rival_key, kind="stable")
        chosen, rival_key = rivals_stay[by_key], rival_key[by_key]
        row, place = np.nonzero(held_rank != UNUSED)
        held_key = row << RANK_BITS | held_rank[row, place]

        at_rival = np.searchsorted(held_key, rival_key, side="right") + np.arange(len(rival_key))
        is_rival = np.zeros(len(held_key) + len(rival_key), dtype=bool)
        is_rival[at_rival] = True
        rows = np.empty(len(is_rival), dtype=np.int64)
        rows[is_rival], rows[~is_rival] = rival_key >> RANK_BITS, row
        places = place_in_group(rows)
        fits = places < self.capacity
        held_fits, rival_fits = fits[~is_rival], fits[is_rival]

        slots = self.slot[features].astype(np.int64)
        taken = np.zeros(slots.shape, dtype=bool)
        kept_row, kept_slot = row[held_fits], slots[row[held_fits], place[held_fits]]
        taken[kept_row, kept_slot] = True
        chosen = chosen[rival_fits]
        new_row = rival_key[rival_fits] >> RANK_BITS
        free_row, free_slot = np.nonzero(~taken)
        first_free = np.searchsorted(free_row, np.arange(len(features)))
        new_slot = free_slot[first_free[new_row] + place_in_group(new_row)]
        taken[new_row, new_slot] = True

        new_at, kept_at = places[is_rival & fits], places[~is_rival & fits]
        rank, slot = np.full_like(held_rank, UNUSED), np.empty_like(slots)
        rank[kept_row, kept_at] = held_key[held_fits] & UNUSED
        rank[new_row, new_at] = rivals.rank[chosen]
        slot[kept_row, kept_at], slot[new_row, new_at] = kept_slot, new_slot
        # Empty slots stand behind those in use, so that each occurs once.
        empty_row, empty_slot = np.nonzero(~taken)
        slot[rank == UNUSED] = empty_slot
        self.rank[features], self.slot[features] = rank, slot
        for name, empty in (("position", -1), ("value", 0), ("document", -1)):
            array = getattr(self, name)
            array[features[new_row], new_slot] = getattr(rivals, name)[chosen]
            array[features[empty_row], empty_slot] = empty
        return features[new_row], new_slot, chosen

    def _settle_documents(
        self, rivals: Candidates, features: np.ndarray, rival_row: np.ndarray, held_rank: np.ndarray
    ) -> np.ndarray:
        """Of a rival and an example of the same document keep the better: which rivals stay; others' ranks are blotted
        out in ``held_rank``."""
        stays = np.ones(len(rival_row), dtype=bool)
        facing = np.flatnonzero(held_rank[rival_row, 0] != UNUSED)  # the others have nothing to face
        row = rival_row[facing]
        same = self.document[features[row]] == rivals.document[facing, None]  # -1 in empty slots
        twin = same.argmax(axis=1)
        has_twin = same[np.arange(len(twin)), twin]
        facing, row, twin = facing[has_twin], row[has_twin], twin[has_twin]
        twin = (self.slot[features[row]] == twin[:, None]).argmax(axis=1)
        better = rivals.rank[facing] < held_rank[row, twin]
        held_rank[row[better], twin[better]] = UNUSED
        stays[facing[~better]] = False
        return np.flatnonzero(stays)


def quantile_bands(
    sample: Mapping[str, np.ndarray], rank: np.ndarray, histogram: np.ndarray, per_band: int
) -> np.ndarray:
    """Sort a uniform sample of each feature's firings into N_BANDS bands that hold equally many firings each.

    Which band an example is in depends on the fraction of all firings below it. The histogram gives that
    exactly at the edges of its bins; within a bin it is read off the example's place among the sample in that
    bin. It is exact for a feature whose firings are all in the sample, and never wrong by more than what one
    bin holds.

    Args:
        sample: ``position``, ``value`` ``[n, capacity]`` of n features' samples. rank: int64 ``[n, capacity]``, UNUSED
            marks an empty place. histogram: int64 ``[n, N_BINS]``, of all firings.

    Returns:
        int64 ``[n, N_BANDS, per_band]``: which place of the sample stands there, -1 for none; band 0 is the weakest; a
        random choice, strongest first.
    """
    feature, place = np.nonzero(rank != UNUSED)
    value, position, rank = (array[feature, place] for array in (sample["value"], sample["position"], rank))
    order = np.lexsort((position, value, feature))
    feature, place, value, position, rank = (
        array[order] for array in (feature, place, value, position, rank)
    )
    cell = feature * N_BINS + histogram_bin(value)
    _, inverse, sampled = np.unique(cell, return_inverse=True, return_counts=True)
    n_firings = histogram.sum(axis=1)
    below = (histogram.cumsum(axis=1) - histogram).ravel()[cell]
    within = histogram.ravel()[cell] * (place_in_group(cell) + 0.5) / sampled[inverse]
    band = ((below + within) * N_BANDS / n_firings[feature]).astype(np.int64)

    group = feature * N_BANDS + band
    chosen = np.lexsort((rank, group))
    chosen = chosen[place_in_group(group[chosen]) < per_band]
    chosen = chosen[np.lexsort((position[chosen], -value[chosen], group[chosen]))]
    bands = np.full((len(histogram) * N_BANDS, per_band), -1)
    bands[group[chosen], place_in_group(group[chosen])] = place[chosen]
    return bands.reshape(len(histogram), N_BANDS, per_band)


def feature_blocks(d_sae: int, size: int = 2048) -> Iterator[slice]:
    """Consecutive ranges of features, so that what is made of them fits in memory."""
    for start in range(0, d_sae, size):
        yield slice(start, min(start + size, d_sae))


def _first_of_document(feature: np.ndarray, document: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Which candidates rank first in their stretch of one feature and one document: int64, ascending."""
    is_start = np.ones(len(feature), dtype=bool)
    is_start[1:] = (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return starts
    best = np.flatnonzero(
        rank == np.repeat(np.minimum.reduceat(rank, starts), np.diff(starts, append=len(rank)))
    )
    stretch = np.searchsorted(starts, best, side="right")
    return best[group_starts(stretch)]
