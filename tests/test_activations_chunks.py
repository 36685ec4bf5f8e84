"""Long inputs: chunks over the KV cache equal one pass, in bounded memory."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    CONTEXT_LENGTH,
    one_thread,
    padding_mask,
    random_ids,
    tiny_config,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)
from torch import Tensor

import activations.chunks
from activations import models
from activations.chunks import rotation_depends_on_length
from activations.edits import Edit
from activations.errors import InputError
from activations.models import LanguageModel

IDS = random_ids(3, 40)  # several times the sliding window


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def assert_equals_one_pass(
    model: LanguageModel, names: list[str], chunk_tokens: int, mask: Tensor | None = None
) -> None:
    whole = model.capture(IDS, names, attention_mask=mask)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    chunks = list(model.capture_chunks(IDS, names, chunk_tokens=chunk_tokens, attention_mask=mask))
    assert [start for start, _ in chunks] == list(range(0, 40, chunk_tokens))
    for name in names:
        found = torch.cat([captured[name] for _, captured in chunks], dim=1)
        assert found.shape == whole[name].shape
        assert (found - whole[name])[real].abs().max() <= 1e-5 * whole[name][real].abs().max()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_equal_one_pass(architecture: str, padding: str | None) -> None:
    model = tiny_language_model(architecture)
    mask = None if padding is None else padding_mask([40, 23, 1], padding)
    for chunk_tokens in (7, 16):
        assert_equals_one_pass(model, list(model.hook_widths()), chunk_tokens, mask)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])
def test_the_layers_behind_the_last_hook_are_not_needed(architecture: str, hook: str) -> None:
    for chunk_tokens in (1, 16, 39):
        assert_equals_one_pass(tiny_language_model(architecture), [hook], chunk_tokens)


def test_only_the_layers_up_to_the_hook_run() -> None:
    hf_model = tiny_hf_model("llama")
    ran: list[int] = []
    for index, layer in enumerate(hf_model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")
    list(model.capture_chunks(IDS, ["blocks.1.hook_resid_mid"], chunk_tokens=20))
    assert ran == [0, 0]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_edits_see_absolute_positions_in_every_chunk(architecture: str) -> None:
    model = tiny_language_model(architecture)
    ids = IDS.clone()
    ids[0, 30] = 0  # end of text: a special token
    hook = "blocks.2.hook_resid_post"

    def steer(x: Tensor, positions: Tensor) -> Tensor:
        return x + positions[..., None] / 10

    with model.edited(Edit("blocks.0.hook_resid_post", steer)):
        whole = model.capture(ids, [hook])[hook]
        chunks = model.capture_chunks(ids, [hook], chunk_tokens=16)
    # Made inside the block, the iterator keeps the edit.
    found = torch.cat([captured[hook] for _, captured in chunks], dim=1)
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(whole, model.capture(ids, [hook])[hook], atol=0.01)


def test_chunks_become_shorter_where_the_attention_mask_would_be_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, hook = tiny_language_model("llama"), "blocks.2.hook_resid_post"
    whole = model.capture(IDS, [hook])[hook]
    monkeypatch.setattr(
        activations.chunks, "MASK_ENTRIES", 600
    )  # of 3 rows: 200 for chunk x positions so far
    chunks = list(model.capture_chunks(IDS, [hook], chunk_tokens=16))
    lengths = [captured[hook].shape[1] for _, captured in chunks]
    assert [start for start, _ in chunks] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert lengths[0] == 12
    assert all(
        start + n <= 40 and 3 * n * (start + n) <= 600 for (start, _), n in zip(chunks, lengths, strict=True)
    )
    torch.testing.assert_close(torch.cat([captured[hook] for _, captured in chunks], dim=1), whole)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_capture_of_a_long_text_goes_in_chunks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_language_model(architecture)
    names = ["blocks.0.mlp.hook_post", "blocks.2.hook_resid_post"]
    whole = model.capture(IDS, names)
    lengths: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(models, "LONG_INPUT", 39)
        patch.setattr(models, "CHUNK_TOKENS", 12)
        out = {names[0]: torch.empty(3, 40, 72, dtype=torch.float64)}
        embedding = model._hf_model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
        found = model.capture(IDS, names, out=out)
        handle.remove()
        with pytest.raises(InputError) as error:
            model.capture(IDS, names, out={names[0]: torch.empty(3, 40, 71)})
        assert str(error.value).startswith(
            "The buffer for blocks.0.mlp.hook_post has shape (3, 40, 71); it must be"
        )
    assert lengths == [12, 12, 12, 4]
    assert found[names[0]] is out[names[0]]
    torch.testing.assert_close(found[names[0]].float(), whole[names[0]])
    torch.testing.assert_close(found[names[1]], whole[names[1]])


def cache_bytes(architecture: str, n_positions: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of keys and values that are held after each chunk of 16 tokens, captured in the first two layers."""
    import transformers

    caches: list[weakref.ref[transformers.DynamicCache]] = []
    make = transformers.DynamicCache

    def remembered(**options: object) -> transformers.DynamicCache:
        cache = make(**options)
        caches.append(weakref.ref(cache))
        return cache

    config = tiny_config(architecture)
    config.max_position_embeddings = n_positions
    model = LanguageModel.from_hf(tiny_hf_model(architecture, config=config), tiny_tokenizer(), "long")
    held = []
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "DynamicCache", remembered)
        chunks = model.capture_chunks(
            random_ids(1, n_positions), ["blocks.1.hook_resid_post"], chunk_tokens=16
        )
        for _, captured in chunks:
            assert captured["blocks.1.hook_resid_post"].untyped_storage().nbytes() == 16 * 32 * 4
            cache = caches[0]()
            assert cache is not None
            tensors = [
                t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)
            ]
            held.append(sum(t.numel() * t.element_size() for t in tensors))
    del cache, chunks
    assert caches[0]() is None  # nothing is left of it behind the last chunk
    return held


def test_memory_is_that_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers x keys and values x 2 heads x 10 wide x 4 bytes = 320 bytes a token; a window keeps 4 of 5 tokens."""
    full = cache_bytes("llama", 96, monkeypatch)
    assert full == [320 * 16 * n for n in range(1, 7)]
    windowed = cache_bytes("mistral", 96, monkeypatch)
    assert windowed == [2 * 2 * 2 * 8 * 4 * 4] * 6


def test_what_must_be_read_in_one_pass() -> None:
    model = tiny_language_model("llama")
    pattern = ["blocks.0.attn.hook_pattern"]
    ((start, captured),) = model.capture_chunks(IDS, pattern, chunk_tokens=40)
    assert (start, captured[pattern[0]].shape) == (0, (3, 4, 40, 40))
    for one_pass, hook in [
        (model, pattern[0]),
        (tiny_language_model("llama", "bridge"), "blocks.0.hook_resid_post"),
        (tiny_language_model("mamba"), "blocks.0.hook_resid_post"),
    ]:
        with pytest.raises(InputError) as error:
            one_pass.capture_chunks(IDS, [hook], chunk_tokens=39)
        assert str(error.value) == (
            f"{one_pass.name} reads 40 tokens at these hooks in one pass only: choose hooks of the SDPA path, or"
            " at most chunk_tokens (39) tokens."
        )
    with pytest.raises(InputError) as error:
        model.capture_chunks(IDS, ["blocks.0.hook_resid_post"], chunk_tokens=0)
    assert str(error.value) == "chunk_tokens is 0; it must be at least 1."
    with pytest.raises(InputError) as error:
        tiny_language_model("llama").capture_chunks(random_ids(1, 65), ["blocks.0.hook_resid_post"])
    assert str(error.value) == "A sequence of 65 tokens exceeds the model's context of 64 tokens."


def test_rotations_that_depend_on_the_length_of_the_text() -> None:
    """Phi 3's long context: beyond 24 tokens, every token is rotated otherwise, those of the first chunk too."""
    config = tiny_config("phi3")
    config.sliding_window = None
    config.original_max_position_embeddings = 24
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 24,
        "factor": CONTEXT_LENGTH / 24,
    }
    assert not rotation_depends_on_length(config, 24)
    assert rotation_depends_on_length(config, 25)
    model = LanguageModel.from_hf(tiny_hf_model("phi3", config=config), tiny_tokenizer(), "long")
    hook = "blocks.1.hook_resid_post"
    beginning = model.capture(IDS[:, :20], [hook])[hook]
    assert not torch.allclose(model.capture(IDS, [hook])[hook][:, :20], beginning, atol=1e-3)
    with pytest.raises(InputError, match="in one pass only"):
        model.capture_chunks(IDS, [hook], chunk_tokens=16)
    chunks = list(model.capture_chunks(IDS[:, :24], [hook], chunk_tokens=10))
    found = torch.cat([captured[hook] for _, captured in chunks], dim=1)
    torch.testing.assert_close(found, model.capture(IDS[:, :24], [hook])[hook])
