"""The firings of a stretch of text, in the order that everything which sums over features wants them.

A pass over a corpus yields one :class:`Firings` after another: the sparse codes of some ten thousand
positions, grouped by feature. Nothing is ever dense in features.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import (
    BlockRanges,
    blocks_per_batch,
    capture_range,
    counted_positions,
    in_order,
    kept_at_all,
)
from activations.errors import InputError
from activations.exclusion import Exclusion, norms
from activations.models import LanguageModel
from activations.store import HookActivations
from activations.tokenizer import Tokenizer
from features.groups import group_starts
from features.layout import QUANTA, WINDOW, WINDOW_BEFORE
from sae.codes import SparseCodes

CHUNK_FIRINGS = 1 << 20
FIRINGS_PER_FEATURE = 32
"""Firings that are sorted at once, and at least so many for each feature: with fewer, more time goes into merging what
was kept before."""

OUTLIER_FACTOR = 10
NORM_BLOCKS = 16
"""Norms above so many times the median of the first blocks are outliers, where the SAE sets no bound of its own."""

T = TypeVar("T")


class Encoder(Protocol):
    """Whatever tells which of its features fire on an activation: an SAE, or a control of one."""

    @property
    def d_sae(self) -> int:
        """Number of features."""

    @property
    def hook_name(self) -> str:
        """Where in the model it reads."""

    @property
    def b_dec(self) -> Tensor:
        """A tensor of the device and number format that :meth:`encode` takes."""

    def exclusions(self, tokenizer: Tokenizer) -> dict[str, Exclusion]:
        """Which positions do not count, by hook."""

    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of activations ``[n, d_in]``."""


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
    def of(cls, parts: "list[Encoded]", context_length: int) -> "Firings":
        """Group what consecutive ranges of blocks gave by feature.

        Raises:
            InputError: an activation is negative: "strongest" would mean two things.
        """
        joined = Encoded(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if len(joined.value) and joined.value.min() < 0:
            raise InputError("This SAE has negative activations; an index is made of positive ones only.")
        # (feature, entry) in one word: sorting words is several times as fast as a stable argsort.
        packed = joined.feature << 32
        packed |= np.arange(len(packed))
        packed.sort()
        order = packed & 0xFFFFFFFF
        packed >>= 32
        apart = joined.special, joined.special_id, joined.outlier, joined.kept_special, joined.kept_outlier
        return cls(packed, joined.position[order], joined.value[order], joined.kept, context_length, *apart)

    @cached_property
    def barred(self) -> np.ndarray:
        """Positions that make no example: int64, ascending."""
        return np.union1d(self.kept_special, self.kept_outlier)

    @cached_property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The features that fire, ascending, and where the firings of each begin: int64 ``[g]`` each."""
        starts = group_starts(self.feature)
        return self.feature[starts], starts

    def among(self, positions: np.ndarray) -> np.ndarray:
        """Which firings are at some of the positions of these blocks: bool ``[m]``, of int64 positions."""
        wanted = np.zeros(self.n_places, dtype=bool)
        wanted[positions - self.first] = True
        return wanted[self.place]

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
        base = feature * self.n_places - self.first
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
        key = feature * self.n_places + position - self.first
        place = np.searchsorted(self._keys, key).clip(max=len(self._keys) - 1)
        return self._keys[place] == key

    @cached_property
    def first(self) -> int:
        """The first position of the first block."""
        if not len(self.kept):
            return 0
        return int(self.kept[0]) // self.context_length * self.context_length

    @cached_property
    def n_places(self) -> int:
        """Number of positions from the first block to the last."""
        if not len(self.kept):
            return self.context_length
        return (int(self.kept[-1]) // self.context_length + 1) * self.context_length - self.first

    @cached_property
    def place(self) -> np.ndarray:
        """int64 ``[m]``: the position of each firing, counted from :attr:`first`, where what is known of ``n_places``
        positions is looked up."""
        return self.position - self.first

    @cached_property
    def _keys(self) -> np.ndarray:
        """One ascending number for each firing, by feature and position.

        A window that ends with its block may end where the next feature begins: that number is not smaller.
        """
        return self.feature * self.n_places + self.place


class Encoded(NamedTuple):
    """What fires in a few blocks, in the order of positions; columns as :class:`Firings` has them, not yet sorted.

    position, feature: int64 ``[m]``, value: float32 ``[m]``. The others are those of :class:`Firings`.
    """

    position: np.ndarray
    feature: np.ndarray
    value: np.ndarray
    kept: np.ndarray
    special: np.ndarray
    special_id: np.ndarray
    outlier: np.ndarray
    kept_special: np.ndarray
    kept_outlier: np.ndarray


def stream_firings(
    model: LanguageModel,
    sae: Encoder,
    blocks: TokenBlocks,
    store: HookActivations | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    outlier_norm: float = float("inf"),
) -> Generator[tuple[Firings, int], None, None]:
    """The firings of ``sae`` on ``blocks``, in order; positions that training excludes are left out.

    On a CPU ranges of blocks are read and encoded in several threads, each of which computes on one: whatever else is
    to be done runs beside them without making an operator wait for its other half. Close it where not all is read.

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
    encode = _encoder(model, sae, blocks, store, outlier_norm)
    ranges = BlockRanges(stop, blocks_per_batch(model, blocks.context_length), start)
    with closing(in_order(model.device, lambda span: (span[1], encode(*span)), ranges)) as encoded:
        done = start
        for group in _grouped(encoded, enough, lambda part: len(part[1].feature)):
            reached = group[-1][0]
            yield Firings.of([part for _, part in group], blocks.context_length), reached - done
            done = reached


def _encoder(
    model: LanguageModel,
    sae: Encoder,
    blocks: TokenBlocks,
    store: HookActivations | None,
    outlier_norm: float,
) -> Callable[[int, int], Encoded]:
    """A function that says what fires in blocks ``first`` to ``last``."""
    exclusions = {
        hook_name: rule
        for hook_name, rule in sae.exclusions(model.tokenizer).items()
        if hook_name == sae.hook_name
        or rule.max_norm < float("inf")  # without a bound, both exclude the same
    }
    exclude_special = bool(exclusions[sae.hook_name].special_ids)
    all_special = sorted(model.tokenizer.special_ids)
    read = _reader(model, list(exclusions), blocks, store)

    def encode(first: int, last: int) -> Encoded:
        # Both their norms and the encoder want at least float32, converted once.
        found = {
            name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in read(first, last).items()
        }
        counts = kept_at_all(blocks, first, last, found, exclusions).cpu().numpy().reshape(-1)
        real = np.flatnonzero(counted_positions(blocks, first, last).numpy().reshape(-1))
        is_kept = counts[real]
        kept, left_out = real[is_kept], real[~is_kept]
        # One call for all of them, those that do not count behind the others: they are few.
        x = found[sae.hook_name].flatten(0, 1)
        x = x.index_select(0, torch.from_numpy(np.concatenate([kept, left_out])).to(x.device)).to(sae.b_dec)
        codes = sae.encode(x)
        rows, feature, value = _entries(codes.row_slice(0, len(kept)))
        left_rows, left_feature, _ = _entries(codes.row_slice(len(kept), len(x)))

        ids = blocks.ids[first:last].reshape(-1).astype(np.int64)
        special_kept, special_left = (np.isin(ids[places], all_special) for places in (kept, left_out))
        by_id = special_left[left_rows] & exclude_special
        far = np.zeros(len(kept), dtype=bool)
        if outlier_norm < float("inf"):
            far = (norms(x[: len(kept)]) > outlier_norm).cpu().numpy() & ~special_kept
        kept += first * blocks.context_length
        return Encoded(
            kept[rows],
            feature,
            value,
            kept=kept,
            special=left_feature[by_id],
            special_id=ids[left_out[left_rows[by_id]]],
            outlier=left_feature[~by_id],
            kept_special=kept[special_kept],
            kept_outlier=kept[far],
        )

    return encode


def _entries(codes: SparseCodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and features, int64, and values, float32, of all entries, row by row."""
    rows, feature, value = (entry.cpu().numpy() for entry in codes.entries())
    return rows, feature, value.astype(np.float32, copy=False)


def usual_outlier_norm(
    model: LanguageModel, sae: Encoder, blocks: TokenBlocks, store: HookActivations | None = None
) -> float:
    """The norm above which a position is an outlier where the SAE sets no bound of its own: OUTLIER_FACTOR times the
    median of the first blocks' norms, special tokens left out; infinite where the SAE does set one."""
    rule = sae.exclusions(model.tokenizer)[sae.hook_name]
    if rule.max_norm < float("inf"):
        return float("inf")
    stop = min(NORM_BLOCKS, blocks.n_blocks)
    x = _reader(model, [sae.hook_name], blocks, store)(0, stop)[sae.hook_name]
    is_special = torch.from_numpy(np.isin(blocks.ids[:stop], sorted(model.tokenizer.special_ids)))
    counts = counted_positions(blocks, 0, stop) & ~is_special
    length = norms(x[counts.to(x.device)])
    return OUTLIER_FACTOR * float(length.median()) if len(length) else float("inf")


def _reader(
    model: LanguageModel, hook_names: list[str], blocks: TokenBlocks, store: HookActivations | None
) -> Callable[[int, int], dict[str, Tensor]]:
    """A function that gives activations of blocks ``first`` to ``last``: ``[last - first, context, width]`` by hook.

    What the store lacks is computed.
    """
    held = {} if store is None else {n: store.store.at(n) for n in hook_names if n in store.store.hook_names}
    missing = [name for name in hook_names if name not in held]

    def read(first: int, last: int) -> dict[str, Tensor]:
        found = {name: at_hook.read(first, last) for name, at_hook in held.items()}
        return found | (capture_range(model, blocks, missing, (first, last)) if missing else {})

    return read


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
