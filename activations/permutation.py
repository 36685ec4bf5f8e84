"""A random order of many things that takes no memory: computed, forwards and backwards, at any place.

A Feistel network permutes the numbers of as many bits as are needed, and whatever falls outside the range is sent
through again until it falls inside (cycle walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
The halves differ by at most one bit, so fewer than two passes are needed on average. The round function is the
finaliser of MurmurHash3 (Appleby), applied to one half and a key of the round. It shuffles; it keeps no secret.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

_PIECE = 1 << 16
"""Numbers permuted at once: the scratch arrays stay in the processor's cache."""


class Permutation:
    """A permutation of ``range(n)`` drawn by ``key``: same n and key, same permutation, on every machine.

    Args:
        n: how many numbers; at most 2⁶².
        key: any text; another key gives another permutation.
    """

    def __init__(self, n: int, key: str):
        if not 0 <= n <= 1 << 62:
            raise ValueError(f"A permutation of {n} numbers cannot be computed: give 0 to 2**62.")
        self.n = n
        n_bits = max(2, (n - 1).bit_length())
        self._low_bits = n_bits // 2
        self._low_mask = np.uint32((1 << self._low_bits) - 1)
        self._high_mask = np.uint32((1 << (n_bits - self._low_bits)) - 1)
        # 256 bits make eight rounds; four already suffice to shuffle (Luby & Rackoff 1988).
        self._round_keys = np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4")

    def forward(self, positions: np.ndarray) -> np.ndarray:
        """Which number stands at each of ``positions`` (int64 [m], each in ``range(n)``): int64 [m]."""
        return self._walk(positions, list(enumerate(self._round_keys)))

    def inverse(self, numbers: np.ndarray) -> np.ndarray:
        """At which position each of ``numbers`` (int64 [m], each in ``range(n)``) stands: int64 [m]."""
        return self._walk(numbers, list(enumerate(self._round_keys))[::-1])

    def _walk(self, x: np.ndarray, rounds: Iterable[tuple[int, np.uint32]]) -> np.ndarray:
        out = np.empty(len(x), np.int64)
        for start in range(0, len(x), _PIECE):
            y = self._network(x[start : start + _PIECE], rounds)
            outside = np.flatnonzero(y >= self.n)
            while len(outside):
                again = self._network(y[outside], rounds)
                y[outside] = again
                outside = outside[again >= self.n]
            out[start : start + _PIECE] = y
        return out

    def _network(self, x: np.ndarray, rounds: Iterable[tuple[int, np.uint32]]) -> np.ndarray:
        """One pass over all rounds: each changes one half by a hash of the other, which undoes it as well."""
        low = x.astype(np.uint32) & self._low_mask
        high = (x >> self._low_bits).astype(np.uint32)
        for number, key in rounds:
            if number % 2:
                low ^= _hash(high, key) & self._low_mask
            else:
                high ^= _hash(low, key) & self._high_mask
        return (high.astype(np.int64) << self._low_bits) | low


def _hash(x: np.ndarray, key: np.uint32) -> np.ndarray:
    """fmix32 of ``x ^ key``: uint32 [m], arithmetic modulo 2³²."""
    h = x ^ key
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h
