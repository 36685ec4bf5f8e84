"""Centred writing weights: what TransformerLens' processed weights show, as a transform of the plain model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import one_thread, random_ids, tiny_hf_model, tiny_language_model, tiny_tokenizer
from torch import Tensor

from activations.architectures import STREAM_HOOKS
from activations.edits import Edit
from activations.models import LanguageModel

IDS = random_ids(2, 9)
LAYER_NORM = ["gpt2", "gpt_neox", "gpt_neox_sequential", "opt"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def centred_model(architecture: str, path: Any = "auto") -> LanguageModel:
    hf_model = tiny_hf_model(architecture)
    return LanguageModel.from_hf(
        hf_model, tiny_tokenizer(), architecture, path=path, center_writing_weights=True
    )


def stream_hooks(model: LanguageModel) -> list[str]:
    return [name for name in model.hook_widths() if name.split(".", 2)[2] in STREAM_HOOKS]


@pytest.mark.parametrize("architecture", [*LAYER_NORM, "llama", "gemma2"])
def test_it_shows_what_transformer_lens_shows_after_processing_its_weights(architecture: str) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = tiny_hf_model(architecture, "eager")
    bridge = build_bridge_from_module(hf_model, type(hf_model).__name__, hf_config=hf_model.config)
    bridge.enable_compatibility_mode()
    with torch.no_grad():
        _, there = bridge.run_with_cache(IDS)
    model = centred_model(architecture)
    names = stream_hooks(model)
    here = model.capture(IDS, names)
    for name in names:
        assert (here[name] - there[name]).abs().max() <= 2e-6 * there[name].abs().max(), name


@pytest.mark.parametrize("path", ["sdpa", "bridge"])
@pytest.mark.parametrize("architecture", LAYER_NORM)
def test_the_mean_is_subtracted_in_the_residual_stream_only(architecture: str, path: Any) -> None:
    plain, model = tiny_language_model(architecture, path), centred_model(architecture, path)
    names = list(tiny_language_model(architecture).hook_widths())
    before, after = plain.capture(IDS, names), model.capture(IDS, names)
    for name in names:
        expected = before[name]
        if name.split(".", 2)[2] in STREAM_HOOKS:
            assert expected.mean(-1).abs().max() > 0.01
            expected = expected - expected.mean(-1, keepdim=True)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0)
    assert torch.equal(plain.logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2", "opt_post_norm", "bert", "mamba"])
def test_it_changes_nothing_where_the_mean_is_read(architecture: str) -> None:
    plain, model = tiny_language_model(architecture), centred_model(architecture)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    before, after = plain.capture(IDS, names), model.capture(IDS, names)
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert model.center_writing_weights
    assert model.hash == plain.hash


def test_the_hash_says_where_it_has_an_effect() -> None:
    hashes = {tiny_language_model("gpt2").hash, centred_model("gpt2").hash}
    assert len(hashes) == 2
    assert centred_model("gpt2", "bridge").hash in hashes
    assert not tiny_language_model("gpt2").center_writing_weights


def test_every_way_to_make_a_model_takes_it(tmp_path: Path) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    folder, hook = str(tmp_path / "gpt2"), "blocks.1.hook_resid_post"
    tiny_hf_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    expected = centred_model("gpt2").capture(IDS, [hook])[hook]
    plain = LanguageModel.load(folder, device="cpu")
    loaded = LanguageModel.load(folder, device="cpu", center_writing_weights=True)
    assert torch.equal(loaded.capture(IDS, [hook])[hook], expected)
    assert loaded.hash != plain.hash
    hf_model = tiny_hf_model("gpt2")
    bridge = build_bridge_from_module(
        hf_model, "GPT2LMHeadModel", hf_config=hf_model.config, tokenizer=plain.tokenizer._hf
    )
    model = LanguageModel.from_bridge(bridge, center_writing_weights=True)
    torch.testing.assert_close(model.capture(IDS, [hook])[hook], expected)


@pytest.mark.parametrize("path", ["sdpa", "bridge"])
@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_mid", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"]
)
def test_edits_see_the_centred_value_and_leave_the_mean(hook: str, path: Any) -> None:
    plain, model = tiny_language_model("gpt2", path), centred_model("gpt2", path)
    seen: list[Tensor] = []

    def shrink(x: Tensor, positions: Tensor) -> Tensor:
        seen.append(x.clone())
        return x / 2 + 1

    def by_hand(x: Tensor, positions: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / 2 + 1 + mean

    with model.edited(Edit(hook, shrink)):
        found = model.logits(IDS)
    with plain.edited(Edit(hook, by_hand)):
        expected = plain.logits(IDS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(seen[0], model.capture(IDS, [hook])[hook])
    with model.edited(
        Edit(hook, lambda x, positions: x)
    ):  # what an edit leaves alone stays what it was, to the bit
        assert torch.equal(model.logits(IDS), plain.logits(IDS))
    with model.edited(Edit(hook, lambda x, positions: x + 1), Edit(hook, lambda x, positions: x - 1)):
        torch.testing.assert_close(model.capture(IDS, [hook])[hook], seen[0])


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.2.hook_resid_pre"]
)
def test_replays(hook: str) -> None:
    model = centred_model("gpt2")
    replay = model.replay(IDS, hook)
    assert torch.equal(replay.logits, model.logits(IDS))
    assert torch.equal(replay.activations, model.capture(IDS, [hook])[hook])
    for value in (replay.activations * 2 + 1, torch.zeros_like(replay.activations)):
        with model.edited(Edit(hook, lambda x, positions, value=value: value)):
            assert torch.equal(replay.logits_with(value), model.logits(IDS))
