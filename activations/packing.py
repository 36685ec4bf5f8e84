"""Documents of token ids cut into blocks, written to disk as they come."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activations.blocks import PADDING, TokenBlocks
from activations.scratch import ScratchArray
from activations.strings import StringTable, encoded

FLUSH_TOKENS = 1 << 16


class TokenDocument(NamedTuple):
    """A tokenised document.

    ids: token ids, without BOS and separator; counted: bool [len(ids)], which of them count, or None: all.
    """

    name: str
    ids: Sequence[int] | np.ndarray
    counted: np.ndarray | None = None


@dataclass(frozen=True)
class Packer:
    """Cuts tokenised documents into :class:`TokenBlocks`, which are mapped from unnamed files.

    context_length: tokens per block, the beginning-of-text token included.
    separator_id: joins documents (concatenated) and fills padding.
    bos_id: put in front of every block; None for no such token.
    with_counted: whether the blocks say which tokens count.
    """

    context_length: int
    separator_id: int
    bos_id: int | None
    vocab_size: int
    split: str
    with_counted: bool = False

    @property
    def _capacity(self) -> int:
        return self.context_length - (self.bos_id is not None)

    def concatenated(self, documents: Iterable[TokenDocument], n_tokens: int) -> TokenBlocks:
        """Write documents one after the other, each behind a separator, and cut the stream into blocks.

        Takes as many documents as ``n_tokens`` (rounded up to whole blocks) need; where they run out, the
        last block is padded.
        """
        wanted = -(-n_tokens // self.context_length) * self._capacity
        writer = _Writer(self)
        for name, ids, counted in documents:
            document = writer.begin(name)
            writer.add([self.separator_id], document, False)
            writer.add(ids[: wanted - 1], document, counted)
            wanted -= len(ids) + 1
            if wanted <= 0:
                break
        writer.fill_up()
        return writer.finish("concatenated")

    def isolated(self, documents: Iterable[TokenDocument], n_tokens: int) -> TokenBlocks:
        """Give every document blocks of its own, padded on the right; a long one continues in the next block.

        Takes documents until the blocks hold ``n_tokens`` tokens.
        """
        writer = _Writer(self)
        for name, ids, counted in documents:
            if n_tokens <= 0:
                break
            n_blocks = min(-(-len(ids) // self._capacity), -(-n_tokens // self.context_length))
            kept = ids[: n_blocks * self._capacity]
            writer.add(kept, writer.begin(name), counted)
            writer.fill_up()
            n_tokens -= len(kept) + n_blocks * (self.bos_id is not None)
        return writer.finish("isolated")


class _Writer:
    """The arrays of token blocks as they grow: what is not yet a whole flush is in memory, the rest in files."""

    def __init__(self, packer: Packer):
        self.packer, self.capacity = packer, packer._capacity
        self.dtype = np.dtype(np.uint16 if packer.vocab_size < 65_536 else np.int32)
        self._held_tokens = 0
        self._ids: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        self._counted: list[np.ndarray] = []
        self._ids_file, self._owners_file = ScratchArray(self.dtype), ScratchArray(np.int32)
        self._counted_file = ScratchArray(bool)
        self._names_file, self._offsets_file = ScratchArray(np.uint8), ScratchArray(np.int64)
        self._n_names = self._offset = 0
        self._offsets_file.append(np.zeros(1))

    def begin(self, name: str) -> int:
        """The number of a new document."""
        self._names_file.append(encoded(name))
        self._offset += len(encoded(name))
        self._offsets_file.append(np.array([self._offset]))
        self._n_names += 1
        return self._n_names - 1

    def add(self, ids: Sequence[int] | np.ndarray, owner: int, counted: np.ndarray | bool | None) -> None:
        """Append tokens of a document (or padding); ``counted`` may be cut to as many as there are ids."""
        n = len(ids)
        self._ids.append(np.asarray(ids, dtype=self.dtype))
        self._owners.append(np.full(n, owner, dtype=np.int32))
        if self.packer.with_counted:
            values = True if counted is None else counted if isinstance(counted, bool) else counted[:n]
            self._counted.append(np.broadcast_to(np.asarray(values, dtype=bool), n))
        self._held_tokens += n
        if self._held_tokens >= FLUSH_TOKENS:
            self._flush()

    def fill_up(self) -> None:
        """Pad the block that is begun."""
        n = -self._held_tokens % self.capacity  # what is flushed are whole blocks
        self.add(np.full(n, self.packer.separator_id), PADDING, False)

    def finish(self, packing: str) -> TokenBlocks:
        """The blocks, all of them whole."""
        self._flush()
        context_length = self.packer.context_length
        return TokenBlocks(
            ids=self._ids_file.mapped(-1, context_length),
            documents=self._owners_file.mapped(-1, context_length),
            names=StringTable(self._names_file.mapped(-1), self._offsets_file.mapped(-1)),
            split=self.packer.split,
            packing=packing,
            bos=self.packer.bos_id is not None,
            counted=self._counted_file.mapped(-1, context_length) if self.packer.with_counted else None,
        )

    def _flush(self) -> None:
        """Write the whole blocks among what is held."""
        whole = self._held_tokens // self.capacity * self.capacity
        bos = self.packer.bos_id
        if not whole:
            return
        for held, file, first in (
            (self._ids, self._ids_file, bos),
            (self._owners, self._owners_file, None),
            (self._counted, self._counted_file, False),
        ):
            if not held:
                continue
            joined = np.concatenate(held)
            blocks = joined[:whole].reshape(-1, self.capacity)
            if bos is not None:
                blocks = np.insert(blocks, 0, blocks[:, 0] if first is None else first, axis=1)
            file.append(blocks)
            held[:] = [joined[whole:].copy()]
        self._held_tokens -= whole
