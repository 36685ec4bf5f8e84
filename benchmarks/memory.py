"""How much anonymous memory a piece of work takes (Linux)."""

import threading
from pathlib import Path
from types import TracebackType

_EVERY = 0.01  # seconds


def anonymous() -> int:
    """Bytes of this process' memory that no file stands behind (RssAnon)."""
    return _status("RssAnon")


def peak() -> int:
    """The most bytes that were ever resident in this process (VmHWM), mapped files among them."""
    return _status("VmHWM")


class PeakMemory:
    """Looks at :func:`anonymous` a hundred times a second; ``growth`` is the most it rose inside the block."""

    def __enter__(self) -> "PeakMemory":
        self._start = self._highest = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._highest - self._start

    @property
    def highest(self) -> int:
        return self._highest

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, anonymous())
            if self._done.wait(_EVERY):
                return


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
