"""How often pairs occur: feature and token, feature and the next one. Exact, however many there are.

Counts are kept as sorted runs, first in memory, then in files. Files are merged when there are several of similar
length, so that every pair is moved about log8(number of files) times, and memory does not grow with the text.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from features.groups import group_starts, place_in_group
from features.records import read_array, write_records

SORTED_AT_ONCE = 2 << 20
"""Pairs that wait to be sorted together."""
PAIRS_IN_MEMORY = 2 << 20
"""Distinct pairs above which a run goes to disk."""
_MERGED_FILES = 8
_PAIRS_AT_ONCE = 1 << 17  # of every file, when files are merged


class Tally(NamedTuple):
    """Sums for pairs, by ascending key, each once.

    key: int64 ``[m]``, first · n_second + second. times: int64 ``[m]``, how often it occurred. total: float64 ``[m]``,
        what was summed; empty where nothing is.
    """

    key: np.ndarray
    times: np.ndarray
    total: np.ndarray


class PairCounts:
    """Counts (and sums of values) of every pair that occurs, as pairs pass by.

    Sums are in float64, exact unless the values of one pair differ by factors of millions, and so do not depend
    on how the text was cut.

    Args:
        n_second: second members are 0 … n_second − 1.
        folder: where runs go that are too large for memory; they stay there.
        summed: whether values are summed too.
    """

    def __init__(self, n_second: int, folder: Path, *, summed: bool) -> None:
        self.n_second = n_second
        self.folder = folder
        self.summed = summed
        self._waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._n_waiting = 0
        self._in_memory: list[Tally] = []
        self._on_disk: list[tuple[Path, int]] = []  # path without ending, and length
        self._n_written = 0

    def add(self, first: np.ndarray, second: np.ndarray, value: np.ndarray | None = None) -> None:
        """Count m pairs: int64 ``[m]`` each, and float32 ``[m]`` where values are summed."""
        key = first * self.n_second
        key += second
        self._waiting.append((key, value))
        self._n_waiting += len(key)
        if self._n_waiting >= SORTED_AT_ONCE:
            self._sort()

    def _sort(self) -> None:
        """Make a run of the pairs that are waiting."""
        if not self._n_waiting:
            return
        key = np.concatenate([key for key, _ in self._waiting])
        if not self.summed:
            self._waiting, self._n_waiting = [], 0
            key.sort()
            self._put(_counted(key, _NO_TOTAL))
            return
        value = np.concatenate([value for _, value in self._waiting if value is not None])
        self._waiting, self._n_waiting = [], 0
        key, order = _sorted(key)
        self._put(_counted(key, value[order].astype(np.float64)))

    def spill(self) -> list[tuple[str, int]]:
        """Write everything to files; their names and lengths, which :meth:`resume` takes."""
        self._sort()
        self._in_memory_to_disk()
        return [(path.name, length) for path, length in self._on_disk]

    def absorb(self, other: "PairCounts") -> None:
        """Count the pairs of another process too; its files stay where they are."""
        other.spill()
        self._on_disk += other._on_disk

    def resume(self, runs: list[tuple[str, int]]) -> None:
        """Take up files that were written."""
        self._on_disk = [(self.folder / name, length) for name, length in runs]
        numbers = [int(name.rsplit("-", 1)[1]) for name, _ in runs]
        self._n_written = max([self._n_written, *(number + 1 for number in numbers)])

    def by_feature(self) -> Callable[[slice], Tally]:
        """A function that gives the pairs whose first member is in a range."""
        self.spill()
        files = [self._open(path) for path, _ in self._on_disk]

        def of(block: slice) -> Tally:
            bounds = np.array([block.start, block.stop]) * self.n_second
            return _merged([_between(file, *np.searchsorted(file.key, bounds)) for file in files])

        return of

    @property
    def files(self) -> set[Path]:
        """The files in use."""
        return {_file(path, column) for path, _ in self._on_disk for column in self._columns}

    @property
    def _columns(self) -> tuple[str, ...]:
        return Tally._fields if self.summed else ("key", "times")

    def _open(self, path: Path) -> Tally:
        columns = [read_array(_file(path, column)) for column in self._columns]
        return Tally(*columns, *(() if self.summed else (_NO_TOTAL,)))

    def _put(self, run: Tally) -> None:
        self._in_memory.append(run)
        if sum(len(run.key) for run in self._in_memory) > PAIRS_IN_MEMORY:
            merged = _merged(self._in_memory)
            self._in_memory = [merged]
            # Where many were the same there is room for many more before the next time.
            if len(merged.key) > PAIRS_IN_MEMORY // 2:
                self._in_memory_to_disk()

    def _in_memory_to_disk(self) -> None:
        if not self._in_memory:
            return
        run = _merged(self._in_memory)
        self._in_memory = []
        self._write(len(run.key), lambda: iter([run]))
        while len(tail := self._on_disk[-_MERGED_FILES:]) == _MERGED_FILES and all(
            length <= 2 * tail[-1][1] for _, length in tail
        ):
            self._merge_on_disk()

    def _merge_on_disk(self) -> None:
        """Merge the last files, range by range; the old ones stay until :attr:`files` is asked for."""
        files = [self._open(path) for path, _ in self._on_disk[-_MERGED_FILES:]]

        def ranges() -> Iterator[Tally]:
            at = [0] * len(files)
            while any(start < len(run.key) for start, run in zip(at, files, strict=True)):
                bound = min(
                    int(run.key[min(start + _PAIRS_AT_ONCE, len(run.key)) - 1]) + 1
                    for start, run in zip(at, files, strict=True)
                    if start < len(run.key)
                )
                to = [int(np.searchsorted(run.key, bound)) for run in files]
                yield _merged([_between(run, *span) for run, *span in zip(files, at, to, strict=True)])
                at = to

        length = sum(len(run.key) for run in ranges())
        del self._on_disk[-_MERGED_FILES:]
        self._write(length, ranges)

    def _write(self, length: int, runs: Callable[[], Iterator[Tally]]) -> None:
        """One file for each column."""
        path = self.folder / f"run-{self._n_written:06}"
        self._n_written += 1
        for place, column in enumerate(self._columns):
            dtype = np.dtype(np.float64 if column == "total" else np.int64)
            write_records(_file(path, column), dtype, (length,), (run[place] for run in runs()))
        self._on_disk.append((path, length))


class Best(NamedTuple):
    """The best partners of each of n first members: ``[n, most]`` arrays.

    second: int32, -1 where there are fewer. times: int64. total: float64 (zeros where nothing was summed).
    """

    second: np.ndarray
    times: np.ndarray
    total: np.ndarray


def best_pairs(run: Tally, merit: np.ndarray, features: slice, n_second: int, most: int) -> Best:
    """For each first member of a range its ``most`` partners with the largest merit; of equals the smaller first.

    Args:
        run: the pairs of that range. merit: ``[m]``, one number for each pair.
    """
    n = features.stop - features.start
    best = Best(np.full((n, most), -1, np.int32), np.zeros((n, most), np.int64), np.zeros((n, most)))
    first, second = np.divmod(run.key, n_second)
    first -= features.start
    order = np.lexsort((-merit, first))
    place = place_in_group(first)  # keys ascend, so they are grouped by first member before and after
    order, place = order[place < most], place[place < most]
    at = first[order], place
    best.second[at], best.times[at] = second[order], run.times[order]
    if len(run.total):
        best.total[at] = run.total[order]
    return best


_NO_TOTAL = np.zeros(0)


def _file(path: Path, column: str) -> Path:
    return path.with_name(f"{path.name}.{column}.npy")


def _between(run: Tally, start: int, stop: int) -> Tally:
    return Tally(*(column[start:stop] for column in run))


def _merged(runs: list[Tally]) -> Tally:
    if len(runs) == 1:
        return runs[0]
    if not runs:
        return Tally(np.zeros(0, np.int64), np.zeros(0, np.int64), _NO_TOTAL)
    key, times, total = (np.concatenate(columns) for columns in zip(*runs, strict=True))
    order = np.argsort(key, kind="stable")  # which finds that these are runs, and merges them
    return _summed(Tally(key[order], times[order], total[order] if len(total) else _NO_TOTAL))


def _sorted(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in order, and where each stood; equal keys in the order they had."""
    bits = len(key).bit_length()
    if len(key) and int(key.max()) >> (63 - bits):
        order = np.argsort(key, kind="stable")
        return key[order], order
    # (key, place) in one word: sorting words is several times as fast as an argsort.
    packed = key << bits
    packed |= np.arange(len(key))
    packed.sort()
    return packed >> bits, packed & ((1 << bits) - 1)


def _counted(key: np.ndarray, value: np.ndarray) -> Tally:
    """The run of sorted keys that count 1 each."""
    starts = group_starts(key)
    total = np.add.reduceat(value, starts) if len(value) else _NO_TOTAL
    return Tally(key[starts], np.diff(starts, append=len(key)), total)


def _summed(run: Tally) -> Tally:
    """Add up entries with the same key; ``run.key`` is ascending."""
    starts = group_starts(run.key)
    total = np.add.reduceat(run.total, starts) if len(run.total) else _NO_TOTAL
    times = np.add.reduceat(run.times, starts) if len(starts) else run.times[:0]
    return Tally(run.key[starts], times, total)
