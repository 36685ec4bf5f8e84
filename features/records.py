"""Files of records, one for each feature: written block by block, so that they need not fit in memory."""

import io
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from activations.errors import InputError
from activations.files import write_parts


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
            yield memoryview(np.ascontiguousarray(block, dtype=dtype).reshape(-1).view(np.uint8))

    write_parts(path, parts())


def read_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        array = np.asarray(np.load(path, mmap_mode="r"))  # items of a memmap object cost ten times as much
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}): build the index again.") from None
    return array


def read_ahead(array: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
    """Tell the system which ranges of a mapped one-dimensional array will be read, so that it fetches them all at once.

    Args:
        first, last: int64 ``[n]``, the items that each range begins with and ends before.
    """
    mapped = array
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    start = array.__array_interface__["data"][0] - np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    pages = (start + np.concatenate([first, last - 1]) * array.itemsize) // mmap.PAGESIZE
    for page in set(pages.tolist()):
        mapped.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)
