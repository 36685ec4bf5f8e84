"""Capturing token blocks, what counts among the activations, and the store on disk."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_language_model

from activations import store as store_module
from activations.blocks import PADDING, TokenBlocks
from activations.capture import capture_blocks, capture_ranges, kept_positions, single_threaded
from activations.edits import Edit
from activations.errors import InputError
from activations.exclusion import Exclusion, Moments
from activations.models import LanguageModel
from activations.progress import Progress
from activations.store import ActivationStore, write_store

HOOK = "blocks.1.hook_resid_post"
CONTEXT, WIDTH = 16, 32


def make_blocks(n_blocks: int, padded: int = 0, seed: int = 0) -> TokenBlocks:
    """Random tokens with a separator (0) here and there; ``padded`` positions of padding at the very end."""
    ids = np.random.default_rng(seed).integers(0, 40, (n_blocks, CONTEXT)).astype(np.uint16)
    documents = np.zeros((n_blocks, CONTEXT), np.int32)
    if padded:
        ids[-1, -padded:] = 0
        documents[-1, -padded:] = PADDING
    return TokenBlocks(ids, documents, ["a document"], "train", "concatenated", bos=False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two batches of four blocks."""
    monkeypatch.setattr(store_module, "SHARD_BYTES", 2 * 4 * CONTEXT * WIDTH * 2)


def bits(store: ActivationStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob("*.*")}


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


def test_exclusion_leaves_out_special_tokens_and_outliers() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    x = torch.tensor([1.0, 2.0, 3.0, 29.0, 31.0])[None, :, None] * torch.tensor([0.6, 0.8])
    # Norms of tokens that are not special: 2, 3, 29, 31; torch's median is the lower of the middle two, 3.
    exclusion = Exclusion.measure({0}, [(ids, x)])
    assert exclusion.max_norm == pytest.approx(30.0)
    assert exclusion.kept(ids, x).tolist() == [[False, True, True, True, False]]
    everything = Exclusion(frozenset(), float("inf"))
    assert everything.kept(ids, x).all()
    with pytest.raises(InputError) as error:
        Exclusion.measure(range(5), [(ids, x)])
    assert str(error.value) == "The corpus holds special tokens only: give one that holds text."


def test_exclusion_measures_the_first_hundred_thousand_tokens_only() -> None:
    taken = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(10):
            taken.append(number)
            yield torch.ones(60_000, dtype=torch.int64), torch.full((60_000, 1), 1.0 + 9 * (number > 1))

    # The second batch goes 20,000 past the sample, and the third would change nothing.
    assert Exclusion.measure({0}, batches()).max_norm == 10.0
    assert taken == [0, 1]


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


@pytest.mark.usefixtures("small_shards")
def test_a_store_gives_back_what_the_model_computes(model: LanguageModel, tmp_path: Path) -> None:
    blocks = make_blocks(22, padded=6)
    store = write_store(model, blocks, HOOK, tmp_path / "store")
    assert len(list(store.folder.glob("shard-*.safetensors"))) == 3
    captured = torch.cat([activations[HOOK] for _, activations in capture_blocks(model, blocks, [HOOK])])
    expected = captured.bfloat16()
    for start, stop in ((0, 22), (0, 1), (7, 9), (8, 16), (21, 22)):
        assert torch.equal(store.read(start, stop), expected[start:stop])
    assert (store.hook_name, store.width, store.n_blocks) == (HOOK, WIDTH, 22)
    assert store.blocks.hash == blocks.hash

    # Slow and obvious: separators (id 0) and padding do not count, nor do norms above ten medians.
    text = torch.from_numpy((blocks.ids != 0) & (blocks.documents != PADDING))
    norms = expected.float().norm(dim=-1)
    counts = text & (norms <= 10 * norms[text].median())
    rows = expected[counts].double()
    assert store.n_kept == len(rows)
    assert store.exclusion.special_ids == {0}
    assert store.exclusion.max_norm == pytest.approx(10 * float(norms[text].median()), rel=1e-6)
    torch.testing.assert_close(store.mean, rows.mean(0).float())
    assert ((rows - store.mean) * store.scale).square().sum(1).mean() == pytest.approx(WIDTH, rel=1e-5)
    assert torch.equal(kept_positions(blocks, 0, 22, expected, store.exclusion), counts)


def test_writing_again_opens_what_is_there(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(8)
    write_store(model, blocks, HOOK, tmp_path)
    monkeypatch.setattr(store_module, "capture_blocks", None)  # a second capture would fail
    assert write_store(model, blocks, HOOK, tmp_path).n_blocks == 8


class Stop(Exception):
    pass


def stop_after(n_tokens: int) -> Progress:
    """A progress bar that interrupts the work."""

    @contextmanager
    def progress(description: str, *, total: int, unit: str) -> Iterator:
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            if done > n_tokens:
                raise Stop

        yield step

    return progress


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_store_continues_at_the_first_missing_shard(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(30)
    whole = write_store(model, blocks, HOOK, tmp_path / "whole")
    folder = tmp_path / "interrupted"
    with pytest.raises(Stop):
        write_store(model, blocks, HOOK, folder, progress=stop_after(20 * CONTEXT))
    assert sorted(path.name for path in folder.glob("shard-*")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    with pytest.raises(InputError, match="is not a finished store of activations"):
        ActivationStore.open(folder)

    starts = []

    def spy(*arguments: object, start: int, **options: object) -> Iterator:
        starts.append(start)
        return capture_blocks(*arguments, start=start, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "capture_blocks", spy)
    # One flipped bit in the second shard: it is computed again, with what follows.
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    continued = write_store(model, blocks, HOOK, folder)
    assert starts == [8]
    assert bits(continued) == bits(whole)


@pytest.mark.usefixtures("small_shards")
def test_a_store_from_other_inputs_is_replaced(model: LanguageModel, tmp_path: Path) -> None:
    write_store(model, make_blocks(30), HOOK, tmp_path / "store")
    fewer = make_blocks(9, seed=1)
    replaced = write_store(model, fewer, HOOK, tmp_path / "store")
    assert bits(replaced) == bits(write_store(model, fewer, HOOK, tmp_path / "fresh"))
    replaced.delete()
    assert not (tmp_path / "store").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError) as error:
        write_store(model, make_blocks(4), HOOK, tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds thesis.txt, which is no part of a store of activations: give an empty or new"
        " folder."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    make_blocks(4).save(tmp_path / "tokens")
    with pytest.raises(InputError, match="holds token blocks, not a store of activations"):
        write_store(model, make_blocks(4), HOOK, tmp_path / "tokens")


def test_an_unknown_hook_changes_nothing_on_disk(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hook_resid_posst"):
        write_store(model, make_blocks(4), "blocks.1.hook_resid_posst", tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(model: LanguageModel, tmp_path: Path) -> None:
    store = write_store(model, make_blocks(4), HOOK, tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"shard-00000\.safetensors cannot be read \(.*\): capture again"):
        store.read(0, 1)
    (tmp_path / "statistics.safetensors").unlink()
    with pytest.raises(InputError, match=r"statistics\.safetensors cannot be read"):
        ActivationStore.open(tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_a_disk_with_too_little_room_is_refused_before_work_begins(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 blocks of 16 positions of 32 values of 2 bytes are 40,960 bytes.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=40_959))
    with pytest.raises(InputError) as error:
        write_store(model, make_blocks(40), HOOK, tmp_path / "store")
    assert str(error.value) == (
        f"The disk has too little room for the activations in {tmp_path / 'store'}, 0 MB in all: free some"
        " and run again to continue, or choose a folder on another disk."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_up_keeps_what_is_finished(model: LanguageModel, tmp_path: Path) -> None:
    import resource

    blocks, folder = make_blocks(40), tmp_path / "store"
    with pytest.raises(Stop):
        write_store(model, blocks, HOOK, folder, progress=stop_after(20 * CONTEXT))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, unlimited[1]))  # a shard is 8 kB
    try:
        with pytest.raises(InputError) as error:
            write_store(model, blocks, HOOK, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert str(error.value) == (
        f"The disk has too little room for the activations in {folder}, 0 MB in all: free some and run again"
        " to continue, or choose a folder on another disk."
    )
    left = ["shard-00000.safetensors", "shard-00001.safetensors", "tokens"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert write_store(model, blocks, HOOK, folder).n_blocks == 40
