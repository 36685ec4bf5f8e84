"""Files of records, one for each feature: written block by block, so that they need not fit in memory."""

import io
import mmap
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from activations.errors import InputError
from activations.files import write_parts

READ_WHOLE = 1 << 20
"""Bytes of a file that is fetched as a whole, while the next ones are opened."""
_PARSING = threading.Lock()
"""numpy parses headers with :mod:`ast`, which in CPython 3.11 fails now and then in two threads at once."""


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as a ``.npy`` file, atomically."""
    write_records(path, array.dtype, array.shape, [array])


def write_records(path: Path, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write consecutive blocks of an array of this type and shape as one ``.npy`` file, atomically."""

    def parts() -> Iterator[bytes | memoryview]:
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        yield header.getvalue()
        for block in blocks:
            yield np.ascontiguousarray(block, dtype=dtype).reshape(-1).view(np.uint8).data

    write_parts(path, parts())


def read_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory; ``np.load`` takes three times as long, and a page reads a dozen files.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("written by another version of numpy")
            with _PARSING:
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(mapped) <= READ_WHOLE and hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED)  # so that the disk has several requests at once
            return np.ndarray(shape, dtype, mapped, file.tell())
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}): build the index again.") from None


def read_ahead(array: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
    """Tell the system which ranges of a mapped one-dimensional array will be read, so that it fetches them all at once.

    Args:
        first, last: int64 ``[n]``, the items that each range begins with and ends before.
    """
    mapped: Any = array
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = (
        array.__array_interface__["data"][0] - np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    )
    pages = (start + np.concatenate([first, last - 1]) * array.itemsize) // mmap.PAGESIZE
    for page in set(pages.tolist()):
        mapped.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)
