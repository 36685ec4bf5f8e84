"""Edits: what they see, in which order, for whom, and what happens when they do nothing."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import (
    END_OF_TEXT,
    one_thread,
    padding_mask,
    random_ids,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)
from torch import Tensor

from activations.edits import Edit, token_positions
from activations.errors import InputError
from activations.models import LanguageModel

HOOK = "blocks.1.hook_resid_post"
IDS = random_ids(2, 7)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def scaled(factor: float, hook_name: str = HOOK) -> Edit:
    return Edit(hook_name, lambda x, positions: x * factor)


def shifted(amount: float, hook_name: str = HOOK) -> Edit:
    return Edit(hook_name, lambda x, positions: x + amount)


def at(model: LanguageModel, hook_name: str = HOOK) -> Tensor:
    return model.capture(IDS, [hook_name])[hook_name]


def test_positions_count_real_tokens_and_skip_special_ones() -> None:
    ids = torch.tensor([[5, 0, 6, 7], [5, 6, 0, 0]])
    special = frozenset({0})
    assert token_positions(ids, None, special).tolist() == [[0, -1, 2, 3], [0, 1, -1, -1]]
    assert token_positions(ids, None, frozenset()).tolist() == [[0, 1, 2, 3]] * 2
    left, right = padding_mask([4, 2], "left"), padding_mask([4, 2], "right")
    assert token_positions(ids, left, special).tolist() == [[0, -1, 2, 3], [-1, -1, -1, -1]]
    assert token_positions(ids, right, special).tolist() == [[0, -1, 2, 3], [0, 1, -1, -1]]
    assert token_positions(ids, left, frozenset()).tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]


@pytest.mark.parametrize("path", ["auto", "bridge"])
def test_an_edit_is_given_positions_and_flat_heads(path: str) -> None:
    model = tiny_language_model("llama", path)
    seen: dict[str, tuple[list[int], list[list[int]]]] = {}

    def look(name: str) -> Edit:
        def apply(x: Tensor, positions: Tensor) -> Tensor:
            seen[name] = (list(x.shape), positions.tolist())
            return x

        return Edit(name, apply)

    ids = torch.tensor([[END_OF_TEXT, 9, 9], [9, 9, 9]])
    names = ["blocks.0.attn.hook_z", "blocks.2.hook_mlp_out"]
    with model.edited(*map(look, names)):
        model.logits(ids, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
    positions = [[-1, 1, 2], [-1, 0, 1]]
    assert seen == {names[0]: ([2, 3, 40], positions), names[1]: ([2, 3, 32], positions)}


def test_edits_apply_in_order_and_outer_blocks_first() -> None:
    model = tiny_language_model("llama")
    x = at(model)
    with model.edited(scaled(2), shifted(1)):
        torch.testing.assert_close(at(model), x * 2 + 1)
    with model.edited(shifted(1), scaled(2)):
        torch.testing.assert_close(at(model), (x + 1) * 2)
    with model.edited(shifted(1)):
        with model.edited(scaled(2)):
            torch.testing.assert_close(at(model), (x + 1) * 2)
        torch.testing.assert_close(at(model), x + 1)
    torch.testing.assert_close(at(model), x, rtol=0, atol=0)


def test_a_capture_sees_edits_at_and_before_its_hook() -> None:
    model = tiny_language_model("gpt2")
    post, next_pre = HOOK, "blocks.2.hook_resid_pre"
    plain = model.capture(IDS, [post, next_pre])
    with model.edited(shifted(3, post)):
        edited = model.capture(IDS, [post, next_pre])
    torch.testing.assert_close(edited[post], plain[post] + 3)
    torch.testing.assert_close(edited[next_pre], plain[next_pre] + 3)
    with model.edited(shifted(3, next_pre)):
        edited = model.capture(IDS, [post, next_pre])
    torch.testing.assert_close(edited[post], plain[post], rtol=0, atol=0)
    torch.testing.assert_close(edited[next_pre], plain[next_pre] + 3)


def test_the_result_is_cast_back() -> None:
    model = tiny_language_model("llama")
    with model.edited(Edit(HOOK, lambda x, positions: x.double() + 1)):
        assert at(model).dtype == torch.float32


@pytest.mark.parametrize(
    ("apply", "found"),
    [(lambda x, positions: x[:, :1], "shape (2, 1, 32)"), (lambda x, positions: None, "NoneType")],
)
def test_a_result_of_another_shape_is_refused(apply: Callable[[Tensor, Tensor], Tensor], found: str) -> None:
    model = tiny_language_model("llama")
    with pytest.raises(InputError) as error, model.edited(Edit(HOOK, apply)):
        model.logits(IDS)
    assert str(error.value) == (
        f"The edit at {HOOK} returned {found}; it must return a tensor of shape (2, 7, 32), the shape it was"
        " given."
    )


def test_an_edit_that_never_took_effect_is_an_error() -> None:
    model = tiny_language_model("llama")
    sentence = (
        "The edit at blocks.2.hook_resid_pre never took effect: the model ran inside the block, but this hook"
        " did not fire."
    )
    with pytest.raises(InputError) as error, model.edited(scaled(2, "blocks.2.hook_resid_pre")):
        model.capture(IDS, ["blocks.0.hook_resid_post"])
    assert str(error.value) == sentence
    with model.edited(scaled(2, "blocks.2.hook_resid_pre")):
        pass  # nothing was run


def test_an_error_inside_the_block_is_not_hidden_by_one_about_the_edit() -> None:
    model = tiny_language_model("llama")

    def run_and_fail() -> None:
        with model.edited(scaled(2, "blocks.2.hook_resid_pre")):
            model.capture(IDS, ["blocks.0.hook_resid_post"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()


def test_an_edit_at_a_hook_that_the_model_never_computes_is_an_error() -> None:
    model = tiny_language_model("llama")
    # A hook that TransformerLens lists and this model never computes: hook_result is off by default.
    with pytest.raises(InputError) as error, model.edited(scaled(2, "blocks.1.attn.hook_result")):
        model.logits(IDS)
    assert "blocks.1.attn.hook_result never took effect" in str(error.value)


def test_an_unknown_hook_is_refused_at_once() -> None:
    model = tiny_language_model("llama")
    with pytest.raises(InputError) as error:
        model.edited(scaled(2, "blocks.1.hook_resid_posst"))
    assert (
        str(error.value) == "blocks.1.hook_resid_posst does not exist; did you mean blocks.1.hook_resid_post?"
    )


def test_edits_belong_to_one_model_and_to_our_own_calls() -> None:
    hf_model = tiny_hf_model("llama")
    one = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "one")
    two = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "two")  # over the very same modules
    x, logits = at(one), one.logits(IDS)
    with one.edited(scaled(2)):
        torch.testing.assert_close(at(one), x * 2)
        torch.testing.assert_close(at(two), x, rtol=0, atol=0)
        with two.edited(shifted(1)):
            torch.testing.assert_close(at(two), x + 1)
            torch.testing.assert_close(at(one), x * 2)
        with torch.no_grad():
            torch.testing.assert_close(hf_model(IDS).logits, logits, rtol=0, atol=0)


def test_an_edit_may_run_another_model() -> None:
    one, two = tiny_language_model("llama"), tiny_language_model("gpt2")
    x, other = at(one), at(two)
    with one.edited(Edit(HOOK, lambda x, positions: x + at(two))):
        torch.testing.assert_close(at(one), x + other)


def test_a_bridge_copied_from_a_model_with_hooks_edits_once() -> None:
    model = LanguageModel.from_hf(tiny_hf_model("gpt_neox"), tiny_tokenizer(), "tiny")
    x = at(model)  # the hook at HOOK is installed now, and the bridge's copy of the modules carries it along
    with model.edited(shifted(5)):
        found = model.capture(IDS, [HOOK, "blocks.1.attn.hook_pattern"])[HOOK]
    torch.testing.assert_close(found, x + 5)


def test_threads_see_their_own_edits_only() -> None:
    model = tiny_language_model("llama")
    x = at(model)
    found: dict[str, Tensor] = {}
    with model.edited(scaled(2)):
        context = contextvars.copy_context()
        new = threading.Thread(target=lambda: found.update(new=at(model)))
        copied = threading.Thread(target=lambda: found.update(copied=context.run(at, model)))
        for thread in (new, copied):
            thread.start()
            thread.join()
    torch.testing.assert_close(found["new"], x, rtol=0, atol=0)
    torch.testing.assert_close(found["copied"], x * 2)


def test_concurrent_captures_and_edits_do_not_meet() -> None:
    model = tiny_language_model("gpt_neox")
    names = ["blocks.0.hook_mlp_out", HOOK, "blocks.2.attn.hook_z"]
    plain = {name: at(model, name) for name in names}
    barrier = threading.Barrier(4)
    wrong: list[str] = []

    def work(index: int) -> None:
        name = names[index % len(names)]
        factor = float(index + 1)
        barrier.wait()
        for _ in range(25):
            with model.edited(scaled(factor, name)):
                if not torch.allclose(at(model, name), plain[name] * factor):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("hook_out", ["blocks.1.hook_mlp_out", "blocks.2.attn.hook_q"])
def test_an_edit_can_read_another_hook_of_the_same_pass(hook_out: str) -> None:
    """As it flows there, after the edits of that hook; at ``blocks.2.attn.hook_q`` the bridge runs the model."""
    model, reads = tiny_language_model("llama"), "blocks.0.hook_resid_mid"
    seen: list[Tensor] = []

    def remember(x: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        seen.append(read.clone())
        return x

    edit = Edit(hook_out, remember, reads=reads)
    with model.edited(edit):
        model.logits(IDS)
    with model.edited(scaled(2.0, reads), edit):
        model.logits(IDS)
    expected = model.capture(IDS, [reads])[reads]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1], 2 * expected)


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_an_edit_of_what_the_mlp_reads_leaves_the_stream_alone(architecture: str) -> None:
    """Also where nothing lies between both, and whichever of the two hooks was used first."""
    model = LanguageModel.from_hf(tiny_hf_model(architecture), tiny_tokenizer(), architecture)
    read, stream = "blocks.1.mlp.hook_in", "blocks.1.hook_resid_mid"
    names = [stream, read, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    with model.edited(scaled(2.0, read)):
        model.logits(IDS)
    plain = model.capture(IDS, names)
    with model.edited(scaled(2.0, read)):
        edited = model.capture(IDS, names)
    assert torch.equal(edited[stream], plain[stream])
    assert torch.equal(edited[read], 2 * plain[read])
    assert not torch.allclose(edited[names[2]], plain[names[2]])
    torch.testing.assert_close(edited[names[3]], edited[stream] + edited[names[2]])


def test_concurrent_passes_read_their_own() -> None:
    model, reads = tiny_language_model("llama"), "blocks.0.hook_resid_pre"
    edit = Edit("blocks.2.hook_mlp_out", lambda x, positions, read: read, reads=reads)
    texts = [random_ids(2, 7, seed) for seed in range(16)]

    def run(ids: Tensor) -> Tensor:
        with model.edited(edit):
            return model.capture(ids, ["blocks.2.hook_mlp_out"])["blocks.2.hook_mlp_out"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, texts))
    for ids, values in zip(texts, found, strict=True):
        assert torch.equal(values, model.capture(ids, [reads])[reads])


def test_a_hook_that_an_edit_reads_must_exist() -> None:
    edit = Edit(HOOK, lambda x, positions, read: x, reads="blocks.0.hook_resid_md")
    with pytest.raises(InputError, match=r"^blocks\.0\.hook_resid_md does not exist"):
        tiny_language_model("llama").edited(edit)
