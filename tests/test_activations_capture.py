"""Capturing token blocks in parallel, and which of their positions count."""

from collections.abc import Iterator

import pytest
import torch
from store_helpers import HOOK, WIDTH, make_blocks
from tiny_models import tiny_language_model

from activations.capture import (
    blocks_per_batch,
    capture_blocks,
    capture_ranges,
    counted_positions,
    single_threaded,
    single_threaded_workers,
)
from activations.config import ExclusionRule
from activations.edits import Edit
from activations.errors import InputError
from activations.exclusion import Moments
from activations.models import LanguageModel
from activations.statistics import measure_statistics, statistics_of


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_captured_batches_are_in_order_and_equal_one_by_one(model: LanguageModel, n_workers: int) -> None:
    blocks = make_blocks(18)
    hooks = [HOOK, "blocks.0.hook_mlp_out"]
    ranges = [(0, 4), (12, 16), (4, 8), (16, 18)]
    captured = list(capture_ranges(model, blocks, hooks, ranges, n_workers=n_workers))
    assert [start for start, _ in captured] == [0, 12, 4, 16]
    for (start, stop), (_, activations) in zip(ranges, captured, strict=True):
        with single_threaded():
            expected = model.capture(blocks.ids_tensor(start, stop), hooks)
        for hook in hooks:
            assert torch.equal(activations[hook], expected[hook])


def test_a_worker_computes_on_one_thread_whatever_it_has_computed_before() -> None:
    """PyTorch forgets the setting of a thread that has not asked for it, at its first parallel operator."""
    setting = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with single_threaded_workers(2) as pool:
            for _ in range(2):
                large = [pool.submit(lambda: torch.ones(1 << 18).exp_().sum()) for _ in range(4)]
                assert all(future.result() > 0 for future in large)
                assert {pool.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(setting)


def test_capture_keeps_the_number_of_threads_and_stops_when_nobody_listens(model: LanguageModel) -> None:
    threads = torch.get_num_threads()
    captured = capture_blocks(model, make_blocks(40), [HOOK], batch_blocks=2, start=6)
    assert next(captured)[0] == 6
    captured.close()
    assert torch.get_num_threads() == threads


def test_padding_is_masked(model: LanguageModel) -> None:
    blocks = make_blocks(1, padded=5)
    ((_, activations),) = capture_blocks(model, blocks, [HOOK])
    alone = model.capture(blocks.ids_tensor(0, 1)[:, :-5], [HOOK])[HOOK]
    torch.testing.assert_close(activations[HOOK][:, :-5], alone, rtol=1e-5, atol=1e-5)


def test_edits_in_force_hold_in_every_worker(model: LanguageModel) -> None:
    blocks = make_blocks(12)
    edit = Edit(HOOK, lambda x, positions: torch.full_like(x, 7.0))
    with model.edited(edit):
        captured = list(capture_ranges(model, blocks, [HOOK], [(0, 4), (4, 8), (8, 12)], n_workers=3))
    assert all((activations[HOOK] == 7.0).all() for _, activations in captured)
    ((_, clean), *_) = capture_blocks(model, blocks, [HOOK])
    assert not (clean[HOOK] == 7.0).any()


def test_an_error_in_a_worker_reaches_the_caller(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="hook_nothing"):
        list(capture_blocks(model, make_blocks(4), ["blocks.1.hook_nothing"]))


def test_long_sequences_make_small_batches(model: LanguageModel) -> None:
    # 2,048 tokens at once on a CPU, but never less than a block
    assert [blocks_per_batch(model, n) for n in (16, 256, 1000, 1024, 100_000)] == [128, 8, 2, 2, 1]


def test_exclusion_leaves_out_special_tokens_and_outliers() -> None:
    ids = torch.tensor([0, 1, 2, 3, 4])
    x = torch.tensor([1.0, 2.0, 3.0, 29.0, 31.0])[:, None] * torch.tensor([0.6, 0.8])
    # Norms of tokens that are not special: 2, 3, 29, 31; torch's median is the lower of the middle two, 3.
    found = statistics_of([(ids, x, x.norm(dim=-1))], {0}, ExclusionRule())
    assert found.exclusion.max_norm == pytest.approx(30.0)
    assert found.exclusion.kept(ids, x).tolist() == [False, True, True, True, False]
    torch.testing.assert_close(found.mean, x[1:4].mean(0))
    everything = statistics_of(
        [(ids, x, x.norm(dim=-1))], {0}, ExclusionRule(exclude_special=False, outlier_factor=None)
    )
    assert everything.exclusion.kept(ids, x).all()
    torch.testing.assert_close(everything.mean, x.mean(0))
    with pytest.raises(InputError) as error:
        statistics_of([(ids, x, x.norm(dim=-1))], range(5), ExclusionRule())
    assert str(error.value) == "The corpus holds special tokens only: give one that holds text."


def test_statistics_are_those_of_the_first_hundred_thousand_tokens() -> None:
    taken = []

    def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for number in range(10):
            taken.append(number)
            ids = torch.ones(60_000, dtype=torch.int64)
            ids[::2] = number % 2  # every other token of the even batches is special
            x = torch.full((60_000, 1), 1.0 + number)
            yield ids, x, x[:, 0]

    found = statistics_of(rows(), {0}, ExclusionRule())
    # 30,000 of value 1, 60,000 of value 2 and 10,000 of value 3
    assert taken == [0, 1, 2]
    assert found.exclusion.max_norm == 20.0
    assert found.mean.item() == pytest.approx((30_000 * 1 + 60_000 * 2 + 10_000 * 3) / 100_000)
    variance = (30_000 * 0.8**2 + 60_000 * 0.2**2 + 10_000 * 1.2**2) / 100_000
    assert found.scale == pytest.approx(variance**-0.5)


def test_measuring_a_model_equals_measuring_its_activations(model: LanguageModel) -> None:
    blocks = make_blocks(22, padded=6)
    x = torch.cat([activations[HOOK] for _, activations in capture_blocks(model, blocks, [HOOK])])
    counts = counted_positions(blocks, 0, 22)
    rows = blocks.ids_tensor(0, 22)[counts], x[counts], x[counts].norm(dim=-1)
    expected = statistics_of([rows], {0}, ExclusionRule())
    found = measure_statistics(model, blocks, HOOK)
    assert found.exclusion == expected.exclusion
    assert found.scale == pytest.approx(expected.scale)
    torch.testing.assert_close(found.mean, expected.mean)
    assert found.mean.shape == (WIDTH,)


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0])
def test_a_bound_below_the_median_is_refused(factor: float) -> None:
    with pytest.raises(InputError) as error:
        ExclusionRule(outlier_factor=factor).check()
    assert str(error.value) == (
        f"outlier_factor is {factor}, and must be above 1: half of all norms exceed their median."
    )


def test_moments_equal_the_formula_in_float64() -> None:
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments = Moments(7)
    for part in x.split(130):
        moments.add(part)
    exact = x.double()
    scale = (7 / (exact - exact.mean(0)).square().sum(1).mean()).sqrt()
    torch.testing.assert_close(moments.mean, exact.mean(0).float())
    assert moments.scale == pytest.approx(float(scale), rel=1e-9)
    constant = Moments(7)
    constant.add(torch.full((10, 7), 3.3))
    assert constant.scale == 1.0
