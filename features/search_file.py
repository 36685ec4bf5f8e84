"""The search database ``features/search.sqlite``: label, top tokens and note of every feature, in order of importance.

It is made from the labels and the index, and can be made again. A row's number says how important the feature is and
which it is, so that rows come in the order of results, whatever is looked for, and the first need nothing of the rest:

======================  ==========================================================================
entry                   one row per feature, by rank: what is shown of it
terms                   FTS5 without content: which terms stand in which row
vocabulary              all words of one length, a line each: prefixes and typing errors are looked up here
chunk                   label, tokens and note of some rows as an Arrow table: what regular expressions read
state                   what it was made from, and number and mark of the last change of the labels that it knows
======================  ==========================================================================
"""

import json
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from activations.errors import InputError
from features.terms import Piece, terms

VERSION = 2
FIELDS = ("label", "tokens", "note")
"""The texts of an entry that are searched."""

_FEATURE_BITS = 32
_LEVELS = 1024  # of importance; within one, features come by number
_INDEXED_PREFIX = 3  # characters: shorter prefixes have lists of their own, longer ones few words each
_WORDS_OF_PREFIX = 500  # a longer prefix with more words than this is left to FTS5
_NEAREST_WORDS = 8  # for a typing error
_LONGEST_WORD = 40  # characters: what is longer is kept, but not offered for typing errors
_CHUNK_ROWS = 16_384
_LINES = "(?m)"  # ^ and $ match at lines
_READERS = 2  # chunks are matched by so many threads
_BUSY_SECONDS = 30.0

_SCHEMA = f"""
CREATE TABLE entry (rank INTEGER PRIMARY KEY, feature INTEGER NOT NULL UNIQUE, label TEXT NOT NULL,
    tokens TEXT NOT NULL, note TEXT NOT NULL, score REAL, score_kind TEXT NOT NULL, source TEXT NOT NULL,
    density REAL NOT NULL);
CREATE VIRTUAL TABLE terms USING fts5(label, tokens, note, content='', columnsize=0, tokenize='ascii',
    prefix='{" ".join(map(str, range(1, _INDEXED_PREFIX + 1)))}');
CREATE TABLE vocabulary (length INTEGER PRIMARY KEY, words TEXT NOT NULL);
CREATE TABLE chunk (first INTEGER PRIMARY KEY, rows BLOB NOT NULL);
CREATE TABLE state (inputs TEXT NOT NULL, change INTEGER NOT NULL, mark TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is searched and shown of a feature.

    Attributes:
        feature: its number.
        importance: 0 to 1; the most important come first.
        label, tokens, note: texts, empty if there is none; each token is a line.
        score: of the label; None if it was not scored.
        score_kind: what kind of score it is, "" if there is none.
        source: who gave the label, "" if there is none.
        density: share of positions at which the feature fires.
    """

    feature: int
    importance: float
    label: str
    tokens: str
    note: str
    score: float | None
    score_kind: str
    source: str
    density: float

    @property
    def rank(self) -> int:
        """Smaller is more important; no two features have the same."""
        level = round((1 - min(max(self.importance, 0.0), 1.0)) * (_LEVELS - 1))
        return level << _FEATURE_BITS | self.feature


@dataclass(frozen=True)
class Sought:
    """A piece of a query with what it came to in this vocabulary.

    Attributes:
        alternatives: sequences of terms, one of which an entry must have.
        is_prefix: whether the last term of each may go on.
        guess: "" if the piece was found as it was typed, else "prefix" or "typo".
    """

    alternatives: tuple[tuple[str, ...], ...]
    is_prefix: bool = False
    guess: str = ""

    @property
    def expression(self) -> str:
        """In the language of FTS5. Terms hold no quotes, so nothing that is typed is ever part of the language."""
        star = " *" if self.is_prefix else ""
        options = (" + ".join(f'"{term}"' for term in option) + star for option in self.alternatives)
        return f"({' OR '.join(options)})"

    def stands_in(self, found: Sequence[str]) -> bool:
        """Whether terms of a text hold one of the alternatives."""
        return any(
            all(
                found[start + i] == term
                or (self.is_prefix and i == len(option) - 1 and found[start + i].startswith(term))
                for i, term in enumerate(option)
            )
            for option in self.alternatives
            for start in range(len(found) - len(option) + 1)
        )


class SearchFile:
    """The database at ``path``. Every call opens its own connection, so threads may share an instance."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else makes or changes it inside the block: others wait. Readers never do."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield

    def state(self, inputs: Mapping[str, Any]) -> tuple[int, str] | None:
        """Number and mark of the last change of the labels that it knows; None if it is not of these ``inputs``."""
        if not self.path.is_file():
            return None
        try:
            with self._connected() as connection:
                made_from, *state = connection.execute("SELECT inputs, change, mark FROM state").fetchone()
        except (InputError, TypeError):
            return None  # broken, or another program's: it only holds what can be made again
        return (int(state[0]), str(state[1])) if made_from == _key(inputs) else None

    def build(
        self,
        entries: Iterable[Entry],
        inputs: Mapping[str, Any],
        state: tuple[int, str],
        step: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Make it anew, inside :meth:`writing`; whoever reads meanwhile reads the old one.

        Args:
            entries: of every feature, in any order.
            inputs: what they were made from, for :meth:`state`.
            state: number and mark of the last change of the labels that they know.
            step: is told how many more entries are written.
        """
        part = self.path.with_name(f"{self.path.name}.part")
        part.unlink(missing_ok=True)
        with (
            self._explaining("written"),
            closing(sqlite3.connect(part, isolation_level=None)) as connection,
        ):
            # A half-written part is thrown away, so nothing needs to be undone in it.
            connection.executescript(
                "PRAGMA page_size = 16384; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                f" PRAGMA user_version = {VERSION}; BEGIN; {_SCHEMA}"
            )
            ordered = iter(sorted(entries, key=lambda entry: entry.rank))
            words: set[str] = set()
            first = 0
            while rows := list(islice(ordered, _CHUNK_ROWS)):
                words |= _insert(connection, rows)
                connection.execute("INSERT INTO chunk VALUES (?, ?)", (first, _packed(map(_with_rank, rows))))
                first = rows[-1].rank + 1
                step(len(rows))
            _add_words(connection, words)
            connection.execute("INSERT INTO terms (terms) VALUES ('optimize')")
            connection.execute("INSERT INTO state VALUES (?, ?, ?)", (_key(inputs), *state))
            connection.execute("COMMIT")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # A journal that a killed process left beside the old file would be applied to the new one.
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
        os.replace(part, self.path)

    def update(self, entries: Sequence[Entry], state: tuple[int, str]) -> None:
        """Put changed entries into the place of those of the same features, all or none; inside :meth:`writing`."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            old = [
                row
                for entry in entries
                for row in connection.execute(
                    "SELECT rank, label, tokens, note FROM entry WHERE feature = ?", (entry.feature,)
                )
            ]
            for rank, *texts in old:
                connection.execute(
                    "INSERT INTO terms (terms, rowid, label, tokens, note) VALUES ('delete', ?, ?, ?, ?)",
                    (rank, *map(_terms_text, texts)),
                )
                connection.execute("DELETE FROM entry WHERE rank = ?", (rank,))
            _add_words(connection, _insert(connection, entries))
            _repack(connection, {rank for rank, *_ in old} | {entry.rank for entry in entries})
            connection.execute("UPDATE state SET change = ?, mark = ?", state)
            connection.execute("COMMIT")

    def features(self, numbers: Iterable[int]) -> list[Entry]:
        """The entries of these features, in their order; unknown ones are left out."""
        with self._connected() as connection:
            rows = (
                connection.execute(f"{_SELECT} WHERE feature = ?", (number,)).fetchone() for number in numbers
            )
            return [_entry(row) for row in rows if row]

    def with_terms(self, pieces: Sequence[Piece], n: int) -> tuple[list[Entry], list[Sought]]:
        """The n most important entries that have all pieces of a query, and what was made of each piece.

        A word that stands nowhere is read as the beginning of words, and if there are none, as a typing error.
        """
        with self._connected() as connection:
            sought = [_resolved(connection, piece) for piece in pieces]
            if not sought or not all(one.alternatives for one in sought):
                return [], sought
            rows = connection.execute(
                f"{_SELECT} JOIN terms ON terms.rowid = entry.rank WHERE terms MATCH ?"
                " ORDER BY terms.rowid LIMIT ?",
                (" AND ".join(one.expression for one in sought), n),
            ).fetchall()
            return [_entry(row) for row in rows], sought

    def with_pattern(
        self, pattern: str, n: int, *, ignore_case: bool = False
    ) -> list[tuple[Entry, list[str]]]:
        """The n most important entries with a text that a regular expression (RE2) matches, and their fields that do.

        ``^`` and ``$`` match at the lines of a text.

        Raises:
            InputError: it is no regular expression.
        """
        import pyarrow as pa

        found: list[tuple[int, list[str]]] = []
        with (
            self._connected() as connection,
            ThreadPoolExecutor(_READERS) as pool,
            closing(_matched(pool, _blobs(connection), pattern, ignore_case, n)) as chunks,
        ):
            try:
                for part in chunks:
                    found += part
                    if len(found) >= n:
                        break
            except pa.ArrowInvalid as error:
                reason = (
                    str(error).removeprefix("Invalid regular expression: ").replace(_LINES, "").rstrip(".")
                )
                raise InputError(
                    f"/{pattern}/ is not a regular expression of RE2 ({reason}): correct it, or leave the slashes"
                    " off to look for the text itself."
                ) from None
            query = f"{_SELECT} WHERE rank = ?"
            return [
                (_entry(connection.execute(query, (rank,)).fetchone()), fields) for rank, fields in found[:n]
            ]

    @contextmanager
    def _explaining(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} cannot be {action} ({error}): free some space if the disk is full, else delete the file,"
                " which is then made again."
            ) from None

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with (
            self._explaining("used"),
            closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection,
        ):
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                raise sqlite3.DatabaseError("of another version")
            connection.execute("PRAGMA mmap_size = 4294967296")
            yield connection


_SELECT = """
SELECT feature, entry.label, entry.tokens, entry.note, score, score_kind, source, density, entry.rank
FROM entry
"""


def _entry(row: tuple[Any, ...]) -> Entry:
    feature, *rest, rank = row
    return Entry(feature, 1 - (rank >> _FEATURE_BITS) / (_LEVELS - 1), *rest)


def _key(inputs: Mapping[str, Any]) -> str:
    return json.dumps(dict(inputs), sort_keys=True)


def _terms_text(text: str) -> str:
    return " ".join(terms(text))


def _insert(connection: sqlite3.Connection, entries: Sequence[Entry]) -> set[str]:
    """Write entries with their terms; the words among these."""
    texts = [tuple(_terms_text(getattr(entry, field)) for field in FIELDS) for entry in entries]
    connection.executemany(
        "INSERT INTO entry (rank, feature, label, tokens, note, score, score_kind, source, density)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (e.rank, e.feature, e.label, e.tokens, e.note, e.score, e.score_kind, e.source, e.density)
            for e in entries
        ),
    )
    connection.executemany(
        "INSERT INTO terms (rowid, label, tokens, note) VALUES (?, ?, ?, ?)",
        ((entry.rank, *text) for entry, text in zip(entries, texts, strict=True)),
    )
    return {term for text in texts for field in text for term in field.split(" ") if term.isalnum()}


def _add_words(connection: sqlite3.Connection, words: set[str]) -> None:
    """Words that are gone from all entries stay: they find nothing."""
    by_length: dict[int, set[str]] = {}
    for word in words:
        by_length.setdefault(len(word), set()).add(word)
    for length, group in by_length.items():
        known = _words(connection, length)
        if not group <= set(known):
            text = "\n".join(sorted(group.union(known)))
            connection.execute("INSERT OR REPLACE INTO vocabulary VALUES (?, ?)", (length, text))


def _words(connection: sqlite3.Connection, length: int) -> list[str]:
    row = connection.execute("SELECT words FROM vocabulary WHERE length = ?", (length,)).fetchone()
    return row[0].split("\n") if row else []


def _resolved(connection: sqlite3.Connection, piece: Piece) -> Sought:
    typed = (piece.terms,)
    word = piece.word
    if word is None:
        return Sought(typed, piece.is_prefix)
    if piece.is_prefix:
        return _beginning_with(connection, word)
    query = "SELECT rowid FROM terms WHERE terms MATCH ? ORDER BY rowid LIMIT 1"
    if connection.execute(query, (Sought(typed).expression,)).fetchone():
        return Sought(typed)
    longer = _beginning_with(connection, word)
    if longer.alternatives and connection.execute(query, (longer.expression,)).fetchone():
        return Sought(longer.alternatives, longer.is_prefix, "prefix")
    return Sought(tuple((word,) for word in _nearest(connection, word)), False, "typo")


def _beginning_with(connection: sqlite3.Connection, prefix: str) -> Sought:
    """Few words are looked up one by one, which streams; FTS5 would gather all their rows first."""
    if len(prefix) <= _INDEXED_PREFIX:
        return Sought(((prefix,),), True)
    import re

    found: list[str] = []
    line = re.compile(f"^{re.escape(prefix)}.*$", re.MULTILINE)
    rows = connection.execute("SELECT words FROM vocabulary WHERE length >= ?", (len(prefix),))
    for (words,) in rows:
        found += line.findall(words)
        if len(found) > _WORDS_OF_PREFIX:
            return Sought(((prefix,),), True)
    return Sought(tuple((word,) for word in found))


def _nearest(connection: sqlite3.Connection, word: str) -> list[str]:
    """The words with the smallest number of wrong, missing, added or swapped letters, at most 2 (1 in a short word)."""
    from rapidfuzz.distance import OSA
    from rapidfuzz.process import extract

    limit = 0 if len(word) < 3 else 1 if len(word) < 6 else 2
    if not limit or len(word) > _LONGEST_WORD:
        return []
    lengths = range(len(word) - limit, len(word) + limit + 1)
    choices = [choice for length in lengths for choice in _words(connection, length)]
    found = extract(word, choices, scorer=OSA.distance, score_cutoff=limit, limit=_NEAREST_WORDS)
    least = min((distance for _, distance, _ in found), default=0)
    return [choice for choice, distance, _ in found if distance == least]


def _with_rank(entry: Entry) -> tuple[int, str, str, str]:
    return entry.rank, entry.label, entry.tokens, entry.note


def _packed(rows: Iterable[tuple[int, str, str, str]]) -> bytes:
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = (pa.int64(), *[pa.string()] * len(FIELDS))
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    batch = pa.record_batch(arrays, names=["rank", *FIELDS])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _repack(connection: sqlite3.Connection, ranks: set[int]) -> None:
    """Write the chunks anew in which these ranks lie."""
    from bisect import bisect_right

    firsts = [first for (first,) in connection.execute("SELECT first FROM chunk ORDER BY first")]
    for place in sorted({bisect_right(firsts, rank) - 1 for rank in ranks}):
        end = firsts[place + 1] if place + 1 < len(firsts) else 2**62
        rows = connection.execute(
            "SELECT rank, label, tokens, note FROM entry WHERE rank >= ? AND rank < ? ORDER BY rank",
            (firsts[place], end),
        )
        connection.execute("UPDATE chunk SET rows = ? WHERE first = ?", (_packed(rows), firsts[place]))


def _blobs(connection: sqlite3.Connection) -> Iterator[bytes]:
    for (rows,) in connection.execute("SELECT rows FROM chunk ORDER BY first"):
        yield rows


def _matched(
    pool: ThreadPoolExecutor, blobs: Iterator[bytes], pattern: str, ignore_case: bool, n: int
) -> Generator[list[tuple[int, list[str]]], None, None]:
    """Rank and matching fields of the first n matching rows of each chunk, a few chunks ahead."""
    pending: deque[Future[list[tuple[int, list[str]]]]] = deque()
    try:
        for blob in blobs:
            pending.append(pool.submit(_matching_rows, blob, pattern, ignore_case, n))
            if len(pending) > _READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _matching_rows(blob: bytes, pattern: str, ignore_case: bool, n: int) -> list[tuple[int, list[str]]]:
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute

    table = pa.ipc.open_stream(pa.py_buffer(blob)).read_all()
    places = {}
    for field in FIELDS:
        texts = table[field].combine_chunks()
        filled = np.flatnonzero(compute.not_equal(texts, "").to_numpy(zero_copy_only=False))
        if len(filled) < len(texts):
            texts = texts.take(filled)
        matches = compute.match_substring_regex(texts, _LINES + pattern, ignore_case=ignore_case)
        if matches.true_count:
            places[field] = filled[np.flatnonzero(matches.to_numpy(zero_copy_only=False))]
    if not places:
        return []
    ranks = table["rank"].to_numpy()
    rows = np.unique(np.concatenate(list(places.values())))[:n]
    within = {field: set(found.tolist()) for field, found in places.items()}
    return [(int(ranks[row]), [field for field in within if row in within[field]]) for row in rows.tolist()]
