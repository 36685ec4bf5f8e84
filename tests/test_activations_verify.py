"""Finding any flipped bit of a store, and making again just what is damaged."""

import json
import random
from pathlib import Path

import pytest
from store_helpers import CONTEXT, HOOK, SECOND_HOOK, Stop, contents, make_blocks, stop_after
from tiny_models import tiny_hf_model, tiny_language_model, tiny_tokenizer

from activations import plan as plan_module
from activations import writer as writer_module
from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.models import LanguageModel
from activations.store import ActivationStore, own_hash
from activations.store_stream import StoreStream
from activations.verify import Damage, Repair, repair_store, verify_store
from activations.writer import append_store, write_store

SPLITS = {"train": make_blocks(30), "test": make_blocks(5, seed=1, split="test")}
MORE = make_blocks(7, seed=2)


def text(about: dict) -> dict[str, TokenBlocks]:
    return SPLITS if about["text"] == "first" else {"train": MORE}


def no_text(about: dict) -> dict[str, TokenBlocks]:
    raise AssertionError("the tokens were not damaged")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 16_000)
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: 4)
    monkeypatch.setattr(plan_module, "LEAST_BATCHES", {"cpu": 1})


@pytest.fixture
def folder(model: LanguageModel, tmp_path: Path) -> Path:
    """A store of two hooks, with text appended."""
    others = {"test": SPLITS["test"]}
    write_store(
        model, SPLITS["train"], [HOOK, SECOND_HOOK], tmp_path / "s", others=others, about={"text": "first"}
    )
    append_store(model, MORE, tmp_path / "s", about={"text": "more"})
    return tmp_path / "s"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_store_as_it_was_written_has_no_damage(folder: Path, model: LanguageModel) -> None:
    assert len(contents(folder)) > 12
    assert verify_store(folder) == []
    assert repair_store(folder, model, no_text) == Repair([], [])


def test_any_flipped_bit_and_any_missing_file_is_named_and_repaired(
    folder: Path, model: LanguageModel
) -> None:
    whole = contents(folder)
    generator = random.Random(0)
    for file, data in whole.items():
        for _ in range(3):
            flip(folder / file, generator.randrange(8 * len(data)))
            assert verify_store(folder) == [Damage(file, "was changed")], file
            assert repair_store(folder, model, text) == Repair([file], []), file
            assert contents(folder) == whole, file
        (folder / file).unlink()
        assert verify_store(folder) == [Damage(file, "is missing")], file
        assert repair_store(folder, model, text) == Repair([file], []), file
        assert contents(folder) == whole, file


def test_only_what_is_damaged_is_captured_again(
    folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = []
    rows = writer_module.Writer.rows

    def spy(self: writer_module.Writer, block_range: tuple[int, int]) -> dict:
        ranges.append(block_range)
        return rows(self, block_range)

    monkeypatch.setattr(writer_module.Writer, "rows", spy)
    flip(folder / "shard-00002.safetensors", 9000)
    flip(folder / "shards.jsonl", 100)  # proves itself from the other shards, and is damaged for good here
    repair_store(folder, model, no_text)
    assert set(ranges) <= {(0, 4), (8, 12)}
    assert verify_store(folder) == []


def test_other_bits_are_said(folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = writer_module.Writer.rows

    def rounded_differently(self: writer_module.Writer, block_range: tuple[int, int]) -> dict:
        found = rows(self, block_range)
        found[f"norm/{HOOK}"] = found[f"norm/{HOOK}"] * (1 + 1e-6)
        return found

    monkeypatch.setattr(writer_module.Writer, "rows", rounded_differently)
    (folder / "shard-00004.safetensors").unlink()
    file = "shard-00004.safetensors"
    assert repair_store(folder, model, no_text) == Repair([file], [file])
    assert verify_store(folder) == []


def test_what_cannot_be_repaired_is_said(
    folder: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "shard-00001.safetensors").unlink()
    other = LanguageModel.from_hf(tiny_hf_model("llama", seed=1), tiny_tokenizer(), "other")
    with pytest.raises(InputError) as error:
        repair_store(folder, other, no_text)
    assert str(error.value) == (
        f"{folder} was captured with another model than other: give that one with --model."
    )
    for name, dtype in (
        ("whole", None),
        ("half", "bfloat16"),
    ):  # the same weights, computing in another format
        tiny_hf_model("llama").save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        loaded = LanguageModel.load(str(tmp_path / "model"), dtype=dtype)
        if name == "whole":
            write_store(loaded, SPLITS["train"], [HOOK], tmp_path / "loaded")
            (tmp_path / "loaded" / "shard-00001.safetensors").unlink()
            continue
        with pytest.raises(InputError) as error:
            repair_store(tmp_path / "loaded", loaded, no_text)
    assert str(error.value) == (
        f"{tmp_path / 'loaded'} cannot be repaired here: its dtype would not be as it was captured."
    )
    (train,) = folder.glob("tokens/train-*")
    flip(train / "manifest.json", 300)
    with pytest.raises(InputError, match="and the text that they were made from has changed"):
        repair_store(folder, model, lambda about: {"train": make_blocks(30, seed=9)})
    for name in ("manifest.json", "start.json"):
        (folder / name).write_text(json.dumps({"kind": "nothing"}))
    with pytest.raises(InputError, match=r"manifest.json and start.json are both damaged: capture again"):
        repair_store(folder, model, no_text)
    with pytest.raises(InputError, match="is no store of activations: it has no"):
        verify_store(tmp_path)


def test_a_store_of_a_newer_saescope_is_not_damaged(folder: Path, model: LanguageModel) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format_version"] = 99
    manifest["hash"] = own_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for action in (verify_store, ActivationStore.open, lambda f: repair_store(f, model, no_text)):
        with pytest.raises(
            InputError, match="was written in format 99, and this saescope reads up to format"
        ):
            action(folder)


def test_a_store_is_repaired_in_the_batches_it_was_captured_in(
    folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(folder)
    (folder / "shard-00001.safetensors").unlink()
    monkeypatch.setattr(plan_module, "blocks_per_batch", lambda model, context_length: 64)  # as on a GPU
    assert repair_store(folder, model, no_text) == Repair(["shard-00001.safetensors"], [])
    assert contents(folder) == whole


def test_manifest_and_tokens_damaged_at_once(folder: Path, model: LanguageModel) -> None:
    whole = contents(folder)
    flip(folder / "manifest.json", 1000)
    (train,) = folder.glob("tokens/train-*")
    flip(train / "ids.npy", 2000)
    tokens = train.relative_to(folder).as_posix()
    assert verify_store(folder) == [Damage("manifest.json", "was changed"), Damage(tokens, "was changed")]
    repair_store(folder, model, text)
    assert contents(folder) == whole


def test_a_copy_in_training_order_does_not_outlive_the_damage_it_was_made_from(
    folder: Path, model: LanguageModel
) -> None:
    settings = {"batch_size": 16, "n_batches": 20, "seed": 3}
    copy = folder / "shuffled" / "copy"
    flip(folder / "shard-00000.safetensors", 8 * 20_000 // 2)
    list(StoreStream.external(ActivationStore.open(folder).at(HOOK), copy, **settings))
    repair_store(folder, model, no_text)
    held = ActivationStore.open(folder).at(HOOK)
    both = zip(StoreStream.exact(held, **settings), StoreStream.external(held, copy, **settings), strict=True)
    assert all((a == b).all() for a, b in both)


def test_an_unfinished_store_is_verified_as_far_as_it_goes_and_finished_by_repair(
    model: LanguageModel, tmp_path: Path
) -> None:
    write_store(model, make_blocks(40), [HOOK], tmp_path / "whole")
    folder = tmp_path / "half"
    with pytest.raises(Stop):
        write_store(model, make_blocks(40), [HOOK], folder, progress=stop_after(33 * CONTEXT))
    assert verify_store(folder) == []
    flip(folder / "shard-00000.safetensors", 9000)
    assert verify_store(folder) == [Damage("shard-00000.safetensors", "was changed")]
    repair = repair_store(folder, model, no_text)
    assert "shard-00000.safetensors" in repair.files
    assert repair.other_bits == []
    assert contents(folder) == contents(tmp_path / "whole")
