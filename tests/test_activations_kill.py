"""A capture that is killed, at any moment, and resumed; and one shared by two processes."""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_helpers import CONTEXT, HOOK, SECOND_HOOK, contents, make_blocks
from tiny_models import tiny_language_model

from activations import files as files_module
from activations import plan as plan_module
from activations.models import LanguageModel
from activations.processes import started_processes
from activations.store import ActivationStore
from activations.verify import verify_store
from activations.writer import write_store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")

N_BLOCKS, BATCH_BLOCKS, SHARD_BLOCKS = 120, 2, 16


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 12 + 2 * 4 + 2 * (32 + 72)
    monkeypatch.setattr(plan_module, "SHARD_BYTES", SHARD_BLOCKS * CONTEXT * row_bytes)
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: BATCH_BLOCKS)


def capture(model: LanguageModel, folder: Path, record: Path | None = None) -> None:
    """Capture the store; write down the first block of each forward pass."""
    blocks = make_blocks(N_BLOCKS, padded=5)
    if record is not None:
        first = {blocks.ids[start].tobytes(): start for start in range(0, N_BLOCKS, BATCH_BLOCKS)}
        captured = LanguageModel.capture

        def recorded(self: LanguageModel, ids: torch.Tensor, *args: object, **options: object) -> dict:
            result = captured(self, ids, *args, **options)  # type: ignore[arg-type]
            line = f"{first[ids[0].numpy().astype(blocks.ids.dtype).tobytes()]}\n"
            handle = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(handle, line.encode())
            os.close(handle)
            return result

        LanguageModel.capture = recorded  # type: ignore[method-assign]
    write_store(model, blocks, [HOOK, SECOND_HOOK], folder)


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


def shards_captured_twice(first: Path, second: Path) -> int:
    """How many shards were captured whole before the kill, and again after it."""

    def blocks(path: Path) -> set[int]:
        return set(map(int, path.read_text().split())) if path.exists() else set()

    both = blocks(first) & blocks(second)
    shards = (
        range(start, min(start + SHARD_BLOCKS, N_BLOCKS), BATCH_BLOCKS)
        for start in range(0, N_BLOCKS, SHARD_BLOCKS)
    )
    return sum(set(shard) <= both for shard in shards)


def resume(model: LanguageModel, folder: Path, before: Path, whole: dict[str, bytes]) -> None:
    """Check what a killed capture left, finish it, and compare."""
    if (folder / "shards.jsonl").is_file() and (folder / "shards.jsonl").stat().st_size:
        assert ActivationStore.open(folder).at(HOOK).read(0, 1).isfinite().all()
        assert verify_store(folder) == []
    after = before.with_name(before.name + "-after")
    assert ended(forked(lambda: capture(model, folder, after))) == 0
    assert contents(folder) == whole
    assert not list(folder.glob(".*.*"))
    assert shards_captured_twice(before, after) <= 1


@pytest.fixture(scope="module")
def whole(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of an uninterrupted capture, and how long a forked process takes for them."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        row_bytes = 12 + 2 * 4 + 2 * (32 + 72)
        patch.setattr(plan_module, "SHARD_BYTES", SHARD_BLOCKS * CONTEXT * row_bytes)
        patch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: BATCH_BLOCKS)
        begun = time.perf_counter()
        assert ended(forked(lambda: capture(model, folder, folder.with_name("record")))) == 0
        seconds = time.perf_counter() - begun
    assert len(list(folder.glob("shard-*"))) == 8
    return contents(folder), seconds


def kill_at_random_moments(
    model: LanguageModel, whole: tuple[dict[str, bytes], float], tmp_path: Path, times: int
) -> int:
    """How many of the captures were killed before they were done."""
    files, seconds = whole
    generator = random.Random(times)
    killed = 0
    for number in range(times):
        folder, record = tmp_path / f"{number}", tmp_path / f"record-{number}"
        process = forked(lambda folder=folder, record=record: capture(model, folder, record))  # type: ignore[misc]
        time.sleep(generator.random() * seconds)
        os.kill(process, signal.SIGKILL)
        killed += ended(process) == signal.SIGKILL
        resume(model, folder, record, files)
    return killed


def test_killed_at_eight_random_moments(
    model: LanguageModel, whole: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    assert kill_at_random_moments(model, whole, tmp_path, times=8) >= 4


@pytest.mark.slow
def test_killed_at_fifty_random_moments(
    model: LanguageModel, whole: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    assert kill_at_random_moments(model, whole, tmp_path, times=50) >= 25


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("number", [1, 2, 7, 12])
def test_killed_between_temporary_file_fsync_and_rename(
    model: LanguageModel,
    whole: tuple[dict[str, bytes], float],
    tmp_path: Path,
    number: int,
    call: str,
    when: str,
) -> None:
    """The process kills itself just before or after the given one of its writes, fsyncs or renames."""

    def die() -> None:
        module, name = {
            "write": (files_module, "_write_all"),
            "fsync": (files_module.os, "fsync"),
            "rename": (files_module.os, "replace"),
        }[call]
        function, calls = getattr(module, name), 0

        def counted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number and when == "before":
                if call == "write":  # half of it is written
                    args[0].write(args[1][: len(args[1]) // 2])  # type: ignore[attr-defined,index,arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, counted)
        capture(model, tmp_path / "store", tmp_path / "record")

    assert ended(forked(die)) == signal.SIGKILL
    resume(model, tmp_path / "store", tmp_path / "record", whole[0])


def test_interrupting_leaves_a_store_that_can_be_used(
    model: LanguageModel, whole: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    """Ctrl-C: the shard being written is finished, and what is there can be read."""
    folder, record = tmp_path / "store", tmp_path / "record"

    def interrupted() -> None:
        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        try:
            capture(model, folder, record)
        except KeyboardInterrupt:
            os._exit(0)

    process = forked(interrupted)
    while len(list(folder.glob("shard-*"))) < 3:
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 0
    assert not list(folder.glob(".shard-*"))
    assert verify_store(folder) == []
    assert ActivationStore.open(folder).n_rows >= 3 * SHARD_BLOCKS * CONTEXT
    resume(model, folder, record, whole[0])


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return int(connection.getsockname()[1])


def test_two_processes_write_what_one_writes(
    model: LanguageModel, whole: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "store"

    def share(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes = started_processes()
        blocks = make_blocks(N_BLOCKS, padded=5)
        store = write_store(model, blocks, [HOOK, SECOND_HOOK], folder, processes=processes)
        assert store.complete
        (tmp_path / f"done-{rank}").touch()

    processes = [forked(lambda rank=rank: share(rank)) for rank in range(2)]  # type: ignore[misc]
    assert [ended(process) for process in processes] == [0, 0]
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
    # Not only token, position and document ids and the layout: every byte, since each batch runs on one thread.
    assert contents(folder) == whole[0]
