"""Many strings in two memory-mapped arrays: a vocabulary of 256,000 tokens opens in no time."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class StringTable(Sequence[str]):
    """A sequence of strings, read-only.

    Args:
        text: uint8, the UTF-8 bytes of all strings, one after the other.
        offsets: int64 ``[n + 1]``, where each begins.
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        self.text = text
        self.offsets = offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> "StringTable":
        """Pack strings."""
        encoded = [string.encode() for string in strings]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return bytes(self.text[self.offsets[i] : self.offsets[i + 1]]).decode()
