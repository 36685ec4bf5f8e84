"""All documents of a corpus as one table: where each lies, its split, 64 bits of its digest; no text, no names.

A document takes 46 bytes, and as many as its relative path has where it is a file of its own.
"""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from activations.cache import Cache
from activations.errors import InputError
from activations.files import hash_files, hash_json, room_needed
from activations.sources.compressed import COMPRESSIONS, open_compressed
from activations.sources.copies import ROWS_FILE, Copy, open_copy, write_copy, write_index
from activations.sources.files import ROW_KINDS, find_files, folder_hash, is_saved_dataset, kind_of
from activations.sources.hub import StreamedDataset, saved_rows
from activations.sources.parquet import parquet_rows
from activations.sources.python import python_files
from activations.sources.reading import Form, Piece
from activations.sources.rows import ROW, LeftOut, decode_text, index_jsonl, parse_line
from activations.sources.spec import Content, SourceSpec
from activations.sources.splits import split_number
from activations.strings import StringCollector, StringTable

DOCUMENT = np.dtype([*ROW.descr, ("group", "<i4"), ("file", "<i4"), ("fills_up", "i1")])
"""A row of a file, and: its group; its file's place among the names, -1 in a group of one file; whether it is read
only so that the test split has enough documents."""

COPIES_BYTES = 100 * 2**30
INDEX_KEPT_BYTES = 16 * 2**20  # a smaller file is looked through as quickly as its hash is compared


@dataclass(frozen=True)
class Group:
    """Documents that are read in the same way: one file of rows, or the files of a folder.

    root: the file or the folder; prefix: what the names of its documents begin with.
    """

    source: int
    root: Path
    prefix: str
    form: Form
    content: Content
    column: str
    key_is_name: bool = False


class Documents(NamedTuple):
    """groups, names: see ``DOCUMENT``; table: array of ``DOCUMENT`` without exact copies; left_out: count by reason.

    complete: whether nothing more can be read from a stream.
    """

    groups: list[Group]
    names: StringTable
    table: np.ndarray
    left_out: dict[str, int]
    complete: bool

    def order(self, split: int, seed: int, source: int | None = None) -> np.ndarray:
        """Places in the table of the documents of a split (of one source), shuffled; what fills up comes last."""
        chosen = self.table["split"] == split
        if source is not None:
            sources = np.array([group.source for group in self.groups], dtype=np.int32)
            chosen &= sources[self.table["group"]] == source
        order = array("q", np.flatnonzero(chosen).astype(np.int64).tobytes())
        random.Random(seed).shuffle(order)
        shuffled = np.frombuffer(order, dtype=np.int64)
        fills_up = self.table["fills_up"][shuffled].astype(bool)
        return np.concatenate([shuffled[~fills_up], shuffled[fills_up]])

    def count(self, split: int) -> int:
        """How many documents a split has."""
        return int((self.table["split"] == split).sum())

    def name(self, place: int) -> str:
        """Short and readable: "asyncio/tasks.py", "news.jsonl:12"."""
        entry = self.table[place]
        group = self.groups[entry["group"]]
        if entry["file"] < 0:
            return f"{group.prefix}:{entry['row']}"
        return str(PurePosixPath(group.prefix, self.names[entry["file"]]))

    def piece(self, place: int) -> Piece:
        """How to read a document."""
        entry = self.table[place]
        group = self.groups[entry["group"]]
        path = group.root if entry["file"] < 0 else group.root / self.names[entry["file"]]
        where = (int(entry["start"]), int(entry["inner"]), int(entry["length"]))
        return Piece(str(path), group.form, *where, group.content, group.column)

    def group(self, place: int) -> Group:
        """The group of a document."""
        return self.groups[self.table["group"][place]]

    def hash(self) -> str:
        """sha256 over every document's name, content and split."""
        digest = hashlib.sha256()
        for name in ("digest", "split", "row", "group", "file", "fills_up"):
            digest.update(np.ascontiguousarray(self.table[name]).data)
        digest.update(repr([group.prefix for group in self.groups]).encode())
        digest.update(self.names.text.data)
        digest.update(self.names.offsets.data)
        return digest.hexdigest()


def find_documents(
    specs: Sequence[SourceSpec],
    packages: Sequence[str],
    streams: dict[int, StreamedDataset],
    n_parts: int,
) -> Documents:
    """Look through all sources.

    Args:
        packages: installed packages that source "python" reads as well.
        streams: the dataset of every source that is streamed.
        n_parts: how many parts of each are read.

    Raises:
        InputError: a source does not exist or holds something else.
    """
    builder = _Builder()
    for source, spec in enumerate(specs):
        if source in streams:
            builder.add_stream(source, spec, streams[source], n_parts)
        elif spec.location == "python":
            builder.add_python(source, packages)
        elif is_saved_dataset(Path(spec.location)):
            builder.add_saved_dataset(source, spec)
        else:
            builder.add_files(source, spec)
    return builder.finish(all(stream.is_complete(n_parts) for stream in streams.values()))


class _Builder:
    """The table as it grows."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.names = StringCollector()
        self.left_out: Counter[str] = Counter()
        self._packed = bytearray()
        self._folders: dict[Group, int] = {}

    def add_python(self, source: int, packages: Sequence[str]) -> None:
        for file in python_files(packages, self.left_out):
            group = Group(source, file.root, file.prefix, "file", "text", "", key_is_name=True)
            self._add_file(group, file.relative, file.n_bytes, file.sha1, file.split, file.fills_up)

    def add_files(self, source: int, spec: SourceSpec) -> None:
        for root, relative in find_files(spec.location):
            path = root / relative
            if kind_of(path) in ROW_KINDS:
                self._add_row_file(source, spec, path, relative)
            elif spec.content == "text":
                self._add_text_file(Group(source, root, "", "file", "text", ""), relative)
            else:
                raise InputError(f"{path} is text and has no {spec.content}: give .jsonl or .parquet files.")

    def add_saved_dataset(self, source: int, spec: SourceSpec) -> None:
        folder = Path(spec.location)
        key = hash_json([folder_hash(folder), spec.split, spec.content, spec.column])
        where = _Where(key, folder.name, str(folder))
        self._add_copy(source, spec, where, lambda: saved_rows(folder, spec))

    def add_stream(self, source: int, spec: SourceSpec, stream: StreamedDataset, n_parts: int) -> None:
        for number, part in enumerate(stream.parts(n_parts)):
            rows_file = stream.part_folder(number) / ROWS_FILE
            self._add_rows(Group(source, rows_file, stream.name, "frames", spec.content, spec.column), part)

    def finish(self, complete: bool) -> Documents:
        """Leave out exact copies: of them the one in train stays before score before test, then the first."""
        table = np.frombuffer(self._packed, dtype=DOCUMENT)
        order = np.lexsort((table["split"], table["digest"]))  # stable: the first of equals stays first
        digests = table["digest"][order]
        kept = np.ones(len(table), dtype=bool)
        kept[order[1:][digests[1:] == digests[:-1]]] = False
        if not kept.all():
            self.left_out["exact copy"] = int((~kept).sum())
            table = table[kept]
        return Documents(self.groups, self.names.table(), table, dict(self.left_out), complete)

    def _add_text_file(self, group: Group, relative: str) -> None:
        path = group.root / relative
        try:
            with open_compressed(path) as file:
                data = file.read()
            text = decode_text(data)
            if not text.strip():
                raise LeftOut("empty")
        except OSError:
            self.left_out["unreadable"] += 1
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
        else:
            sha1 = hashlib.sha1(text.encode()).digest()
            self._add_file(group, relative, len(data), sha1, split_number(sha1))

    def _add_row_file(self, source: int, spec: SourceSpec, path: Path, name: str) -> None:
        is_jsonl = kind_of(path) == ".jsonl"
        if is_jsonl and path.suffix not in COMPRESSIONS:
            group = Group(source, path, name, "lines", spec.content, spec.column)
            self._add_rows(group, _jsonl_index(path, spec))
            return
        key = hash_json([hash_files([path]), path.name, spec.content, spec.column])
        self._add_copy(
            source,
            spec,
            _Where(key, name, str(path)),
            lambda: _compressed_lines(path) if is_jsonl else parquet_rows(path, spec.column),
        )

    def _add_copy(
        self, source: int, spec: SourceSpec, where: "_Where", rows: Callable[[], Iterable[tuple[int, Any]]]
    ) -> None:
        cache = Cache("copies", COPIES_BYTES)
        no_room = f"The disk has no room for a copy of {where.place}: free some, or set SAESCOPE_CACHE to another disk."
        copy = _find_copy(cache, where.key)
        if copy is None:
            with room_needed(no_room), cache.new(where.key) as new:
                write_copy(new, rows(), spec.content, spec.column, where.place)
            copy = _find_copy(cache, where.key)
        assert copy is not None
        folder, found = copy
        group = Group(source, folder / ROWS_FILE, where.name, "frames", spec.content, spec.column)
        self._add_rows(group, found)

    def _add_rows(self, group: Group, found: Copy) -> None:
        table = np.empty(len(found.rows), dtype=DOCUMENT)
        for field in ROW.names or ():
            table[field] = found.rows[field]
        table["group"], table["file"], table["fills_up"] = len(self.groups), -1, 0
        self.groups.append(group)
        self._packed += table.tobytes()
        self.left_out.update(found.left_out)

    def _add_file(
        self, group: Group, relative: str, n_bytes: int, sha1: bytes, split: int, fills_up: bool = False
    ) -> None:
        if group not in self._folders:
            self._folders[group] = len(self.groups)
            self.groups.append(group)
        digest = int.from_bytes(sha1[:8], "little")
        entry = (0, 0, 0, n_bytes, digest, split, self._folders[group], len(self.names), fills_up)
        self._packed += np.array(entry, dtype=DOCUMENT).tobytes()
        self.names.append(relative)


class _Where(NamedTuple):
    """Of a copy: its key in the cache; what its documents are called after; what messages call its source."""

    key: str
    name: str
    place: str


def _find_copy(cache: Cache, key: str) -> tuple[Path, Copy] | None:
    folder = cache.find(key)
    if folder is None:
        return None
    try:
        return folder, open_copy(folder)
    except InputError:
        cache.remove(key)
        return None


def _jsonl_index(path: Path, spec: SourceSpec) -> Copy:
    """Where the documents of a file lie: a large file is looked through once for each content."""
    if path.stat().st_size < INDEX_KEPT_BYTES:
        index = index_jsonl(path, spec.content, spec.column)
        return Copy(index.rows, dict(index.left_out), {})
    cache = Cache("copies", COPIES_BYTES)
    key = hash_json([hash_files([path]), path.name, spec.content, spec.column])
    found = _find_copy(cache, key)
    if found is not None:
        return found[1]
    index = index_jsonl(path, spec.content, spec.column)
    with cache.new(key) as new:
        write_index(new, index)
    return Copy(index.rows, dict(index.left_out), {})


def _compressed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of every line of a compressed file, blank lines passed over."""
    with open_compressed(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, parse_line(line, f"{path} line {number}")
            except LeftOut as reason:
                if line.strip():
                    yield number, reason
