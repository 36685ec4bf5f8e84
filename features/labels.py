"""What do we call a feature: labels in one SQLite file, the only file of a run that people edit.

A feature may have an automatic label with its scores, a person's label, and a person's note, each in a table
of its own: labelling again replaces the first and cannot touch the others. A person's label wins.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from activations.errors import InputError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x53414573  # "SAEs": tells our files from other people's SQLite files
_BUSY_SECONDS = 30.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS automatic (
    feature INTEGER PRIMARY KEY, text TEXT NOT NULL, method TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n INTEGER
);
CREATE TABLE IF NOT EXISTS person (feature INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS note (feature INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS provenance (inputs TEXT NOT NULL);
"""

# One row per feature that has a label or a note. Scores belong to the automatic text, so they are
# shown only with it.
_EFFECTIVE = """
SELECT f.feature AS feature, COALESCE(p.text, a.text, '') AS text,
       p.text IS NULL AND a.text IS NOT NULL AS is_automatic, a.method, a.f1, a.precision, a.recall, a.n,
       COALESCE(o.text, '') AS note
FROM (SELECT feature FROM automatic UNION SELECT feature FROM person UNION SELECT feature FROM note) AS f
LEFT JOIN automatic AS a ON a.feature = f.feature
LEFT JOIN person AS p ON p.feature = f.feature
LEFT JOIN note AS o ON o.feature = f.feature
"""


@dataclass(frozen=True)
class Label:
    """What a feature is called, and how well the name predicts its firing.

    Attributes:
        feature: index of the feature.
        text: the label; empty for a feature that has only a note.
        source: who gave it.
        method: which kind of automatic label it is (see :mod:`features.explain`); empty for a person's.
        f1, precision, recall: of the label as a predictor of firing, on held-out documents; None where
            nothing was measured, and for a person's label.
        n: how many held-out positions on which the feature fired they rest on; None likewise.
        note: a person's remark, empty if there is none.
    """

    feature: int
    text: str
    source: Literal["automatic", "person"] = "person"
    method: str = ""
    f1: float | None = None
    precision: float | None = None
    recall: float | None = None
    n: int | None = None
    note: str = ""


class Labels:
    """The labels of one run.

    Every call opens its own connection, so an instance may be shared by threads, and several processes may
    write to one file. The file appears at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> "Labels":
        """The labels at ``path``; a file that does not exist yet counts as empty.

        Raises:
            InputError: the file is damaged, is not a file of labels, or was written by a newer version.
        """
        labels = cls(Path(path))
        with labels._connected(write=False):
            pass
        return labels

    def get(self, feature: int) -> Label | None:
        """The label of a feature, a person's before an automatic one; None if it has none, and no note."""
        found = self._select("WHERE f.feature = ?", (feature,))
        return found[0] if found else None

    def automatic(self, feature: int) -> Label | None:
        """The automatic label of a feature, also where a person's stands before it; without its note."""
        with self._connected(write=False) as connection:
            query = "SELECT text, method, f1, precision, recall, n FROM automatic WHERE feature = ?"
            row = connection and connection.execute(query, (feature,)).fetchone()
        return Label(feature, row[0], "automatic", *row[1:]) if row else None

    def all(self) -> dict[int, Label]:
        """The labels of all features that have one, by feature."""
        return {label.feature: label for label in self._select("ORDER BY feature", ())}

    def search(self, text: str) -> list[Label]:
        """Labels whose text or note contains ``text``, in whatever case, in the order of features."""
        condition = "WHERE instr(casefold(COALESCE(p.text, a.text, '')), ?1) OR instr(casefold(o.text), ?1)"
        return self._select(f"{condition} ORDER BY feature", (text.casefold(),))

    def set(self, feature: int, text: str, *, note: str | None = None) -> None:
        """Give a feature a person's label; an empty one takes it away, and the automatic label shows again.

        Args:
            note: replaces the feature's note, an empty one removes it; None leaves it as it is.
        """
        with self._connected(write=True) as connection:
            _put_text(connection, "person", feature, text)
            if note is not None:
                _put_text(connection, "note", feature, note)

    def set_note(self, feature: int, note: str) -> None:
        """Write a note about a feature; an empty one removes it."""
        with self._connected(write=True) as connection:
            _put_text(connection, "note", feature, note)

    def put_automatic(self, labels: Sequence[Label], inputs: Mapping[str, Any] | None = None) -> None:
        """Replace all automatic labels, in one transaction; people's labels and notes stay.

        Args:
            inputs: hashes and settings that the labels were derived from; see :attr:`inputs`.
        """
        rows = [(x.feature, x.text, x.method, x.f1, x.precision, x.recall, x.n) for x in labels]
        with self._connected(write=True) as connection:
            connection.execute("DELETE FROM automatic")
            connection.executemany("INSERT INTO automatic VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            connection.execute("DELETE FROM provenance")
            connection.execute("INSERT INTO provenance VALUES (?)", (json.dumps(dict(inputs or {})),))

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What the automatic labels were derived from; None if there are none yet."""
        with self._connected(write=False) as connection:
            row = connection and connection.execute("SELECT inputs FROM provenance").fetchone()
        return json.loads(row[0]) if row else None

    def _select(self, condition: str, arguments: tuple[Any, ...]) -> list[Label]:
        with self._connected(write=False) as connection:
            rows = connection.execute(_EFFECTIVE + condition, arguments).fetchall() if connection else []
        return [_label(*row) for row in rows]

    @contextmanager
    def _connected(self, *, write: bool) -> Iterator[sqlite3.Connection | Any]:
        """A connection in a transaction; None when nothing has been written yet and nothing is to be."""
        if not write and not self.path.is_file():
            yield None
            return
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(
                sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            ) as connection:
                if not self._prepare(connection, write):
                    yield None
                    return
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield connection
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
        except (sqlite3.OperationalError, OSError) as error:
            action = "written" if write else "read"
            raise InputError(f"The labels in {self.path} cannot be {action} ({error}).") from None
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} is not a readable file of labels ({error}): move it away to start a new one."
            ) from None

    def _prepare(self, connection: sqlite3.Connection, write: bool) -> bool:
        """Check whose file this is; make the tables if it is new. False if there are none to read yet."""
        connection.create_function("casefold", 1, _casefold, deterministic=True)
        connection.execute("BEGIN")  # all three at one moment: another process may be making the tables
        version, application = _pragma(connection, "user_version"), _pragma(connection, "application_id")
        is_new = _pragma(connection, "schema_version") == 0
        connection.rollback()
        if version > SCHEMA_VERSION and application == APPLICATION_ID:
            raise InputError(
                f"{self.path} was written in format {version}, and this saescope reads up to format"
                f" {SCHEMA_VERSION}: install a newer saescope."
            )
        if version == SCHEMA_VERSION and application == APPLICATION_ID:
            return True
        if not is_new and application != APPLICATION_ID:
            raise InputError(f"{self.path} is an SQLite file of something else, not of labels.")
        if not write:
            return False
        self._use_write_ahead_log(connection)
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
        return True

    @staticmethod
    def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
        """Readers and a writer at once; where the file system cannot do it, the ordinary journal serves."""
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL").fetchone()


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _casefold(text: str | None) -> str | None:
    return None if text is None else text.casefold()


def _put_text(connection: sqlite3.Connection, table: str, feature: int, text: str) -> None:
    if text.strip():
        connection.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (feature, text.strip()))
    else:
        connection.execute(f"DELETE FROM {table} WHERE feature = ?", (feature,))


def _label(
    feature: int,
    text: str,
    is_automatic: int,
    method: str | None,
    f1: float | None,
    precision: float | None,
    recall: float | None,
    n: int | None,
    note: str,
) -> Label:
    if not is_automatic:
        return Label(feature, text, "person", note=note)
    return Label(feature, text, "automatic", method or "", f1, precision, recall, n, note)
