"""Examples of every feature's firings, chosen while the text streams by.

Two choices, by one mechanism: each feature keeps the few firings that rank first. For the strongest examples
the rank is the activation (and of one document only the strongest firing is kept); for a fair sample of all
firings it is a hash of feature and position, which is a uniform sample without replacement whatever the order
and the cuts of the stream. After the pass the sample is sorted into quantile bands.
"""

import numpy as np

from features.firings import Firings
from features.groups import group_starts, place_in_group
from features.layout import N_BANDS, WINDOW
from features.statistics import N_BINS, histogram_bin

EXAMPLE = np.dtype(
    [
        ("rank", np.int64),  # the smaller, the better; UNUSED marks an empty place
        ("position", np.int64),
        ("document", np.int32),
        ("value", np.float32),
        ("scale", np.float32),
        ("window", np.uint8, (WINDOW,)),
    ]
)
"""One example as it is kept in memory; window and scale as :meth:`Firings.windows` gives them."""
RANK_BITS = 40
UNUSED = (1 << RANK_BITS) - 1


def strength_rank(value: np.ndarray) -> np.ndarray:
    """Ranks that put larger activations first: the bits of a positive float grow with it."""
    return (0x7FFFFFFF - value.view(np.int32)).astype(np.int64)


def sampling_rank(feature: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Ranks in an order that is random, but the same in every run: a hash of feature and position."""
    mixed = _splitmix64(_splitmix64(position.astype(np.uint64)) ^ feature.astype(np.uint64))
    return np.minimum(mixed >> np.uint64(64 - RANK_BITS), np.uint64(UNUSED - 1)).astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ExampleTable:
    """For every feature the ``capacity`` firings with the smallest ranks; of equal ranks, the earlier ones.

    Attributes:
        table: EXAMPLE ``[d_sae, capacity]``, best first; the places left over have rank UNUSED, position -1.
    """

    def __init__(self, d_sae: int, capacity: int, *, one_per_document: bool) -> None:
        self.one_per_document = one_per_document
        self.table = blank_examples(d_sae, capacity)

    def add(self, firings: Firings, rank: np.ndarray, document: np.ndarray) -> None:
        """Let firings compete for the places.

        Args:
            firings: m of them, later in the text than those before.
            rank: int64 ``[m]``, below UNUSED. document: int32 ``[m]``.
        """
        # Later firings lose ties, so only a strictly better rank displaces the worst of those kept.
        if self.one_per_document:
            rivals = _first_of_document(firings.feature, document, rank)
            rivals = rivals[rank[rivals] < self.table["rank"][firings.feature[rivals], -1]]
        else:
            rivals = np.flatnonzero(rank < self.table["rank"][firings.feature, -1])
        starts = group_starts(firings.feature[rivals])
        features = firings.feature[rivals[starts]]
        rival_row = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rivals)))
        held = self.table[features]
        row, place = np.nonzero(held["rank"] != UNUSED)
        held = held[row, place]
        n_held = len(held)

        row = np.concatenate([row, rival_row])
        pool_rank = np.concatenate([held["rank"], rank[rivals]])
        pool_document = np.concatenate([held["document"], document[rivals]])
        order = np.argsort(row << RANK_BITS | pool_rank, kind="stable")
        if self.one_per_document:
            owner = row[order] << 32 | pool_document[order]
            order = order[np.sort(np.unique(owner, return_index=True)[1])]
        place = place_in_group(row[order])
        fits = place < self.table.shape[1]
        order, place = order[fits], place[fits]

        is_new = order >= n_held
        new = rivals[order[is_new] - n_held]
        winners = np.empty(len(order), EXAMPLE)
        winners[~is_new] = held[order[~is_new]]
        # Windows are cut out for those that won only: most rivals never need one.
        winners[is_new] = _examples(firings, new, rank[new], document[new])
        self.table[features] = blank_examples(1, 1)[0]
        self.table[features[row[order]], place] = winners


def quantile_bands(sample: np.ndarray, histogram: np.ndarray, per_band: int) -> np.ndarray:
    """Sort a uniform sample of each feature's firings into N_BANDS bands that hold equally many firings each.

    Which band an example is in depends on the fraction of all firings below it. The histogram gives that
    exactly at the edges of its bins; within a bin it is read off the example's place among the sample in that
    bin. It is exact for a feature whose firings are all in the sample, and never wrong by more than what one
    bin holds.

    Args:
        sample: EXAMPLE ``[d_sae, capacity]``. histogram: int64 ``[d_sae, N_BINS]``, of all firings.

    Returns:
        EXAMPLE ``[d_sae, N_BANDS, per_band]``: band 0 is the weakest; a random choice, strongest first.
    """
    feature, place = np.nonzero(sample["rank"] != UNUSED)
    examples = sample[feature, place]
    order = np.lexsort((examples["position"], examples["value"], feature))
    examples, feature = examples[order], feature[order]

    cell = feature * N_BINS + histogram_bin(examples["value"])
    _, inverse, sampled = np.unique(cell, return_inverse=True, return_counts=True)
    n_firings = histogram.sum(axis=1)
    below = (histogram.cumsum(axis=1) - histogram).ravel()[cell]
    within = histogram.ravel()[cell] * (place_in_group(cell) + 0.5) / sampled[inverse]
    band = ((below + within) * N_BANDS / n_firings[feature]).astype(np.int64)

    group = feature * N_BANDS + band
    chosen = np.lexsort((examples["rank"], group))
    chosen = chosen[place_in_group(group[chosen]) < per_band]
    chosen = chosen[np.lexsort((examples["position"][chosen], -examples["value"][chosen], group[chosen]))]
    bands = blank_examples(len(sample) * N_BANDS, per_band)
    bands[group[chosen], place_in_group(group[chosen])] = examples[chosen]
    return bands.reshape(len(sample), N_BANDS, per_band)


def blank_examples(*shape: int) -> np.ndarray:
    """Empty places: EXAMPLE of this shape."""
    blank = np.zeros(shape, EXAMPLE)
    blank["rank"] = UNUSED
    blank["position"] = -1
    return blank


def _first_of_document(feature: np.ndarray, document: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Which firings rank first in their stretch of one feature and one document: int64, ascending."""
    is_start = (np.diff(feature, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return starts
    stretch = is_start.cumsum() - 1
    best = np.flatnonzero(rank == np.minimum.reduceat(rank, starts)[stretch])
    return best[group_starts(stretch[best])]


def _examples(firings: Firings, chosen: np.ndarray, rank: np.ndarray, document: np.ndarray) -> np.ndarray:
    examples = np.empty(len(chosen), EXAMPLE)
    examples["rank"] = rank
    examples["position"] = firings.position[chosen]
    examples["document"] = document
    examples["value"] = firings.value[chosen]
    examples["window"], examples["scale"] = firings.windows(chosen)
    return examples
