"""Have the C library keep the memory that a training step frees, for the next step, and keep little more than that."""

import ctypes
import sys

import torch

_M_ARENA_MAX = -8  # mallopt(3)


def keep_freed_memory() -> None:
    """Let blocks below 32 MiB come from the heap and stay there when they are freed, in one heap for all threads.

    glibc maps large blocks one by one and returns them to the system when they are freed, and every step would fault
    its tensors in again page by page (5% of its time). Freeing a block just below 32 MiB moves that limit to its
    highest (mallopt(3), M_MMAP_THRESHOLD). Larger blocks stay mapped: with them in the heap too, gradients of
    [24576, 768] came twice as fast, but gaps in the heap cost 70 MB. A heap for each thread, which glibc otherwise
    makes, would keep the same tensors once per thread (some 25 MB with two). With other C libraries nothing changes.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
