"""Everything that is summed or chosen while the text streams by; saved, taken up again, and merged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activations.blocks import TokenBlocks
from activations.files import new_folder, read_manifest, write_manifest
from features.coactivation import Coactivation
from features.examples import (
    UNUSED,
    Candidates,
    ExampleTable,
    feature_blocks,
    feature_hash,
    position_hash,
    rank_of_hashes,
    strength_rank,
)
from features.firings import Firings
from features.groups import run_starts
from features.layout import NEAR_MISSES, TOP_EXAMPLES
from features.near_misses import near_misses
from features.pair_counts import PairCounts
from features.places import Places
from features.records import read_array, write_array
from features.statistics import ActivationStatistics

STATE = "unfinished feature index"
SAMPLE = 64
"""Firings of each feature in the fair sample: some 6 for each decile, of which PER_BAND are kept."""
_SPARE_MISSES = 6
"""Near misses kept beyond those that are shown, for tokens that turn out not to be the feature's."""


class Gathering:
    """What one pass over (a part of) the text gathers about all features.

    Args:
        folder: where it may keep files. bos_id: the beginning-of-text token, if there is one.
    """

    def __init__(
        self, d_sae: int, d_vocab: int, blocks: TokenBlocks, folder: Path, bos_id: int | None
    ) -> None:
        self.folder = folder
        self._bos_id = -1 if bos_id is None else bos_id
        self.n_positions = 0
        self.vocabulary_count = np.zeros(d_vocab, dtype=np.int64)
        self.bos = np.zeros(d_sae, dtype=np.int64)
        self.special = np.zeros(d_sae, dtype=np.int64)
        self.outlier = np.zeros(d_sae, dtype=np.int64)
        self.left_out = np.zeros(d_sae, dtype=np.int64)
        self.statistics = ActivationStatistics(d_sae)
        self.strongest = ExampleTable(d_sae, TOP_EXAMPLES, one_per_document=True)
        self.sample = ExampleTable(d_sae, SAMPLE, one_per_document=False)
        self.misses = ExampleTable(d_sae, NEAR_MISSES + _SPARE_MISSES, one_per_document=True)
        self.tokens = PairCounts(d_vocab, folder / "tokens", summed=True)
        self.nexts = PairCounts(d_vocab, folder / "nexts", summed=False)
        self.coactive = Coactivation(d_sae, blocks.ids.size)
        self._feature_hash = feature_hash(np.arange(d_sae))
        self._ids = blocks.ids.reshape(-1)
        self._document_of = blocks.documents.reshape(-1)
        self._context_length = blocks.context_length
        self._document_start = _document_starts(self._document_of, len(blocks.names))
        self.places = Places(d_sae, self._document_of, blocks.context_length)

    def add(self, firings: Firings) -> None:
        """Take the next stretch of text."""
        d_sae = len(self.special)
        left_out = np.concatenate([firings.special, firings.outlier])
        self.left_out += np.bincount(left_out, minlength=d_sae)
        self.special += np.bincount(firings.special, minlength=d_sae)
        self.outlier += np.bincount(firings.outlier, minlength=d_sae)
        self.bos += np.bincount(firings.special[firings.special_id == self._bos_id], minlength=d_sae)
        self.n_positions += len(firings.kept)
        if not len(firings.kept):
            return
        self.vocabulary_count += np.bincount(self._ids[firings.kept], minlength=len(self.vocabulary_count))
        feature, position, value = firings.feature, firings.position, firings.value
        self.statistics.add(firings)
        # What is known of each position of this stretch is made once, and looked up for every firing.
        stretch = slice(firings.first, firings.first + firings.n_places)
        ids, documents = self._ids[stretch].astype(np.int64), self._document_of[stretch]
        follower = np.full(len(ids), -1)
        goes_on = documents[1:] == documents[:-1]
        goes_on[self._context_length - 1 :: self._context_length] = False
        follower[:-1][goes_on] = ids[1:][goes_on]
        place = firings.place
        document, token = documents[place], ids[place]
        self.tokens.add(feature, token, value)
        next_token = follower[place]
        followed = np.flatnonzero(next_token >= 0)
        self.nexts.add(feature[followed], next_token[followed])
        self.places.add(firings, document, self._document_start)
        self.coactive.add(firings)

        strength = strength_rank(value)
        hashes = position_hash(np.arange(stretch.start, stretch.stop))
        sampled = rank_of_hashes(self._feature_hash[feature], hashes[place])
        if len(firings.barred):
            is_special, is_outlier = (
                firings.among(places) for places in (firings.kept_special, firings.kept_outlier)
            )
            self.special += np.bincount(feature[is_special], minlength=d_sae)
            self.outlier += np.bincount(feature[is_outlier], minlength=d_sae)
            self.bos += np.bincount(feature[is_special & (token == self._bos_id)], minlength=d_sae)
            strength[is_special | is_outlier] = sampled[is_special | is_outlier] = UNUSED
        for table, rank in ((self.strongest, strength), (self.sample, sampled)):
            table.add(Candidates(feature, position, value, document, rank), firings)
        number = int(position_hash(firings.kept[:1])[0] >> np.uint64(1))
        some = self.strongest.one_of_each(number)
        token_of = np.where(some >= 0, self._ids[some].astype(np.int64), -1)
        self.misses.add(near_misses(firings, token_of, self._ids, self._document_of), firings)

    def save(self, inputs: Mapping[str, Any], n_blocks: int) -> None:
        """Write everything to its folder, so that the pass can go on behind ``n_blocks`` blocks."""
        runs = {name: pairs.spill() for name, pairs in self._pairs.items()}
        with new_folder(self.folder / "state") as new:
            for name, array in self._arrays().items():
                write_array(new / f"{name}.npy", array)
            facts = {name: getattr(self, name) for name in self._FACTS}
            write_manifest(new, STATE, inputs, n_blocks=n_blocks, runs=runs, **facts)
        for pairs in self._pairs.values():
            if pairs.folder.is_dir():
                for path in set(pairs.folder.iterdir()) - pairs.files:
                    path.unlink()

    def resume(self) -> int:
        """Take up what was saved in its folder; how many blocks that covers."""
        state = self.folder / "state"
        manifest = read_manifest(state, STATE)
        for name in self._FACTS:
            setattr(self, name, manifest[name])
        for name, pairs in self._pairs.items():
            pairs.resume([(run, length) for run, length in manifest["runs"][name]])
        for part in self._parts:
            loaded = {
                name.removeprefix(f"{part}."): np.array(read_array(state / f"{name}.npy"))
                for name in self._arrays()
                if name.startswith(f"{part}.")
            }
            self._load(part, loaded)
        return int(manifest["n_blocks"])

    def merge(self, later: "Gathering") -> None:
        """Add what another process gathered from the text behind; its files stay where they are."""
        self.n_positions += later.n_positions
        self.coactive.merge(later.coactive)
        self.places.merge(later.places)
        for mine, theirs in (
            (self.strongest, later.strongest),
            (self.sample, later.sample),
            (self.misses, later.misses),
        ):
            for features in feature_blocks(len(self.special)):
                mine.merge(theirs, features)
        for name in self._COUNTS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.statistics.merge(later.statistics)
        for name, pairs in self._pairs.items():
            pairs.absorb(later._pairs[name])

    _FACTS = ("n_positions",)
    _COUNTS = ("vocabulary_count", "bos", "special", "outlier", "left_out")
    _parts = ("own", "statistics", "strongest", "sample", "misses", "places", "coactive")

    @property
    def _pairs(self) -> dict[str, PairCounts]:
        return {"tokens": self.tokens, "nexts": self.nexts}

    def _arrays(self) -> dict[str, np.ndarray]:
        groups: dict[str, Mapping[str, np.ndarray]] = {
            "own": {name: getattr(self, name) for name in self._COUNTS},
            "statistics": {
                name: getattr(self.statistics, name)
                for name in ("count", "total", "squares", "max", "histogram")
            },
            "strongest": self.strongest.arrays(),
            "sample": self.sample.arrays(),
            "misses": self.misses.arrays(),
            "places": self.places.arrays(),
            "coactive": self.coactive.arrays(),
        }
        return {f"{part}.{name}": array for part, arrays in groups.items() for name, array in arrays.items()}

    def _load(self, part: str, arrays: Mapping[str, np.ndarray]) -> None:
        target = self if part == "own" else getattr(self, part)
        if isinstance(target, ExampleTable | Places | Coactivation):
            target.load(arrays)
            return
        for name, array in arrays.items():
            setattr(target, name, array)


def _document_starts(document_of: np.ndarray, n_documents: int) -> np.ndarray:
    """The first position of every document, int64."""
    begins = run_starts(document_of)
    starts = np.full(n_documents, -1, dtype=np.int64)
    owner = document_of[begins]
    real = owner >= 0
    starts[owner[real][::-1]] = begins[real][::-1]  # of several runs the first
    return starts
