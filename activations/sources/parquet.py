"""Rows of parquet files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from activations.errors import InputError
from activations.sources.compressed import COMPRESSIONS, open_compressed

ROWS_AT_ONCE = 1024


def parquet_rows(path: Path, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of every row, with one column.

    Bytes that are no UTF-8 come as lone surrogates, so that they count as unreadable.

    Raises:
        InputError: the file is no parquet file, is damaged or has no such column.
    """
    import pyarrow as pa

    with open_compressed(path) as opened:
        file = _seekable(opened) if path.suffix in COMPRESSIONS else opened
        try:
            yield from _rows(file, path, column)
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is no sound parquet file ({reason}): write it again.") from None


def _rows(file: IO[bytes], path: Path, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Row groups can be large: read in pieces, and not ahead.
    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    columns = parquet.schema_arrow.names
    if column not in columns:
        raise InputError(
            f"{path} has no column {column!r}: name the column to read (there are: {', '.join(columns)})."
        )
    number = 0
    for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
        values = batch.column(0)
        try:
            plain = values.to_pylist()
        except UnicodeDecodeError:
            encoded = values.cast(pa.binary()).to_pylist()
            plain = [data if data is None else data.decode(errors="surrogateescape") for data in encoded]
        for value in plain:
            number += 1
            yield number, {column: value}


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Parquet is read from its end."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the last reference
    shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy
