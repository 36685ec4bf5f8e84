"""Captures that are killed, at any moment, and resumed; and captures shared by two processes."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from killing import Resumable, ended, forked, kill_at
from store_helpers import CONTEXT, HOOK, SECOND_HOOK, contents, make_blocks
from tiny_models import tiny_hf_model, tiny_language_model, tiny_tokenizer

from activations import files as files_module
from activations import plan as plan_module
from activations.models import LanguageModel
from activations.processes import started_processes
from activations.store import ActivationStore
from activations.verify import repair_store, verify_store
from activations.writer import append_store, write_store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")

BATCH_BLOCKS = 2
ROW_BYTES = 12 + 2 * 4 + 2 * (32 + 72)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(scope="module")
def other_model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_hf_model("llama", seed=1), tiny_tokenizer(), "other")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: BATCH_BLOCKS)
    monkeypatch.setattr(plan_module, "LEAST_BATCHES", {"cpu": 1})
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 8 * BATCH_BLOCKS * CONTEXT * ROW_BYTES)


@dataclass(frozen=True)
class Capture(Resumable):
    """A store of ``n_blocks`` blocks, ``shard_batches`` batches a shard, captured on ``threads`` threads.

    Each fsync takes ``fsync_seconds`` longer than it does.
    """

    model: LanguageModel
    n_blocks: int = 120
    shard_batches: int = 8
    threads: int = 1
    fsync_seconds: float = 0.0

    def __call__(self, folder: Path, record: Path) -> None:
        """Capture; write down the first block of each forward pass."""
        plan_module.SHARD_BYTES = self.shard_batches * BATCH_BLOCKS * CONTEXT * ROW_BYTES
        torch.set_num_threads(self.threads)
        blocks = make_blocks(self.n_blocks, padded=5)
        first = {blocks.ids[start].tobytes(): start for start in range(0, self.n_blocks, BATCH_BLOCKS)}
        captured = LanguageModel.capture

        def recorded(model: LanguageModel, ids: torch.Tensor, *args: object, **options: object) -> dict:
            result = captured(model, ids, *args, **options)  # type: ignore[arg-type]
            line = f"{first[ids[0].numpy().astype(blocks.ids.dtype).tobytes()]}\n"
            handle = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(handle, line.encode())
            os.close(handle)
            return result

        def slow(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
            time.sleep(self.fsync_seconds)
            fsync(handle)

        LanguageModel.capture = recorded  # type: ignore[method-assign]
        files_module.os.fsync = slow  # type: ignore[assignment]
        write_store(self.model, blocks, [HOOK, SECOND_HOOK], folder)

    def captured_twice(self, first: Path, second: Path) -> int:
        """How many shards were captured whole before the kill, and whole again after it."""

        def blocks(path: Path) -> set[int]:
            return set(map(int, path.read_text().split())) if path.exists() else set()

        both = blocks(first) & blocks(second)
        length = self.shard_batches * BATCH_BLOCKS
        shards = (
            range(start, min(start + length, self.n_blocks), BATCH_BLOCKS)
            for start in range(0, self.n_blocks, length)
        )
        return sum(set(shard) <= both for shard in shards)

    def resume(self, folder: Path, before: Path, whole: dict[str, bytes]) -> None:
        """Check what a killed capture left, finish it, and compare."""
        if (folder / "shards.jsonl").is_file() and (folder / "shards.jsonl").stat().st_size:
            assert ActivationStore.open(folder).at(HOOK).read(0, 1).isfinite().all()
            assert verify_store(folder) == []
        after = before.with_name(before.name + "-after")
        assert ended(forked(lambda: self(folder, after))) == 0
        assert contents(folder) == whole
        assert not list(folder.glob(".*.*"))
        assert self.captured_twice(before, after) <= 1


def test_killed_at_eight_random_moments(model: LanguageModel, tmp_path: Path) -> None:
    assert Capture(model).killed_at_random(tmp_path, times=8) >= 4


@pytest.mark.parametrize("shard_batches", [1, 3])
def test_however_many_threads_run_ahead_one_shard_is_repeated(
    model: LanguageModel, tmp_path: Path, shard_batches: int
) -> None:
    capture = Capture(model, n_blocks=40, shard_batches=shard_batches, threads=4, fsync_seconds=0.02)
    assert capture.killed_at_random(tmp_path, times=4) >= 1


@pytest.mark.slow
def test_killed_at_fifty_random_moments(model: LanguageModel, tmp_path: Path) -> None:
    assert Capture(model).killed_at_random(tmp_path, times=50) >= 25


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("action", ["capture", "append", "replace", "repair"])
def test_killed_in_each_of_its_writes_fsyncs_and_renames(
    model: LanguageModel, other_model: LanguageModel, tmp_path: Path, action: str, call: str
) -> None:
    """From the first to the last of them; the same action again ends in the bytes of one that was not killed."""
    first, more = make_blocks(36, padded=5), make_blocks(6, seed=1)
    before = tmp_path / "before"
    if action in ("append", "repair"):
        write_store(model, first, [HOOK], before)
    elif action == "replace":
        write_store(other_model, first, [HOOK], before)
    if action == "repair":
        (before / "shard-00001.safetensors").write_bytes(b"damage")
        (before / "statistics.safetensors").unlink()

    def act(folder: Path) -> None:
        if action == "append":
            append_store(model, more, folder)
        elif action == "repair":
            repair_store(folder, model, lambda about: {})
        else:
            write_store(model, first, [HOOK], folder, replace_other=action == "replace")

    def prepared(folder: Path) -> Path:
        if before.exists():
            shutil.copytree(before, folder)
        return folder

    act(prepared(tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    number = 0
    while True:
        number += 1
        folder = prepared(tmp_path / f"{number}")

        def killed(folder: Path = folder, number: int = number) -> None:
            kill_at(call, number)
            act(folder)

        done = ended(forked(killed)) == 0
        if not done:
            act(folder)
        assert contents(folder) == whole, number
        assert not list(folder.rglob(".*.*"))
        if done:
            assert number > 5
            return


def test_interrupting_leaves_a_store_that_can_be_used(model: LanguageModel, tmp_path: Path) -> None:
    """Ctrl-C: the shard being written is finished, and what is there can be read."""
    capture, folder, record = Capture(model), tmp_path / "store", tmp_path / "record"
    whole, _ = capture.whole(tmp_path / "whole")

    def interrupted() -> None:
        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        try:
            capture(folder, record)
        except KeyboardInterrupt:
            os._exit(0)

    process = forked(interrupted)
    while len(list(folder.glob("shard-*"))) < 3:
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 0
    assert not list(folder.glob(".shard-*"))
    assert verify_store(folder) == []
    assert ActivationStore.open(folder).n_rows >= 3 * 16 * CONTEXT
    capture.resume(folder, record, whole)


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return int(connection.getsockname()[1])


def together(work: Callable[[int], None], kill_rank: int | None = None, after: float = 0.0) -> list[int]:
    """Run ``work(rank)`` in two forked processes as torchrun would; how each ended.

    With ``kill_rank`` that process is killed ``after`` seconds, and the other, which waits for it, with it.
    """
    port = free_port()

    def share(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        work(rank)

    processes = [forked(lambda rank=rank: share(rank)) for rank in range(2)]  # type: ignore[misc]
    if kill_rank is not None:
        time.sleep(after)
        for rank in (kill_rank, 1 - kill_rank):
            os.kill(processes[rank], signal.SIGKILL)
    return [ended(process) for process in processes]


def test_two_processes_write_what_one_writes(model: LanguageModel, tmp_path: Path) -> None:
    whole, _ = Capture(model).whole(tmp_path / "whole")
    folder, blocks = tmp_path / "store", make_blocks(120, padded=5)

    def share(rank: int) -> None:
        store = write_store(model, blocks, [HOOK, SECOND_HOOK], folder, processes=started_processes())
        assert store.complete

    assert together(share) == [0, 0]
    # Not only token, position and document ids and the layout: every byte, since each batch runs on one thread.
    assert contents(folder) == whole


def test_two_processes_are_killed_and_go_on(model: LanguageModel, tmp_path: Path) -> None:
    whole, seconds = Capture(model).whole(tmp_path / "whole")
    blocks = make_blocks(120, padded=5)
    listed = 0
    for number in range(3):
        folder = tmp_path / f"{number}"

        def share(rank: int, folder: Path = folder) -> None:
            write_store(model, blocks, [HOOK, SECOND_HOOK], folder, processes=started_processes())

        together(share, kill_rank=number % 2, after=seconds * (1 + number) / 2)
        if list(folder.glob("shard-00000*")) and verify_store(folder) == []:
            listed += 1
            assert ActivationStore.open(folder).at(HOOK).read(0, 1).isfinite().all()
        assert together(share) == [0, 0]
        assert contents(folder) == whole
    assert listed > 0


def test_two_processes_append_together(model: LanguageModel, tmp_path: Path) -> None:
    first, more = make_blocks(40), make_blocks(30, seed=1)
    for name in ("alone", "together"):
        write_store(model, first, [HOOK], tmp_path / name)
    append_store(model, more, tmp_path / "alone")

    def share(rank: int) -> None:
        processes = started_processes()
        if rank == 1:
            time.sleep(0.3)  # a slower one meets what the other has begun
        append_store(model, more, tmp_path / "together", processes=processes)

    assert together(share) == [0, 0]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
