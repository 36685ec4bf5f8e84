"""The feature index: what makes each feature fire. Opens in milliseconds, without torch or the model.

:func:`features.build.build_index` writes it; :mod:`features.layout` lists its files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from activations.blocks import PADDING, TokenBlocks
from activations.errors import InputError
from activations.files import read_manifest
from activations.strings import StringTable
from activations.tokenizer import byte_pieces
from features.layout import ARRAYS, KIND, LENS_ARRAYS, N_BANDS, QUANTA, WINDOW, WINDOW_BEFORE
from features.statistics import histogram_quantile

_SHOWN_BYTE = re.compile("<0x([0-9A-F]{2})>")
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
        count: how often the feature fires at it. mean: the mean activation there.
        share: fraction of the feature's firings that are at it.
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

    def __init__(self, folder: Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._arrays = arrays

    @classmethod
    def open(cls, folder: str | Path, *, sae_hash: str | None = None) -> "FeatureIndex":
        """Open an index.

        Args:
            sae_hash: if given, the index must have been made with the SAE of this hash.

        Raises:
            InputError: the folder holds no finished index, a damaged one, or one of another SAE.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        if sae_hash is not None and manifest["inputs"]["sae_hash"] != sae_hash:
            raise InputError(f"{folder} was made with another SAE: build the index of this one.")
        arrays = {}
        for name in (*ARRAYS, *(LENS_ARRAYS if manifest["logit_lens"] else ())):
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path} cannot be read ({error}): build the index again.") from None
        return cls(folder, manifest, arrays)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self._arrays["count"])

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
        return self._arrays["count"]

    @cached_property
    def density(self) -> np.ndarray:
        """float64 ``[d_sae]``, fraction of positions at which each feature fires."""
        return np.asarray(self.count / self.n_tokens)

    @property
    def mean(self) -> np.ndarray:
        """float32 ``[d_sae]``, mean activation over firings; 0 for a feature that never fired."""
        return self._arrays["mean"]

    @property
    def std(self) -> np.ndarray:
        """float32 ``[d_sae]``, standard deviation of the activation over firings."""
        return self._arrays["std"]

    @property
    def max(self) -> np.ndarray:
        """float32 ``[d_sae]``, largest activation."""
        return self._arrays["max"]

    @property
    def vocabulary(self) -> Sequence[str]:
        """Display text of every token id; a lone byte of a character shows as ``<0xE2>``."""
        return self._vocabulary

    @cached_property
    def blocks(self) -> TokenBlocks:
        """The text of the index."""
        ids = self._arrays["ids"]
        starts = self._arrays["run_start"]
        documents = np.repeat(self._arrays["run_document"], np.diff(starts, append=ids.size))
        facts = {name: self.manifest[name] for name in ("split", "packing", "bos")}
        return TokenBlocks(
            ids=ids, documents=documents.reshape(ids.shape), names=list(self._documents), **facts
        )

    @property
    def histogram_edges(self) -> np.ndarray:
        """float32 ``[n_bins + 1]``, log-spaced; what lies outside is counted in the first or last bin."""
        return self._arrays["histogram_edges"]

    def histogram(self, feature: int) -> np.ndarray:
        """int64 ``[n_bins]``, firings by activation: ``edges[i] <= a < edges[i + 1]``."""
        return self._row("histogram", feature).astype(np.int64)

    def quantile(self, feature: int, q: float) -> float:
        """The activation below which a fraction ``q`` of firings lies, to within a bin of the histogram."""
        return histogram_quantile(
            self.histogram(feature), self.histogram_edges, float(self.max[self._checked(feature)]), q
        )

    def top_examples(self, feature: int, width: int = WINDOW) -> list[Example]:
        """The strongest firings, strongest first, at most one per document, ``width`` tokens around each."""
        return self._examples("top", self._checked(feature), width)

    def range_examples(self, feature: int, width: int = WINDOW) -> list[tuple[str, list[Example]]]:
        """A random choice of firings from each fifth of them by activation, the strongest ("80–100%") first.

        Each band holds a fifth of all firings (see :func:`features.examples.quantile_bands`); bands without
        an example, of features that fired a few times only, are left out.
        """
        feature = self._checked(feature)
        bands = []
        for band in reversed(range(N_BANDS)):
            if examples := self._examples("range", (feature, band), width):
                name = f"{100 * band // N_BANDS}–{100 * (band + 1) // N_BANDS}%"
                bands.append((name, examples))
        return bands

    def top_tokens(self, feature: int) -> list[TokenStatistic]:
        """The tokens at which the feature fires, those with the largest sum of activations first."""
        ids, counts = self._row("token_id", feature), self._row("token_count", feature)
        base = self._arrays["vocabulary_count"]
        statistics = []
        for token_id, count, mean in zip(ids, counts, self._row("token_mean", feature), strict=True):
            if token_id >= 0:
                share = float(count) / float(self.count[feature])
                lift = share * self.n_tokens / float(base[token_id])
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
        """The features with the most similar decoder rows: (feature, cosine), nearest first."""
        ids, cosines = self._row("neighbour_id", feature), self._row("neighbour_cosine", feature)
        return [(int(i), float(cosine)) for i, cosine in zip(ids, cosines, strict=True)]

    def pieces(self, start: int, stop: int) -> list[str]:
        """Exact text of the tokens at positions ``start`` to ``stop`` (of one block), one string per token.

        A character that is spread over several tokens stands at the first of them, the others are "".
        """
        context = self._arrays["ids"].shape[1]
        block = start - start % context
        # A character may begin before the first of them, or end after the last.
        begin = max(start - _LONGEST_CHARACTER + 1, block)
        end = min(stop + _LONGEST_CHARACTER - 1, block + context)
        ids = self._arrays["ids"].reshape(-1)[begin:end]
        return byte_pieces([self._token_bytes(int(i)) for i in ids])[start - begin : stop - begin]

    @cached_property
    def _vocabulary(self) -> StringTable:
        return StringTable(self._arrays["vocabulary"], self._arrays["vocabulary_offsets"])

    @cached_property
    def _documents(self) -> StringTable:
        return StringTable(self._arrays["documents"], self._arrays["documents_offsets"])

    @cached_property
    def _padding_starts(self) -> np.ndarray:
        return np.asarray(self._arrays["run_start"][self._arrays["run_document"] == PADDING])

    def _checked(self, feature: int) -> int:
        if not 0 <= feature < self.d_sae:
            raise InputError(
                f"Feature {feature} does not exist: the features of this SAE are 0 to {self.d_sae - 1}."
            )
        return feature

    def _row(self, name: str, feature: int) -> np.ndarray:
        return self._arrays[name][self._checked(feature)]

    def _lens(self, name: str, feature: int) -> list[tuple[str, int, float]]:
        feature = self._checked(feature)
        if not self.manifest["logit_lens"]:
            return []
        ids, logits = self._row(f"{name}_id", feature), self._row(f"{name}_logit", feature)
        return [(self.vocabulary[i], int(i), float(logit)) for i, logit in zip(ids, logits, strict=True)]

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token's display text stands for."""
        parts = _SHOWN_BYTE.split(self.vocabulary[token_id])  # text, byte, text, byte, …, text
        return b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))

    def _examples(self, group: str, row: int | tuple[int, int], width: int) -> list[Example]:
        if not 1 <= width <= WINDOW:
            raise InputError(
                f"An example {width} tokens wide cannot be shown: the width must be 1 to {WINDOW}."
            )
        position, value, scale, window = (
            self._arrays[f"{group}_{name}"][row] for name in ("position", "value", "scale", "window")
        )
        return [
            self._example(
                int(position[i]), float(value[i]), window[i] * (scale[i] / np.float32(QUANTA)), width
            )
            for i in np.flatnonzero(position >= 0)
        ]

    def _example(self, position: int, value: float, window: np.ndarray, width: int) -> Example:
        """``window``: float32 [WINDOW], activations from ``position - WINDOW_BEFORE`` on."""
        context = self._arrays["ids"].shape[1]
        block = position - position % context
        before = (width - 1) * WINDOW_BEFORE // (WINDOW - 1)
        start = max(position - before, block)
        stop = min(position - before + width, block + context)
        padding = np.searchsorted(self._padding_starts, position)
        if padding < len(self._padding_starts):
            stop = min(stop, int(self._padding_starts[padding]))
        run = np.searchsorted(self._arrays["run_start"], position, side="right") - 1
        first = start - position + WINDOW_BEFORE
        activations = window[first : first + stop - start].astype(np.float32)
        activations[position - start] = value
        return Example(
            document=self._documents[int(self._arrays["run_document"][run])],
            position=position,
            tokens=self.pieces(start, stop),
            activations=activations,
            peak=position - start,
            value=value,
        )
