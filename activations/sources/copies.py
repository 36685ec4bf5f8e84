"""Copies of rows that can be read at random, and the index of a file that can.

Compressed files, parquet and streamed datasets can only be read from the front. Each is read once, into
``rows.jsonl.zst``: JSON lines, compressed in frames of about 64 kB that are independent of each other, as the zstd
format allows, so that a document costs one frame to read and every tool reads the whole.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from activations.errors import InputError
from activations.files import hash_files, read_manifest, write_manifest
from activations.sources.rows import LeftOut, RowIndex, row_key
from activations.sources.spec import Content

KIND = "copy of rows"
ROWS_FILE = "rows.jsonl.zst"
INDEX_FILE = "index.npy"
FRAME_BYTES = 64 * 1024


class Copy(NamedTuple):
    """rows: array of ``ROW``; left_out: rows that are no documents, by reason; facts: what its manifest says."""

    rows: np.ndarray
    left_out: dict[str, int]
    facts: dict[str, Any]


class FrameWriter:
    """Writes lines to a file in compressed frames."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._file = file
        self._compress = zstandard.ZstdCompressor(level=3, write_checksum=True).compress
        self._start = 0
        self._frame = bytearray()

    def add(self, line: bytes) -> tuple[int, int]:
        """Write a line; where its frame begins in the file, and where it begins in the frame."""
        if len(self._frame) >= FRAME_BYTES:
            self.finish()
        place = self._start, len(self._frame)
        self._frame += line
        return place

    def finish(self) -> None:
        """Write the frame that is begun."""
        if self._frame:
            self._start += self._file.write(self._compress(bytes(self._frame)))
            self._frame.clear()


def read_frame(file: BinaryIO, start: int) -> bytes:
    """The content of the frame that begins at ``start``; zstandard.ZstdError where it is damaged."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor().decompressobj()
    file.seek(start)
    content = b""
    while not decompressor.eof:
        data = file.read(FRAME_BYTES)
        if not data:
            raise zstandard.ZstdError("the frame is cut off")
        content += decompressor.decompress(data)
    return content


def write_copy(
    folder: Path,
    rows: Iterable[tuple[int, Any]],
    content: Content,
    column: str,
    place: str,
    *,
    max_bytes: int | None = None,
    facts: Callable[[int], Mapping[str, Any]] = lambda n_rows: {},
) -> None:
    """Copy one column of (number, row) pairs to a new folder; a row may be the reason why it is left out.

    Args:
        place: what the rows are of, for messages.
        max_bytes: stop after the row with which the copied lines reach this size.
        facts: what the manifest is to say as well, asked at the end with the number of rows that were read.

    Raises:
        InputError: the column is missing or holds something else.
    """
    folder.mkdir(parents=True)
    index, size, n_rows = RowIndex(), 0, 0
    with (folder / ROWS_FILE).open("wb") as file:
        frames = FrameWriter(file)
        for number, row in rows:
            n_rows += 1
            try:
                if isinstance(row, LeftOut):
                    raise row
                key = row_key(row, content, column, f"{place} row {number}")
            except LeftOut as reason:
                index.left_out[str(reason)] += 1
                continue
            line = json.dumps({column: row[column]}, ensure_ascii=False).encode() + b"\n"
            index.add(number, *frames.add(line), len(line), key)
            size += len(line)
            if max_bytes is not None and size >= max_bytes:
                break
        frames.finish()
    _finish(folder, index, facts(n_rows))


def write_index(folder: Path, index: RowIndex) -> None:
    """Keep the index of a file that itself can be read at random."""
    folder.mkdir(parents=True)
    _finish(folder, index, {})


def open_copy(folder: Path) -> Copy:
    """Open what was written, index or copy, once its hash is checked.

    Raises:
        InputError: it is unfinished or damaged.
    """
    manifest = read_manifest(folder, KIND)
    try:
        if manifest["hash"] != hash_files(_files(folder)):
            raise InputError(f"{folder} does not match its hash: remove it.")
        return Copy(np.load(folder / INDEX_FILE), manifest["left_out"], manifest["facts"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} cannot be read ({error}): remove it.") from None


def _finish(folder: Path, index: RowIndex, facts: Mapping[str, Any]) -> None:
    np.save(folder / INDEX_FILE, index.rows)
    write_manifest(
        folder, KIND, {}, hash=hash_files(_files(folder)), left_out=dict(index.left_out), facts=dict(facts)
    )


def _files(folder: Path) -> list[Path]:
    return [path for name in (INDEX_FILE, ROWS_FILE) if (path := folder / name).exists()]
