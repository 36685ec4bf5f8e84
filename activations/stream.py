"""Shuffled batches of activations for training, computed when they are needed.

A ring buffer holds ``buffer_rows`` activations, by default half a gigabyte of them. A *round* is what it holds
when the round begins: its slots are given out in random order, batch by batch, and the slots of each batch are
filled at once with the next rows of the source, which belong to the next round. So every batch costs the same,
every activation is given out exactly once per pass over the blocks, and a stream continues from three counters:
it reads again the rows of the round (and those of the next round so far), and draws everything random anew from
(seed, round).

The source gives batches of blocks in an order that is drawn anew for every pass, since a long document fills
many neighbouring blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import (
    BlockRange,
    BlockRanges,
    blocks_per_batch,
    capture_range,
    in_order,
    kept_at_all,
    single_threaded,
)
from activations.errors import InputError
from activations.exclusion import Exclusion

if TYPE_CHECKING:
    from activations.models import LanguageModel

BUFFER_BYTES = 1 << 29
_ORDER_OF_BLOCKS, _ORDER_OF_ROWS = 0, 1


class _Source(Protocol):
    """Gives the activations that count, batch of blocks by batch of blocks.

    hook_names: where in the model they are from; what flows at several hooks stands side by side.
    width: of all hooks together.
    """

    hook_names: Sequence[str]
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def ranges(self) -> Sequence[BlockRange]:
        """The batches of blocks."""

    def rows(self, ranges: Iterable[BlockRange]) -> Iterator[Tensor]:
        """Rows [n, width] of each range of blocks, in this order."""


class _LiveSource:
    def __init__(
        self,
        model: "LanguageModel",
        blocks: TokenBlocks,
        exclusions: Mapping[str, Exclusion],
        part: int = 0,
        n_parts: int = 1,
    ):
        ranges = BlockRanges(blocks.n_blocks, blocks_per_batch(model, blocks.context_length))
        if len(ranges) < n_parts:
            raise InputError(
                f"The text fills {len(ranges)} batches of the model, and each of {n_parts} processes needs one: take"
                " more tokens, or fewer processes."
            )
        self.ranges = ranges if n_parts == 1 else ranges[part::n_parts]
        self.hook_names: Sequence[str] = tuple(exclusions)
        self.width = sum(model.width(hook_name) for hook_name in exclusions)
        self.dtype, self.device = model.dtype, model.device
        self._model, self._blocks, self._exclusions = model, blocks, exclusions
        self._n_workers = torch.get_num_threads()

    def rows(self, ranges: Iterable[BlockRange]) -> Iterator[Tensor]:
        return in_order(self.device, self._rows, ranges, n_workers=self._n_workers)

    def _rows(self, block_range: BlockRange) -> Tensor:
        captured = capture_range(self._model, self._blocks, self.hook_names, block_range)
        kept = kept_at_all(self._blocks, *block_range, captured, self._exclusions)
        sides = [captured[hook_name] for hook_name in self.hook_names]
        return torch.cat([x[kept.to(x.device)].to(self.device) for x in sides], dim=1)


class _Place(NamedTuple):
    """Where a source is read next: the batch of blocks, counted over all passes, and the row in it."""

    batch: int
    row: int


class _Reader:
    """Reads rows of a source one after the other, from ``place`` on, without end."""

    def __init__(self, source: _Source, seed: int, place: _Place):
        self._source, self._seed = source, seed
        self._batches = self._from(place.batch)
        self._batch = place.batch - 1
        self._skip = place.row
        self._rows = torch.empty(0)
        self._offset = 0

    @property
    def place(self) -> _Place:
        at_end = self._offset == len(self._rows)
        return _Place(self._batch + 1, 0) if at_end else _Place(self._batch, self._offset)

    def take(self, n: int) -> Iterator[Tensor]:
        """The next ``n`` rows, in pieces [m, width]."""
        while n > 0:
            if self._offset == len(self._rows):
                self._rows = next(self._batches)
                self._batch += 1
                self._offset, self._skip = self._skip, 0
            piece = self._rows[self._offset : self._offset + n]
            self._offset += len(piece)
            n -= len(piece)
            yield piece

    def _from(self, batch: int) -> Iterator[Tensor]:
        ranges = self._source.ranges
        while True:
            number, first = divmod(batch, len(ranges))
            order = np.random.default_rng((self._seed, _ORDER_OF_BLOCKS, number)).permutation(len(ranges))
            n_rows = 0
            for rows in self._source.rows(ranges[i] for i in order[first:]):
                n_rows += len(rows)
                yield rows
            if first == 0 and n_rows == 0:
                raise InputError("No position of the corpus counts: every token is special or an outlier.")
            batch += len(ranges) - first


def refuse_other_stream(found: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse a state of a stream that was made in another way.

    Args:
        found: how the stream of the state was made. made: how this one is.

    Raises:
        InputError: names what differs.
    """
    if found != made:
        changed = [name for name, value in made.items() if found.get(name) != value]
        raise InputError(
            f"The checkpoint's activation stream has another {' and '.join(changed)}: continue with the"
            " settings the run was started with, or start a new run."
        )


class ActivationStream(Iterator[Tensor]):
    """Gives ``n_batches`` batches [batch_size, width], float32, of activations in random order.

    Special tokens, outliers and padding are left out; activations are as the model made them (not centred). Those of
    several hooks stand side by side in a row: the same position of the text, where it counts at each of the hooks.

    Blocks are passed over again where they hold fewer activations than asked for. Same source, seed, batch
    size and buffer size: same batches, to the bit; :meth:`state_dict` between two batches, loaded into a
    stream made in the same way, continues with the same batches.

    Make one with :meth:`live`; a store is read by :class:`activations.store_stream.StoreStream`.

    Attributes:
        width: size of one activation vector; of all hooks together where there are several.
        batch_size: activations per batch.
        n_batches: batches in all.
        n_tokens: activations in all.
    """

    def __init__(
        self, source: _Source, *, batch_size: int, n_batches: int, seed: int, buffer_rows: int | None = None
    ):
        self.width = source.width
        self.batch_size, self.n_batches = batch_size, n_batches
        self.n_tokens = n_batches * batch_size
        self._source, self._seed = source, seed
        if buffer_rows is None:
            buffer_rows = BUFFER_BYTES // (source.width * source.dtype.itemsize)
        self._round_batches = max(1, min(max(2, buffer_rows // batch_size), n_batches))
        self._round_rows = self._round_batches * batch_size
        self._batches_done = 0
        self._round_place = _Place(0, 0)
        self._close()

    @classmethod
    def live(
        cls,
        model: "LanguageModel",
        blocks: TokenBlocks,
        hook_name: str,
        exclusion: Exclusion,
        *,
        also: Mapping[str, Exclusion] = MappingProxyType({}),
        batch_size: int,
        n_batches: int,
        seed: int = 0,
        buffer_rows: int | None = None,
        part: int = 0,
        n_parts: int = 1,
    ) -> "ActivationStream":
        """Compute activations when they are needed; buffer and batches are on the model's device.

        Args:
            exclusion: which positions count at ``hook_name``.
            also: further hooks, captured in the same pass, whose activations stand to the right of those of
                ``hook_name`` in this order; and which positions count there.
            batch_size: activations per batch, of all parts together.
            part, n_parts: of so many streams, which share the blocks out among each other, this is the one that gives
                the part of every batch with this number.

        Raises:
            InputError: unknown hook; fewer batches of blocks than parts.
        """
        source = _LiveSource(model, blocks, {hook_name: exclusion, **also}, part, n_parts)
        batch_size //= n_parts
        return cls(source, batch_size=batch_size, n_batches=n_batches, seed=seed, buffer_rows=buffer_rows)

    def __len__(self) -> int:
        """Number of batches that are left."""
        return self.n_batches - self._batches_done

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Tensor:
        if self._batches_done == self.n_batches:
            self._close()
            raise StopIteration
        place = self._batches_done, self._round_place
        try:
            # Copying rows gains nothing from several threads, and waits for all of them on a busy machine.
            with single_threaded():
                return self._next()
        except BaseException:
            self._batches_done, self._round_place = place
            self._close()  # the buffer is filled again, for the batch that was not given
            raise

    def _next(self) -> Tensor:
        if self._buffer is None:
            self._open()
        assert self._buffer is not None
        round_, batch = divmod(self._batches_done, self._round_batches)
        slots = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        activations = self._buffer[torch.from_numpy(slots).to(self._buffer.device)].float()
        if self._batches_done + self._round_batches < self.n_batches:
            self._fill(slots)
        self._batches_done += 1
        if batch + 1 == self._round_batches:
            self._begin_round(round_ + 1, self._next_round_place)
        return activations

    def state_dict(self) -> dict[str, Any]:
        """Counters from which a stream made in the same way continues; JSON-able."""
        return {
            "batches_done": self._batches_done,
            "round_place": list(self._round_place),
            "made": self._made,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the buffer is filled again at the next batch.

        Raises:
            InputError: the state is of a stream with another size, seed or source.
        """
        refuse_other_stream(state["made"], self._made)
        self._close()
        self._batches_done = state["batches_done"]
        self._round_place = _Place(*state["round_place"])

    @property
    def _made(self) -> dict[str, int | str]:
        return {
            "hook": " ".join(self._source.hook_names),
            "seed": self._seed,
            "batch size": self.batch_size,
            "number of batches": self.n_batches,
            "buffer size": self._round_rows,
            "number of blocks": self._source.ranges[-1][1],
        }

    def _close(self) -> None:
        self._buffer: Tensor | None = None
        self._reader: _Reader | None = None
        self._order = np.empty(0, np.int64)
        self._next_round_place = self._round_place

    def _open(self) -> None:
        """Fill the buffer with the rows of the round and those of the next one read so far."""
        source = self._source
        self._buffer = torch.empty(self._round_rows, self.width, dtype=source.dtype, device=source.device)
        self._reader = _Reader(source, self._seed, self._round_place)
        round_, batch = divmod(self._batches_done, self._round_batches)
        self._fill(self._slots(round_))
        self._begin_round(round_, self._round_place)
        rows_left = self.n_tokens - (round_ + 1) * self._round_rows
        self._fill(self._order[: max(0, min(batch * self.batch_size, rows_left))])

    def _begin_round(self, number: int, place: _Place) -> None:
        assert self._reader is not None
        self._round_place, self._next_round_place = place, self._reader.place
        self._order = self._given(number)

    def _fill(self, slots: np.ndarray) -> None:
        """Put the next rows of the source into these slots of the buffer."""
        assert self._buffer is not None
        assert self._reader is not None
        start = 0
        for rows in self._reader.take(len(slots)):
            place = torch.from_numpy(slots[start : start + len(rows)]).to(self._buffer.device)
            self._buffer[place] = rows.to(self._buffer)
            start += len(rows)

    def _slots(self, number: int) -> np.ndarray:
        """Where the rows of a round lie: in the slots that the round before gave out, in that order."""
        n_rows = max(0, min(self._round_rows, self.n_tokens - number * self._round_rows))
        return np.arange(n_rows) if number == 0 else self._given(number - 1)[:n_rows]

    def _given(self, number: int) -> np.ndarray:
        """The slots of a round in the order in which it gives them out."""
        is_full = (number + 1) * self._round_rows <= self.n_tokens
        slots = np.arange(self._round_rows) if is_full else self._slots(number)
        return np.random.default_rng((self._seed, _ORDER_OF_ROWS, number)).permutation(slots)
