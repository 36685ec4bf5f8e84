"""Replies of models on disk, by the hash of what was asked: a second run asks nothing."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from activations.errors import InputError
from features.llm.chat import Reply, Request

REPLIES = "replies.sqlite"
"""Name of the file in a run folder."""
_BUSY_SECONDS = 30.0


class ReplyCache:
    """Replies in one SQLite file, which several threads and processes may read and write at once.

    Raises:
        InputError: the file is damaged or of something else, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._connected() as connection:
            # Readers and a writer at once; where the file system cannot do it, the ordinary journal serves.
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute(
                "CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, content TEXT NOT NULL)"
            )

    def get(self, request: Request) -> Reply | None:
        """What was answered; None if it was never asked."""
        with self._connected() as connection:
            row = connection.execute("SELECT content FROM reply WHERE key = ?", (request.key,)).fetchone()
        return Reply(**json.loads(row[0])) if row else None

    def put(self, request: Request, reply: Reply) -> Reply:
        """Keep a reply; of two to the same request the first stays, and is returned."""
        with self._connected() as connection:
            content = json.dumps(asdict(reply))
            connection.execute("INSERT OR IGNORE INTO reply VALUES (?, ?)", (request.key, content))
        return self.get(request) or reply

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(
                sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            ) as connection:
                # Nothing is lost when this process is killed; after a power cut the last replies may be.
                connection.execute("PRAGMA synchronous = NORMAL")
                yield connection
        except (sqlite3.OperationalError, OSError) as error:
            raise InputError(f"The replies in {self.path} cannot be read or written ({error}).") from None
        except (sqlite3.DatabaseError, json.JSONDecodeError, TypeError) as error:
            raise InputError(
                f"{self.path} is not a readable file of replies ({error}): move it away to start a new one."
            ) from None
