"""Reading rows in the order of training: where they lie, and from a shuffled copy."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_language_model
from torch import Tensor

from activations import plan, shuffled, store_stream
from activations.blocks import PADDING, TokenBlocks
from activations.capture import kept_positions
from activations.config import StoredAs
from activations.errors import InputError
from activations.ordered import CHUNK, RowOrder
from activations.permutation import Permutation
from activations.shuffled import ROWS_FILE, ShuffledReader, external_bytes
from activations.store_stream import StoreStream
from activations.writer import write_store

SIZES = (700, 1, 0, 999, 512, 300)  # 2,512 rows: nine chunks and a short one
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass
class Rows:
    """A source in memory whose rows are random, and partly do not count."""

    sizes: tuple[int, ...] = SIZES
    width: int = 5
    dtype: torch.dtype = torch.bfloat16
    kept_share: float = 0.7
    hook_name: str = "blocks.1.hook_resid_post"
    identity: str = "some rows"
    seed: int = 0

    @property
    def n_rows(self) -> int:
        return sum(self.sizes)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor | None, np.ndarray]:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.n_rows, self.width, generator=generator)
        counts = torch.rand(self.n_rows, generator=generator).numpy() < self.kept_share
        if self.dtype == torch.int8:
            return (
                (40 * x).clamp(-127, 127).to(torch.int8),
                torch.rand(self.n_rows, generator=generator),
                counts,
            )
        return x.to(self.dtype), None, counts

    def values(self, shard: int) -> Tensor:
        return self._all[0][self.starts[shard] : self.starts[shard + 1]]

    def scales(self, shard: int) -> Tensor | None:
        scales = self._all[1]
        return None if scales is None else scales[self.starts[shard] : self.starts[shard + 1]]

    def kept(self) -> np.ndarray:
        return np.packbits(self._all[2], bitorder="little")

    def activations(self) -> Tensor:
        """All rows, float32."""
        values, scales, _ = self._all
        return values.float() if scales is None else values.float() * scales[:, None]

    def counts(self, row: int) -> bool:
        return bool(self._all[2][row])


def by_definition(source: Rows, seed: int, epochs: int) -> Iterator[int]:
    """The rows that count in the order that the module describes, one position at a time."""
    order = Permutation(source.n_rows, f"rows {seed}")
    whole = source.n_rows // CHUNK
    for epoch in range(epochs):
        chunks = list(range(whole))
        if epoch:
            chunks = Permutation(whole, f"chunks {seed} {epoch}").forward(np.arange(whole)).tolist()
        chunks.append(whole)
        for chunk in chunks:
            for position in range(chunk * CHUNK, min((chunk + 1) * CHUNK, source.n_rows)):
                row = int(order.forward(np.array([position]))[0])
                if source.counts(row):
                    yield row


def make(kind: str, source: Rows, folder: Path, **settings: Any) -> StoreStream:
    settings = {"batch_size": 100, "n_batches": 50, **settings}
    if kind == "exact":
        return StoreStream.exact(source, **settings)
    return StoreStream.external(source, folder / "shuffled", memory_bytes=100_000, **settings)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_stream, "_WINDOW_BYTES", 2 * CHUNK * 10)  # two chunks of five bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["exact", "external"])
def test_batches_follow_the_definition_over_several_epochs(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = Rows(dtype=dtype)
    stream = make(kind, source, tmp_path, seed=3)
    assert (stream.n_tokens, stream.n_batches, stream.batch_size, stream.width) == (5000, 50, 100, 5)
    batches = list(stream)
    assert {(batch.dtype, batch.shape) for batch in batches} == {(torch.float32, (100, 5))}
    expected = source.activations()[list(islice(by_definition(source, 3, epochs=3), 5000))]
    assert torch.equal(torch.cat(batches), expected)
    with pytest.raises(StopIteration):
        next(stream)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    kept_share=st.sampled_from([0.1, 0.5, 1.0]),
    batch_size=st.integers(1, 300),
    memory=st.integers(10_000, 200_000),
)
def test_both_orders_give_the_same_batches(
    sizes: list[int], width: int, dtype: torch.dtype, kept_share: float, batch_size: int, memory: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    source = Rows(tuple(sizes), width, dtype, kept_share)
    if not source.kept().any():
        return
    arguments = {"batch_size": batch_size, "n_batches": 4, "seed": 1}
    folder = tmp_path_factory.mktemp("external") / "shuffled"
    exact = list(StoreStream.exact(source, **arguments))
    external = list(StoreStream.external(source, folder, memory_bytes=memory, **arguments))
    assert torch.equal(torch.cat(exact), torch.cat(external))
    rows = list(islice(by_definition(source, 1, epochs=100), 20))
    assert torch.equal(torch.cat(exact)[: len(rows)], source.activations()[rows][: 4 * batch_size])


def test_every_epoch_gives_every_row_that_counts_once_and_composes_batches_anew(tmp_path: Path) -> None:
    source = Rows((CHUNK * 20,), width=1, dtype=torch.float32, kept_share=1.0)
    epochs = torch.cat(list(make("exact", source, tmp_path, batch_size=512, n_batches=30))).view(3, -1)
    rows = source.activations()[:, 0].sort().values
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, rows)
    batches = [{tuple(sorted(batch.tolist())) for batch in epoch.view(10, 512)} for epoch in epochs]
    assert not batches[0] & batches[1]
    assert not batches[1] & batches[2]


def test_orders_of_seeds_differ(tmp_path: Path) -> None:
    first, other = (next(make("exact", Rows(), tmp_path, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["exact", "external"])
def test_a_stream_continues_from_every_batch_with_either_order(kind: str, tmp_path: Path) -> None:
    source = Rows()
    whole = list(make("exact", source, tmp_path))
    stream = make(kind, source, tmp_path)
    for done in range(51):
        state = json.loads(json.dumps(stream.state_dict()))
        assert state["batches_done"] == done
        again = make("external" if done % 2 else "exact", source, tmp_path)
        again.load_state_dict(state)
        assert len(again) == 50 - done
        for batch in whole[done : done + 3]:
            assert torch.equal(next(again), batch)
        next(stream, None)


def test_a_stream_may_be_set_back(tmp_path: Path) -> None:
    stream = make("exact", Rows(), tmp_path)
    state = stream.state_dict()
    first = list(stream)
    stream.load_state_dict(state)
    assert all(map(torch.equal, stream, first))


def test_a_state_of_another_stream_is_refused(tmp_path: Path) -> None:
    state = make("exact", Rows(), tmp_path).state_dict()
    for change, named in [
        (make("exact", Rows(), tmp_path, seed=1), "seed"),
        (make("exact", Rows(), tmp_path, batch_size=99), "batch size"),
        (make("exact", Rows(), tmp_path, n_batches=2), "number of batches"),
        (make("exact", Rows(identity="other"), tmp_path), "store"),
        (make("exact", Rows(hook_name="h"), tmp_path), "hook"),
    ]:
        with pytest.raises(InputError) as refused:
            change.load_state_dict(state)
        assert f"has another {named}: continue with the settings" in str(refused.value)


@pytest.mark.parametrize("kind", ["exact", "external"])
@pytest.mark.parametrize("sizes", [SIZES, (), (0,)])
def test_rows_that_all_do_not_count_are_refused(kind: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No position of the store counts"):
        make(kind, Rows(sizes, kept_share=0.0), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken_call", range(1, 12, 2))
def test_a_batch_that_failed_is_given_when_asked_for_again(
    broken_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(make("exact", Rows(), tmp_path))
    calls = 0
    take = StoreStream._take

    def interrupted(self: StoreStream, n: int) -> Iterator[Tensor]:
        nonlocal calls
        for piece in take(self, n):
            calls += 1
            if calls == broken_call:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(StoreStream, "_take", interrupted)
    stream, given = make("exact", Rows(), tmp_path, batch_size=700, n_batches=7), []
    while len(given) < 7:
        before = stream.state_dict()
        try:
            given.append(next(stream))
        except KeyboardInterrupt:
            assert stream.state_dict() == before
    assert calls >= broken_call
    assert torch.equal(torch.cat(given)[:4900], torch.cat(expected)[:4900])


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16", "int8"])
def test_a_store_of_a_model_is_read_in_both_orders(
    stored_as: StoredAs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", 1)
    monkeypatch.setattr(plan, "LEAST_BATCHES", {"cpu": 1})
    monkeypatch.setattr(plan, "blocks_per_batch", lambda model, context_length: 4)
    model, ids = tiny_language_model("llama"), random_ids(40, 12).numpy().astype(np.uint16)
    ids[:, 0] = model.tokenizer.separator_id  # special: does not count
    documents = np.repeat(np.arange(40, dtype=np.int32)[:, None], 12, axis=1)
    documents[::3, 7:] = PADDING
    blocks = TokenBlocks(ids, documents, [f"document {i}" for i in range(40)], "train", "isolated", False)
    hook = "blocks.1.hook_resid_post"
    held = write_store(model, blocks, [hook], tmp_path / "store", stored_as=stored_as).at()
    assert len(held.starts) > 3
    x = held.read(0, 40)
    rows = x[kept_positions(blocks, 0, 40, x, held.exclusion)].float()
    assert 0 < len(rows) == held.n_kept < held.n_rows
    arguments = {"batch_size": len(rows), "n_batches": 2}
    exact = list(StoreStream.exact(held, **arguments))
    external = list(StoreStream.external(held, tmp_path / "copy", memory_bytes=50_000, **arguments))
    for i in range(2):
        assert torch.equal(exact[i], external[i])
        assert sorted(exact[i].tolist()) == sorted(rows.tolist())


# Several hooks


def other_rows(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.int8) -> Rows:
    """The same rows at another hook: of another width and number format, of which others count."""
    return Rows(sizes, width=3, dtype=dtype, hook_name="blocks.2.hook_mlp_out", identity="others", seed=7)


def pair(kind: str, folder: Path, first: Rows, second: Rows, **settings: Any) -> StoreStream:
    settings = {"batch_size": 100, "n_batches": 50, **settings}
    if kind == "exact":
        return StoreStream.exact(first, also=[second], **settings)
    also = [(second, folder / "second")]
    return StoreStream.external(first, folder / "first", also=also, memory_bytes=100_000, **settings)


@pytest.mark.parametrize("kind", ["exact", "external"])
def test_two_hooks_stand_side_by_side_where_a_row_counts_at_both(kind: str, tmp_path: Path) -> None:
    first, second = Rows(), other_rows()
    batches = list(pair(kind, tmp_path, first, second, seed=3))
    at_both = [row for row in by_definition(first, 3, epochs=5) if second.counts(row)][:5000]
    expected = torch.cat([first.activations()[at_both], second.activations()[at_both]], dim=1)
    assert torch.equal(torch.cat(batches), expected)


@pytest.mark.parametrize("kind", ["exact", "external"])
def test_a_stream_of_two_hooks_continues_and_refuses_other_hooks(kind: str, tmp_path: Path) -> None:
    first, second = Rows(), other_rows()
    stream = pair(kind, tmp_path, first, second)
    for _ in range(13):
        next(stream)
    state, rest = stream.state_dict(), list(stream)
    continued = pair("exact", tmp_path, first, second)
    continued.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(rest, continued, strict=True))
    for other in (make("exact", first, tmp_path), pair("exact", tmp_path, second, first)):
        with pytest.raises(InputError, match="another store and hook"):
            other.load_state_dict(state)


def test_hooks_of_different_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        pair("exact", tmp_path, Rows(), other_rows((10,)))
    assert str(error.value) == (
        "blocks.1.hook_resid_post and blocks.2.hook_mlp_out have 2512 and 10 rows, and can be read side by side from"
        " one store only."
    )


# Threads


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("capture")]


def test_the_threads_end_with_the_stream(tmp_path: Path) -> None:
    stream = make("exact", Rows(), tmp_path)
    next(stream)
    assert reading_threads()
    del stream
    assert not reading_threads()
    stream = make("exact", Rows(), tmp_path)
    list(stream)
    assert not reading_threads()


def test_what_goes_wrong_while_reading_ahead_reaches_the_caller(tmp_path: Path) -> None:
    class Broken(Rows):
        def values(self, shard: int) -> Tensor:
            if shard == 3:
                raise InputError("shard-00003 cannot be read.")
            return super().values(shard)

    stream = make("exact", Broken(), tmp_path)
    with pytest.raises(InputError, match="shard-00003 cannot be read"):
        list(stream)


def test_reading_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows((100 * CHUNK,), kept_share=1.0)
    stream = make("exact", source, tmp_path, batch_size=10, n_batches=100)
    asked = []
    rows = RowOrder.rows

    def counted(self: RowOrder, positions: np.ndarray) -> np.ndarray:
        asked.append(len(positions))
        return rows(self, positions)

    monkeypatch.setattr(RowOrder, "rows", counted)
    next(stream)
    stream._windows.close()  # waits for the threads
    assert sum(asked) <= 6 * 2 * CHUNK


# The shuffled copy


def left_in(folder: Path) -> list[str]:
    """What lies in a folder beside the lock, which stays."""
    return [path.name for path in folder.iterdir() if path.name != ".lock-shuffled"]


def test_two_that_want_the_same_copy_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows()
    shuffle, begun = shuffled._shuffle, threading.Event()
    n_shuffled = 0

    def watched(*arguments: Any) -> None:
        nonlocal n_shuffled
        n_shuffled += 1
        begun.set()
        time.sleep(0.5)  # the other begins meanwhile
        shuffle(*arguments)

    monkeypatch.setattr(shuffled, "_shuffle", watched)

    def first_batch() -> Tensor:
        return next(make("external", source, tmp_path))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(first_batch)
        assert begun.wait(10)
        second = pool.submit(first_batch)
        assert torch.equal(second.result(), first.result())
    assert n_shuffled == 1
    assert torch.equal(first.result(), next(make("exact", source, tmp_path)))
    assert left_in(tmp_path) == ["shuffled"]


@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there")
def test_a_copy_that_is_replaced_meanwhile_is_read_to_the_end(tmp_path: Path) -> None:
    source, grown = Rows(), replace(Rows(), identity="grown", seed=5)
    stream = make("external", source, tmp_path)
    batches = list(islice(stream, 2))
    make("external", grown, tmp_path)
    assert all(map(torch.equal, [*batches, *stream], make("exact", source, tmp_path)))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no other way")
def test_a_copy_is_read_the_same_on_systems_without_preadv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    assert all(map(torch.equal, make("external", Rows(), tmp_path), make("exact", Rows(), tmp_path)))


def test_a_finished_copy_is_opened_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(make("external", Rows(), tmp_path))

    def refuse(*_: object) -> None:
        raise OSError("the disk cannot be written")

    monkeypatch.setattr(shuffled, "FileLock", refuse)
    assert torch.equal(next(make("external", Rows(), tmp_path)), expected)


def test_a_finished_copy_is_used_again_and_another_one_replaced(tmp_path: Path) -> None:
    source = Rows()
    first = next(make("external", source, tmp_path))
    made = (tmp_path / "shuffled" / ROWS_FILE).stat()
    assert torch.equal(next(make("external", source, tmp_path)), first)
    assert (tmp_path / "shuffled" / ROWS_FILE).stat().st_ino == made.st_ino
    for changed, seed in [(source, 1), (replace(source, identity="other", seed=5), 0), (Rows(width=6), 0)]:
        again = next(make("external", changed, tmp_path, seed=seed))
        assert torch.equal(again, next(make("exact", changed, tmp_path, seed=seed)))
    assert left_in(tmp_path) == ["shuffled"]


def test_an_interrupted_shuffle_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows()
    monkeypatch.setattr(shuffled, "_checksums", lambda records: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make("external", source, tmp_path)
    assert left_in(tmp_path) == []
    (tmp_path / ".shuffled.killed").mkdir()  # as a killed process leaves it
    (tmp_path / ".shuffled.killed" / "bucket-00000").write_bytes(b"some rows")
    monkeypatch.undo()
    assert torch.equal(next(make("external", source, tmp_path)), next(make("exact", source, tmp_path)))
    assert left_in(tmp_path) == ["shuffled"]


def test_disk_use_is_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows(SIZES * 8, width=20)
    used = []
    checksums = shuffled._checksums

    def watched(records: np.ndarray) -> np.ndarray:  # a bucket is in the copy, and not yet deleted
        used.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        return checksums(records)

    monkeypatch.setattr(shuffled, "_checksums", watched)
    reader = ShuffledReader.make(source, 0, tmp_path / "shuffled", memory_bytes=300_000)
    n_bytes = source.n_rows * 40
    bucket = 300_000 / (2 * 40 + 64) * 40
    predicted = external_bytes(source, memory_bytes=300_000)
    assert predicted <= n_bytes + bucket + 8 * (source.n_rows / CHUNK + 1)
    assert n_bytes < max(used) <= predicted
    assert external_bytes(source) == 2 * n_bytes + 8 * -(
        -source.n_rows // CHUNK
    )  # one bucket holds everything
    assert (reader._folder / ROWS_FILE).stat().st_size == n_bytes


def test_too_little_room_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError) as refused:
        make("external", Rows(), tmp_path)
    assert str(refused.value).startswith("The disk has too little room to shuffle the activations into")
    assert left_in(tmp_path) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shuffled").mkdir()
    (tmp_path / "shuffled" / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match=r"is not a finished shuffled copy"):
        make("external", Rows(), tmp_path)
    assert (tmp_path / "shuffled" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("name", ["rows.bin", "checksums.bin"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_truncated_copy_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    make("external", Rows(), tmp_path)
    file = tmp_path / "shuffled" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError) as refused:
        make("external", Rows(), tmp_path)
    assert f"{name} holds" in str(refused.value)
    assert "delete" in str(refused.value)


@pytest.mark.parametrize("byte", [0, 12_345, -1])
def test_a_flipped_bit_is_found_when_it_is_read(byte: int, tmp_path: Path) -> None:
    source = Rows(dtype=torch.int8)
    make("external", source, tmp_path)
    file = tmp_path / "shuffled" / ROWS_FILE
    data = bytearray(file.read_bytes())
    data[byte] ^= 64
    file.write_bytes(data)
    with pytest.raises(InputError) as refused:
        list(make("external", source, tmp_path))
    position = byte % len(data) // 9
    chunk = position // CHUNK * CHUNK
    last = min(chunk + CHUNK, source.n_rows) - 1
    assert f"is damaged at rows {chunk} to {last}: delete" in str(refused.value)
