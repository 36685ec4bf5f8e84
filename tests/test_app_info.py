"""``sae info --model``: which hooks a model has, how wide they are, in which layers, and which path serves them."""

import re
from pathlib import Path

import pytest
import torch
from command import Command
from tiny_models import random_ids, tiny_hf_model, tiny_tokenizer

from activations.models import LanguageModel
from sae.architectures.registry import architecture_from
from sae.config import SAEConfig
from sae.formats.convert import convert
from sae.model import SparseAutoencoder


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)


def saved(architecture: str, folder: Path) -> Path:
    tiny_hf_model(architecture).save_pretrained(folder / architecture)
    tiny_tokenizer().save_pretrained(folder / architecture)
    return folder / architecture


def cells(printed: str) -> dict[str, list[str]]:
    """hook_name → the other columns."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_both_paths_of_a_model(tmp_path: Path, sae: Command) -> None:
    folder = saved("qwen3_moe", tmp_path)
    printed = sae("info", "--model", folder, "--device", "cpu", "--dtype", "bfloat16")
    assert printed.startswith(
        f"{folder}: qwen3_moe, 3 layers, d_model 32, 4 heads, vocabulary 320, context 64 tokens, torch.bfloat16 on cpu"
    )
    fast, slow = printed.split("Served by TransformerBridge, more slowly:")
    assert "Served by the SDPA path, at the speed of the model:" in fast
    assert cells(fast)["blocks.L.attn.hook_z"] == ["40", "0–2"]
    assert cells(fast)["blocks.L.mlp.hook_post"] == ["72", "1"]  # the other layers are mixtures of experts
    assert cells(slow)["blocks.L.attn.hook_pattern"] == ["[batch, 4, pos, pos]", "0–2"]
    assert cells(slow)["blocks.L.mlp.hook_post"] == ["32", "0, 2"]
    assert cells(slow)["ln_final.hook_normalized"] == ["32"]
    assert "blocks.L.hook_resid_post" not in cells(slow)


def test_every_hook_that_is_listed_can_be_captured(tmp_path: Path, sae: Command) -> None:
    folder = saved("gpt2", tmp_path)
    listed = [name for name in cells(sae("info", "--model", folder)) if re.search(r"\bhook_", name)]
    names = [name.replace(".L.", ".1.") for name in listed if name != "hook_name"]
    assert len(names) > 30
    model = LanguageModel.load(str(folder))
    final = {"ln_final", "unembed", "hook_unembed"}  # behind the last block
    names = [name for name in names if name.split(".")[0] not in final]
    captured = model.capture(random_ids(1, 4), names)
    assert captured.keys() == set(names)


@pytest.mark.parametrize("architecture", ["mamba", "bert"])
def test_a_model_that_only_the_bridge_serves(architecture: str, tmp_path: Path, sae: Command) -> None:
    printed = sae("info", "--model", saved(architecture, tmp_path))
    assert (
        f"The SDPA path does not serve {architecture} models: all hooks of this one are TransformerBridge's."
    ) in printed
    assert "Served by the SDPA path" not in printed
    assert cells(printed)["blocks.L.hook_resid_post"] == ["32", "0–2"]
    assert ("no attention, vocabulary 320, no limit of context" in printed) == (architecture == "mamba")


def test_without_the_bridge_nothing_of_transformer_lens_is_needed(
    tmp_path: Path, sae: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the bridge was started")

    monkeypatch.setattr("activations.hooked.start_bridge", refuse)
    printed = sae("info", "--model", saved("llama", tmp_path), "--no-bridge")
    assert cells(printed)["blocks.L.hook_resid_mid"] == ["32", "0–2"]
    assert printed.rstrip().endswith(
        "TransformerBridge serves every other hook of TransformerLens, more slowly."
    )


def test_a_model_that_cannot_be_loaded_as_asked(tmp_path: Path, sae: Command) -> None:
    folder = saved("llama", tmp_path)
    assert sae.refused("info", "--model", folder, "--dtype", "int8") == (
        "dtype is 'int8'; it must be 'float32', 'bfloat16' or 'float16'."
    )
    assert sae.refused("info", "--model", folder, "--device", "tpu") == (
        "The device 'tpu' is not available on this machine; 'cpu' always is."
    )
    assert sae.refused("info", folder, "--device", "cpu") == (
        "--device, --dtype and --no-bridge go with --model, not with a folder."
    )


def test_an_sae_of_any_format_is_described(tmp_path: Path, sae: Command) -> None:
    """In our format, in another's, and as the file of its weights."""
    config = SAEConfig(d_sae=24, k=3)
    weights = architecture_from(config).initial_weights(8, 8, torch.Generator().manual_seed(0))
    metadata = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "corpus": {"text": "x" * 200}}
    SparseAutoencoder(config, weights, metadata).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "dictionary_learning")
    for place in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "theirs" / "ae.pt"):
        rows = cells(sae("info", place))
        assert rows["SAE"] == ["topk, 24 features, k 3"]
        assert rows["widths"] == ["8 → 8"]
        assert rows["hook"] == ["blocks.1.hook_resid_post"]
        assert rows["model_name"] == ["gpt2"]
    assert len(rows["corpus"][0]) == 81
    assert sae.refused("info", tmp_path) == f"{tmp_path} is not a run: it has no run.toml."


def test_what_cannot_be_read_is_said_with_its_path(tmp_path: Path, sae: Command) -> None:
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    assert sae.refused("train", "--out", run, "--tokens", "2000", "--d-sae", "64").endswith(
        "cannot be used: Not a directory."
    )
