"""Ctrl-C and SIGTERM in a training loop: heard at once while it waits for activations, never within a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from activations.errors import Terminated
from sae.mesh import ALONE, Mesh

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """While the context is open, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, both outside ``held``.

    In a thread that is not the main one Python hears no signals, and nothing is changed. Of several processes
    (``mesh``) all stop after the same step: a signal that any of them heard is raised in all at the end of ``held``.
    """

    def __init__(self, mesh: Mesh = ALONE) -> None:
        self._mesh = mesh
        self._before: dict[signal.Signals, Any] = {}
        self._holding = False
        self._waiting = 0

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
        if self._holding or self._mesh.size > 1:
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
        heard = self._mesh.most(self._waiting)
        if heard:
            self._waiting = 0
            raise _exception(heard)


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
