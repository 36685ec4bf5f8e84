"""Have the C library keep the memory that a training step frees, for the next step."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER, _TRIM_DEFAULT, _MMAP_DEFAULT = 2**31 - 1, 128 << 10, 1 << 16


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let large blocks come from the heap, and the heap not shrink, until the context is left.

    glibc maps large blocks one by one and returns them to the system when they are freed, so every step would fault in
    its gradients again, page by page: half of the time that it takes to compute them. The switches are in mallopt(3);
    afterwards they are what they were by default, and what is free goes back. With other C libraries nothing happens.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if library is None or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _MMAP_DEFAULT)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_DEFAULT)
        library.malloc_trim(0)
