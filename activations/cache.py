"""What can be computed again, kept on disk: the platform's cache folder, or where ``SAESCOPE_CACHE`` says."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STALE_SECONDS = 86_400  # what is unfinished for so long was left by a process that was killed
UNFINISHED = ".unfinished-"
TRIM_EVERY_BYTES = 256 * 2**20


def cache_folder() -> Path:
    """The folder that holds all caches; ``SAESCOPE_CACHE`` overrides the platform's."""
    if given := os.environ.get("SAESCOPE_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "saescope"


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes ``path`` when the block ends well.

    Where another process was quicker its folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=UNFINISHED))
    try:
        yield temporary / "item"
        try:
            os.replace(temporary / "item", path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Cache:
    """Files or folders by key; the least recently used go when there are too many bytes.

    An item is complete when it is there: it is written beside and renamed. Two processes that make the same item
    do not disturb each other.

    Args:
        name: folder of these items within the cache folder.
        max_bytes: bound on their size; an item used within the last minutes may exceed it.
    """

    def __init__(self, name: str, max_bytes: int):
        self.folder = cache_folder() / name
        self.max_bytes = max_bytes
        self._unchecked = TRIM_EVERY_BYTES  # so that the first item looks at the folder

    def find(self, key: str) -> Path | None:
        """The item with this key, marked as used now."""
        path = self._path(key)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    @contextmanager
    def new(self, key: str) -> Iterator[Path]:
        """A path to write an item to, a file or a folder, which takes its place when the block ends."""
        with placed(self._path(key)) as item:
            yield item
            self._unchecked += _size(item)
        if self._unchecked >= TRIM_EVERY_BYTES:
            self._unchecked = 0
            self.trim()

    def remove(self, key: str) -> None:
        """Remove an item, if it is there."""
        _remove(self._path(key))

    def trim(self) -> None:
        """Remove what was never finished, and the least recently used items until the rest fit the bound."""
        now = time.time()
        for left_over in self.folder.glob(f"??/{UNFINISHED}*"):
            if now - _used(left_over) > STALE_SECONDS:
                _remove(left_over)
        items = sorted((_used(path), path, _size(path)) for path in self.folder.glob("??/[!.]*"))
        total = sum(size for _, _, size in items)
        for used, path, size in items:
            if total <= self.max_bytes or now - used < 60:
                return
            _remove(path)
            total -= size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    except OSError:  # another process removed it
        return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
