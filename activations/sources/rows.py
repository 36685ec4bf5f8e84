"""Rows of files as documents: what a row must hold, and where it lies, in 37 bytes."""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activations.errors import InputError
from activations.sources.spec import Content
from activations.sources.splits import split_number

ROW = np.dtype(
    [
        ("row", "<i8"),
        ("start", "<i8"),
        ("inner", "<i4"),
        ("length", "<i8"),
        ("digest", "<u8"),
        ("split", "i1"),
    ]
)
"""row: counted from 1, 0 for a whole file; start: first byte in the file (of its frame, in a copy); inner: first byte
in the frame; length: bytes; digest: 64 bits of the content's sha1; split: place in ``SPLITS``."""

_ROW = struct.Struct("<qqiqQb")


class LeftOut(Exception):
    """The reason why something is not a document."""


class RowIndex:
    """Collects where the documents of a file lie, and counts what is left out."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self._packed = bytearray()

    def add(self, row: int, start: int, inner: int, length: int, key: bytes) -> None:
        """Add a document; its ``key`` decides the split and tells exact copies."""
        digest = hashlib.sha1(key).digest()
        split = split_number(digest)
        self._packed += _ROW.pack(row, start, inner, length, int.from_bytes(digest[:8], "little"), split)

    @property
    def rows(self) -> np.ndarray:
        """The documents as an array of ``ROW``."""
        return np.frombuffer(self._packed, dtype=ROW)


def row_key(row: Any, content: Content, column: str, place: str) -> bytes:
    """The bytes that stand for the content of a row.

    Raises:
        LeftOut: nothing is in it, or half a character, which JSON can hold and no text can.
        InputError: the column is missing or holds something else.
    """
    if not isinstance(row, Mapping) or column not in row:
        columns = ", ".join(map(str, row)) if isinstance(row, Mapping) and row else "none"
        raise InputError(
            f"{place} has no column {column!r}: name the column that holds the {content} (there are: {columns})."
        )
    value = row[column]
    if value is None:
        raise LeftOut("empty")
    try:
        return _KEYS[content](value)
    except UnicodeEncodeError:
        raise LeftOut("unreadable") from None
    except (TypeError, ValueError, KeyError):
        raise InputError(
            f"{place} has no {_MEANINGS[content]} in column {column!r}: name one that does."
        ) from None


def index_jsonl(path: Path, content: Content, column: str) -> RowIndex:
    """Where the documents of a file of JSON lines lie.

    Raises:
        InputError: a line is not JSON, or lacks the column.
    """
    index, start = RowIndex(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                key = row_key(
                    parse_line(line, f"{path} line {number}"), content, column, f"{path} line {number}"
                )
            except LeftOut as reason:
                if line.strip():
                    index.left_out[str(reason)] += 1
            else:
                index.add(number, start, 0, len(line), key)
            start += len(line)
    return index


def parse_line(line: bytes, place: str) -> Any:
    """The JSON value of a line.

    Raises:
        LeftOut: the line is blank or is no UTF-8.
        InputError: it is not JSON.
    """
    if not line.strip():
        raise LeftOut("blank")
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise LeftOut("unreadable") from None
    except (ValueError, RecursionError):
        raise InputError(f"{place} is not JSON: each line must be one JSON object.") from None


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, with one kind of line end.

    Raises:
        LeftOut: it is no UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise LeftOut("unreadable") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def token_ids(value: Iterable[int]) -> np.ndarray:
    """Token ids as int64; TypeError where they are none."""
    ids = np.asarray(value)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError
    return ids.astype(np.int64)


def _text_key(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    if not value.strip():
        raise LeftOut("empty")
    return value.encode()


def _tokens_key(value: Any) -> bytes:
    if isinstance(value, str):
        raise TypeError
    ids = token_ids(value)
    if not ids.size:
        raise LeftOut("empty")
    return ids.astype("<i8").tobytes()


def _messages_key(value: Any) -> bytes:
    if isinstance(value, str):
        raise TypeError
    for message in value:
        if not isinstance(message["role"], str) or "content" not in message:
            raise TypeError
    if not len(value):
        raise LeftOut("empty")
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


_KEYS = {"text": _text_key, "tokens": _tokens_key, "messages": _messages_key}
_MEANINGS = {
    "text": "text",
    "tokens": "list of token ids",
    "messages": "list of messages, each with role and content,",
}
