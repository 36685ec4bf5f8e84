"""Sizes of launches: Triton works on blocks whose sides are powers of two."""


def padded(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """Warps for a block of so many numbers, so that a thread holds about 16 of them; at most 512 threads."""
    return min(max(numbers // (32 * 16), 1), 16)
