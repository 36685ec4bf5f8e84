"""Token blocks: text as fixed windows of token ids, each token knowing which document it came from."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.errors import InputError
from activations.files import MANIFEST, is_finished, new_folder, read_manifest, write_manifest
from activations.scratch import ScratchArray
from activations.strings import StringCollector, StringTable

if TYPE_CHECKING:
    import torch

KIND = "token blocks"
PADDING = -1
"""Stands in ``TokenBlocks.documents`` where there is no token."""

CHUNK = 1 << 18
"""Blocks on disk are gone through so many tokens at a time."""


@dataclass(frozen=True)
class TokenBlocks:
    """Windows of token ids cut from documents.

    The arrays are in memory or mapped from files; what is asked of all tokens is answered chunk by chunk.

    ids: [n_blocks, context_length], uint16 where the vocabulary allows it, else int32. Padding is on the
        right and holds the separator's id, so that it counts as special everywhere.
    documents: int32 [n_blocks, context_length], index into ``names``; -1 is padding.
    names: one readable name per document.
    split: "train", "score" or "test".
    packing: "concatenated" or "isolated" (see :mod:`activations.corpus`).
    bos: whether every block begins with the beginning-of-text token.
    counted: bool [n_blocks, context_length], which tokens training, statistics and metrics are about: those of chosen
        roles in a chat; None is all.
    """

    ids: np.ndarray
    documents: np.ndarray
    names: Sequence[str]
    split: str
    packing: str
    bos: bool
    counted: np.ndarray | None = None

    @property
    def n_blocks(self) -> int:
        return int(self.ids.shape[0])

    @property
    def context_length(self) -> int:
        return int(self.ids.shape[1])

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens, padding left out."""
        return sum(int((part != PADDING).sum()) for part in _chunks(self.documents))

    @cached_property
    def hash(self) -> str:
        """sha256 over ids, documents, names, what counts and how they were packed."""
        digest = hashlib.sha256(f"{self.split} {self.packing} {self.bos} {self.ids.shape}".encode())
        for array in (self.ids, self.documents):
            for part in _chunks(array):
                digest.update(np.ascontiguousarray(part, dtype="<i4").data)
        for number, name in enumerate(self.names):
            digest.update(("\0" + name if number else name).encode(errors="surrogateescape"))
        for part in () if self.counted is None else _chunks(self.counted):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def first(self, n_blocks: int) -> "TokenBlocks":
        """The first ``n_blocks`` blocks, and the names of the documents up to there: the same whatever follows."""
        documents = self.documents[:n_blocks]
        # Documents are numbered in the order of the blocks.
        n_names = 1 + max((int(part.max()) for part in _chunks(documents)), default=PADDING)
        names = self.names
        return replace(
            self,
            ids=self.ids[:n_blocks],
            documents=documents,
            names=names.head(n_names) if isinstance(names, StringTable) else names[:n_names],
            counted=None if self.counted is None else self.counted[:n_blocks],
        )

    def first_tokens(self, n_tokens: int) -> "TokenBlocks":
        """As many of the first blocks as hold ``n_tokens`` tokens, padding left out; all where there are fewer."""
        n_blocks = held = 0
        for part in _chunks(self.documents):
            so_far = held + np.cumsum((part != PADDING).sum(axis=1))
            if so_far[-1] >= n_tokens:
                return self.first(n_blocks + int(np.searchsorted(so_far, n_tokens)) + 1)
            n_blocks, held = n_blocks + len(part), int(so_far[-1])
        return self

    @classmethod
    def joined(cls, parts: Sequence["TokenBlocks"]) -> "TokenBlocks":
        """The blocks of all parts one after the other, their documents numbered on, mapped from unnamed files.

        Raises:
            InputError: the parts are not of one context length and one way to pack.
        """
        first = parts[0]
        for part in parts[1:]:
            for name in ("context_length", "packing", "bos"):
                if getattr(part, name) != getattr(first, name):
                    raise InputError(
                        f"Token blocks with {name} {getattr(first, name)} and {getattr(part, name)} cannot be joined."
                    )
        dtype = np.result_type(*(part.ids for part in parts))
        ids, documents, counted = ScratchArray(dtype), ScratchArray(np.int32), ScratchArray(bool)
        names, n_names = StringCollector(), 0
        for part in parts:
            for start in range(0, part.n_blocks, step := _chunk_length(part.ids)):
                owners = part.documents[start : start + step]
                ids.append(part.ids[start : start + step])
                documents.append(np.where(owners == PADDING, PADDING, owners + n_names))
                counts = (
                    np.ones(owners.shape, bool)
                    if part.counted is None
                    else part.counted[start : start + step]
                )
                counted.append(counts)
            for name in part.names:
                names.append(name)
            n_names = len(names)
        shape = (-1, first.context_length)
        all_count = all(part.counted is None for part in parts)
        return replace(
            first,
            ids=ids.mapped(*shape),
            documents=documents.mapped(*shape),
            names=names.table(),
            counted=None if all_count else counted.mapped(*shape),
        )

    def ids_tensor(self, start: int, stop: int) -> "torch.Tensor":
        """Ids of blocks ``start`` to ``stop`` as int64 [stop - start, context_length]."""
        import torch

        return torch.from_numpy(self.ids[start:stop].astype(np.int64))

    def attention_mask(self, start: int, stop: int) -> "torch.Tensor | None":
        """int64 [stop - start, context_length] with 0 at padding, or None where these blocks hold none."""
        import torch

        real = np.asarray(self.documents[start:stop] != PADDING)
        return None if real.all() else torch.from_numpy(real.astype(np.int64))

    def save(self, folder: Path, inputs: Mapping[str, Any] | None = None) -> None:
        """Write the blocks to ``folder``, atomically; ``inputs`` says what they were made from.

        Every array is a .npy file: ids, documents, counted where it is not None, and the names as their UTF-8 bytes
        and the offset of each.
        """
        names = self.names if isinstance(self.names, StringTable) else StringTable.of(self.names)
        arrays = {"ids": self.ids, "documents": self.documents, "names": names.text, "offsets": names.offsets}
        if self.counted is not None:
            arrays["counted"] = self.counted
        with new_folder(Path(folder)) as new:
            for name, array in arrays.items():
                _write_array(new / f"{name}.npy", array)
            write_manifest(
                new,
                KIND,
                inputs or {},
                hash=self.hash,
                n_tokens=self.n_tokens,
                split=self.split,
                packing=self.packing,
                bos=self.bos,
                counted=self.counted is not None,
            )

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> "TokenBlocks":
        """Open what :meth:`save` wrote, mapped from its files.

        Args:
            verify: read everything once, to compare it with its hash; otherwise the manifest is believed.

        Raises:
            InputError: the folder holds no token blocks, or they do not match their hash.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        path = folder

        def read(name: str) -> np.ndarray:
            nonlocal path
            path = folder / f"{name}.npy"
            array: np.ndarray = np.load(path, mmap_mode="r")
            return array

        try:
            blocks = cls(
                ids=read("ids"),
                documents=read("documents"),
                names=StringTable(read("names"), read("offsets")),
                counted=read("counted") if manifest["counted"] else None,
                **{name: manifest[name] for name in ("split", "packing", "bos")},
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error}): make it again.") from None
        if verify and blocks.hash != manifest["hash"]:
            raise InputError(f"{folder} does not match the hash in its {MANIFEST}: make it again.")
        blocks.__dict__.update(
            hash=manifest["hash"], n_tokens=manifest["n_tokens"]
        )  # their cached properties
        return blocks

    @staticmethod
    def is_finished(folder: Path, inputs: Mapping[str, Any]) -> bool:
        """Whether ``folder`` holds token blocks made from exactly these inputs."""
        return is_finished(Path(folder), KIND, inputs)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Some blocks at a time, about ``CHUNK`` tokens."""
    step = _chunk_length(array)
    for start in range(0, len(array), step):
        yield array[start : start + step]


def _chunk_length(array: np.ndarray) -> int:
    return max(1, CHUNK * len(array) // max(1, array.size))


def _write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file, written chunk by chunk."""
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, *array.shape[1:]), array.dtype))
    header["shape"] = array.shape
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in _chunks(array):
            file.write(np.ascontiguousarray(part).data)
