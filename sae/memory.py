"""Have the C library keep the memory that a training step frees, for the next step."""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER = 2**31 - 1


@cache
def keep_freed_memory() -> None:
    """Let large blocks come from the heap, and the heap never shrink, for the rest of the process.

    glibc maps large blocks one by one and returns them to the system when they are freed, so every step would fault in
    its gradients again, page by page: half of the time that it takes to compute them. Both switches are in mallopt(3);
    with other C libraries nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if hasattr(ctypes, "CDLL") else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
