"""The order in which training reads the rows of a store, and reading them in it where they lie.

Position p of epoch 0 holds row π(p), where π is a keyed permutation of all rows (:mod:`activations.permutation`).
Later epochs pass over the positions of epoch 0 again, chunk by chunk of 256 in another order each, so that a copy
that lies in the order of epoch 0 is read in long pieces and batches are still composed anew. Nothing of this is
stored: the row at any position of any epoch is known at once, whatever the size of the shards.
"""

import mmap
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from activations.permutation import Permutation

CHUNK = 256
"""Positions that stay together from epoch to epoch."""


class RowSource(Protocol):
    """Activations at one hook, row by row, in shards on disk.

    hook_name: where in the model they are from.
    n_rows, width: how many, and the size of one.
    starts: int64 [n_shards + 1], the first row of each shard, and ``n_rows``.
    identity: a hash that says what the rows are.
    """

    @property
    def hook_name(self) -> str: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def identity(self) -> str: ...

    def values(self, shard: int) -> Tensor:
        """[rows, width] of a shard, memory-mapped: float32, bfloat16, float16 or int8."""

    def scales(self, shard: int) -> Tensor | None:
        """For int8: float32 [rows]; an activation is its int8 values times its scale."""

    def kept(self) -> np.ndarray:
        """uint8 [⌈n_rows / 8⌉]: bit r % 8 (the lowest first) of byte r // 8 says that row r counts."""


@dataclass(frozen=True)
class RowFormat:
    """One row as bytes: its values, and behind int8 values their scale.

    dtype, width: of the values.
    """

    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, source: RowSource) -> "RowFormat":
        """The format of a source with at least one row."""
        return cls(source.values(0).dtype, source.width)

    @property
    def value_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.value_bytes + (4 if self.dtype == torch.int8 else 0)

    def decode(self, records: Tensor) -> Tensor:
        """Activations float32 [m, width] of ``records`` uint8 [m, row_bytes]."""
        values = records[:, : self.value_bytes].view(self.dtype).float()
        if self.dtype == torch.int8:
            # A copy: behind an odd number of bytes four of them cannot be read as a number where they lie.
            scales = records[:, self.value_bytes :].clone(memory_format=torch.contiguous_format)
            values *= scales.view(torch.float32)
        return values


class RowOrder:
    """Which row stands where: ``n_rows`` rows in the order drawn by ``seed``."""

    def __init__(self, n_rows: int, seed: int):
        self.n_rows, self.seed = n_rows, seed
        self._rows = Permutation(n_rows, f"rows {seed}")

    def in_first_epoch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The positions of epoch 0 that positions ``start`` to ``stop`` of ``epoch`` repeat: int64 [stop - start].

        A last chunk that is shorter than the others stays last.
        """
        positions = np.arange(start, stop)
        if epoch == 0:
            return positions
        order = Permutation(self.n_rows // CHUNK, f"chunks {self.seed} {epoch}")
        first, last = start // CHUNK, -(-stop // CHUNK)
        chunks = np.arange(first, last)
        whole = chunks < order.n
        chunks[whole] = order.forward(chunks[whole])
        return chunks[positions // CHUNK - first] * CHUNK + positions % CHUNK

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows at these positions of epoch 0."""
        return self._rows.forward(positions)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows stand in epoch 0."""
        return self._rows.inverse(rows)


class RowReader(Protocol):
    """Reads the rows of one source that stand at given positions of one order."""

    source: RowSource
    order: RowOrder
    format: RowFormat

    def read(self, positions: np.ndarray, rows: np.ndarray, out: Tensor) -> np.ndarray:
        """Write rows into ``out``, in any order and perhaps among others, and say where each lies.

        Args:
            positions: int64 [m], of epoch 0; at most as many chunks of them as ``out`` has room for.
            rows: int64 [m], what stands there.
            out: uint8 [n, row_bytes], n a multiple of 256.

        Returns:
            places int64 [m]: ``out[places[i]]`` is row ``rows[i]``.
        """


class ExactReader:
    """Reads rows from the shards themselves, which stay mapped into memory.

    A shard is read through when it is first needed. Fast where the page cache holds the whole store; where it does
    not, the disk is asked for every row by itself.
    """

    def __init__(self, source: RowSource, seed: int):
        self.source, self.order = source, RowOrder(source.n_rows, seed)
        self.format = RowFormat.of(source)
        self._shards: dict[int, tuple[Tensor, Tensor | None]] = {}

    def read(self, positions: np.ndarray, rows: np.ndarray, out: Tensor) -> np.ndarray:
        """See :class:`RowReader`; memory is read in one direction, shard by shard."""
        by_row = np.argsort(rows)
        rows = rows[by_row]
        places = np.empty_like(by_row)
        places[by_row] = np.arange(len(rows))
        starts = self.source.starts
        cuts = np.searchsorted(rows, starts)
        for shard in np.flatnonzero(np.diff(cuts)):
            first, last = cuts[shard], cuts[shard + 1]
            wanted = torch.from_numpy(rows[first:last] - starts[shard])
            self._gather(int(shard), wanted, out[first:last])
        return places

    def _gather(self, shard: int, wanted: Tensor, out: Tensor) -> None:
        values, scales = self._shards.get(shard) or self._mapped(shard)
        if scales is None:
            torch.index_select(values, 0, wanted, out=out)
        else:
            n = self.format.value_bytes
            out[:, :n] = values.index_select(0, wanted)
            out[:, n:] = scales.index_select(0, wanted)[:, None].view(torch.uint8)

    def _mapped(self, shard: int) -> tuple[Tensor, Tensor | None]:
        values = self.source.values(shard).view(torch.uint8)
        # Touched once from beginning to end, a byte of every page: many times faster than page by page at random.
        values.view(-1)[:: mmap.PAGESIZE].sum()
        self._shards[shard] = values, self.source.scales(shard)
        return self._shards[shard]
