"""The firings of a stretch of text, in the order that everything which sums over features wants them.

A pass over a corpus yields one :class:`Firings` after another: the sparse codes of some ten thousand
positions, grouped by feature. Nothing is ever dense in features.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import (
    BlockRanges,
    blocks_per_batch,
    capture_range,
    capture_ranges,
    counted_positions,
    kept_at_all,
)
from activations.errors import InputError
from activations.exclusion import norms
from activations.models import LanguageModel
from activations.store import HookActivations
from features.groups import group_starts
from features.layout import QUANTA, WINDOW, WINDOW_BEFORE
from sae.codes import SparseCodes
from sae.model import SparseAutoencoder

ENCODE_POSITIONS = 8_192
"""Positions that are encoded at once: bounds the memory of their activations."""
CHUNK_FIRINGS = 1 << 20
FIRINGS_PER_FEATURE = 32
"""Firings that are sorted at once, and at least so many for each feature: with fewer, more time goes into merging what
was kept before."""

OUTLIER_FACTOR = 10
NORM_BLOCKS = 16
"""Norms above so many times the median of the first blocks are outliers, where the SAE sets no bound of its own."""

_NONE = np.zeros(0, dtype=np.int64)

T = TypeVar("T")


@dataclass(frozen=True)
class Firings:
    """The firings of consecutive blocks, sorted by feature and then by position.

    Attributes:
        feature: int64 ``[m]``.
        position: int64 ``[m]``, block · context_length + place in the block.
        value: float32 ``[m]``, the activations, all positive.
        kept: int64 ``[n]``, the positions that count, ascending, whether anything fired there or not.
        context_length: positions per block.
        special, outlier: int64, the features that fire at positions that are left out as special tokens or for their
            norm; each once for every such position. special_id: int64, which token that is.
        kept_special, kept_outlier: int64, ascending: special tokens and outliers that count, since the SAE was trained
            on them, but make no telling example.
    """

    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray
    kept: np.ndarray
    context_length: int
    special: np.ndarray
    special_id: np.ndarray
    outlier: np.ndarray
    kept_special: np.ndarray
    kept_outlier: np.ndarray

    @classmethod
    def of(
        cls,
        codes: SparseCodes,
        kept: np.ndarray,
        context_length: int,
        special: np.ndarray = _NONE,
        special_id: np.ndarray = _NONE,
        outlier: np.ndarray = _NONE,
        kept_special: np.ndarray = _NONE,
        kept_outlier: np.ndarray = _NONE,
    ) -> "Firings":
        """Group ``codes`` of n rows by feature; ``kept`` int64 ``[n]`` is the position of each row.

        Raises:
            InputError: an activation is negative: "strongest" would mean two things.
        """
        rows, features, values = (entry.cpu().numpy() for entry in codes.entries())
        if len(values) and values.min() < 0:
            raise InputError("This SAE has negative activations; an index is made of positive ones only.")
        # (feature, entry) in one word: sorting words is several times as fast as a stable argsort.
        packed = features << 32
        packed |= np.arange(len(features))
        packed.sort()
        order = packed & 0xFFFFFFFF
        packed >>= 32
        value = values[order].astype(np.float32, copy=False)
        position = kept[rows[order]]
        apart = special, special_id, outlier, kept_special, kept_outlier
        return cls(packed, position, value, kept, context_length, *apart)

    @cached_property
    def barred(self) -> np.ndarray:
        """Positions that make no example: int64, ascending."""
        return np.union1d(self.kept_special, self.kept_outlier)

    @cached_property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The features that fire, ascending, and where the firings of each begin: int64 ``[g]`` each."""
        starts = group_starts(self.feature)
        return self.feature[starts], starts

    def windows(self, feature: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a feature does around some positions of these blocks, within their block.

        Args:
            feature, position: int64 ``[c]``, pairs.

        Returns:
            uint8 ``[c, WINDOW]``: activations from ``position - WINDOW_BEFORE`` on, in units of
            scale / QUANTA, at least 1 where the feature fires; float32 ``[c]``: the scale, each window's
            largest activation.
        """
        block = position - position % self.context_length
        window_start = position - WINDOW_BEFORE
        begin = np.maximum(window_start, block)
        end = np.minimum(window_start + WINDOW, block + self.context_length)
        base = feature * self._span - self._first
        run_start = np.searchsorted(self._keys, base + begin)
        lengths = np.searchsorted(self._keys, base + end) - run_start
        offsets = lengths.cumsum() - lengths
        row = np.repeat(np.arange(len(feature)), lengths)
        entry = np.arange(len(row)) + (run_start - offsets)[row]
        value = self.value[entry]
        scale = np.zeros(len(feature), dtype=np.float32)
        filled = lengths > 0
        if filled.any():
            scale[filled] = np.maximum.reduceat(value, offsets[filled])
        windows = np.zeros((len(feature), WINDOW), dtype=np.uint8)
        quanta = np.rint(value * (np.float32(QUANTA) / scale[row]))
        windows[row, self.position[entry] - window_start[row]] = quanta.clip(1, QUANTA)
        return windows, scale

    def fires(self, feature: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Whether a feature fires at a position of these blocks: bool ``[c]``, of int64 ``[c]`` pairs."""
        if not len(self.feature):
            return np.zeros(len(feature), dtype=bool)
        key = feature * self._span + position - self._first
        place = np.searchsorted(self._keys, key).clip(max=len(self._keys) - 1)
        return self._keys[place] == key

    @property
    def _first(self) -> int:
        """The first position of the first block."""
        if not len(self.kept):
            return 0
        return int(self.kept[0]) // self.context_length * self.context_length

    @property
    def _span(self) -> int:
        """Number of positions from the first block to the last."""
        if not len(self.kept):
            return self.context_length
        return (int(self.kept[-1]) // self.context_length + 1) * self.context_length - self._first

    @cached_property
    def _keys(self) -> np.ndarray:
        """One ascending number for each firing, by feature and position.

        A window that ends with its block may end where the next feature begins: that number is not smaller.
        """
        return self.feature * self._span + (self.position - self._first)


def stream_firings(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    store: HookActivations | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    outlier_norm: float = float("inf"),
) -> Generator[tuple[Firings, int], None, None]:
    """The firings of ``sae`` on ``blocks``, in order; positions that training excludes are left out.

    Args:
        store: holds the activations of these blocks (it may hold more); ``model`` computes them when None. Those at a
            transcoder's other hook, whose norms exclude positions too, are from the same store if it has them.
        start, stop: the range of blocks that is read; all by default.
        outlier_norm: see :func:`usual_outlier_norm`.

    Yields:
        firings, and how many blocks have been read since the last ones. A stream that starts where these end yields
        what this one would yield next.
    """
    stop = blocks.n_blocks if stop is None else stop
    enough = max(CHUNK_FIRINGS, FIRINGS_PER_FEATURE * sae.d_sae)
    encoded = (
        _Encoded.of(sae, group)
        for group in _grouped(
            _rows(model, sae, blocks, store, start, stop, outlier_norm),
            ENCODE_POSITIONS,
            lambda rows: len(rows.kept),
        )
    )
    done = start
    for group in _grouped(encoded, enough, lambda part: part.codes.nnz):
        firings = Firings.of(
            SparseCodes.concatenate([part.codes for part in group]),
            np.concatenate([part.kept for part in group]),
            blocks.context_length,
            np.concatenate([part.special for part in group]),
            np.concatenate([part.special_id for part in group]),
            np.concatenate([part.outlier for part in group]),
            np.concatenate([part.kept_special for part in group]),
            np.concatenate([part.kept_outlier for part in group]),
        )
        yield firings, group[-1].reached - done
        done = group[-1].reached


class _Rows(NamedTuple):
    """Activations of a few blocks: kept int64 ``[n]``, the positions that count, which of them are special tokens or
    outliers, and theirs ``[n, d_in]``; those of special tokens and outliers that are left out; and the block that comes
    next."""

    kept: np.ndarray
    kept_special: np.ndarray
    kept_outlier: np.ndarray
    x: Tensor
    special: Tensor
    special_id: np.ndarray
    outlier: Tensor
    reached: int


class _Encoded(NamedTuple):
    """Codes of the positions that count; features that fire at the others; the block that comes next."""

    kept: np.ndarray
    codes: SparseCodes
    special: np.ndarray
    special_id: np.ndarray
    outlier: np.ndarray
    kept_special: np.ndarray
    kept_outlier: np.ndarray
    reached: int

    @classmethod
    def of(cls, sae: SparseAutoencoder, group: list[_Rows]) -> "_Encoded":
        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).to(sae.b_dec)

        def firing(parts: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
            """Rows and features of the entries."""
            x = joined(parts)
            if not len(x):
                return _NONE, _NONE
            rows, features, _ = sae.encode(x).entries()
            return rows.cpu().numpy(), features.cpu().numpy()

        rows_of_special, special = firing([rows.special for rows in group])
        special_id = np.concatenate([rows.special_id for rows in group])[rows_of_special]
        return cls(
            np.concatenate([rows.kept for rows in group]),
            sae.encode(joined([rows.x for rows in group])),
            special,
            special_id,
            firing([rows.outlier for rows in group])[1],
            np.concatenate([rows.kept_special for rows in group]),
            np.concatenate([rows.kept_outlier for rows in group]),
            group[-1].reached,
        )


def _rows(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    store: HookActivations | None,
    start: int,
    stop: int,
    outlier_norm: float,
) -> Iterator[_Rows]:
    exclusions = {
        hook_name: rule
        for hook_name, rule in sae.exclusions(model.tokenizer).items()
        if hook_name == sae.hook_name
        or rule.max_norm < float("inf")  # without a bound, both exclude the same
    }
    rule = exclusions[sae.hook_name]
    all_special, exclude_special = sorted(model.tokenizer.special_ids), bool(rule.special_ids)
    for first, found in _activations(model, list(exclusions), blocks, store, start, stop):
        x = found[sae.hook_name]
        last = first + len(x)
        counts = kept_at_all(blocks, first, last, found, exclusions).to(x.device)
        kept = np.flatnonzero(counts.cpu().numpy()) + first * blocks.context_length
        left_out = counted_positions(blocks, first, last).to(x.device) & ~counts
        is_special = torch.from_numpy(np.isin(blocks.ids[first:last], all_special)).to(x.device)
        special = is_special[counts].cpu().numpy()
        outlier = (norms(x[counts]) > outlier_norm).cpu().numpy() & ~special
        by_id = left_out & is_special & exclude_special
        ids = blocks.ids[first:last].astype(np.int64)[by_id.cpu().numpy()]
        apart = x[by_id], ids, x[left_out & ~by_id]
        yield _Rows(kept, kept[special], kept[outlier], x[counts], *apart, last)


def usual_outlier_norm(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, store: HookActivations | None = None
) -> float:
    """The norm above which a position is an outlier where the SAE sets no bound of its own: OUTLIER_FACTOR times the
    median of the first blocks' norms, special tokens left out; infinite where the SAE does set one."""
    rule = sae.exclusions(model.tokenizer)[sae.hook_name]
    if rule.max_norm < float("inf"):
        return float("inf")
    stop = min(NORM_BLOCKS, blocks.n_blocks)
    found = [x[sae.hook_name] for _, x in _activations(model, [sae.hook_name], blocks, store, 0, stop)]
    counts = counted_positions(blocks, 0, stop) & torch.from_numpy(
        ~np.isin(blocks.ids[:stop], sorted(model.tokenizer.special_ids))
    )
    x = torch.cat(found)[counts.to(found[0].device)]
    return OUTLIER_FACTOR * float(norms(x).median()) if len(x) else float("inf")


def _activations(
    model: LanguageModel,
    hook_names: list[str],
    blocks: TokenBlocks,
    store: HookActivations | None,
    start: int,
    stop: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """First block and activations by hook name, a few blocks at a time; what the store lacks is computed."""
    ranges = BlockRanges(stop, blocks_per_batch(model, blocks.context_length), start)
    if store is None:
        yield from capture_ranges(model, blocks, hook_names, ranges)
        return
    held = [name for name in hook_names if name in store.store.hook_names]
    missing = [name for name in hook_names if name not in held]
    for first, last in ranges:
        found = {name: store.store.at(name).read(first, last) for name in held}
        if missing:
            found |= capture_range(model, blocks, missing, (first, last))
        yield first, found


def _grouped(items: Iterable[T], enough: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of consecutive items whose sizes sum to at least ``enough``; the last list may fall short."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= enough:
            yield group
            group, total = [], 0
    if group:
        yield group
