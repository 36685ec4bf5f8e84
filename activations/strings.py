"""Many strings in two arrays, which may be memory-mapped: a few bytes more than their text."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


def encoded(string: str) -> bytes:
    """UTF-8; names of files may hold bytes that are none, which come back as they were."""
    return string.encode(errors="surrogateescape")


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
        collector = StringCollector()
        for string in strings:
            collector.append(string)
        return collector.table()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return bytes(self.text[self.offsets[i] : self.offsets[i + 1]]).decode(errors="surrogateescape")

    def head(self, n: int) -> "StringTable":
        """The first ``n`` strings, in the same arrays."""
        offsets = self.offsets[: n + 1]
        return StringTable(self.text[: offsets[-1]], offsets)


class StringCollector:
    """Packs strings one by one."""

    def __init__(self) -> None:
        self._text, self._offsets = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, string: str) -> None:
        """Add a string."""
        self._text += encoded(string)
        self._offsets.append(len(self._text))

    def table(self) -> StringTable:
        """The strings so far; nothing can be added any more."""
        return StringTable(
            np.frombuffer(self._text, dtype=np.uint8), np.frombuffer(self._offsets, dtype=np.int64)
        )
