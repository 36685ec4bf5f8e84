"""Launches: Triton works on blocks whose sides are powers of two, and on the current device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of the tensor the current one, to which Triton launches whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """Warps for a block of so many numbers, so that a thread holds about 16 of them; at most 512 threads."""
    return min(max(numbers // (32 * 16), 1), 16)
