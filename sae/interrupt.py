"""Ctrl-C and SIGTERM in a training loop: heard at once while it waits for activations, never within a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from activations.errors import Terminated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """While the context is open, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, both outside ``held``.

    In a thread that is not the main one Python hears no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._holding = False
        self._waiting: int | None = None

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *about: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = number
        else:
            raise _exception(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must not be torn apart: a signal that comes in the block is raised at its end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            raise _exception(number)


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
