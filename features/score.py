"""How well does a label predict when its feature fires? Measured on documents nobody made labels from.

A label here is a predicate over the tokens around a position. For each feature, over all positions of the
score split that the SAE's exclusion keeps::

    precision = share of the predicate's positions on which the feature fires
    recall    = share of the feature's firings on which the predicate holds
    F1        = 2 · precision · recall / (precision + recall)

"Fires" means an activation above 0, however weak: what every other figure and picture of the toolkit calls
firing. (Many published scores look only at the strongest activations, where every label does better.)
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.firings import Firings, stream_firings
from sae.model import SparseAutoencoder

Place = Literal["current", "previous", "next", "pair"]
NO_KEY = -1
"""The key of a position that has none: nothing is before the first token of a block, or after its last."""


def position_keys(ids: np.ndarray, place: Place, vocab_size: int) -> np.ndarray:
    """What a predicate looks at, as one number per position.

    Args:
        ids: token ids ``[n_blocks, context]``.
        place: the token itself (``"current"``), the one before it, the one after it, or ``"pair"``: the one
            before and the token itself, as ``previous · vocab_size + current``.

    Returns:
        int64 ``[n_blocks · context]``, :data:`NO_KEY` where there is no such token in the block.
    """
    ids = ids.astype(np.int64)
    keys = np.full_like(ids, NO_KEY)
    if place == "current":
        keys[:] = ids
    elif place == "next":
        keys[:, :-1] = ids[:, 1:]
    elif place == "previous":
        keys[:, 1:] = ids[:, :-1]
    else:
        keys[:, 1:] = ids[:, :-1] * vocab_size + ids[:, 1:]
    return keys.reshape(-1)


@dataclass(frozen=True)
class Predicates:
    """One predicate per feature, all about the same place: "its key is one of this feature's".

    Attributes:
        place: what the predicates look at, see :func:`position_keys`.
        features, keys: int64 ``[m]``, the sets as (feature, key) pairs, no pair twice; a feature without
            pairs has a predicate that never holds.
    """

    place: Place
    features: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What precision and recall are made of.

    Attributes:
        hits: int64 ``[n_predicates, d_sae]``, positions where the predicate holds and the feature fires.
        predicted: int64 ``[n_predicates, d_sae]``, positions where the predicate holds.
        fired: int64 ``[d_sae]``, positions where the feature fires.
        n_positions: all positions.
    """

    hits: np.ndarray
    predicted: np.ndarray
    fired: np.ndarray
    n_positions: int

    @property
    def precision(self) -> np.ndarray:
        """float64 ``[n_predicates, d_sae]``, nan where the predicate holds nowhere."""
        return _ratio(self.hits, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """float64 ``[n_predicates, d_sae]``, nan where the feature never fires."""
        return _ratio(self.hits, self.fired)

    @property
    def f1(self) -> np.ndarray:
        """float64 ``[n_predicates, d_sae]``, nan where the feature never fires and none is predicted to."""
        return _ratio(2 * self.hits, self.predicted + self.fired)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def count_predictions(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    predicates: Sequence[Predicates],
    *,
    progress: Progress = silent,
) -> Counts:
    """Compare predicates with firings over all of ``blocks``, in one pass over all features at once."""
    counters = [_Counter(p, blocks.ids, sae.d_sae, model.tokenizer.vocab_size) for p in predicates]
    fired = np.zeros(sae.d_sae, dtype=np.int64)
    n_positions = 0
    stream = stream_firings(model, sae, blocks)
    with progress("score labels", total=blocks.ids.size, unit="tokens") as step, closing(stream):
        for firings, n_blocks in stream:
            fired += np.bincount(firings.feature, minlength=sae.d_sae)
            n_positions += len(firings.kept)
            for counter in counters:
                counter.add(firings)
            step(n_blocks * blocks.context_length)
    hits = np.array([counter.hits for counter in counters])
    return Counts(hits, np.array([counter.predicted() for counter in counters]), fired, n_positions)


class _Counter:
    """Counts for one :class:`Predicates`.

    Keys are renumbered 0 … n − 1 among those that any feature's predicate names, and the pairs become the
    sorted numbers ``feature · n + key``, so that "is this firing predicted?" is one binary search.
    """

    def __init__(self, predicates: Predicates, ids: np.ndarray, d_sae: int, vocab_size: int) -> None:
        self.d_sae = d_sae
        self.known, self.number = np.unique(predicates.keys, return_inverse=True)
        self.features = predicates.features
        self.pairs = np.sort(self.features * len(self.known) + self.number)
        self.number_at = find(self.known, position_keys(ids, predicates.place, vocab_size))
        self.positions_of_key = np.zeros(len(self.known), dtype=np.int64)
        self.hits = np.zeros(d_sae, dtype=np.int64)

    def add(self, firings: Firings) -> None:
        number = self.number_at[firings.kept]
        self.positions_of_key += np.bincount(number[number >= 0], minlength=len(self.known))
        number = self.number_at[firings.position]
        named = number >= 0
        feature = firings.feature[named]
        predicted = find(self.pairs, feature * len(self.known) + number[named]) >= 0
        self.hits += np.bincount(feature[predicted], minlength=self.d_sae)

    def predicted(self) -> np.ndarray:
        """Positions where each feature's predicate holds, ``[d_sae]``; its keys exclude each other."""
        out = np.zeros(self.d_sae, dtype=np.int64)
        np.add.at(out, self.features, self.positions_of_key[self.number])
        return out


def find(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where each value stands in a sorted table of distinct numbers, −1 if it does not: int64."""
    if not len(table):
        return np.full(len(values), -1)
    place = np.searchsorted(table, values).clip(max=len(table) - 1)
    return np.where(table[place] == values, place, -1)
