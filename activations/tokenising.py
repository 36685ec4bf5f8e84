"""Documents to token ids: batch by batch, by several processes where there is much of it, and each batch only once.

A batch is a run of documents in the order of the corpus, so that what comes out does not depend on the number of
processes. Its ids are kept in the cache by the contents of its documents and the tokenizer's definition.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from activations.cache import Cache
from activations.errors import InputError
from activations.sources.documents import Documents
from activations.sources.reading import Piece, read_pieces
from activations.sources.rows import token_ids
from activations.token_worker import WorkerProcess, encoded, flatten

if TYPE_CHECKING:
    from activations.tokenizer import Tokenizer

FIRST_BATCH_BYTES, BATCH_BYTES = 500_000, 2_000_000
"""A batch closes when its documents reach this size; batches double from the first size to the second."""

PARALLEL_BYTES, PARALLEL_CORES = 64_000_000, 4
"""Text and cores for which processes pay. Otherwise the tokenizer's own threads share the work in this process, and
only parsing and the lists of ids, a tenth of it, wait for each other: on two cores 112 MB took 11 seconds, and 13 in
two processes."""

CHATS_AT_ONCE = 64

TOKENS_BYTES = 10 * 2**30

_DIGEST_BYTES = 16


class TokenBatch(NamedTuple):
    """Documents one after the other: ids, the end of each document, and (chats with chosen roles) what counts.

    ids: uint16 or int32 [n_tokens]; ends: int64 [n_documents]; counted: bool [n_tokens], or None: all.
    """

    ids: np.ndarray
    ends: np.ndarray
    counted: np.ndarray | None

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(ids, counted) of each document."""
        start = 0
        for end in self.ends.tolist():
            yield self.ids[start:end], None if self.counted is None else self.counted[start:end]
            start = end


class Tokenising:
    """Tokenises documents of a corpus; a context, whose processes end with it.

    Args:
        expected_bytes: how much text is likely to be asked for, which decides whether processes are started.
        roles: the roles of a chat whose tokens count; empty is all.
        n_processes: by default one for each core, where there are some.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: "Tokenizer",
        expected_bytes: int,
        roles: Sequence[str] = (),
        n_processes: int | None = None,
    ):
        self._documents, self._tokenizer, self._roles = documents, tokenizer, roles
        if n_processes is None:
            n_processes = n_cores() if n_cores() >= PARALLEL_CORES else 1
        pays = n_processes > 1 and expected_bytes >= PARALLEL_BYTES
        self._n_processes = n_processes if pays and tokenizer.definition is not None else 0
        self._threads: ThreadPoolExecutor | None = None
        self._idle: deque[WorkerProcess] = deque()
        self._workers: list[WorkerProcess] = []
        self._cache = None if tokenizer.definition is None else Cache("tokens", TOKENS_BYTES)
        self._tokenizer_key = hashlib.sha256((tokenizer.definition or "").encode()).digest()

    def __enter__(self) -> "Tokenising":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def read(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """(place in the table, ids, counted) of each document, in the order of ``places``; a leading BOS is left out.

        Raises:
            InputError: a file has changed, ids are beyond the vocabulary, or a chat does not fit the template.
        """
        for batch, tokens in self._in_order(self._batches(places)):
            for place, (ids, counted) in zip(batch.tolist(), tokens.documents(), strict=True):
                yield place, ids, counted

    def _batches(self, places: np.ndarray) -> Iterator[np.ndarray]:
        size = FIRST_BATCH_BYTES
        start = total = 0
        lengths = self._documents.table["length"]
        for stop, place in enumerate(places, start=1):
            total += int(lengths[place])
            if total >= size or stop == len(places):
                yield places[start:stop]
                start, total, size = stop, 0, min(2 * size, BATCH_BYTES)

    def _in_order(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, TokenBatch]]:
        """Each batch with its tokens, computed ahead as far as there are processes."""
        pending: deque[tuple[np.ndarray, TokenBatch | Future[TokenBatch]]] = deque()
        for batch in batches:
            pending.append((batch, self._begin(batch)))
            if len(pending) > 2 * self._n_processes:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())

    def _begin(self, batch: np.ndarray) -> "TokenBatch | Future[TokenBatch]":
        pieces = [self._documents.piece(place) for place in batch.tolist()]
        is_plain = all(piece.content != "messages" for piece in pieces)
        key = self._key(batch, pieces) if is_plain and self._cache is not None else None
        if key is not None and (kept := self._kept(key)) is not None:
            return kept
        if self._n_processes and is_plain:
            self._start()
            assert self._threads is not None
            return self._threads.submit(self._in_worker, pieces, key)
        return self._keep(key, self._here(pieces))

    def _start(self) -> None:
        if self._threads is None:
            assert self._tokenizer.definition is not None
            definition = self._tokenizer.definition
            self._workers = [WorkerProcess(definition) for _ in range(self._n_processes)]
            self._idle.extend(self._workers)
            self._threads = ThreadPoolExecutor(self._n_processes, thread_name_prefix="tokenise")

    def _in_worker(self, pieces: list[Piece], key: str | None) -> TokenBatch:
        worker = self._idle.popleft()  # as many threads as workers: one is idle
        try:
            ids, ends = worker.tokenise(pieces)
        finally:
            self._idle.append(worker)
        return self._keep(key, self._checked(pieces, TokenBatch(ids, ends, None)))

    def _here(self, pieces: list[Piece]) -> TokenBatch:
        """Tokenise in this process."""
        values = read_pieces(pieces)
        places: dict[str, list[int]] = {"text": [], "tokens": [], "messages": []}
        for n, piece in enumerate(pieces):
            places[piece.content].append(n)
        ids = [np.zeros(0, np.int32)] * len(pieces)
        counted: list[np.ndarray | None] = [None] * len(pieces)
        texts = [values[n] for n in places["text"]]
        for n, text_ids in zip(places["text"], encoded(texts, self._tokenizer.encode_batch), strict=True):
            ids[n] = text_ids
        for n in places["tokens"]:
            ids[n] = token_ids(values[n])
        for start in range(0, len(places["messages"]), CHATS_AT_ONCE):
            chats = places["messages"][start : start + CHATS_AT_ONCE]
            rendered = self._tokenizer.encode_chats([values[n] for n in chats], self._roles)
            for n, (chat_ids, chat_counted) in zip(chats, rendered, strict=True):
                ids[n], counted[n] = np.array(chat_ids, dtype=np.int32), chat_counted
        batch = TokenBatch(*flatten(ids), None)
        if any(part is not None for part in counted):
            parts = [
                np.ones(len(i), dtype=bool) if c is None else c for i, c in zip(ids, counted, strict=True)
            ]
            batch = batch._replace(counted=np.concatenate(parts))
        return self._checked(pieces, batch)

    def _checked(self, pieces: list[Piece], batch: TokenBatch) -> TokenBatch:
        """The batch, once given ids are known to be in the vocabulary; in the smallest type, without leading BOS."""
        vocab_size, bos = self._tokenizer.vocab_size, self._tokenizer.bos_id
        if len(batch.ids) and (batch.ids.max() >= vocab_size or batch.ids.min() < 0):
            wrong = int(np.flatnonzero((batch.ids >= vocab_size) | (batch.ids < 0))[0])
            piece = pieces[int(np.searchsorted(batch.ends, wrong, side="right"))]
            raise InputError(
                f"{piece.path} holds token id {batch.ids[wrong]} in column {piece.column!r}, and the model's vocabulary"
                f" has {vocab_size}: give ids that were made with its tokenizer."
            )
        dtype = np.uint16 if vocab_size < 65_536 else np.int32
        batch = batch._replace(ids=batch.ids.astype(dtype))
        starts = np.concatenate([[0], batch.ends[:-1]]).astype(np.int64)
        given = np.array([piece.content != "text" for piece in pieces], dtype=bool) & (batch.ends > starts)
        doubled = starts[given][batch.ids[starts[given]] == bos] if bos is not None else starts[:0]
        if not len(doubled):
            return batch
        kept = np.ones(len(batch.ids), dtype=bool)
        kept[doubled] = False
        return TokenBatch(
            batch.ids[kept],
            np.cumsum(kept)[batch.ends - 1],
            None if batch.counted is None else batch.counted[kept],
        )

    def _key(self, batch: np.ndarray, pieces: list[Piece]) -> str:
        digest = hashlib.sha256(self._tokenizer_key)
        digest.update(f"{self._tokenizer.vocab_size} {self._tokenizer.bos_id}".encode())
        digest.update(self._documents.table["digest"][batch].tobytes())
        digest.update("".join(piece.content[:2] for piece in pieces).encode())
        return digest.hexdigest()

    def _kept(self, key: str) -> TokenBatch | None:
        assert self._cache is not None
        path = self._cache.find(key)
        if path is None:
            return None
        try:
            return _load(path)
        except (OSError, ValueError):
            self._cache.remove(key)
            return None

    def _keep(self, key: str | None, batch: TokenBatch) -> TokenBatch:
        if key is not None and self._cache is not None:
            try:
                with self._cache.new(key) as path:
                    _save(path, batch)
            except OSError:  # a cache that cannot be written is no reason to stop
                self._cache = None
        return batch


def _finished(batch: np.ndarray, tokens: "TokenBatch | Future[TokenBatch]") -> tuple[np.ndarray, TokenBatch]:
    return batch, tokens.result() if isinstance(tokens, Future) else tokens


def n_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1


def _save(path: Path, batch: TokenBatch) -> None:
    """A digest of what follows, counts, ends, ids."""
    counts = np.array([len(batch.ends), len(batch.ids), batch.ids.itemsize], dtype="<i8")
    content = counts.tobytes() + batch.ends.astype("<i8").tobytes() + batch.ids.tobytes()
    path.write_bytes(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() + content)


def _load(path: Path) -> TokenBatch:
    """What was saved, mapped; ValueError where it is damaged."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    content = data[_DIGEST_BYTES:]
    if hashlib.blake2b(content.data, digest_size=_DIGEST_BYTES).digest() != data[:_DIGEST_BYTES].tobytes():
        raise ValueError("damaged")
    n_documents, n_ids, itemsize = np.frombuffer(content[:24], dtype="<i8").tolist()
    ends = np.frombuffer(content[24 : 24 + 8 * n_documents], dtype="<i8")
    ids = np.frombuffer(content[24 + 8 * n_documents :], dtype="<u2" if itemsize == 2 else "<i4")
    assert len(ids) == n_ids
    return TokenBatch(ids, ends, None)
