"""Replays: the same logits as a whole forward pass under an edit, from the block of the hook on only."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    one_thread,
    padding_mask,
    random_ids,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)
from torch import Tensor

from activations.capture import in_order
from activations.edits import Edit
from activations.errors import InputError
from activations.models import LanguageModel

IDS = random_ids(2, 9)
HOOKS = [
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_mid",
    "blocks.1.mlp.hook_in",
    "blocks.1.mlp.hook_post",
    "blocks.2.hook_resid_post",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def whole_pass(model: LanguageModel, hook_name: str, value: Tensor, mask: Tensor | None = None) -> Tensor:
    with model.edited(Edit(hook_name, lambda x, positions: value)):
        return model.logits(IDS, attention_mask=mask)


ABSENT = {"gpt_neox": "hook_resid_mid", "mixtral": "mlp.hook_post"}
CASES = [(a, hook) for a in ARCHITECTURES for hook in HOOKS if hook[9:] != ABSENT.get(a)]


@pytest.mark.parametrize(("architecture", "hook_name"), CASES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_replay_equals_a_whole_pass_to_the_bit(architecture: str, hook_name: str, side: str | None) -> None:
    model = tiny_language_model(architecture)
    mask = None if side is None else padding_mask([9, 6], side)
    replay = model.replay(IDS, hook_name, attention_mask=mask)
    assert torch.equal(replay.logits, model.logits(IDS, attention_mask=mask))
    assert torch.equal(replay.activations, model.capture(IDS, [hook_name], attention_mask=mask)[hook_name])
    for value in (replay.activations * 2 + 1, torch.zeros_like(replay.activations), replay.activations):
        assert torch.equal(replay.logits_with(value), whole_pass(model, hook_name, value, mask))


def test_a_replay_on_the_bridge_equals_a_whole_pass() -> None:
    model = tiny_language_model("llama", "bridge")
    replay = model.replay(IDS, "blocks.1.hook_resid_post")
    value = replay.activations + 1
    expected = whole_pass(model, "blocks.1.hook_resid_post", value)
    assert torch.equal(replay.logits_with(value), expected)
    assert not torch.allclose(expected, replay.logits)


def test_blocks_before_the_hook_run_once() -> None:
    hf_model = tiny_hf_model("llama")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")
    runs = [0, 0, 0]
    for i, block in enumerate(hf_model.model.layers):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    replay = model.replay(IDS, "blocks.1.hook_mlp_out")
    replay.logits_with(replay.activations + 1)
    assert runs == [1, 2, 2]
    replay = model.replay(IDS, "blocks.1.hook_resid_post")
    replay.logits_with(replay.activations + 1)
    assert runs == [2, 3, 4]
    assert len(hf_model.model.layers) == 3


def test_replays_of_several_threads_do_not_meet() -> None:
    model = tiny_language_model("llama")

    def difference(factor: float) -> float:
        replay = model.replay(IDS, "blocks.0.hook_resid_post")
        value = replay.activations * factor
        expected = whole_pass(model, "blocks.0.hook_resid_post", value)
        return float((replay.logits_with(value) - expected).abs().max())

    assert list(in_order(model.device, difference, [0.1 * i for i in range(40)], n_workers=4)) == [0.0] * 40


def test_what_cannot_be_replayed_is_refused() -> None:
    model = tiny_language_model("llama")
    with pytest.raises(InputError) as error:
        model.replay(IDS, "blocks.7.hook_resid_post")
    assert str(error.value) == "blocks.7.hook_resid_post does not exist: the layers of this model are 0 to 2."
    replay = model.replay(IDS, "blocks.1.hook_resid_post")
    with pytest.raises(InputError) as error:
        replay.logits_with(replay.activations[:, :-1])
    assert str(error.value) == (
        "The activations have shape (2, 8, 32); they must have that of what they replace, (2, 9, 32)."
    )
    edit = Edit("blocks.0.hook_resid_post", lambda x, positions: x)
    with pytest.raises(InputError) as error, model.edited(edit):
        model.replay(IDS, "blocks.1.hook_resid_post")
    assert str(error.value) == ("A replay starts from the model as it is: leave the block of edited() first.")
