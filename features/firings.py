"""The firings of a stretch of text, in the order that everything which sums over features wants them.

A pass over a corpus yields one :class:`Firings` after another: the sparse codes of some ten thousand
positions, grouped by feature. Nothing is ever dense in features.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import BlockRanges, blocks_per_batch, capture_blocks, capture_range, kept_at_all
from activations.errors import InputError
from activations.models import LanguageModel
from activations.store import HookActivations
from features.layout import QUANTA, WINDOW, WINDOW_BEFORE
from sae.codes import SparseCodes
from sae.model import SparseAutoencoder

ENCODE_POSITIONS = 8_192
"""Positions that are encoded at once: bounds the memory of their activations."""
CHUNK_FIRINGS = 1 << 20
"""Firings that are sorted at once: with fewer, more time goes into merging what was kept before."""

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
    """

    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray
    kept: np.ndarray
    context_length: int

    @classmethod
    def of(cls, codes: SparseCodes, kept: np.ndarray, context_length: int) -> "Firings":
        """Group ``codes`` of n rows by feature; ``kept`` int64 ``[n]`` is the position of each row.

        Raises:
            InputError: an activation is negative: "strongest" would mean two things.
        """
        rows, features, values = (entry.cpu().numpy() for entry in codes.entries())
        if len(values) and values.min() < 0:
            raise InputError("This SAE has negative activations; an index is made of positive ones only.")
        # (feature, entry) in one word: sorting words is several times as fast as a stable argsort.
        packed = np.sort(features << 32 | np.arange(len(features)))
        order = packed & 0xFFFFFFFF
        value = values[order].astype(np.float32, copy=False)
        return cls(packed >> 32, kept[rows[order]], value, kept, context_length)

    def windows(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the same feature does around some of the firings, within their blocks.

        Args:
            chosen: int64 ``[c]``, which of the m firings.

        Returns:
            uint8 ``[c, WINDOW]``: activations from ``position - WINDOW_BEFORE`` on, in units of
            scale / QUANTA, at least 1 where the feature fires; float32 ``[c]``: the scale, each window's
            largest activation.
        """
        position = self.position[chosen]
        block = position - position % self.context_length
        window_start = position - WINDOW_BEFORE
        begin = np.maximum(window_start, block)
        end = np.minimum(window_start + WINDOW, block + self.context_length)
        # A window is a contiguous run of the sorted firings, and never empty: it holds the firing itself.
        keys, base = self._keys, self.feature[chosen] * self._span
        run_start = np.searchsorted(keys, base + begin - self._first)
        lengths = np.searchsorted(keys, base + end - self._first) - run_start
        offsets = lengths.cumsum() - lengths
        row = np.repeat(np.arange(len(chosen)), lengths)
        entry = np.arange(len(row)) + (run_start - offsets)[row]
        value = self.value[entry]
        scale = np.maximum.reduceat(value, offsets) if len(chosen) else np.zeros(0, dtype=np.float32)
        windows = np.zeros((len(chosen), WINDOW), dtype=np.uint8)
        quanta = np.rint(value * (np.float32(QUANTA) / scale)[row])
        windows[row, self.position[entry] - window_start[row]] = quanta.clip(1, QUANTA)
        return windows, scale

    @property
    def _first(self) -> int:
        """The first position of the first block."""
        return int(self.kept[0]) // self.context_length * self.context_length

    @property
    def _span(self) -> int:
        """Number of positions from the first block to the last."""
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
) -> Generator[tuple[Firings, int], None, None]:
    """The firings of ``sae`` on ``blocks``, in order; positions that training excludes are left out.

    Args:
        store: holds the activations of these blocks (it may hold more); ``model`` computes them when None. Those at a
            transcoder's other hook, whose norms exclude positions too, are from the same store if it has them.

    Yields:
        firings, and how many blocks have been read since the last ones.
    """
    activations = _kept_activations(model, sae, blocks, store)
    codes = (
        (
            np.concatenate([kept for kept, _ in group]),
            sae.encode(torch.cat([x for _, x in group]).to(sae.b_dec)),
        )
        for group in _grouped(activations, ENCODE_POSITIONS, lambda item: len(item[0]))
    )
    done = 0
    for group in _grouped(codes, CHUNK_FIRINGS, lambda item: item[1].nnz):
        kept = np.concatenate([kept for kept, _ in group])
        firings = Firings.of(SparseCodes.concatenate([c for _, c in group]), kept, blocks.context_length)
        reached = int(kept[-1]) // blocks.context_length + 1
        yield firings, reached - done
        done = reached


def _kept_activations(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, store: HookActivations | None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions that count, int64 [n], ascending, and their activations [n, d_in], a few blocks at a time."""
    exclusions = {
        hook_name: rule
        for hook_name, rule in sae.exclusions(model.tokenizer).items()
        if hook_name == sae.hook_name
        or rule.max_norm < float("inf")  # without a bound, both exclude the same
    }
    for start, found in _activations(model, list(exclusions), blocks, store):
        x = found[sae.hook_name]
        counts = kept_at_all(blocks, start, start + len(x), found, exclusions).to(x.device)
        kept = np.flatnonzero(counts.cpu().numpy()) + start * blocks.context_length
        if len(kept):
            yield kept, x[counts]


def _activations(
    model: LanguageModel, hook_names: list[str], blocks: TokenBlocks, store: HookActivations | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """First block and activations by hook name, a few blocks at a time; what the store lacks is computed."""
    if store is None:
        yield from capture_blocks(model, blocks, hook_names)
        return
    held = [name for name in hook_names if name in store.store.hook_names]
    missing = [name for name in hook_names if name not in held]
    for start, stop in BlockRanges(blocks.n_blocks, blocks_per_batch(model, blocks.context_length)):
        found = {name: store.store.at(name).read(start, stop) for name in held}
        if missing:
            found |= capture_range(model, blocks, missing, (start, stop))
        yield start, found


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
