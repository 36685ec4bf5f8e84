"""Hugging Face datasets: streamed from the hub and kept, or saved on disk."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from activations.cache import cache_folder, placed
from activations.errors import InputError
from activations.files import hash_json, read_json, room_needed, write_json
from activations.sources.copies import Copy, open_copy, write_copy
from activations.sources.files import folder_hash
from activations.sources.spec import HUB, SourceSpec

PART_BYTES = 16 * 2**20
"""Text in one part of the local copy: it grows by whole parts."""

HUB_SECONDS = 9  # the hub has answered within them, or is taken to be out of reach

SOURCE_FILE = "source.json"

T = TypeVar("T")


class StreamedDataset:
    """A dataset of the hub (or a local folder of data files, by the same code) and the local copy of its beginning.

    The copy is made of parts, one after the other in the order of the dataset, and is extended as far as documents are
    asked for. It belongs to one revision, which is found out once: later calls need no hub until they need more text.

    Raises:
        InputError: the hub cannot be reached, or has no such dataset, config, split, revision or column.
    """

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        self.name = spec.location.removeprefix(HUB)
        wanted = [self.name, spec.config, spec.split, spec.revision, spec.content, spec.column]
        slug = re.sub(r"[^\w.-]+", "--", self.name)[-60:]
        self.folder = cache_folder() / "datasets" / f"{slug}-{hash_json(wanted)[:16]}"
        self.revision = self._known_revision()
        self._parts: list[Copy] = []
        self._stream: Any = None
        self._rows: Iterator[tuple[int, Any]] | None = None

    def describe(self) -> dict[str, Any]:
        """What was read: name, config, split, revision."""
        return {
            "dataset": self.name,
            "config": self.spec.config,
            "split": self._split,
            "revision": self.revision,
        }

    def part_folder(self, number: int) -> Path:
        """Where a part of the copy lies."""
        return self.folder / f"part-{number:05d}"

    def parts(self, count: int) -> list[Copy]:
        """The first ``count`` parts, or all where there are fewer; read from the hub as far as they are missing."""
        while len(self._parts) < count and not self._is_finished:
            folder = self.part_folder(len(self._parts))
            part = self._kept(folder)
            if part is None:
                self._write_part(folder)
                part = open_copy(folder)
            else:
                self._rows = None  # the stream, if it is open, stands before this part
            self._parts.append(part)
        return self._parts[:count]

    def is_complete(self, count: int) -> bool:
        """Whether ``count`` parts are the whole dataset."""
        return self._is_finished and count >= len(self._parts)

    def _kept(self, folder: Path) -> Copy | None:
        """A part of this revision that is there and whole; anything else is removed."""
        try:
            part = open_copy(folder)
        except InputError:
            part = None
        if part is not None and part.facts["revision"] == self.revision:
            return part
        shutil.rmtree(folder, ignore_errors=True)
        return None

    @property
    def _is_finished(self) -> bool:
        return bool(self._parts) and bool(self._parts[-1].facts["finished"])

    @property
    def _split(self) -> str:
        return self.spec.split or "train"

    @property
    def _is_local(self) -> bool:
        return Path(self.name).is_dir()

    def _known_revision(self) -> str:
        if self._is_local:
            return folder_hash(Path(self.name))[:40]
        path = self.folder / SOURCE_FILE
        if path.is_file():
            return str(read_json(path)["revision"])
        revision = self._ask_hub(self.spec.revision)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"source": self.spec.given, "revision": revision})
        return revision

    def _ask_hub(self, revision: str | None) -> str:
        """The commit that a revision (None: the newest) is now; refused within seconds where there is no answer."""
        from huggingface_hub import HfApi

        def ask() -> str:
            return str(HfApi().dataset_info(self.name, revision=revision, timeout=HUB_SECONDS - 1).sha)

        try:
            return _within(HUB_SECONDS, ask)
        except Exception as error:
            raise self._refusal(error) from None

    def _write_part(self, folder: Path) -> None:
        before: dict[str, Any] = self._parts[-1].facts if self._parts else {"n_rows": 0, "next": None}
        if self._rows is None:
            self._rows = self._open(before["n_rows"], before["next"])
        first: int = before["n_rows"]
        finished = False

        def rows() -> Iterator[tuple[int, Any]]:
            nonlocal finished
            assert self._rows is not None
            while (row := next(self._rows, None)) is not None:  # "for" would end the rows with the part
                yield row
            finished = True

        def facts(n_rows: int) -> dict[str, Any]:
            return {
                "revision": self.revision,
                "n_rows": first + n_rows,
                "next": json.dumps(self._stream.state_dict()),
                "finished": finished,
            }

        spec = self.spec
        no_room = f"The disk has no room for a copy of {self.name}: free some, or set SAESCOPE_CACHE to another disk."
        try:
            with room_needed(no_room), placed(folder) as new:
                write_copy(
                    new, rows(), spec.content, spec.column, self.name, max_bytes=PART_BYTES, facts=facts
                )
        except BaseException:
            self._rows = None  # what was read is lost: begin at the end of the last part again
            raise

    def _open(self, n_rows: int, state: str | None) -> Iterator[tuple[int, Any]]:
        """(number, row) from the row after the first ``n_rows`` on."""
        import datasets

        spec = self.spec
        # Opening a stream tries again for half a minute: ask first.
        revision = None if self._is_local else self._ask_hub(self.revision)
        try:
            stream = datasets.load_dataset(
                self.name, spec.config, split=self._split, revision=revision, streaming=True
            )
            columns = stream.column_names
            if columns is not None and spec.column not in columns:
                raise InputError(
                    f"Dataset {self.name} has no column {spec.column!r}: name the column to read (there are:"
                    f" {', '.join(columns)})."
                )
            if columns is not None:
                stream = stream.select_columns([spec.column])
            if state is not None:
                stream.load_state_dict(json.loads(state))
            self._stream = stream
            yield from enumerate(stream, start=n_rows + 1)
        except InputError:
            raise
        except Exception as error:
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> InputError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return InputError(
            f"Dataset {self.name} cannot be read ({reason.rstrip('.')}): check its name, config, split and revision and"
            " the connection to the hub, or give a local copy."
        )


def saved_rows(folder: Path, spec: SourceSpec) -> Iterator[tuple[int, Any]]:
    """(number, row) of a dataset that ``datasets.save_to_disk`` wrote.

    Raises:
        InputError: it cannot be opened, or has no such split or column.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder} is no sound saved dataset ({str(error).splitlines()[0]}).") from None
    if isinstance(found, datasets.DatasetDict):
        split = spec.split or "train"
        if split not in found:
            raise InputError(f"{folder} has no split {split!r}: there are {', '.join(map(str, found))}.")
        found = found[split]
    if spec.column not in found.column_names:
        raise InputError(
            f"{folder} has no column {spec.column!r}: name the column to read (there are:"
            f" {', '.join(found.column_names)})."
        )
    yield from enumerate(found.select_columns([spec.column]), start=1)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer, or TimeoutError: looking up a name can hang longer than any timeout of a connection."""
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds} seconds")
    return answers[0]
