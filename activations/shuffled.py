"""A copy of a store's rows that lies in the order of training, written in two sequential passes.

Gathering rows in random order asks a disk for every row by itself. The copy is made without that (an external
distribution sort): pass 1 reads the store from beginning to end and appends each row to the bucket of positions that
it belongs to; pass 2 reads one bucket after the other, puts it into order in memory and appends it to the copy. A
bucket's rows come in the order of the store, so nothing but the rows is written: which is which follows from the
permutation. A folder holds::

    rows.bin         the rows at positions 0, 1, 2 … of epoch 0: their values, behind int8 values their scale
    checksums.bin    uint64 per chunk of 256 rows: the sum of its bytes, read as little-endian 64-bit numbers
    manifest.json    what was shuffled, and how
"""

import os
import shutil
import weakref
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from activations.errors import InputError
from activations.files import is_finished, new_folder, read_manifest, room_for, room_needed, write_manifest
from activations.ordered import CHUNK, RowFormat, RowOrder, RowSource
from activations.progress import Progress, Step, silent

KIND = "shuffled copy of activations"
ROWS_FILE, CHECKSUMS_FILE = "rows.bin", "checksums.bin"
MEMORY_BYTES = 1 << 30
_INDEX_BYTES = 64
"""Per row, in the arrays that say where it goes."""


def external_bytes(source: RowSource, *, memory_bytes: int = MEMORY_BYTES) -> int:
    """Disk space that :meth:`ShuffledReader.make` takes while it works: the copy and one bucket.

    The finished copy takes as much as the store's activations.
    """
    format_ = RowFormat.of(source)
    bucket = min(_bucket_rows(format_, memory_bytes), source.n_rows)
    checksums = 8 * -(-source.n_rows // CHUNK)
    return (source.n_rows + bucket) * format_.row_bytes + checksums


class ShuffledReader:
    """Reads rows from a copy in the order of training, chunk by chunk; every chunk is checked.

    Made by :meth:`make`. The files stay open, so that a copy that is replaced meanwhile is read to the end.
    """

    def __init__(self, source: RowSource, seed: int, folder: Path):
        self.source, self.order = source, RowOrder(source.n_rows, seed)
        self.format = RowFormat.of(source)
        self._folder, self._path = folder, folder / ROWS_FILE
        self._check_size(self._path, source.n_rows * self.format.row_bytes)
        self._check_size(folder / CHECKSUMS_FILE, 8 * -(-source.n_rows // CHUNK))
        self._checksums = np.memmap(folder / CHECKSUMS_FILE, "<u8", mode="r")
        self._file = self._path.open("rb", buffering=0)
        self._place = Lock()  # threads share the place where the file is read, on systems that need one
        weakref.finalize(self, self._file.close)

    @classmethod
    def make(
        cls,
        source: RowSource,
        seed: int,
        folder: Path | str,
        *,
        memory_bytes: int = MEMORY_BYTES,
        progress: Progress = silent,
    ) -> "ShuffledReader":
        """Write the copy to ``folder``, or open it if it is there; a copy of other rows or seed is replaced.

        While another process writes it, this waits; a lock file beside the folder tells.

        Args:
            seed: draws the order.
            memory_bytes: what the passes may hold in memory.

        Raises:
            InputError: too little room on the disk (:func:`external_bytes` says how much it takes), a folder
                that holds something else, or a copy that is damaged.
        """
        folder = Path(folder)
        inputs = _inputs(source, seed)
        if is_finished(folder, KIND, inputs):  # nothing is written, so the disk may be read-only
            return cls(source, seed, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".lock-{folder.name}")):
            if not is_finished(folder, KIND, inputs):
                _write_copy(source, seed, folder, inputs, memory_bytes, progress)
            return cls(source, seed, folder)

    def read(self, positions: np.ndarray, rows: np.ndarray, out: Tensor) -> np.ndarray:
        """See :class:`activations.ordered.RowReader`.

        Raises:
            InputError: a chunk is not as it was written.
        """
        chunks, place = np.divmod(positions, CHUNK)
        is_new = np.diff(chunks, prepend=-1) != 0
        for i, chunk in enumerate(chunks[is_new]):
            self._read_chunk(int(chunk), out.numpy()[i * CHUNK : (i + 1) * CHUNK])
        return (np.cumsum(is_new) - 1) * CHUNK + place

    def _read_chunk(self, chunk: int, out: np.ndarray) -> None:
        first = chunk * CHUNK
        out = out[: self.source.n_rows - first]
        n_read = self._read_at(first * self.format.row_bytes, out.reshape(-1).data)
        if n_read != out.nbytes or _checksum(out) != self._checksums[chunk]:
            raise InputError(
                f"{self._path} is damaged at rows {first} to {first + len(out) - 1}: {self._remedy}"
            )

    def _read_at(self, offset: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], offset)
        with self._place:
            self._file.seek(offset)
            return self._file.readinto(out)

    def _check_size(self, path: Path, expected: int) -> None:
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise InputError(f"{path} holds {size:,} bytes where {expected:,} were written: {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"delete {self._folder} to have the store shuffled again."


def _inputs(source: RowSource, seed: int) -> dict[str, str | int]:
    return {
        "identity": source.identity,
        "hook_name": source.hook_name,
        "seed": seed,
        "n_rows": source.n_rows,
        "width": source.width,
        "dtype": str(RowFormat.of(source).dtype).removeprefix("torch."),
    }


def _bucket_rows(format_: RowFormat, memory_bytes: int) -> int:
    """How many rows fit twice into the memory, with the arrays that say where they go: whole chunks."""
    return max(1, memory_bytes // (2 * format_.row_bytes + _INDEX_BYTES) // CHUNK) * CHUNK


def _write_copy(
    source: RowSource,
    seed: int,
    folder: Path,
    inputs: dict[str, str | int],
    memory_bytes: int,
    progress: Progress,
) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        read_manifest(folder, KIND)  # refuses what is not ours
    needed = external_bytes(source, memory_bytes=memory_bytes)
    if room_for(folder, freed=folder.glob("*.bin")) < needed:
        raise InputError(_no_space(folder, needed))
    shutil.rmtree(folder, ignore_errors=True)  # makes room
    with room_needed(_no_space(folder, needed)), new_folder(folder) as new:
        with progress("shuffle", total=2 * source.n_rows, unit="rows") as step:
            _shuffle(source, seed, new, memory_bytes, step)
        write_manifest(new, KIND, inputs)


def _shuffle(source: RowSource, seed: int, folder: Path, memory_bytes: int, step: Step) -> None:
    """Both passes, into ``folder``."""
    format_, order = RowFormat.of(source), RowOrder(source.n_rows, seed)
    size = min(_bucket_rows(format_, memory_bytes), source.n_rows)
    # Memory is taken once: fresh pages cost more than the copying into them.
    read, moved = torch.empty(2, size, format_.row_bytes, dtype=torch.uint8)
    buckets = [folder / f"bucket-{i:05d}" for i in range(-(-source.n_rows // size))]
    for start in range(0, source.n_rows, size):
        stop = min(start + size, source.n_rows)
        _read_rows(source, format_, start, stop, read)
        by_bucket, cuts = _distribution(start, stop, order, size, len(buckets))
        for bucket, first, last in zip(buckets, cuts, cuts[1:], strict=False):
            with bucket.open("ab") as file:
                file.write(_gathered(read, by_bucket[first:last], moved).data)
        step(stop - start)
    with (folder / ROWS_FILE).open("wb") as copy, (folder / CHECKSUMS_FILE).open("wb") as checksums:
        for i, bucket in enumerate(buckets):
            start, stop = i * size, min((i + 1) * size, source.n_rows)
            with bucket.open("rb") as file:
                file.readinto(read[: stop - start].numpy().data)
            records = _gathered(read, _ranks(order.rows(np.arange(start, stop))), moved)
            copy.write(records.data)
            checksums.write(_checksums(records).data)
            bucket.unlink()
            step(stop - start)


def _read_rows(source: RowSource, format_: RowFormat, start: int, stop: int, out: Tensor) -> None:
    """Rows ``start`` to ``stop`` of the store as bytes, into ``out`` uint8 [≥ stop - start, row_bytes]."""
    starts = source.starts
    for shard in range(np.searchsorted(starts, start, "right") - 1, np.searchsorted(starts, stop)):
        first, last = max(start, int(starts[shard])), min(stop, int(starts[shard + 1]))
        here = slice(first - int(starts[shard]), last - int(starts[shard]))
        records = out[first - start : last - start]
        records[:, : format_.value_bytes] = source.values(shard)[here].view(torch.uint8)
        if (scales := source.scales(shard)) is not None:
            records[:, format_.value_bytes :] = scales[here, None].view(torch.uint8)


def _distribution(
    start: int, stop: int, order: RowOrder, size: int, n_buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``start`` to ``stop``, counted from ``start``, bucket by bucket, and where each bucket's begin and end."""
    bucket = order.positions(np.arange(start, stop)) // size
    by_bucket = np.argsort(bucket, kind="stable")
    return by_bucket, np.searchsorted(bucket[by_bucket], np.arange(n_buckets + 1))


def _ranks(x: np.ndarray) -> np.ndarray:
    """How many elements of ``x`` [m], all different, are smaller than each: int64 [m]."""
    ranks = np.empty(len(x), np.int64)
    ranks[np.argsort(x)] = np.arange(len(x))
    return ranks


def _gathered(records: Tensor, which: np.ndarray, out: Tensor) -> np.ndarray:
    """``records[which]``, in the memory of ``out``."""
    return torch.index_select(records, 0, torch.from_numpy(which), out=out[: len(which)]).numpy()


def _checksums(records: np.ndarray) -> np.ndarray:
    """uint64 [⌈m / 256⌉] of rows uint8 [m, row_bytes] that begin with a chunk."""
    return np.array([_checksum(records[i : i + CHUNK]) for i in range(0, len(records), CHUNK)], "<u8")


def _checksum(chunk: np.ndarray) -> int:
    """The sum, modulo 2⁶⁴, of the bytes of one chunk read eight at a time; any single flipped bit changes it."""
    flat = chunk.reshape(-1)
    n_words = len(flat) // 8
    rest = int.from_bytes(flat[8 * n_words :].tobytes(), "little")
    return (int(flat[: 8 * n_words].view("<u8").sum()) + rest) % 2**64


def _no_space(folder: Path, needed: int) -> str:
    return (
        f"The disk has too little room to shuffle the activations into {folder}, {needed / 1e6:,.0f} MB while it"
        " works: free some, choose a folder on another disk, or read in exact order, which needs none."
    )
