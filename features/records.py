"""The files of an index: records, one for each feature, written block by block since they need not fit in memory; and
several small arrays in one file.
"""

import io
import json
import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from activations.errors import InputError
from activations.files import write_parts

READ_WHOLE = 1 << 20
"""Bytes of a file that is fetched as a whole, while the next ones are opened."""
_BEGINNING = 1 << 16  # bytes
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
    """Map a ``.npy`` file into memory; ``np.load`` takes three times as long, and a page reads several files.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("written by another version of numpy")
            with _PARSING:
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return np.ndarray(shape, dtype, _mapped(file.fileno()), file.tell())
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise _unreadable(path, error) from None


_SAFETENSORS_NAMES = {"int64": "I64", "int32": "I32", "uint8": "U8"}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write several arrays, int64, int32 or uint8, as one safetensors file, atomically."""
    # Wide numbers first, so that each array begins at a multiple of its item size.
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {}
    end = 0
    for name, array in ordered.items():
        start, end = end, end + array.nbytes
        kind = _SAFETENSORS_NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    contents = (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in ordered.values())
    write_parts(path, [len(text).to_bytes(8, "little"), text, *contents])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map what :func:`write_arrays` wrote into memory.

    Raises:
        InputError: it is missing or damaged.
    """
    dtypes = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header, begin = json.loads(file.read(length)), 8 + length
            mapped = _mapped(file.fileno())
        arrays = {}
        for name, described in header.items():
            shape, dtype = described["shape"], np.dtype(dtypes[described["dtype"]])
            start, end = described["data_offsets"]
            if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError("its header contradicts itself")
            arrays[name] = np.ndarray(shape, dtype, mapped, begin + start)
        return arrays
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise _unreadable(path, error) from None


def _mapped(handle: int) -> mmap.mmap:
    mapped = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    if len(mapped) <= READ_WHOLE and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)  # so that the disk has several requests at once
    return mapped


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({error}): build the index again.")


def fetch_beginnings(paths: Iterable[Path]) -> None:
    """Have the system fetch the beginnings of files that will be read one after the other, all at once; those that are
    not there are left out."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, _BEGINNING, os.POSIX_FADV_WILLNEED)


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
    begin, end = (start + place * array.itemsize for place in (first, last))
    first_page, last_page = begin // mmap.PAGESIZE, (end - 1) // mmap.PAGESIZE
    for page, n_pages in set(zip(first_page.tolist(), (last_page - first_page + 1).tolist(), strict=True)):
        mapped.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, n_pages * mmap.PAGESIZE)
