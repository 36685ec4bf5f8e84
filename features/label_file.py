"""The SQLite file that labels live in: its tables, who may open it, and what is said when it cannot be.

Labels, scores and notes are only ever added; triggers refuse anything else. Every row, of whichever of these
tables, takes the next number of one counter as its id, so ids tell what came first and what is new since.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from activations.errors import InputError

SCHEMA_VERSION = 2
APPLICATION_ID = 0x53414573  # "SAEs": tells our files from other people's SQLite files
_BUSY_SECONDS = 120.0  # a writer of a million labels keeps the others waiting for some seconds

_APPENDED = ("labels", "scores", "notes")
_SCHEMA = (
    "CREATE TABLE state (counter INTEGER NOT NULL, inputs TEXT)",
    "INSERT INTO state VALUES (0, NULL)",
    """CREATE TABLE labels (
        id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
        author TEXT NOT NULL, method TEXT NOT NULL, pattern TEXT NOT NULL, made TEXT NOT NULL,
        prompt_hash TEXT NOT NULL, examples_hash TEXT NOT NULL)""",
    "CREATE INDEX labels_of_feature ON labels (feature, source)",
    """CREATE TABLE scores (
        id INTEGER PRIMARY KEY, label INTEGER NOT NULL, kind TEXT NOT NULL, value REAL NOT NULL,
        n INTEGER NOT NULL, low REAL, high REAL, precision REAL, recall REAL, upper REAL, control REAL,
        judge TEXT NOT NULL, made TEXT NOT NULL)""",
    "CREATE INDEX scores_of_label ON scores (label, kind)",
    """CREATE TABLE notes (
        id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, text TEXT NOT NULL, author TEXT NOT NULL,
        made TEXT NOT NULL)""",
    "CREATE INDEX notes_of_feature ON notes (feature)",
    "CREATE TABLE stars (feature INTEGER PRIMARY KEY)",
    "CREATE TABLE lists (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    """CREATE TABLE members (
        list INTEGER NOT NULL, feature INTEGER NOT NULL, note TEXT NOT NULL, UNIQUE (list, feature))""",
    *(
        f"""CREATE TRIGGER {table}_are_kept_{action} BEFORE {action} ON {table}
        BEGIN SELECT RAISE(ABORT, 'the history of {table} is never changed'); END"""
        for table in _APPENDED
        for action in ("UPDATE", "DELETE")
    ),
)


class LabelFile:
    """One file of labels. Every use opens its own connection, so threads and processes may share the file.

    Attributes:
        path: where it is; it appears at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection that sees the file as it is at one moment; None if nothing has been written yet.

        A file of format 1 is converted first.

        Raises:
            InputError: the file is damaged, not one of labels, newer than this version, or cannot be read.
        """
        if not self.path.is_file():
            yield None
            return
        with self._sentences("read"), closing(self._connect_to_read()) as connection:
            if not self._is_ready(connection):
                yield None
                return
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction of its own, kept if the block ends well, else without a trace.

        Raises:
            InputError: as for :meth:`reading`; the file cannot be written, or the disk is full.
        """
        with self._sentences("written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, _BUSY_SECONDS, isolation_level=None)) as connection:
                if not self._is_ready(connection):
                    _use_write_ahead_log(connection)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if _pragma(connection, "user_version") == 0:
                        _make_tables(connection)
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()

    def _connect_to_read(self) -> sqlite3.Connection:
        """Where nothing can be written, a file with a write-ahead log opens only if it is said never to change."""
        log = self.path.with_name(self.path.name + "-wal")
        if os.access(self.path.parent, os.W_OK) or (log.is_file() and log.stat().st_size):
            return sqlite3.connect(self.path, _BUSY_SECONDS, isolation_level=None)
        address = f"{self.path.resolve().as_uri()}?immutable=1"
        return sqlite3.connect(address, _BUSY_SECONDS, isolation_level=None, uri=True)

    def _is_ready(self, connection: sqlite3.Connection) -> bool:
        """Check whose file this is, and convert an old one. False if it is empty."""
        connection.execute("BEGIN")  # all three at one moment: another process may be making the tables
        version, application = _pragma(connection, "user_version"), _pragma(connection, "application_id")
        is_empty = _pragma(connection, "schema_version") == 0
        connection.rollback()
        if is_empty:
            return False
        if application != APPLICATION_ID:
            raise InputError(f"{self.path} is an SQLite file of something else, not of labels.")
        if version > SCHEMA_VERSION:
            raise InputError(
                f"{self.path} was written in format {version}, and this saescope reads up to format"
                f" {SCHEMA_VERSION}: install a newer saescope."
            )
        if version < SCHEMA_VERSION:
            with self._sentences(f"converted to format {SCHEMA_VERSION}"):
                _convert(connection)
        return True

    @contextmanager
    def _sentences(self, action: str) -> Iterator[None]:
        """Turn what SQLite and the system complain of into a sentence about what was to be done."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise InputError(f"The labels in {self.path} cannot be {action} ({error}).") from None
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} is not a readable file of labels ({error}): move it away to start a new one."
            ) from None
        except UnicodeEncodeError:
            raise InputError(
                f"A text for {self.path} holds half of a character: labels and notes must be valid Unicode."
            ) from None


def next_ids(connection: sqlite3.Connection, n: int = 1) -> int:
    """Take the next ``n`` numbers of the counter; returns the first of them."""
    (counter,) = connection.execute("SELECT counter FROM state").fetchone()
    connection.execute("UPDATE state SET counter = ?", (counter + n,))
    return int(counter) + 1


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Readers and a writer at once; where the file system cannot do it, the ordinary journal serves."""
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = WAL").fetchone()


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _convert(connection: sqlite3.Connection) -> None:
    """From format 1, which kept one automatic label, one person's label and one note of a feature, undated.

    An automatic label without F1 had nothing measured, and has no score now.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _pragma(connection, "user_version") == 1:  # else another process was faster
            automatic = connection.execute(
                "SELECT feature, text, method, f1, precision, recall, n FROM automatic ORDER BY feature"
            ).fetchall()
            person = connection.execute("SELECT feature, text FROM person ORDER BY feature").fetchall()
            notes = connection.execute("SELECT feature, text FROM note ORDER BY feature").fetchall()
            inputs = connection.execute("SELECT inputs FROM provenance").fetchone()
            for table in ("automatic", "person", "note", "provenance"):
                connection.execute(f"DROP TABLE {table}")
            _make_tables(connection)
            add_label = "INSERT INTO labels VALUES (?, ?, ?, ?, '', ?, '', '', '', '')"
            for feature, text, method, f1, precision, recall, n in automatic:
                label = next_ids(connection)
                connection.execute(add_label, (label, feature, "automatic", text, method))
                if f1 is not None:
                    connection.execute(
                        "INSERT INTO scores VALUES (?, ?, 'tokens', ?, ?, NULL, NULL, ?, ?, NULL, NULL, 'pattern', '')",
                        (next_ids(connection), label, f1, n or 0, precision, recall),
                    )
            for feature, text in person:
                connection.execute(add_label, (next_ids(connection), feature, "person", text, ""))
            for feature, text in notes:
                row = (next_ids(connection), feature, text)
                connection.execute("INSERT INTO notes VALUES (?, ?, ?, '', '')", row)
            if inputs is not None:
                connection.execute("UPDATE state SET inputs = ?", (json.dumps(json.loads(inputs[0])),))
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
