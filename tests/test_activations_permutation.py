"""The computed order: a permutation, the same everywhere, that shuffles."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.permutation import Permutation


def test_every_small_range_is_permuted() -> None:
    for n in range(1, 5001):
        order = Permutation(n, "a key").forward(np.arange(n))
        assert np.bincount(order, minlength=n).tolist() == [1] * n, n


@given(n=st.integers(1, 2**62), key=st.text(), data=st.data())
def test_the_inverse_leads_back(n: int, key: str, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    permutation = Permutation(n, key)
    numbers = permutation.forward(positions)
    assert numbers.dtype == np.int64
    assert ((numbers >= 0) & (numbers < n)).all()
    assert (permutation.inverse(numbers) == positions).all()
    assert (permutation.forward(permutation.inverse(positions)) == positions).all()


def test_long_and_short_requests_agree() -> None:
    permutation = Permutation(300_000, "a key")
    whole = permutation.forward(np.arange(300_000))
    assert (np.sort(whole) == np.arange(300_000)).all()
    assert (permutation.forward(np.arange(70_000, 70_010)) == whole[70_000:70_010]).all()
    assert (permutation.forward(np.array([299_999, 0, 131_072])) == whole[[299_999, 0, 131_072]]).all()
    assert permutation.forward(np.arange(0)).tolist() == []


def test_the_order_is_pinned() -> None:
    """Another order would make every checkpoint of a stream continue with other batches."""
    assert Permutation(10, "rows 0").forward(np.arange(10)).tolist() == [7, 9, 1, 5, 3, 4, 2, 6, 0, 8]
    assert Permutation(10**12, "rows 0").forward(np.arange(3)).tolist() == [
        963109705178,
        390883663695,
        583104819166,
    ]


def test_it_is_the_network_of_the_definition() -> None:
    """Against one number at a time, in Python's integers."""

    def fmix32(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    def forward(x: int, n: int, key: str) -> int:
        digest = hashlib.sha256(key.encode()).digest()
        low_bits = (n - 1).bit_length() // 2
        high_bits = (n - 1).bit_length() - low_bits
        while True:
            high, low = divmod(x, 2**low_bits)
            for i in range(8):
                round_key = int.from_bytes(digest[4 * i : 4 * i + 4], "little")
                if i % 2 == 0:
                    high ^= fmix32(low ^ round_key) % 2**high_bits
                else:
                    low ^= fmix32(high ^ round_key) % 2**low_bits
            x = high * 2**low_bits + low
            if x < n:
                return x

    for n in (3, 1000, 2**31 + 5, 2**62):
        xs = np.arange(min(n, 50))
        assert Permutation(n, "k").forward(xs).tolist() == [forward(int(x), n, "k") for x in xs]


def test_other_keys_give_other_orders() -> None:
    orders = {tuple(Permutation(100, str(key)).forward(np.arange(100))) for key in range(1000)}
    assert len(orders) == 1000


@pytest.mark.parametrize("n", [5, 24, 33])
def test_over_keys_every_number_falls_everywhere_equally_often(n: int) -> None:
    n_keys = 100 * n
    orders = np.stack([Permutation(n, f"key {key}").forward(np.arange(n)) for key in range(n_keys)])
    for numbers in orders.T:
        assert chi_square(np.bincount(numbers, minlength=n)) < far(n - 1)


@pytest.mark.parametrize("n", [2**17, 2**17 + 1, 200_000])
def test_neighbours_are_spread_without_a_trace(n: int) -> None:
    order = Permutation(n, "a key").forward(np.arange(n))
    for apart in (1, 2, 256):
        distance = (order[apart:] - order[:-apart]) % n
        assert chi_square(np.bincount(distance * 100 // n, minlength=100)) < far(99)
        assert abs(np.corrcoef(order[apart:], order[:-apart])[0, 1]) < 5 / np.sqrt(n)
    first_tenth = np.bincount(order[: n // 10] * 100 // n, minlength=100)
    assert chi_square(first_tenth) < far(99)
    # A random permutation has about one fixed point: Poisson of mean 1.
    assert (order == np.arange(n)).sum() < 9


def test_too_many_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="2\\*\\*62"):
        Permutation(2**62 + 1, "a key")


def chi_square(counts: np.ndarray) -> float:
    """Of counts against all being equal."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def far(degrees: int) -> float:
    """Five and a half standard deviations above the mean of χ²."""
    return degrees + 5.5 * np.sqrt(2 * degrees)
