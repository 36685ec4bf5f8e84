"""Have the C library keep the memory that a training step frees, for the next step."""

import torch


def keep_freed_memory() -> None:
    """Let blocks below 32 MiB come from the heap and stay there when they are freed.

    glibc maps large blocks one by one and returns them to the system when they are freed, and every step would fault
    its tensors in again page by page (5% of its time). Freeing a block just below 32 MiB moves that limit to its
    highest (mallopt(3), M_MMAP_THRESHOLD); with other C libraries nothing changes. Larger blocks stay mapped: with them
    in the heap too, gradients of [24576, 768] came twice as fast, but gaps in the heap cost 70 MB.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
