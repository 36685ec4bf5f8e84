"""Arrays that grow in unnamed files: memory that the system may write back, gone with its last use."""

import tempfile
from typing import IO

import numpy as np

from activations.cache import cache_folder


class ScratchArray:
    """A file that values are appended to, and that is then mapped.

    It lies on the disk of the cache, since a temporary folder may be in memory.
    """

    def __init__(self, dtype: np.dtype | type):
        self.dtype = np.dtype(dtype)
        self._file = _unnamed()

    def append(self, values: np.ndarray | bytes) -> None:
        """Write values, converted to the array's type, at the end."""
        if isinstance(values, bytes):
            self._file.write(values)
        else:
            self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def mapped(self, *shape: int) -> np.ndarray:
        """What was written; one dimension may be -1."""
        self._file.flush()
        if not self._file.tell():  # nothing can be mapped
            return np.zeros([max(n, 0) for n in shape], self.dtype)
        return np.memmap(self._file, dtype=self.dtype, mode="r").reshape(shape)


def _unnamed() -> IO[bytes]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()
