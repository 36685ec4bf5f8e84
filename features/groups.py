"""Runs of equal numbers in a sorted array: how sums and ranks over features are taken without a loop."""

import numpy as np


def group_starts(group: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins: int64, for a sorted array of numbers >= 0."""
    return np.flatnonzero(np.diff(group, prepend=-1))


def place_in_group(group: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal numbers: int64, for a sorted array of numbers >= 0."""
    starts = group_starts(group)
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
