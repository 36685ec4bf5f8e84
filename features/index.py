"""The feature index: what makes each feature fire. Opens in milliseconds, without torch or the model.

:func:`features.build.build_index` writes it; :mod:`features.layout` lists its files.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.blocks import PADDING, TokenBlocks
from activations.errors import InputError
from activations.files import MANIFEST, read_manifest
from activations.strings import StringTable
from activations.tokenizer import byte_pieces
from features.coactive import Coactive
from features.layout import (
    ALL_COLUMNS,
    COUNTED,
    FEATURES,
    IDS,
    KIND,
    LAYOUT,
    N_BANDS,
    QUANTA,
    TEXT,
    TEXT_ARRAYS,
    WINDOW,
    WINDOW_BEFORE,
)
from features.records import fetch_beginnings, read_ahead, read_array, read_arrays
from features.statistics import histogram_quantile
from features.tags import Tag, rules_of
from features.tokens_html import visible
from features.weights import WEIGHTS, WeightIndex

if TYPE_CHECKING:
    from features.run import Run
    from features.tables import FeatureTable

_FILES = (FEATURES, ALL_COLUMNS, IDS, TEXT)
_SHOWN_BYTE = re.compile("<0x([0-9A-F]{2})>")
_REMEMBERED = 16  # features
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so at most as many tokens."""


@dataclass(frozen=True)
class Example:
    """One firing of a feature in its surroundings.

    Attributes:
        document: name of the document it is in.
        position: where in the text of the index: block · context_length + place in the block.
        tokens: exact text of the tokens around it; a character that is spread over several tokens stands at
            the first of them, the others are "".
        activations: float32 ``[len(tokens)]``, the feature's activations there: exact at the peak, elsewhere
            to 0.4% of the largest around it; 0 at positions that do not count.
        peak: which of the tokens this example is about.
        value: the activation there.
    """

    document: str
    position: int
    tokens: list[str]
    activations: np.ndarray
    peak: int
    value: float


@dataclass(frozen=True)
class TokenStatistic:
    """How a feature treats one token of the vocabulary.

    Attributes:
        token, token_id: its display text and id.
        count: how often the feature fires at it (or before it). mean: the mean activation there.
        share: fraction of the feature's firings that are at it (or before it).
        lift: share / fraction of all text that is this token; 1 means the feature does not care.
    """

    token: str
    token_id: int
    count: int
    mean: float
    share: float
    lift: float


class FeatureIndex:
    """A finished index on disk. Statistics are over the positions that count: those that training uses.

    Attributes:
        folder: where it lies.
        manifest: facts, and ``inputs``: what it was made from (sae_hash, model_hash, blocks_hash …).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._run: Run | None = None
        self._record = lru_cache(_REMEMBERED)(self._read_record)

    @classmethod
    def open(cls, folder: str | Path, *, sae_hash: str | None = None) -> "FeatureIndex":
        """Open an index: all of its files are mapped, and read where they are asked for.

        Args:
            sae_hash: if given, the index must have been made with the SAE of this hash.

        Raises:
            InputError: the folder holds no finished index, a damaged one, or one of another SAE.
        """
        folder = Path(folder)
        weights = (folder.parent / "weights", folder / "weights")
        fetch_beginnings(folder / name for name in (MANIFEST, *_FILES))
        fetch_beginnings(path / name for path in weights for name in (MANIFEST, WEIGHTS))
        manifest = read_manifest(folder, KIND)
        if sae_hash is not None and manifest["inputs"]["sae_hash"] != sae_hash:
            raise InputError(f"{folder} was made with another SAE: build the index of this one.")
        if manifest["inputs"].get("layout") != LAYOUT:
            raise InputError(f"{folder} was made by another version of saescope: build the index again.")
        for name in _FILES:
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks {name}: build the index again.")
        index = cls(folder, manifest)
        # All files of one index are mapped now: it may be built anew while this one is in use.
        _ = index._columns, index._records, index._text, index._ids, index._counted, index.weights.records
        return index

    def of_run(self, run: "Run") -> "FeatureIndex":
        """The same index, which knows the run it belongs to: its model, SAE and labels."""
        self._run = run
        return self

    def search(self, query: str, **options: Any) -> "FeatureTable":
        """Features by the words of their labels, top tokens and notes; see :func:`features.search.search`."""
        from features.search import search

        return search(self._of_a_run(), query, **options)

    def active_in(self, text: str, **options: Any) -> "FeatureTable":
        """The features that are active in a text; see :func:`features.active.active_in`."""
        from features.active import active_in

        return active_in(self._of_a_run(), text, **options)

    def contrast(self, a: Sequence[str], b: Sequence[str], **options: Any) -> "FeatureTable":
        """The features that tell two sets of texts apart; see :func:`features.contrast.contrast`."""
        from features.contrast import contrast

        return contrast(self._of_a_run(), a, b, **options)

    def _of_a_run(self) -> "Run":
        if self._run is None:
            raise InputError(
                f"{self.folder} was opened by itself, without model and labels: use open_run(...).index."
            )
        return self._run

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.manifest["d_sae"])

    @property
    def n_tokens(self) -> int:
        """Number of positions that count."""
        return int(self.manifest["n_tokens"])

    @property
    def hook_name(self) -> str:
        """Where in the model."""
        return str(self.manifest["inputs"]["hook_name"])

    @property
    def sae_hash(self) -> str:
        """Hash of the SAE it was made with."""
        return str(self.manifest["inputs"]["sae_hash"])

    @property
    def count(self) -> np.ndarray:
        """int64 ``[d_sae]``, number of positions at which each feature fires."""
        return self.column("count")

    @cached_property
    def density(self) -> np.ndarray:
        """float64 ``[d_sae]``, fraction of positions at which each feature fires."""
        return np.asarray(self.count / self.n_tokens)

    @property
    def mean(self) -> np.ndarray:
        """float32 ``[d_sae]``, mean activation over firings; 0 for a feature that never fired."""
        return self.column("mean")

    @property
    def std(self) -> np.ndarray:
        """float32 ``[d_sae]``, standard deviation of the activation over firings."""
        return self.column("std")

    @property
    def max(self) -> np.ndarray:
        """float32 ``[d_sae]``, largest activation."""
        return self.column("max")

    @property
    def token_entropy(self) -> np.ndarray:
        """float32 ``[d_sae]``, bits: how spread out a feature's firings are over tokens; 0 for a single token."""
        return self.column("entropy")

    def column(self, name: str) -> np.ndarray:
        """One of :data:`features.layout.COLUMNS` for all features ``[d_sae]``, mapped from the file."""
        return self._columns[name]

    def array(self, name: str) -> np.ndarray:
        """One field of the records of all features ``[d_sae, …]``, mapped from the file; see :mod:`features.layout` and
        :func:`features.weights.weight_record`.
        """
        names = self._records.dtype.names or ()
        return self._records[name] if name in names else self.weights.records[name]

    @cached_property
    def _columns(self) -> np.ndarray:
        return read_array(self.folder / ALL_COLUMNS)

    @cached_property
    def _records(self) -> np.ndarray:
        return read_array(self.folder / FEATURES)

    @cached_property
    def _ids(self) -> np.ndarray:
        return read_array(self.folder / IDS)

    @cached_property
    def _counted(self) -> np.ndarray | None:
        return read_array(self.folder / COUNTED) if self.manifest["counted"] else None

    @cached_property
    def _text(self) -> dict[str, np.ndarray]:
        arrays = read_arrays(self.folder / TEXT)
        if missing := set(TEXT_ARRAYS) - set(arrays):
            raise InputError(f"{self.folder / TEXT} lacks {min(missing)}: build the index again.")
        return arrays

    @cached_property
    def weights(self) -> WeightIndex:
        """What the weights alone tell."""
        beside = self.folder.parent / "weights"
        with suppress(InputError):  # there may be anything
            found = WeightIndex.open(beside)
            if found.manifest["inputs"]["sae_hash"] == self.sae_hash:
                return found
        return WeightIndex.open(self.folder / "weights")

    @property
    def decoder_map(self) -> np.ndarray | None:
        """float32 ``[d_sae, 2]``, a place in the plane for every decoder row; None before it is made."""
        return self.weights.decoder_map

    @property
    def vocabulary(self) -> Sequence[str]:
        """Display text of every token id; a lone byte of a character shows as ``<0xE2>``."""
        return self._vocabulary

    @cached_property
    def blocks(self) -> TokenBlocks:
        """The text of the index."""
        starts = self._text["run_start"]
        documents = np.repeat(self._text["run_document"], np.diff(starts, append=self._ids.size))
        facts = {name: self.manifest[name] for name in ("split", "packing", "bos")}
        return TokenBlocks(
            ids=self._ids,
            documents=documents.reshape(self._ids.shape),
            names=list(self._documents),
            counted=self._counted,
            **facts,
        )

    @cached_property
    def histogram_edges(self) -> np.ndarray:
        """float32 ``[n_bins + 1]``, log-spaced; what lies outside is counted in the first or last bin."""
        return np.array(self.manifest["histogram_edges"], dtype=np.float32)

    def fetch(self, feature: int) -> None:
        """Have the system read everything about a feature, which is then at hand: its page waits for the disk once."""
        self._record(self._checked(feature))

    def histogram(self, feature: int) -> np.ndarray:
        """int64 ``[n_bins]``, firings by activation: ``edges[i] <= a < edges[i + 1]``."""
        return self._row("histogram", feature).astype(np.int64)

    def quantile(self, feature: int, q: float) -> float:
        """The activation below which a fraction ``q`` of firings lies, to within a bin of the histogram."""
        return histogram_quantile(
            self.histogram(feature), self.histogram_edges, float(self.max[self._checked(feature)]), q
        )

    def top_examples(self, feature: int, width: int = WINDOW) -> list[Example]:
        """The strongest firings, strongest first, at most one per document, ``width`` tokens around each.

        More than WINDOW tokens are read and encoded again, which needs the run that the index belongs to.
        """
        return self._examples("top", self._checked(feature), width)

    def near_misses(self, feature: int, width: int = WINDOW) -> list[Example]:
        """Places of the feature's own tokens where it is silent, at most one per document; ``value`` is 0."""
        return self._examples("miss", self._checked(feature), width)

    def range_examples(self, feature: int, width: int = WINDOW) -> list[tuple[str, list[Example]]]:
        """A random choice of firings from each tenth of them by activation, the strongest ("90–100%") first.

        Each band holds a tenth of all firings (see :func:`features.examples.quantile_bands`); bands without
        an example, of features that fired a few times only, are left out.
        """
        feature = self._checked(feature)
        bands = []
        for band in reversed(range(N_BANDS)):
            if examples := self._examples("range", feature, width, band):
                name = f"{100 * band // N_BANDS}–{100 * (band + 1) // N_BANDS}%"
                bands.append((name, examples))
        return bands

    def top_tokens(self, feature: int) -> list[TokenStatistic]:
        """The tokens at which the feature fires, those with the largest sum of activations first."""
        return self._tokens("token", feature, self._row("token_mean", feature))

    def next_tokens(self, feature: int) -> list[TokenStatistic]:
        """The tokens that follow its firings in the same document, the most frequent first; their mean is nan."""
        ids = self._row("next_id", feature)
        return self._tokens("next", feature, np.full(len(ids), np.nan))

    def coactive(self, feature: int) -> list[Coactive]:
        """The features that fire at the same positions, the most alike (Jaccard) first; counted on a sample."""
        ids, both, others = (self._row(f"coactive_{name}", feature) for name in ("id", "count", "sampled"))
        both, others, ids = (array[ids >= 0].astype(np.int64) for array in (both, others, ids))
        own = np.full(len(ids), self.column("sampled")[feature], np.int64)
        return Coactive.of(ids, both, own, others, int(self.manifest["n_sampled"]))

    def tags(self, feature: int) -> list[Tag]:
        """What rules say of it; see :data:`features.tags.RULES`."""
        tags = []
        for rule in rules_of(int(self.column("tags")[self._checked(feature)])):
            about = ""
            if rule.name == "duplicate":
                about = f" of {self.neighbours(feature)[0][0]}"
            elif rule.name == "single token":
                most = max(self.top_tokens(feature), key=lambda token: token.count)
                about = f" ‹{visible(most.token)}›"
            elif rule.name == "says":
                promoted = {token_id for _, token_id, _ in self.promoted(feature)}
                said = [token for token in self.next_tokens(feature) if token.token_id in promoted]
                about = f" ‹{visible(said[0].token)}›" if said else ""
            tags.append(Tag(rule.name, rule.name + about, rule.tooltip))
        return tags

    def _tokens(self, name: str, feature: int, means: np.ndarray) -> list[TokenStatistic]:
        ids, counts = self._row(f"{name}_id", feature), self._row(f"{name}_count", feature)
        base, n_firings = self._text["vocabulary_count"], int(self.count[feature])
        statistics = []
        for token_id, count, mean in zip(ids, counts, means, strict=True):
            if token_id >= 0:
                share = int(count) / n_firings
                rate = int(base[token_id]) / self.n_tokens
                lift = share / rate if rate else float("nan")  # a token that never counts where features fire
                statistics.append(
                    TokenStatistic(
                        self.vocabulary[token_id], int(token_id), int(count), float(mean), share, lift
                    )
                )
        return statistics

    def promoted(self, feature: int) -> list[tuple[str, int, float]]:
        """Tokens whose logit the feature raises most: (display text, id, logit per unit of activation).

        The logit lens, less its mean over the vocabulary; empty where the hook is not on the residual stream
        (``mlp.hook_post``, ``attn.hook_z``) or the model's final normalisation is not known.
        """
        return self._lens("promoted", feature)

    def suppressed(self, feature: int) -> list[tuple[str, int, float]]:
        """Tokens whose logit the feature lowers most, the lowest first; see :meth:`promoted`."""
        return self._lens("suppressed", feature)

    def neighbours(self, feature: int) -> list[tuple[int, float]]:
        """The features with the most similar decoder rows: (feature, cosine), nearest first.

        Of an SAE too wide to keep those of all features they are worked out now.
        """
        feature = self._checked(feature)
        if self.d_sae == 1:
            return []
        if not self.weights.has_neighbours:
            from features.weights import neighbours_of

            return neighbours_of(self._of_a_run().sae, feature)
        ids, cosines = self._row("neighbour_id", feature), self._row("neighbour_cosine", feature)
        return [(int(i), float(cosine)) for i, cosine in zip(ids, cosines, strict=True) if i >= 0]

    def pieces(self, start: int, stop: int) -> list[str]:
        """Exact text of the tokens at positions ``start`` to ``stop`` (of one block), one string per token.

        A character that is spread over several tokens stands at the first of them, the others are "".
        """
        context = self._ids.shape[1]
        block = start - start % context
        # A character may begin before the first of them, or end after the last.
        begin = max(start - _LONGEST_CHARACTER + 1, block)
        end = min(stop + _LONGEST_CHARACTER - 1, block + context)
        ids = self._ids.reshape(-1)[begin:end].tolist()
        seen = self._seen_tokens
        shown = [seen[i] if i in seen else self._shown(i) for i in ids]
        if "<0x" not in "".join(shown):
            return shown[start - begin : stop - begin]
        return byte_pieces([self._token_bytes(i) for i in ids])[start - begin : stop - begin]

    def _shown(self, token_id: int) -> str:
        """The display text of a token, remembered: most tokens occur many times in a page."""
        text = self._seen_tokens.get(token_id)
        if text is None:
            text = self._seen_tokens[token_id] = self._vocabulary[token_id]
        return text

    @cached_property
    def _seen_tokens(self) -> dict[int, str]:
        return {}

    @cached_property
    def _vocabulary(self) -> StringTable:
        return StringTable(self._text["vocabulary"], self._text["vocabulary_offsets"])

    @cached_property
    def _documents(self) -> StringTable:
        return StringTable(self._text["documents"], self._text["documents_offsets"])

    @cached_property
    def _padding_starts(self) -> np.ndarray:
        return np.asarray(self._text["run_start"][self._text["run_document"] == PADDING])

    def _checked(self, feature: int) -> int:
        if not 0 <= feature < self.d_sae:
            raise InputError(
                f"Feature {feature} does not exist: the features of this SAE are 0 to {self.d_sae - 1}."
            )
        return feature

    def _row(self, name: str, feature: int) -> np.ndarray:
        feature = self._checked(feature)
        record = self._record(feature)
        names = record.dtype.names or ()
        value: np.ndarray = record[name] if name in names else self.weights.records[feature][name]
        return value

    def _read_record(self, feature: int) -> np.ndarray:
        """Everything about one feature, in one read; ``_record`` remembers it for a while."""
        here, behind = np.array([feature]), np.array([feature + 1])
        for array in (self._records, self.weights.records, self._columns):
            read_ahead(array, here, behind)
        record = self._records[feature].copy()
        places = [record[f"{group}_position"].reshape(-1) for group in ("top", "range", "miss")]
        position = np.concatenate(places).astype(np.int64)
        position = position[position >= 0]
        ids = self._ids.reshape(-1)
        read_ahead(ids, (position - WINDOW_BEFORE).clip(min=0), (position + WINDOW).clip(max=len(ids)))
        return record

    def _lens(self, name: str, feature: int) -> list[tuple[str, int, float]]:
        feature = self._checked(feature)
        if not self.weights.has_logit_lens:
            return []
        ids, logits = self._row(f"{name}_id", feature), self._row(f"{name}_logit", feature)
        return [
            (self.vocabulary[i], int(i), float(logit)) for i, logit in zip(ids, logits, strict=True) if i >= 0
        ]

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token's display text stands for."""
        parts = _SHOWN_BYTE.split(self._shown(token_id))  # text, byte, text, byte, …, text
        return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))

    def _examples(self, group: str, feature: int, width: int, band: int | None = None) -> list[Example]:
        if width < 1:
            raise InputError(f"An example {width} tokens wide cannot be shown: the width must be at least 1.")
        if width > WINDOW:
            from features.wide import widened

            run = self._of_a_run()
            kept = self._examples(group, feature, WINDOW, band)
            return widened(run, kept, feature, width, width * WINDOW_BEFORE // WINDOW)
        record = self._record(feature)
        position, scale, window = (
            record[f"{group}_{name}"] if band is None else record[f"{group}_{name}"][band]
            for name in ("position", "scale", "window")
        )
        value = np.zeros_like(scale)
        if group != "miss":
            value = record[f"{group}_value"] if band is None else record[f"{group}_value"][band]
        there = position >= 0
        places = position[there].astype(np.int64)
        starts, stops, documents = self._surroundings(places, width)
        activations = window[there].astype(np.float32) * (scale[there, None] / np.float32(QUANTA))
        examples = []
        for i, (place, start, stop) in enumerate(zip(places.tolist(), starts, stops, strict=True)):
            first = start - place + WINDOW_BEFORE
            around, peak = activations[i, first : first + stop - start].copy(), place - start
            around[peak] = value[there][i]
            name, tokens = self._documents[documents[i]], self.pieces(start, stop)
            examples.append(Example(name, place, tokens, around, peak, float(value[there][i])))
        return examples

    def _surroundings(self, position: np.ndarray, width: int) -> tuple[list[int], list[int], list[int]]:
        """The first position of ``width`` around each of some, the one behind the last, and the document's number."""
        context = self._ids.shape[1]
        block = position - position % context
        before = (width - 1) * WINDOW_BEFORE // (WINDOW - 1)
        start = np.maximum(position - before, block)
        stop = np.minimum(position - before + width, block + context)
        run = np.searchsorted(self._text["run_start"], position, side="right") - 1
        if len(self._padding_starts):
            padding = np.searchsorted(self._padding_starts, position)
            next_padding = self._padding_starts[padding.clip(max=len(self._padding_starts) - 1)]
            stop = np.where(padding < len(self._padding_starts), np.minimum(stop, next_padding), stop)
        return start.tolist(), stop.tolist(), self._text["run_document"][run].tolist()
