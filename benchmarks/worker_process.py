"""Another library's training in a process and environment of its own, spoken to over pipes."""

import json
import subprocess
from pathlib import Path
from typing import Any

from peers import peer_python


class WorkerProcess:
    """Runs a worker script (see ``worker.py``) until it is closed.

    Args:
        peer: the library, as ``peers.PEERS`` names it. script: in this folder. words: further words for the script.
    """

    def __init__(self, peer: str, script: str, *words: str) -> None:
        self.peer = peer
        self.process = subprocess.Popen(
            [str(peer_python(peer)), str(Path(__file__).with_name(script)), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command, wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.peer} ended early; what it said stands above.")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process, which gives its memory back."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
