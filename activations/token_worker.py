"""A process that reads, parses and tokenises; it loads neither torch nor transformers.

It is a fresh interpreter, not a fork, and runs nothing of the caller's main module. Messages are pickles through
pipes: first the tokenizer's definition, then pieces in, ids and ends out.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from activations.errors import InputError
from activations.sources.reading import Piece, read_pieces
from activations.sources.rows import token_ids

ENCODED_AT_ONCE = 500_000  # characters


class WorkerProcess:
    """A tokenising process, as its parent sees it."""

    def __init__(self, definition: str):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONSAFEPATH": "1",  # nothing in the current folder stands in for a module
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "activations.token_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send(definition)

    def tokenise(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n_tokens], ends int64 [n_documents]) of documents that are text or token ids.

        Raises:
            InputError: a file has changed, or the process was ended from outside.
        """
        try:
            self._send([tuple(piece) for piece in pieces])
            assert self._process.stdout is not None
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise InputError(
                f"A tokenising process ended early (status {self._process.wait()}): free memory and run again."
            ) from None
        if isinstance(answer, str):
            raise InputError(answer)
        ids, ends = answer
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(ends, dtype=np.int64)

    def kill(self) -> None:
        """End the process, whatever it is doing; a call of :meth:`tokenise` in another thread raises."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a killed process, and close its pipes."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not yet sent
                pipe.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()


def encoded(
    texts: Sequence[str], encode_batch: Callable[[list[str]], Iterable[Sequence[int]]]
) -> Iterator[np.ndarray]:
    """Token ids of each text as int32; half a megabyte at once, since lists of ids take ten times the text's memory."""
    begun, size = 0, 0
    for place, text in enumerate(texts, start=1):
        size += len(text)
        if size >= ENCODED_AT_ONCE or place == len(texts):
            for ids in encode_batch(list(texts[begun:place])):
                yield np.array(ids, dtype=np.int32)
            begun, size = place, 0


def flatten(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other: (ids [n_tokens], ends int64 [n_documents])."""
    ends = np.cumsum([len(document) for document in ids], dtype=np.int64)
    return np.concatenate(ids), ends


def main() -> None:
    """Tokenise until the parent closes the pipe."""
    from tokenizers import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    messages, answers = sys.stdin.buffer, sys.stdout.buffer
    encode_batch = Tokenizer.from_str(pickle.load(messages)).encode_batch_fast

    def ids_of(texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in encode_batch(texts, add_special_tokens=False))

    while True:
        try:
            pieces = [Piece(*piece) for piece in pickle.load(messages)]
        except EOFError:
            return
        try:
            values = read_pieces(pieces)
            texts = [value for value, piece in zip(values, pieces, strict=True) if piece.content == "text"]
            from_text = encoded(texts, ids_of)
            ids, ends = flatten(
                [
                    next(from_text) if piece.content == "text" else token_ids(value)
                    for value, piece in zip(values, pieces, strict=True)
                ]
            )
            too_large = len(ids) and max(int(ids.max()), -int(ids.min())) > np.iinfo(np.int32).max
            answer: Any = (
                "A token id does not fit 32 bits: give ids that were made with the model's tokenizer."
                if too_large
                else (ids.astype(np.int32).tobytes(), ends.tobytes())
            )
        except InputError as error:
            answer = str(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
