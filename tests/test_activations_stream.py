"""Shuffled batches from the ring buffer, on disk and live."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_language_model
from torch import Tensor

from activations import stream as stream_module
from activations.blocks import TokenBlocks
from activations.capture import BlockRange, capture_blocks, kept_positions
from activations.errors import InputError
from activations.exclusion import Exclusion
from activations.models import LanguageModel
from activations.store_stream import StoreStream
from activations.stream import ActivationStream
from activations.writer import write_store

HOOK = "blocks.1.hook_resid_post"
module_file = stream_module.__file__


class NumberedRows:
    """A source whose rows are their own number: range i holds ``counts[i]`` rows."""

    hook_names, width, dtype, device = ("rows",), 1, torch.float32, torch.device("cpu")

    def __init__(self, counts: Sequence[int]):
        self.ranges = [(i, i + 1) for i in range(len(counts))]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.n_read = 0

    def rows(self, ranges: Sequence[BlockRange]) -> Iterator[Tensor]:
        for start, _ in ranges:
            self.n_read += 1
            yield torch.arange(self.starts[start], self.starts[start + 1]).float()[:, None]


def make_stream(source: NumberedRows, **settings: int) -> ActivationStream:
    return ActivationStream(source, **{"batch_size": 10, "seed": 0, "buffer_rows": 60, **settings})


def numbers(batches: Sequence[Tensor]) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in batches]


# 300 rows in ranges of many sizes, one of them empty
COUNTS = [7, 0, 31, 12, 1, 25, 24] * 3


@pytest.mark.parametrize("buffer_rows", [1, 60, 64, 170, 10_000])
def test_a_pass_gives_every_row_once_in_another_order(buffer_rows: int) -> None:
    stream = make_stream(NumberedRows(COUNTS), n_batches=30, buffer_rows=buffer_rows)
    assert (stream.n_tokens, stream.n_batches, stream.batch_size, stream.width) == (300, 30, 10, 1)
    batches = list(stream)
    assert [batch.shape for batch in batches] == [(10, 1)] * 30
    flat = [n for batch in numbers(batches) for n in batch]
    assert sorted(flat) == list(range(300))
    assert flat != sorted(flat)
    with pytest.raises(StopIteration):
        next(stream)


def test_further_passes_have_another_order() -> None:
    stream = make_stream(NumberedRows(COUNTS), n_batches=75, buffer_rows=10_000)
    flat = [n for batch in numbers(list(stream)) for n in batch]
    # 750 rows are read in 2.5 passes
    counts = np.bincount(flat)
    assert set(counts) == {2, 3}
    assert (counts == 3).sum() == 150


def test_rows_are_mixed_over_the_buffer() -> None:
    source = NumberedRows([100] * 100)
    stream = make_stream(source, batch_size=100, n_batches=100, buffer_rows=2000)
    ranges = [np.unique(np.array(batch) // 100).size for batch in numbers(list(stream))]
    # 100 draws from the 20 ranges that fill the buffer meet about 19.9 of them.
    assert min(ranges) > 14


def test_the_same_seed_gives_the_same_batches_and_another_seed_does_not() -> None:
    first, again, other = (
        numbers(list(make_stream(NumberedRows(COUNTS), n_batches=20, seed=seed))) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("buffer_rows", [20, 60, 10_000])
def test_a_stream_continues_exactly_from_every_batch(buffer_rows: int) -> None:
    settings = {
        "n_batches": 43,
        "buffer_rows": buffer_rows,
    }  # 430 rows: into the second pass, no whole rounds
    whole = numbers(list(make_stream(NumberedRows(COUNTS), **settings)))
    for done in range(0, 44, 3):
        stopped = make_stream(NumberedRows(COUNTS), **settings)
        for _ in range(done):
            next(stopped)
        state = json.loads(json.dumps(stopped.state_dict()))
        continued = make_stream(NumberedRows(COUNTS), **settings)
        continued.load_state_dict(state)
        assert len(continued) == 43 - done
        assert numbers(list(continued)) == whole[done:]


def test_a_stream_goes_back_to_a_state_of_its_own() -> None:
    stream = make_stream(NumberedRows(COUNTS), n_batches=30)
    for _ in range(8):
        next(stream)
    state = stream.state_dict()
    rest = numbers(list(stream))
    stream.load_state_dict(state)
    assert numbers(list(stream)) == rest


def interrupted_once(stream: ActivationStream, line: int) -> tuple[list[list[int]], int]:
    """All batches of a stream that is interrupted before its ``line``-th line of code and then goes on.

    Returns them, and how many lines were run before the interruption.
    """
    n_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal n_lines
        if frame.f_code.co_filename != module_file:
            return None
        if event == "line":
            if n_lines == line:
                raise KeyboardInterrupt  # which also ends the tracing
            n_lines += 1
        return trace

    batches, before = [], sys.gettrace()
    sys.settrace(trace)
    try:
        while len(batches) < stream.n_batches:
            try:
                batches.append(next(stream))
            except KeyboardInterrupt:
                sys.settrace(before)
    finally:
        sys.settrace(before)
    return numbers(batches), n_lines


@pytest.mark.parametrize("buffer_rows", [20, 60])
def test_a_stream_that_was_interrupted_anywhere_goes_on_exactly(buffer_rows: int) -> None:
    settings = {"n_batches": 17, "buffer_rows": buffer_rows}  # no whole rounds
    whole = numbers(list(make_stream(NumberedRows(COUNTS[:7]), **settings)))  # 100 rows: into the second pass
    untouched, n_lines = interrupted_once(make_stream(NumberedRows(COUNTS[:7]), **settings), line=-1)
    assert untouched == whole
    assert n_lines > 500
    for line in range(0, n_lines, 3):
        batches, n_run = interrupted_once(make_stream(NumberedRows(COUNTS[:7]), **settings), line)
        assert n_run == line
        assert batches == whole, line


def test_continuing_reads_two_buffers_at_most() -> None:
    source = NumberedRows([10] * 100)
    stream = make_stream(source, n_batches=300, buffer_rows=60)
    for _ in range(250):
        next(stream)
    fresh = NumberedRows([10] * 100)
    continued = make_stream(fresh, n_batches=300, buffer_rows=60)
    continued.load_state_dict(stream.state_dict())
    next(continued)
    assert fresh.n_read <= 13  # 120 rows and the batch itself, ten rows each


def test_every_batch_after_the_first_reads_one_batch_of_rows() -> None:
    source = NumberedRows([10] * 100)
    stream = make_stream(source, n_batches=50, buffer_rows=60)
    read = []
    for _ in stream:
        read.append(source.n_read)
    # The first fills six batches and replaces itself; the last six need no more rows.
    assert read == [*range(7, 51), *[50] * 6]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 20}, "batch size"),
        ({"buffer_rows": 30, "seed": 1}, "seed and buffer size"),
        ({"seed": 1}, "seed"),
        ({"n_batches": 31}, "number of batches"),
        ({"counts": [10, 290]}, "number of blocks"),
    ],
)
def test_a_state_of_another_stream_is_refused(change: dict, named: str) -> None:
    state = make_stream(NumberedRows(COUNTS), n_batches=30).state_dict()
    source = NumberedRows(change.pop("counts", COUNTS))
    with pytest.raises(InputError) as error:
        make_stream(source, **{"n_batches": 30, "buffer_rows": 65, **change}).load_state_dict(state)
    assert str(error.value) == (
        f"The checkpoint's activation stream has another {named}: continue with the settings the run was"
        " started with, or start a new run."
    )


def test_a_source_without_rows_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(InputError) as error:
        next(make_stream(NumberedRows([0, 0]), n_batches=1))
    assert str(error.value) == "No position of the corpus counts: every token is special or an outlier."


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    ids = np.random.default_rng(0).integers(0, 20, (30, 16)).astype(np.uint16)
    return TokenBlocks(ids, np.zeros((30, 16), np.int32), ["a"], "train", "concatenated", bos=False)


def test_live_and_stored_streams_give_the_same_activations(
    model: LanguageModel, blocks: TokenBlocks, tmp_path: Path
) -> None:
    held = write_store(model, blocks, [HOOK], tmp_path).at()
    settings = {"batch_size": 32, "n_batches": held.n_kept // 32, "seed": 5}
    stored = torch.cat(list(StoreStream.exact(held, **settings)))
    live = torch.cat(list(ActivationStream.live(model, blocks, HOOK, held.exclusion, **settings)))
    assert stored.dtype == live.dtype == torch.float32
    assert len(stored) == held.n_kept // 32 * 32
    known = {row.numpy().tobytes() for row in live.bfloat16().float()}
    missing = [row for row in stored if row.numpy().tobytes() not in known]
    assert len(missing) <= held.n_kept % 32  # the last rows of another order


def test_excluded_positions_are_never_given(model: LanguageModel, blocks: TokenBlocks) -> None:
    x = torch.cat([activations[HOOK] for _, activations in capture_blocks(model, blocks, [HOOK])])
    norms = x.norm(dim=-1)
    exclusion = Exclusion(frozenset({0, 3}), max_norm=float(norms.median()))
    expected = x[kept_positions(blocks, 0, 30, x, exclusion)]
    assert 0 < len(expected) < 240
    stream = ActivationStream.live(model, blocks, HOOK, exclusion, batch_size=1, n_batches=len(expected))
    given = torch.cat(list(stream))
    assert torch.equal(given.sort(dim=0).values, expected.sort(dim=0).values)


def test_a_live_stream_continues_exactly(model: LanguageModel, blocks: TokenBlocks) -> None:
    exclusion = Exclusion(frozenset({0}), float("inf"))
    settings = {"batch_size": 32, "n_batches": 18, "buffer_rows": 128}
    stream = ActivationStream.live(model, blocks, HOOK, exclusion, **settings)
    for _ in range(7):
        next(stream)
    state = stream.state_dict()
    rest = list(stream)
    continued = ActivationStream.live(model, blocks, HOOK, exclusion, **settings)
    continued.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(rest, continued, strict=True))


SECOND_HOOK = "blocks.2.mlp.hook_post"


def test_two_hooks_stand_side_by_side_where_a_position_counts_at_both(
    model: LanguageModel, blocks: TokenBlocks
) -> None:
    x, y = (
        torch.cat([found[hook] for _, found in capture_blocks(model, blocks, [HOOK, SECOND_HOOK])])
        for hook in (HOOK, SECOND_HOOK)
    )
    at_x = Exclusion(frozenset({0}), max_norm=float(x.norm(dim=-1).quantile(0.7)))
    at_y = Exclusion(frozenset({0}), max_norm=float(y.norm(dim=-1).quantile(0.7)))
    text = torch.from_numpy(blocks.ids.astype(np.int64)) != 0
    kept = text & (x.norm(dim=-1) <= at_x.max_norm) & (y.norm(dim=-1) <= at_y.max_norm)
    expected = torch.cat([x[kept], y[kept]], dim=1)
    settings = {"batch_size": 1, "n_batches": len(expected)}
    stream = ActivationStream.live(model, blocks, HOOK, at_x, also={SECOND_HOOK: at_y}, **settings)
    assert stream.width == 32 + 72
    assert sorted(torch.cat(list(stream)).tolist()) == sorted(expected.tolist())


def test_a_state_of_another_pair_of_hooks_is_refused(model: LanguageModel, blocks: TokenBlocks) -> None:
    exclusion = Exclusion(frozenset(), float("inf"))

    def stream(*also: str) -> ActivationStream:
        others = dict.fromkeys(also, exclusion)
        return ActivationStream.live(model, blocks, HOOK, exclusion, also=others, batch_size=8, n_batches=4)

    state = stream(SECOND_HOOK).state_dict()
    for other in (stream(), stream("blocks.1.mlp.hook_post")):
        with pytest.raises(InputError, match="another hook"):
            other.load_state_dict(state)


def test_an_unknown_hook_is_refused_at_once(model: LanguageModel, blocks: TokenBlocks) -> None:
    exclusion = Exclusion(frozenset(), float("inf"))
    with pytest.raises(InputError, match="hook_rsid_post"):
        ActivationStream.live(model, blocks, "blocks.1.hook_rsid_post", exclusion, batch_size=2, n_batches=1)
    with pytest.raises(InputError, match="hook_mlp_ut"):
        also = {"blocks.1.hook_mlp_ut": exclusion}
        ActivationStream.live(model, blocks, HOOK, exclusion, also=also, batch_size=2, n_batches=1)
