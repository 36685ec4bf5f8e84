"""The SQLite file that labels live in: its tables, who may open it, and what is said when it cannot be.

Labels, scores and notes are only ever added; triggers refuse anything else. Every row, of whichever of these
tables, takes the next number of one counter as its id, so ids tell what came first and what is new since. With each
number goes a random mark: the same number with another mark is of another past, such as that of an older copy of the
file which was put back.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from activations.errors import InputError

SCHEMA_VERSION = 3
APPLICATION_ID = 0x53414573  # "SAEs": tells our files from other people's SQLite files
_BUSY_SECONDS = 120.0  # a writer of a million labels keeps the others waiting for some seconds

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_APPENDED = ("labels", "scores", "notes")
_WRITES = "CREATE TABLE writes (counter INTEGER PRIMARY KEY, mark BLOB NOT NULL)"
_SCHEMA = (
    _WRITES,
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
        sae_hash: of which SAE its labels must be, which the first write notes; None takes those of any.
    """

    def __init__(self, path: Path, sae_hash: str | None = None) -> None:
        self.path = path
        self.sae_hash = sae_hash

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection that sees the file as it is at one moment; None if nothing has been written yet.

        A file of an older format is converted first.

        Raises:
            InputError: the file is damaged, not one of labels, newer than this version, of another SAE, or cannot be
                read.
        """
        if not self.path.is_file():
            yield None
            return
        with self._sentences("read"), closing(self._connect_to_read()) as connection:
            if not self._is_ready(connection):
                yield None
                return
            connection.execute("BEGIN")
            self.check_sae(connection, self.sae_hash)
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
                self._is_ready(connection)
                _use_write_ahead_log(connection)  # also if it has been moved, which takes it out of use
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if _pragma(connection, "user_version") == 0:
                        _make_tables(connection)
                    self._claim(connection)
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()

    def move_to(self, target: Path) -> None:
        """Give the file another name, in one rename: what stands in its log is brought into it before.

        Raises:
            InputError: there is a file of that name, another process has it open, or it cannot be moved.
        """
        with (
            self._sentences("moved"),
            closing(sqlite3.connect(self.path, _BUSY_SECONDS, isolation_level=None)) as connection,
        ):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if connection.execute("PRAGMA journal_mode = DELETE").fetchone() != ("delete",):
                raise InputError(f"{self.path} is open in another process: close that first.")
        with self._sentences("moved"):
            for name in (
                "",
                "-wal",
                "-journal",
            ):  # a log that was left over would be taken for one of this file
                if (other := target.with_name(target.name + name)).exists():
                    raise InputError(f"{other} is there already: move it away first.")
            self.path.rename(target)

    def check_sae(self, connection: sqlite3.Connection, sae_hash: str | None) -> str | None:
        """The hash of the SAE whose labels these are; None if no run has written to the file yet.

        Raises:
            InputError: it is another than ``sae_hash``, if that is given.
        """
        (inputs,) = connection.execute("SELECT inputs FROM state").fetchone()
        held: str | None = json.loads(inputs or "{}").get("sae_hash")
        if None not in (held, sae_hash) and held != sae_hash:
            raise InputError(f"{self.path} holds labels of another SAE: run sae index {self.path.parent}.")
        return held

    def _claim(self, connection: sqlite3.Connection) -> None:
        """Note of which SAE the labels are, unless that is known."""
        if self.check_sae(connection, self.sae_hash) is None and self.sae_hash is not None:
            (inputs,) = connection.execute("SELECT inputs FROM state").fetchone()
            claimed = json.loads(inputs or "{}") | {"sae_hash": self.sae_hash}
            connection.execute("UPDATE state SET inputs = ?", (json.dumps(claimed),))

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
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                raise InputError(f"The labels in {self.path} cannot be {action} ({error}).") from None
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
    connection.execute("INSERT INTO writes VALUES (?, randomblob(8))", (counter + n,))
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
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _pragma(connection, "user_version")  # another process may have been faster
        if version == 1:
            _convert_from_1(connection)
        elif version == 2:  # which had no marks
            connection.execute(_WRITES)
            next_ids(connection)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _convert_from_1(connection: sqlite3.Connection) -> None:
    """It kept one automatic label, one person's label and one note of a feature, undated.

    An automatic label without F1 had nothing measured, and has no score now.
    """
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
