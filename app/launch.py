"""Start the explorer: Streamlit in a process of its own, on this machine only."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from activations.errors import InputError
from sae.run import RunFolder, read_run_config

HOST = "127.0.0.1"
FIRST_PORT = 8501
START_SECONDS = 60.0
STOP_SECONDS = 5.0
_TRIES = 3
_EXPLORER = Path(__file__).resolve().parent / "explorer"


class Server(NamedTuple):
    """A Streamlit process that answers."""

    process: subprocess.Popen[str]
    address: str


def launch(run_folder: str | Path, port: int | None = None, browser: bool = True) -> None:
    """Serve the explorer of a run until Ctrl-C.

    Args:
        run_folder: a finished run.
        port: on this machine; None takes the next free one from 8501.
        browser: whether to open the web browser.

    Raises:
        InputError: the folder is no run or has no feature index, the port is taken or none,
            or Streamlit does not start.
    """
    folder = Path(run_folder)
    check_explorable(folder)
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"There is no port {port}: name one from 1 to 65535.")
    if port is not None and not _is_free(port):
        raise InputError(f"Port {port} is taken: name another, or leave it out to get the next free one.")
    try:
        with _terminated_like_interrupted(), served(folder, port) as server:
            print(f"Explorer of {folder}: {server.address}  (Ctrl-C ends it)", flush=True)
            if browser:
                webbrowser.open(server.address)
            status = server.process.wait()
    except KeyboardInterrupt:
        print("\nExplorer closed.")
        return
    raise InputError(f"The explorer ended by itself, with exit status {status}; see above.")


def check_explorable(folder: Path) -> None:
    """Raise unless ``folder`` is a run with a feature index.

    Raises:
        InputError: says what is missing and what makes it.
    """
    read_run_config(folder)
    if not RunFolder(folder).index.is_dir():
        raise InputError(f"{folder} has no feature index yet: make it with sae index {folder}.")


def next_free_port(first: int = FIRST_PORT) -> int:
    """The first port from ``first`` on which nothing listens.

    Raises:
        InputError: a hundred ports in a row are taken.
    """
    for port in range(first, first + 100):
        if _is_free(port):
            return port
    raise InputError(f"The ports {first} to {first + 99} are all taken: name a free one.")


def command(run_folder: Path, port: int) -> list[str]:
    """The command line that runs Streamlit.

    ``-P`` and absolute paths: modules of our names in the current folder must not be taken for ours. The flags
    keep Streamlit from asking for an e-mail address, reporting statistics and watching files, and let it say its
    address, which we wait for.
    """
    flags = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": HOST,
        "logger.hideWelcomeMessage": "false",
        "client.toolbarMode": "minimal",
        "theme.base": str(_EXPLORER / "theme.toml"),
    }
    options = [part for name, value in flags.items() for part in (f"--{name}", value)]
    script = str(_EXPLORER / "explorer_main.py")
    return [sys.executable, "-P", "-m", "streamlit", "run", script, *options, "--", str(run_folder.resolve())]


@contextmanager
def served(run_folder: Path, port: int | None = None) -> Iterator[Server]:
    """Streamlit running inside the block, ready to answer; ended with it.

    Args:
        port: None takes the next free one from 8501, and further ones if the server ends at its start, since somebody
            may have taken that first.

    Raises:
        InputError: it does not start, or did not on three ports.
    """
    with ExitStack() as at_the_end:
        chosen, tries = FIRST_PORT, _TRIES if port is None else 1
        while True:
            chosen = next_free_port(chosen) if port is None else port
            process = subprocess.Popen(
                command(run_folder, chosen),
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",  # whatever it prints: the pipe must be read to its end
                env=_environment(),
            )
            at_the_end.callback(_end, process)
            if _gets_ready(process, chosen):
                break
            # Most likely somebody took the port first; they may have left it already, so it tells nothing now.
            chosen, tries = chosen + 1, tries - 1
            if not tries:
                raise InputError(
                    f"Streamlit ended at its start, with exit status {process.returncode}; see above."
                )
        yield Server(process, f"http://{HOST}:{chosen}")


def _environment() -> dict[str, str]:
    """Ours, less the settings of a Streamlit server that this process may itself run in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAMLIT_")}


def _gets_ready(process: subprocess.Popen[str], port: int) -> bool:
    """Wait until Streamlit answers; False if it ended.

    It must have said its address, too: what answers on the port may be another program that took it first.

    Raises:
        InputError: it takes too long.
    """
    named = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if f"{HOST}:{port}" in line:
                    named.set()

    threading.Thread(target=listen, daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if named.is_set() and _answers(port):
            return True
        time.sleep(0.1)
    raise InputError(f"Streamlit did not answer on port {port} within {START_SECONDS:.0f} seconds.")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Let Streamlit close; after Ctrl-C the terminal has told it already."""
    for ask in (process.terminate, process.kill):
        if process.poll() is not None:
            return
        ask()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Inside the block SIGTERM acts like Ctrl-C, so that the server does not outlive us."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Callable[[int, FrameType | None], object] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # where it only means that connections which have just ended do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
