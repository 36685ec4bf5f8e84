"""Shuffled batches of a store's activations for training, in an order that is the same however they are read.

Rows that do not count are skipped, and batches run on across the end of an epoch. Two threads read ahead, a few
windows of positions far, while the caller trains. Since the row at any position is known at once, a stream continues
from one number, its position, without reading anything twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.capture import in_order, single_threaded
from activations.errors import InputError
from activations.ordered import CHUNK, ExactReader, RowReader, RowSource
from activations.progress import Progress, silent
from activations.shuffled import MEMORY_BYTES, ShuffledReader
from activations.stream import refuse_other_stream

_WINDOW_BYTES, _WINDOW_POSITIONS = 1 << 25, 1 << 16
_READERS = 2


class _Window(NamedTuple):
    """Rows at neighbouring positions, at each of the hooks.

    records: for each hook uint8 [n, row_bytes], in any order.
    places: for each hook int64 [m], where in its ``records`` each row that counts lies, in the order of the epoch;
        means nothing for a row that is not of our part of its batch.
    ends: int64 [m], the position behind each, counted over all epochs.
    """

    records: list[Tensor]
    places: list[Tensor]
    ends: np.ndarray


class StoreStream(Iterator[Tensor]):
    """Gives ``n_batches`` batches [batch_size, width], float32, of the rows that count, epoch after epoch.

    Same rows, seed and batch size: same batches, to the bit, whichever way they are read; :meth:`state_dict`
    between two batches, loaded into a stream made in the same way or of the other order, continues with the
    same batches. Rows of several hooks of one store stand side by side, where they count at each of the hooks.

    Make one with :meth:`exact` or :meth:`external`.

    Attributes:
        width: size of one activation vector; of all hooks together where there are several.
        batch_size: activations per batch, of all parts together.
        n_batches: batches in all.
        n_tokens: activations in all.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        kept: np.ndarray,
        *,
        batch_size: int,
        n_batches: int,
        device: torch.device | str = "cpu",
        part: int = 0,
        n_parts: int = 1,
    ):
        self.width = sum(reader.source.width for reader in readers)
        self.batch_size, self.n_batches = batch_size, n_batches
        self.n_tokens = n_batches * batch_size
        self._readers, self._kept, self._device = readers, kept, torch.device(device)
        size = batch_size // n_parts
        self._part = slice(part * size, (part + 1) * size)  # of a batch
        self._order = readers[0].order
        self._batches_done = 0
        self._position = 0
        self._close()

    @classmethod
    def exact(
        cls,
        source: RowSource,
        *,
        also: Sequence[RowSource] = (),
        batch_size: int,
        n_batches: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        part: int = 0,
        n_parts: int = 1,
    ) -> "StoreStream":
        """Read every row where it lies in the store: for stores that fit into the page cache.

        Args:
            also: further hooks of the same store, whose activations stand to the right, in this order.
            part, n_parts: give the part with this number of every batch, of so many equal ones; only that is read.

        Raises:
            InputError: no row counts.
        """
        kept = kept_rows(source, *also)
        readers = [ExactReader(each, seed) for each in (source, *also)]
        return cls(
            readers,
            kept,
            batch_size=batch_size,
            n_batches=n_batches,
            device=device,
            part=part,
            n_parts=n_parts,
        )

    @classmethod
    def external(
        cls,
        source: RowSource,
        folder: Path | str,
        *,
        also: Sequence[tuple[RowSource, Path | str]] = (),
        batch_size: int,
        n_batches: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        part: int = 0,
        n_parts: int = 1,
        memory_bytes: int = MEMORY_BYTES,
        progress: Progress = silent,
    ) -> "StoreStream":
        """Write a shuffled copy to ``folder`` first, unless it is there, and read that in long pieces.

        Args:
            also: as for :meth:`exact`, each with the folder of its copy. part, n_parts: as there.
            memory_bytes: what shuffling may hold in memory.

        Raises:
            InputError: no row counts, or as for :meth:`activations.shuffled.ShuffledReader.make`.
        """
        copies = [(source, folder), *also]
        kept = kept_rows(*(each for each, _ in copies))
        readers = [
            ShuffledReader.make(each, seed, copy, memory_bytes=memory_bytes, progress=progress)
            for each, copy in copies
        ]
        return cls(
            readers,
            kept,
            batch_size=batch_size,
            n_batches=n_batches,
            device=device,
            part=part,
            n_parts=n_parts,
        )

    def __len__(self) -> int:
        """Number of batches that are left."""
        return self.n_batches - self._batches_done

    def __iter__(self) -> "StoreStream":
        return self

    def __next__(self) -> Tensor:
        if self._batches_done == self.n_batches:
            self._close()
            raise StopIteration
        try:
            # Copying rows gains nothing from several threads, and waits for all of them on a busy machine.
            with single_threaded():
                pieces = zip(*self._take(self.batch_size), strict=True)
                sides = [
                    reader.format.decode(_joined(of_one).to(self._device))
                    for reader, of_one in zip(self._readers, pieces, strict=True)
                ]
                batch = _joined(sides, dim=1)
        except BaseException:
            self._close()  # the rows that were taken are taken again
            raise
        assert self._window is not None
        self._position = int(self._window.ends[self._offset - 1])
        self._batches_done += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place from which a stream made in the same way continues; JSON-able."""
        epoch, position = divmod(self._position, self._order.n_rows)
        return {
            "epoch": epoch,
            "position": position,
            "batches_done": self._batches_done,
            "made": self._made,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            InputError: the state is of a stream with another size, seed or source.
        """
        refuse_other_stream(state["made"], self._made)
        self._close()
        self._batches_done = state["batches_done"]
        self._position = state["epoch"] * self._order.n_rows + state["position"]

    @property
    def _made(self) -> dict[str, int | str]:
        sources = [reader.source for reader in self._readers]
        return {
            "seed": self._order.seed,
            "batch size": self.batch_size,
            "number of batches": self.n_batches,
            "store": " ".join(source.identity for source in sources),
            "hook": " ".join(source.hook_name for source in sources),
        }

    def _close(self) -> None:
        self._windows: Iterator[_Window] | None = None
        self._window: _Window | None = None
        self._offset = 0
        self._free: list[list[Tensor]] = []

    def _take(self, n: int) -> Iterator[list[Tensor]]:
        """Our part of the next ``n`` rows that count, a batch, as bytes at each hook, in pieces."""
        if self._windows is None:
            self._windows = _read_ahead(
                self._readers, self._kept, self._position, self._free, self.batch_size, self._part
            )
        taken = 0
        while taken < n:
            if self._window is None or self._offset == len(self._window.ends):
                if self._window is not None:
                    self._free.append(self._window.records)
                self._window, self._offset = next(self._windows), 0
                continue
            here = min(n - taken, len(self._window.ends) - self._offset)
            low, high = max(self._part.start, taken), min(self._part.stop, taken + here)
            ours = slice(self._offset + low - taken, self._offset + high - taken)
            self._offset += here
            taken += here
            if low < high:
                yield [
                    records.index_select(0, of_one[ours])
                    for records, of_one in zip(self._window.records, self._window.places, strict=True)
                ]


def _read_ahead(
    readers: Sequence[RowReader],
    kept: np.ndarray,
    position: int,
    free: list[list[Tensor]],
    batch_size: int,
    part: slice,
) -> Iterator[_Window]:
    """Windows from ``position`` on, where a batch begins, without end. Closing the iterator ends its threads.

    The caller puts the records that it is done with into ``free``: fresh memory costs more than filling it.
    """
    order = readers[0].order
    n_rows = order.n_rows
    row_bytes = sum(reader.format.row_bytes for reader in readers)
    size = min(_WINDOW_BYTES // row_bytes, _WINDOW_POSITIONS)
    size = max(1, size // CHUNK) * CHUNK
    shared = part != slice(0, batch_size)

    def counted_in(epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows that count: their numbers from ``start`` on, their positions in the first epoch, themselves."""
        positions = order.in_first_epoch(epoch, start, stop)
        rows = order.rows(positions)
        counted = np.flatnonzero(kept[rows >> 3] >> (rows & 7) & 1)
        return counted, positions[counted], rows[counted]

    def ranges() -> Iterator[tuple[int, int, int, int]]:
        epoch, start = divmod(position, n_rows)
        before = 0  # rows that count
        while True:
            while start < n_rows:
                stop = min(start // size * size + size, n_rows)
                yield epoch, start, stop, before
                if shared:
                    before += len(counted_in(epoch, start, stop)[0])
                start = stop
            epoch, start = epoch + 1, 0

    def read(window: tuple[int, int, int, int]) -> _Window:
        epoch, start, stop, before = window
        counted, positions, rows = counted_in(epoch, start, stop)
        try:
            records = free.pop()
        except IndexError:
            records = [torch.empty(size, reader.format.row_bytes, dtype=torch.uint8) for reader in readers]
        places = [np.zeros(len(rows), np.int64) for _ in readers]
        ours: slice | np.ndarray = slice(None)
        if shared:
            in_batch = (before + np.arange(len(rows))) % batch_size
            ours = np.flatnonzero((in_batch >= part.start) & (in_batch < part.stop))
        for reader, of_one, out in zip(readers, places, records, strict=True):
            of_one[ours] = reader.read(positions[ours], rows[ours], out)
        return _Window(records, list(map(torch.from_numpy, places)), epoch * n_rows + start + counted + 1)

    return in_order(torch.device("cpu"), read, ranges(), n_workers=_READERS)


def kept_rows(*sources: RowSource) -> np.ndarray:
    """Which rows count at every one of several hooks of one store, as :meth:`RowSource.kept` has it.

    Raises:
        InputError: none does, or the sources have different numbers of rows.
    """
    sizes = [source.n_rows for source in sources]
    if len(set(sizes)) > 1:
        raise InputError(
            f"{' and '.join(source.hook_name for source in sources)} have {' and '.join(map(str, sizes))} rows, and"
            " can be read side by side from one store only."
        )
    kept = reduce(np.bitwise_and, (source.kept() for source in sources))
    if not kept.any():
        raise InputError("No position of the store counts: every token is special or an outlier.")
    return kept


def n_kept(*sources: RowSource) -> int:
    """Number of rows that count at every one of several hooks of one store; errors as for :func:`kept_rows`."""
    return int(np.unpackbits(kept_rows(*sources)).sum())


def _joined(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim)
