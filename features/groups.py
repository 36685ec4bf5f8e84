"""Runs of equal numbers in a sorted array: how sums and ranks over features are taken without a loop."""

import numpy as np


def group_starts(group: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins: int64, for a sorted array of numbers >= 0."""
    begins = np.ones(len(group), dtype=bool)
    np.not_equal(group[1:], group[:-1], out=begins[1:])
    return np.flatnonzero(begins)


def run_starts(values: np.ndarray, at_once: int = 1 << 22) -> np.ndarray:
    """Where each run of equal neighbours begins, in an array that may be mapped from a large file: int64."""
    found = [np.zeros(min(len(values), 1), dtype=np.int64)]
    for start in range(0, len(values), at_once):
        part = values[max(start - 1, 0) : start + at_once]
        found.append(np.flatnonzero(part[1:] != part[:-1]) + max(start - 1, 0) + 1)
    return np.concatenate(found)


def place_in_group(group: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal numbers: int64, for a sorted array of numbers >= 0."""
    starts = group_starts(group)
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
