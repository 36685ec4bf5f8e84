"""Stores on disk: writing, formats, reading back, resuming, appending, refusing."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from store_helpers import (
    CONTEXT,
    HOOK,
    SECOND_HOOK,
    SECOND_WIDTH,
    WIDTH,
    Stop,
    contents,
    make_blocks,
    stop_after,
)
from tiny_models import tiny_hf_model, tiny_language_model, tiny_tokenizer

from activations import plan as plan_module
from activations import writer as writer_module
from activations.blocks import PADDING, TokenBlocks
from activations.capture import capture_blocks, counted_positions, kept_positions
from activations.config import ExclusionRule, StoredAs
from activations.errors import InputError
from activations.models import LanguageModel
from activations.shards import map_shard, to_stored, write_shard
from activations.statistics import measure_statistics
from activations.store import ActivationStore, tokens_folder
from activations.verify import repair_store
from activations.writer import append_store, write_store


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two batches of four blocks."""
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 2 * 4 * CONTEXT * (12 + 4 + WIDTH * 2))
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: 4)
    monkeypatch.setattr(plan_module, "LEAST_BATCHES", {"cpu": 1})


def test_a_store_gives_back_what_the_model_computes(model: LanguageModel, tmp_path: Path) -> None:
    blocks = make_blocks(22, padded=6)
    store = write_store(model, blocks, [HOOK], tmp_path / "store")
    assert len(list(store.folder.glob("shard-*.safetensors"))) == len(store.shards) == 3
    held = store.at(HOOK)
    captured = torch.cat([activations[HOOK] for _, activations in capture_blocks(model, blocks, [HOOK])])
    real = torch.from_numpy(blocks.documents != PADDING)
    expected = captured.bfloat16() * real[..., None]
    for start, stop in ((0, 22), (0, 1), (7, 9), (8, 16), (21, 22)):
        assert torch.equal(held.read(start, stop), expected[start:stop])
    assert (held.hook_name, held.width, store.n_rows, store.complete) == (HOOK, WIDTH, 22 * 16 - 6, True)
    assert store.blocks.hash == blocks.hash

    # Slow and obvious: separators (id 0) and padding do not count, nor do norms above ten medians.
    text = torch.from_numpy(blocks.ids != 0) & real
    norms = captured.norm(dim=-1)
    counts = text & (norms <= 10 * norms[text].median())
    assert held.exclusion.special_ids == {0}
    assert held.exclusion.max_norm == pytest.approx(10 * float(norms[text].median()), rel=1e-2)
    assert held.counts == {
        "kept": int(counts.sum()),
        "special": int((real & ~text).sum()),
        "outlier": int((text & ~counts).sum()),
        "other role": 0,
    }
    rows = expected[counts].double()
    torch.testing.assert_close(held.mean, rows.mean(0).float())
    assert ((rows - held.mean) * held.scale).square().sum(1).mean() == pytest.approx(WIDTH, rel=1e-5)
    assert torch.equal(kept_positions(blocks, 0, 22, expected, held.exclusion), counts)
    bits = np.unpackbits(held.kept(), bitorder="little")[: store.n_rows].astype(bool)
    assert np.array_equal(bits, counts[real].numpy())


def test_what_a_live_stream_measures_is_what_a_store_measures(model: LanguageModel, tmp_path: Path) -> None:
    blocks = make_blocks(22, padded=6)
    live = measure_statistics(model, blocks, HOOK)
    held = write_store(model, blocks, [HOOK], tmp_path / "store", stored_as="float32").at()
    assert held.exclusion == live.exclusion
    assert held.scale == live.scale
    assert torch.equal(held.mean, live.mean)


def test_several_hooks_cost_one_pass_and_lie_side_by_side(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(22, padded=6)
    alone = {hook: write_store(model, blocks, [hook], tmp_path / hook) for hook in (HOOK, SECOND_HOOK)}
    passes = []
    capture = LanguageModel.capture

    def counted(self: LanguageModel, ids: torch.Tensor, hooks: list[str], **options: object) -> dict:
        passes.append(len(ids))
        return capture(self, ids, hooks, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "capture", counted)
    both = write_store(model, blocks, [HOOK, SECOND_HOOK], tmp_path / "both")
    assert sum(passes) == 22
    for hook, width in ((HOOK, WIDTH), (SECOND_HOOK, SECOND_WIDTH)):
        held = both.at(hook)
        assert held.width == width
        assert torch.equal(held.read(0, 22), alone[hook].at().read(0, 22))
        assert held.counts == alone[hook].at().counts
    with pytest.raises(InputError) as error:
        both.at()
    assert str(error.value) == f"{tmp_path / 'both'} holds several hooks: name one of {HOOK}, {SECOND_HOOK}."
    with pytest.raises(
        InputError, match=r"holds no activations of blocks\.0\.hook_mlp_out: it has blocks\.1\."
    ):
        both.at("blocks.0.hook_mlp_out")


def test_token_ids_positions_and_documents_lie_beside_the_activations(
    model: LanguageModel, tmp_path: Path
) -> None:
    blocks = make_blocks(10)
    blocks.documents[3:, 5:] = 1
    blocks.documents[6:, 8:] = PADDING  # documents that end before the block
    store = write_store(model, blocks, [HOOK], tmp_path / "store")
    shards = [load_file(tmp_path / "store" / shard.file) for shard in store.shards]
    names = ("ids", "positions", "documents")
    rows = {name: torch.cat([shard[name] for shard in shards]).numpy() for name in names}
    real = blocks.documents != PADDING
    assert np.array_equal(rows["ids"], blocks.ids[real])
    assert np.array_equal(rows["documents"], blocks.documents[real])
    assert np.array_equal(rows["positions"], np.tile(np.arange(CONTEXT), (10, 1))[real])


@pytest.mark.parametrize(
    ("stored_as", "bytes_each", "relative"),
    [("float32", 4, 0.0), ("bfloat16", 2, 2**-8), ("float16", 2, 2**-11), ("int8", 1, 0.5 / 127)],
)
def test_number_formats(
    model: LanguageModel, tmp_path: Path, stored_as: StoredAs, bytes_each: int, relative: float
) -> None:
    blocks = make_blocks(8)
    store = write_store(model, blocks, [HOOK], tmp_path, stored_as=stored_as)
    captured = torch.cat([activations[HOOK] for _, activations in capture_blocks(model, blocks, [HOOK])])
    held = store.at()
    assert held.values(0).element_size() == bytes_each
    error = (held.read(0, 8).double() - captured.double()).abs()
    if stored_as == "int8":  # half a step, which is 1/127 of the row's largest value
        assert (error <= relative * 1.00001 * captured.abs().amax(-1, keepdim=True)).all()
        assert error.max() > 0
    else:
        assert (error <= relative * captured.abs() + 1e-7).all()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_int8_is_off_by_half_a_step_at_most(values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    stored, scale = to_stored(x, "int8")
    assert scale is not None
    assert stored.dtype == torch.int8
    assert (stored.abs() <= 127).all()
    step = x.abs().max().double() / 127
    assert ((stored.double() * scale.double() - x.double()).abs() <= 0.5001 * step + 1e-40).all()


def test_float16_cuts_off_what_it_cannot_hold() -> None:
    stored, scale = to_stored(torch.tensor([[1.0, -1e6, 1e6]]), "float16")
    assert stored.tolist() == [[1.0, -65504.0, 65504.0]]
    assert scale is None


def test_roles_that_were_not_asked_for_do_not_count(model: LanguageModel, tmp_path: Path) -> None:
    plain = make_blocks(8)
    counted = np.random.default_rng(1).random((8, CONTEXT)) < 0.5
    blocks = TokenBlocks(
        plain.ids, plain.documents, plain.names, "train", "concatenated", bos=False, counted=counted
    )
    held = write_store(model, blocks, [HOOK], tmp_path).at()
    text = blocks.ids != 0
    assert held.counts["other role"] == int((text & ~counted).sum())
    bits = np.unpackbits(held.kept(), bitorder="little")[:128].astype(bool)
    assert np.array_equal(bits, (text & counted).ravel())
    assert torch.equal(counted_positions(blocks, 2, 5), torch.from_numpy(counted[2:5]))


def test_special_tokens_and_outliers_can_be_kept(model: LanguageModel, tmp_path: Path) -> None:
    blocks = make_blocks(8)
    assert write_store(model, blocks, [HOOK], tmp_path).at().counts["special"] > 0
    rule = ExclusionRule(exclude_special=False, outlier_factor=None)
    shards = {file: data for file, data in contents(tmp_path).items() if file.startswith("shard")}
    held = write_store(model, blocks, [HOOK], tmp_path, rule=rule).at()
    assert held.counts == {"kept": 128, "special": 0, "outlier": 0, "other role": 0}
    # Only what is measured was made again.
    assert shards == {file: data for file, data in contents(tmp_path).items() if file.startswith("shard")}
    assert ActivationStore.open(tmp_path).at().exclusion.max_norm == float("inf")


def test_shards_are_safetensors_files_that_hash_to_what_was_said(tmp_path: Path) -> None:
    import hashlib

    parts = {
        "a": [torch.randn(3, 5).bfloat16(), torch.randn(2, 5).bfloat16()],
        "b": [torch.arange(3).int(), torch.arange(2).int()],
        "empty": [torch.zeros(0, 4, dtype=torch.int8)],
    }
    sha256 = write_shard(tmp_path / "s.safetensors", parts)
    assert hashlib.sha256((tmp_path / "s.safetensors").read_bytes()).hexdigest() == sha256
    for read in (load_file, map_shard):
        found = read(tmp_path / "s.safetensors")
        assert found.keys() == parts.keys()
        assert all(torch.equal(found[name], torch.cat(pieces)) for name, pieces in parts.items())


def test_writing_again_opens_what_is_there(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(8)
    write_store(model, blocks, [HOOK], tmp_path)
    monkeypatch.setattr(writer_module, "in_order", None)  # a second capture would fail
    assert write_store(model, blocks, [HOOK], tmp_path).n_rows == 128


def test_an_interrupted_store_is_a_shorter_one_and_continues_to_the_same_bytes(
    model: LanguageModel, tmp_path: Path
) -> None:
    blocks = make_blocks(30, padded=3)
    write_store(model, blocks, [HOOK], tmp_path / "whole")
    folder = tmp_path / "interrupted"
    with pytest.raises(Stop):
        write_store(model, blocks, [HOOK], folder, progress=stop_after(20 * CONTEXT))
    part = ActivationStore.open(folder)
    assert not part.complete
    assert part.blocks.n_blocks == 16
    whole = ActivationStore.open(tmp_path / "whole").at()
    assert torch.equal(part.at().read(3, 16), whole.read(3, 16))
    assert part.at().n_kept == int((blocks.ids[:16] != 0).sum())
    assert len(part.at().kept()) == 16 * CONTEXT // 8
    write_store(model, blocks, [HOOK], folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_line_that_was_cut_short_is_captured_again(model: LanguageModel, tmp_path: Path) -> None:
    blocks = make_blocks(24)
    write_store(model, blocks, [HOOK], tmp_path / "whole")
    folder = tmp_path / "cut"
    with pytest.raises(Stop):
        write_store(model, blocks, [HOOK], folder, progress=stop_after(20 * CONTEXT))
    lines = folder / "shards.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    (folder / ".shard-00002.safetensors.k7x2").write_bytes(b"half a shard")
    assert len(ActivationStore.open(folder).shards) == 1
    write_store(model, blocks, [HOOK], folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert not list(folder.glob(".shard-*"))


def test_a_store_from_other_inputs_is_replaced_only_when_that_is_said(
    model: LanguageModel, tmp_path: Path
) -> None:
    write_store(model, make_blocks(30), [HOOK], tmp_path / "store")
    before = contents(tmp_path / "store")
    fewer = make_blocks(9, seed=1)
    with pytest.raises(InputError) as error:
        write_store(model, fewer, [HOOK], tmp_path / "store")
    assert str(error.value) == (
        f"{tmp_path / 'store'} holds other activations (their tokens, captured_blocks differ): give another"
        " --out, or --append to add text to them."
    )
    assert contents(tmp_path / "store") == before
    replaced = write_store(model, fewer, [HOOK], tmp_path / "store", replace_other=True)
    write_store(model, fewer, [HOOK], tmp_path / "fresh")
    assert contents(replaced.folder) == contents(tmp_path / "fresh")
    replaced.delete()
    assert not (tmp_path / "store").exists()


def test_appended_text_follows_what_is_there(model: LanguageModel, tmp_path: Path) -> None:
    first, second = make_blocks(18), make_blocks(11, padded=4, seed=1)
    write_store(model, first, [HOOK, SECOND_HOOK], tmp_path / "store", others={"test": make_blocks(3)})
    before = contents(tmp_path / "store")
    exclusion = ActivationStore.open(tmp_path / "store").at(HOOK).exclusion
    grown = append_store(model, second, tmp_path / "store", about={"text": "more"})
    after = contents(tmp_path / "store")
    kept = [file for file in before if file.startswith("shard-")]
    assert len(kept) == 5  # two hooks: 22 blocks to 4 KB would be 9; whole batches of four
    assert all(before[file] == after[file] for file in kept)
    assert grown.at(HOOK).exclusion == exclusion
    assert grown.n_rows == 29 * CONTEXT - 4
    test_tokens = tokens_folder(tmp_path / "store", "test", grown.manifest["tokens"]["test"])
    assert TokenBlocks.load(test_tokens).hash == make_blocks(3).hash
    for hook in (HOOK, SECOND_HOOK):
        captured = [
            activations[hook].bfloat16()
            for blocks in (first, second)
            for _, activations in capture_blocks(model, blocks, [hook])
        ]
        read = grown.at(hook).read(0, 29)
        real = torch.from_numpy(grown.blocks.documents != PADDING)
        assert torch.equal(read[real], torch.cat(captured)[real])
    assert grown.manifest["captures"][1]["text"] == "more"
    # Once more the same text: it is there.
    assert append_store(model, second, tmp_path / "store").n_rows == grown.n_rows
    assert contents(tmp_path / "store") == after


def test_text_is_appended_in_the_batches_of_what_is_there(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store captured on a CPU grows on a GPU, and nothing of it is captured again."""
    write_store(model, make_blocks(18), [HOOK], tmp_path / "store")
    captured = []
    rows = writer_module.Writer.rows

    def spy(self: writer_module.Writer, block_range: tuple[int, int]) -> dict:
        captured.append(block_range)
        return rows(self, block_range)

    monkeypatch.setattr(writer_module.Writer, "rows", spy)
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: 64)
    append_store(model, make_blocks(6, seed=1), tmp_path / "store")
    assert captured == [(18, 22), (22, 24)]


def test_a_repaired_shard_without_roles_stays_so_beside_appended_chats(
    model: LanguageModel, tmp_path: Path
) -> None:
    write_store(model, make_blocks(8), [HOOK], tmp_path / "store", about={"text": "plain"})
    chats = make_blocks(8, seed=1)
    counted = np.random.default_rng(1).random((8, CONTEXT)) < 0.5
    append_store(model, replace(chats, counted=counted), tmp_path / "store")
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "shard-00000.safetensors").unlink()
    assert repair_store(tmp_path / "store", model, lambda about: {}).other_bits == []
    assert contents(tmp_path / "store") == before
    assert ActivationStore.open(tmp_path / "store").at().counts["other role"] > 0


def test_an_interrupted_append_continues_to_the_same_bytes(model: LanguageModel, tmp_path: Path) -> None:
    first, second = make_blocks(18), make_blocks(20, seed=1)
    for name in ("whole", "interrupted"):
        write_store(model, first, [HOOK], tmp_path / name)
    append_store(model, second, tmp_path / "whole")
    with pytest.raises(Stop):
        append_store(model, second, tmp_path / "interrupted", progress=stop_after(9 * CONTEXT))
    assert ActivationStore.open(tmp_path / "interrupted").blocks.n_blocks >= 18
    append_store(model, second, tmp_path / "interrupted")
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


def test_appending_what_does_not_belong_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    write_store(model, make_blocks(8), [HOOK], tmp_path / "store")
    other = LanguageModel.from_hf(tiny_hf_model("llama", seed=1), tiny_tokenizer(), "other")
    with pytest.raises(InputError) as error:
        append_store(other, make_blocks(8, seed=1), tmp_path / "store")
    assert str(error.value) == (
        f"{tmp_path / 'store'} holds activations of another model: append with the one that it was captured"
        " with."
    )
    ids = np.ones((4, 8), np.uint16)
    longer = TokenBlocks(ids, np.zeros((4, 8), np.int32), ["a"], "train", "concatenated", bos=False)
    with pytest.raises(InputError, match="has sequences of 16 tokens, and the new text 8: give --context"):
        append_store(model, longer, tmp_path / "store")
    with pytest.raises(Stop):
        write_store(model, make_blocks(20), [HOOK], tmp_path / "half", progress=stop_after(9 * CONTEXT))
    with pytest.raises(InputError, match="is unfinished: run the command that was interrupted again before"):
        append_store(model, make_blocks(8, seed=1), tmp_path / "half")


def test_a_folder_with_something_else_in_it_is_left_alone(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError) as error:
        write_store(model, make_blocks(4), [HOOK], tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds thesis.txt, which is no part of a store of activations: give an empty or new folder."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    make_blocks(4).save(tmp_path / "tokens")
    with pytest.raises(InputError, match="holds token blocks, not a store of activations"):
        write_store(model, make_blocks(4), [HOOK], tmp_path / "tokens")
    # Nothing of anybody else's is taken for ours by its name.
    for number, name in enumerate((".pre-commit-config.yaml", "shard-00000.tar", "tokens/mine/a.txt")):
        other = tmp_path / f"other-{number}" / name
        other.parent.mkdir(parents=True)
        other.write_text("mine")
        with pytest.raises(InputError, match="which is no part of a store of activations"):
            write_store(model, make_blocks(4), [HOOK], tmp_path / f"other-{number}")
        assert other.read_text() == "mine"
    with pytest.raises(InputError, match=r"thesis\.txt is a file, and a store needs a folder"):
        write_store(model, make_blocks(4), [HOOK], tmp_path / "thesis.txt")


def test_an_unknown_hook_changes_nothing_on_disk(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hook_resid_posst"):
        write_store(model, make_blocks(4), ["blocks.1.hook_resid_posst"], tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    hf_model = tiny_hf_model("llama")
    with torch.no_grad():
        hf_model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "broken")
    with pytest.raises(InputError, match=f"The model's activations at {HOOK} are not finite"):
        write_store(model, make_blocks(4), [HOOK], tmp_path / "store")


def test_damaged_files_are_named(model: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = write_store(model, make_blocks(20), [HOOK], folder)
    repair = f"sae store repair {folder} makes it again."
    (folder / "statistics.safetensors").rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"statistics\.safetensors cannot be read \(.*\): sae store repair"):
        ActivationStore.open(folder).at().mean.sum()
    path = folder / "shard-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(InputError) as error:
        ActivationStore.open(folder)
    assert str(error.value) == f"{path} is truncated: {repair}"
    with pytest.raises(InputError, match=r"shard-00001\.safetensors cannot be read"):
        store.at().read(8, 9)
    path.unlink()
    with pytest.raises(InputError) as error:
        ActivationStore.open(folder)
    assert str(error.value) == f"{path} is missing: {repair}"
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["model"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json was changed since it was written"):
        ActivationStore.open(folder)
    with pytest.raises(InputError, match="is not a finished store of activations: it has no manifest"):
        ActivationStore.open(tmp_path)


def test_two_writers_on_one_store(model: LanguageModel, tmp_path: Path) -> None:
    with writer_module.only_writer(tmp_path / "store"), pytest.raises(InputError) as error:
        write_store(model, make_blocks(4), [HOOK], tmp_path / "store")
    assert str(error.value) == (
        f"Another process is writing {tmp_path / 'store'}: wait until it is done, or give another folder."
    )
    assert write_store(model, make_blocks(4), [HOOK], tmp_path / "store").complete


def test_a_disk_with_too_little_room_is_refused_before_work_begins(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 640 rows of 32 values of 2 bytes, a norm, three integers; and 640 tokens of 6 bytes: 55,040 bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=55_039))
    with pytest.raises(InputError) as error:
        write_store(model, make_blocks(40), [HOOK], tmp_path / "store")
    assert str(error.value) == (
        f"The disk has too little room for the activations in {tmp_path / 'store'}, 0 MB in all: free some"
        " and run again to continue, or choose a folder on another disk; what is there can be used."
    )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=55_040))
    store = write_store(model, make_blocks(40), [HOOK], tmp_path / "store")
    # headers and manifests aside, which are a few hundred bytes a shard
    size = sum(len(data) for file, data in contents(store.folder).items() if not file.endswith("json"))
    assert 55_040 <= size <= 55_040 + 1000 * (len(store.shards) + 2)


@pytest.fixture
def largest_file() -> Iterator:
    """Sets how large a file may get, which the system answers as it answers a full disk."""
    resource = pytest.importorskip("resource")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_disk_that_fills_up_leaves_what_is_written_usable(
    model: LanguageModel, tmp_path: Path, largest_file: object
) -> None:
    blocks, folder = make_blocks(40), tmp_path / "store"
    with pytest.raises(Stop):
        write_store(model, blocks, [HOOK], folder, progress=stop_after(20 * CONTEXT))
    largest_file(8000)  # type: ignore[operator]
    with pytest.raises(InputError, match="has too little room for the activations"):
        write_store(model, blocks, [HOOK], folder)
    largest_file(-1)  # type: ignore[operator]
    part = ActivationStore.open(folder)
    assert part.blocks.n_blocks == 16
    assert part.at().read(0, 16).isfinite().all()
    assert not list(folder.glob(".shard-*"))
    assert write_store(model, blocks, [HOOK], folder).complete
