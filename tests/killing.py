"""Work in processes of its own that are killed, at any moment, and resumed."""

import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from store_helpers import contents

from activations import files as files_module


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process, which imports nothing anew; its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """Wait for a process; the signal that killed it, or 0 when it ended well."""
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(call: str, number: int) -> None:
    """Have this process kill itself in the given one of its writes, fsyncs or renames.

    In a write when half of it is done; before an fsync or rename.
    """
    module, name = {
        "write": (files_module, "_write_all"),
        "fsync": (files_module.os, "fsync"),
        "rename": (files_module.os, "replace"),
    }[call]
    function, calls = getattr(module, name), 0

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            if call == "write":
                first = args[1][0]  # type: ignore[index]
                args[0].write(first[: len(first) // 2])  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(module, name, counted)


class Resumable(ABC):
    """Work that leaves files in a folder, and goes on when it is called again."""

    @abstractmethod
    def __call__(self, folder: Path, record: Path) -> None:
        """Do it, or go on; write down in ``record`` what was done."""

    @abstractmethod
    def resume(self, folder: Path, before: Path, whole: dict[str, bytes]) -> None:
        """Finish what was killed, and compare with the files of uninterrupted work; ``before`` is the record."""

    def whole(self, folder: Path) -> tuple[dict[str, bytes], float]:
        """The files of uninterrupted work, and how long a forked process takes for them."""
        begun = time.perf_counter()
        assert ended(forked(lambda: self(folder, folder.with_name("record-whole")))) == 0  # not killed
        return contents(folder), time.perf_counter() - begun

    def killed_at_random(self, folder: Path, times: int) -> int:
        """Kill it ``times`` times at random moments, resume each time; how often it was not done yet."""
        whole, seconds = self.whole(folder / "whole")
        generator = random.Random(times)
        killed = 0
        for number in range(times):
            out, record = folder / f"{number}", folder / f"record-{number}"
            process = forked(lambda out=out, record=record: self(out, record))  # type: ignore[misc]
            time.sleep(generator.random() * seconds)
            os.kill(process, signal.SIGKILL)
            killed += ended(process) == signal.SIGKILL
            self.resume(out, record, whole)
        return killed
