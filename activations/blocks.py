"""Token blocks: text as fixed windows of token ids, each token knowing which document it came from."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from activations.errors import InputError
from activations.files import MANIFEST, is_finished, new_folder, read_manifest, write_bytes, write_manifest

if TYPE_CHECKING:
    import torch

KIND = "token blocks"
TOKENS_FILE = "tokens.safetensors"
PADDING = -1
"""Stands in ``TokenBlocks.documents`` where there is no token."""


@dataclass(frozen=True)
class TokenBlocks:
    """Windows of token ids cut from documents.

    ids: [n_blocks, context_length], uint16 where the vocabulary allows it, else int32. Padding is on the
        right and holds the separator's id, so that it counts as special everywhere.
    documents: int32 [n_blocks, context_length], index into ``names``; -1 is padding.
    names: one readable name per document.
    split: "train", "score" or "test".
    packing: "concatenated" or "isolated" (see :mod:`activations.corpus`).
    bos: whether every block begins with the beginning-of-text token.
    """

    ids: np.ndarray
    documents: np.ndarray
    names: list[str]
    split: str
    packing: str
    bos: bool

    @property
    def n_blocks(self) -> int:
        return int(self.ids.shape[0])

    @property
    def context_length(self) -> int:
        return int(self.ids.shape[1])

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens, padding left out."""
        return int((self.documents != PADDING).sum())

    @cached_property
    def hash(self) -> str:
        """sha256 over ids, documents, names and how they were packed."""
        digest = hashlib.sha256(f"{self.split} {self.packing} {self.bos} {self.ids.shape}".encode())
        digest.update(np.ascontiguousarray(self.ids, dtype="<i4").data)
        digest.update(np.ascontiguousarray(self.documents, dtype="<i4").data)
        digest.update("\0".join(self.names).encode())
        return digest.hexdigest()

    def first(self, n_blocks: int) -> "TokenBlocks":
        """The first ``n_blocks`` blocks."""
        return replace(self, ids=self.ids[:n_blocks], documents=self.documents[:n_blocks])

    def first_tokens(self, n_tokens: int) -> "TokenBlocks":
        """As many of the first blocks as hold ``n_tokens`` tokens, padding left out; all where there are fewer."""
        held = np.cumsum((self.documents != PADDING).sum(axis=1))
        return self.first(min(int(np.searchsorted(held, n_tokens)) + 1, self.n_blocks))

    def ids_tensor(self, start: int, stop: int) -> "torch.Tensor":
        """Ids of blocks ``start`` to ``stop`` as int64 [stop - start, context_length]."""
        import torch

        return torch.from_numpy(self.ids[start:stop].astype(np.int64))

    def attention_mask(self, start: int, stop: int) -> "torch.Tensor | None":
        """int64 [stop - start, context_length] with 0 at padding, or None where these blocks hold none."""
        import torch

        real = self.documents[start:stop] != PADDING
        return None if real.all() else torch.from_numpy(real.astype(np.int64))

    def save(self, folder: Path, inputs: Mapping[str, Any] | None = None) -> None:
        """Write the blocks to ``folder``, atomically; ``inputs`` says what they were made from."""
        with new_folder(Path(folder)) as new:
            write_bytes(new / TOKENS_FILE, save({"ids": self.ids, "documents": self.documents}))
            write_manifest(
                new,
                KIND,
                inputs or {},
                hash=self.hash,
                n_tokens=self.n_tokens,
                split=self.split,
                packing=self.packing,
                bos=self.bos,
                names=self.names,
            )

    @classmethod
    def load(cls, folder: Path) -> "TokenBlocks":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the folder holds no token blocks, or they do not match their hash.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        try:
            arrays = load_file(folder / TOKENS_FILE)
            facts = {name: manifest[name] for name in ("names", "split", "packing", "bos")}
            blocks = cls(ids=arrays["ids"], documents=arrays["documents"], **facts)
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{folder / TOKENS_FILE} cannot be read ({error}): make it again.") from None
        if blocks.hash != manifest["hash"]:
            raise InputError(f"{folder} does not match the hash in its {MANIFEST}: make it again.")
        return blocks

    @staticmethod
    def is_finished(folder: Path, inputs: Mapping[str, Any]) -> bool:
        """Whether ``folder`` holds token blocks made from exactly these inputs."""
        return is_finished(Path(folder), KIND, inputs)


@dataclass(frozen=True)
class Packer:
    """Cuts tokenised documents into :class:`TokenBlocks`.

    context_length: tokens per block, the beginning-of-text token included.
    separator_id: joins documents (concatenated) and fills padding.
    bos_id: put in front of every block; None for no such token.
    """

    context_length: int
    separator_id: int
    bos_id: int | None
    vocab_size: int
    split: str

    @property
    def _capacity(self) -> int:
        return self.context_length - (self.bos_id is not None)

    def concatenated(self, documents: Iterable[tuple[str, list[int]]], n_tokens: int) -> TokenBlocks:
        """Write documents one after the other, each behind a separator, and cut the stream into blocks.

        Takes as many documents as ``n_tokens`` (rounded up to whole blocks) need; where they run out, the
        last block is padded.
        """
        wanted = -(-n_tokens // self.context_length) * self._capacity
        names: list[str] = []
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        for name, tokens in documents:
            ids.append(np.array([self.separator_id, *tokens], dtype=np.int32))
            lengths.append(len(tokens) + 1)
            names.append(name)
            wanted -= len(tokens) + 1
            if wanted <= 0:
                break
        stream = np.concatenate(ids)
        owners = np.repeat(np.arange(len(names), dtype=np.int32), lengths)
        stop = len(stream) + min(wanted, 0)  # wanted < 0: the last document went that far past the end
        padding = -stop % self._capacity
        return self._finish(
            np.pad(stream[:stop], (0, padding), constant_values=self.separator_id),
            np.pad(owners[:stop], (0, padding), constant_values=PADDING),
            names,
            "concatenated",
        )

    def isolated(self, documents: Iterable[tuple[str, list[int]]], n_tokens: int) -> TokenBlocks:
        """Give every document blocks of its own, padded on the right; a long one continues in the next block.

        Takes documents until the blocks hold ``n_tokens`` tokens.
        """
        names: list[str] = []
        ids: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for name, tokens in documents:
            if n_tokens <= 0:
                break
            n_blocks = min(-(-len(tokens) // self._capacity), -(-n_tokens // self.context_length))
            kept = np.array(tokens[: n_blocks * self._capacity], dtype=np.int32)
            padding = n_blocks * self._capacity - len(kept)
            ids.append(np.pad(kept, (0, padding), constant_values=self.separator_id))
            owner = np.full(len(kept), len(names), dtype=np.int32)
            owners.append(np.pad(owner, (0, padding), constant_values=PADDING))
            names.append(name)
            n_tokens -= len(kept) + n_blocks * (self.bos_id is not None)
        return self._finish(np.concatenate(ids), np.concatenate(owners), names, "isolated")

    def _finish(self, ids: np.ndarray, owners: np.ndarray, names: list[str], packing: str) -> TokenBlocks:
        ids, owners = ids.reshape(-1, self._capacity), owners.reshape(-1, self._capacity)
        if self.bos_id is not None:
            ids = np.insert(ids, 0, self.bos_id, axis=1)
            owners = np.insert(owners, 0, owners[:, 0], axis=1)
        return TokenBlocks(
            ids=np.ascontiguousarray(ids, dtype=np.uint16 if self.vocab_size < 65_536 else np.int32),
            documents=np.ascontiguousarray(owners, dtype=np.int32),
            names=names,
            split=self.split,
            packing=packing,
            bos=self.bos_id is not None,
        )
