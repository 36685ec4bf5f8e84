"""Typing ``sae ...`` in tests."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from app.cli import main

ROOT = Path(__file__).parents[1]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Command:
    """Types ``sae ...`` inside this process and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path, status: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["sae", *map(str, words)])
        self.capsys.readouterr()  # what the test itself printed
        found = 0
        try:
            main()
        except SystemExit as stop:
            found = int(stop.code or 0)
        output = self.capsys.readouterr()
        self.output = output.out
        assert found == status, output.err
        return output.err if status else output.out

    def refused(self, *words: str | Path) -> str:
        """The sentence after ``sae: ``."""
        printed = self(*words, status=2)
        assert printed.startswith("sae: ")
        assert printed.count("\n") == 1
        return printed.removeprefix("sae: ").rstrip("\n")


def environment() -> dict[str, str]:
    """Without the terminal's width, and with the checkout's packages."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "COLUMNS": "120"}


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


HEAR_CTRL_C = None if sys.platform == "win32" else _hear_ctrl_c
"""``preexec_fn`` of processes that are sent SIGINT: a shell that runs tests in the background has it ignored."""
