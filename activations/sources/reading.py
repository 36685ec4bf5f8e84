"""Reading documents again from where they lie."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from activations.errors import InputError
from activations.sources.compressed import open_compressed
from activations.sources.copies import read_frame
from activations.sources.rows import LeftOut, decode_text
from activations.sources.spec import Content

Form = Literal["file", "lines", "frames"]
"""A document is a whole file, a line of a file, or a line in a frame of a compressed copy."""


class Piece(NamedTuple):
    """Where a document lies (see ``ROW``) and what it is."""

    path: str
    form: Form
    start: int
    inner: int
    length: int
    content: Content
    column: str


def read_pieces(pieces: Sequence[Piece]) -> list[Any]:
    """The text, ids or messages of each document, in their order; each file is opened once and read forwards.

    Raises:
        InputError: a file has changed since it was looked through.
    """
    values: list[Any] = [None] * len(pieces)
    by_path: dict[str, list[int]] = {}
    for place, piece in enumerate(pieces):
        by_path.setdefault(piece.path, []).append(place)
    for path, places in by_path.items():
        places.sort(key=lambda place: pieces[place][2:4])
        try:
            for place, value in zip(
                places, _read_file(path, [pieces[place] for place in places]), strict=True
            ):
                values[place] = value
        except (OSError, LeftOut, LookupError, ValueError, TypeError):
            raise InputError(f"{path} has changed since it was looked through: run again.") from None
    return values


def _read_file(path: str, pieces: Sequence[Piece]) -> list[Any]:
    if pieces[0].form == "file":
        with open_compressed(Path(path)) as file:
            text = decode_text(file.read())
        return [text] * len(pieces)
    with open(path, "rb") as file:
        if pieces[0].form == "lines":
            return [_row(_at(file, piece.start, piece.length), piece) for piece in pieces]
        values, start, frame = [], -1, b""
        for piece in pieces:
            if piece.start != start:
                start, frame = piece.start, _frame(file, piece.start)
            values.append(_row(frame[piece.inner : piece.inner + piece.length], piece))
        return values


def _at(file: Any, start: int, length: int) -> bytes:
    file.seek(start)
    data: bytes = file.read(length)
    return data


def _frame(file: Any, start: int) -> bytes:
    import zstandard

    try:
        return read_frame(file, start)
    except zstandard.ZstdError as error:
        raise ValueError from error


def _row(line: bytes, piece: Piece) -> Any:
    return json.loads(line)[piece.column]
