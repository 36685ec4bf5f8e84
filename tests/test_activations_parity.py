"""The SDPA path against TransformerLens' bridge, transformers' own hidden states, and sums."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Literal

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    WINDOW,
    one_thread,
    padding_mask,
    random_ids,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)

from activations.edits import Edit
from activations.errors import InputError
from activations.models import LanguageModel


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@cache
def both_paths(architecture: str, attention: str | None) -> tuple[LanguageModel, LanguageModel]:
    hf_model = tiny_hf_model(architecture, attention)
    sdpa = LanguageModel.from_hf(hf_model, tiny_tokenizer(), architecture, path="sdpa")
    bridge = LanguageModel.from_hf(hf_model, tiny_tokenizer(), architecture, path="bridge")
    return sdpa, bridge


LAYER_NORMS = {
    "gpt2": "transformer.ln_f.bias",
    "gpt_neox": "gpt_neox.final_layer_norm.bias",
    "gpt_neox_sequential": "gpt_neox.final_layer_norm.bias",
    "opt": "model.decoder.final_layer_norm.bias",
}
"""The bias of the final normalisation, where that is a LayerNorm."""


def assert_agree(a: torch.Tensor, b: torch.Tensor, relative: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max()


# Bitwise with eager attention, except that the bridge splits the fused query-key-value products of GPT-2 and Phi 3;
# the bridge computes attention eagerly, so SDPA differs from it by rounding.
TOLERANCES: list[tuple[str | None, dict[str, float], float]] = [
    ("eager", {"gpt2": 1e-6, "phi3": 1e-6}, 0.0),
    (None, {}, 1e-5),
]


@pytest.mark.parametrize(("attention", "special", "default"), TOLERANCES, ids=["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_paths_agree(
    architecture: str, padding: str, attention: str | None, special: dict[str, float], default: float
) -> None:
    sdpa, bridge = both_paths(architecture, attention)
    tolerance = special.get(architecture, default)
    ids = random_ids(3, 12)
    mask = None if padding == "none" else padding_mask([12, 7, 1], padding)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    names = list(sdpa.hook_widths())
    here = sdpa.capture(ids, names, attention_mask=mask)
    there = bridge.capture(ids, names, attention_mask=mask)
    assert here.keys() == there.keys() == set(names)
    for name in names:
        assert here[name].shape == (3, 12, sdpa.width(name))
        assert_agree(here[name][real], there[name][real], tolerance)
    assert_agree(
        sdpa.logits(ids, attention_mask=mask)[real], bridge.logits(ids, attention_mask=mask)[real], tolerance
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_equal_what_transformers_and_arithmetic_say(architecture: str) -> None:
    hf_model = tiny_hf_model(architecture)
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), architecture)
    ids = random_ids(2, 10)
    x = model.capture(ids, list(model.hook_widths()))
    with torch.no_grad():
        output = hf_model(ids, output_hidden_states=True)
        for layer in range(model.n_layers):
            block = f"blocks.{layer}."
            torch.testing.assert_close(
                x[block + "hook_resid_pre"], output.hidden_states[layer], rtol=0, atol=0
            )
            if layer + 1 < model.n_layers:  # the last of transformers' states is taken after the final norm
                torch.testing.assert_close(
                    x[block + "hook_resid_post"], output.hidden_states[layer + 1], rtol=0, atol=0
                )
            if architecture == "opt_post_norm":  # normalises the stream itself
                continue
            parts = x[block + "hook_resid_pre"] + x[block + "hook_attn_out"]
            if block + "hook_resid_mid" in x:
                torch.testing.assert_close(x[block + "hook_resid_mid"], parts)
            torch.testing.assert_close(x[block + "hook_resid_post"], parts + x[block + "hook_mlp_out"])
    torch.testing.assert_close(model.logits(ids), output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logit_lens_of_the_last_layer_gives_the_logits(architecture: str) -> None:
    model = tiny_language_model(architecture)
    ids, hook = random_ids(2, 10), "blocks.2.hook_resid_post"
    x = model.capture(ids, [hook])[hook]
    gain, unembedding = model.logit_lens_weights()
    bias = torch.zeros(32)
    if architecture in LAYER_NORMS:
        x = x - x.mean(-1, keepdim=True)
        bias = dict(tiny_hf_model(architecture).named_parameters())[LAYER_NORMS[architecture]]
    if architecture != "opt_post_norm":  # whose last block ends with a normalisation
        eps = getattr(model.config, "rms_norm_eps", 1e-5)
        x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    with torch.no_grad():
        logits = (x * gain + bias) @ unembedding
    if architecture == "gemma2":
        logits = torch.tanh(logits / 3) * 3  # caps its logits
    torch.testing.assert_close(logits, model.logits(ids), rtol=1e-4, atol=1e-5)


# Of each block: its path, what reads attn.hook_z, what reads mlp.hook_post, and the normalisations after both.
LLAMA_BLOCK = ("layers.1", "self_attn.o_proj", "mlp.down_proj", None, None)
POST_NORMED = (*LLAMA_BLOCK[:3], "post_attention_layernorm", "post_feedforward_layernorm")
BLOCKS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "qwen2_moe", "qwen3_moe"], LLAMA_BLOCK),
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2"], POST_NORMED),
    "gemma3": ("language_model.layers.1", *POST_NORMED[1:]),
    "gpt2": ("h.1", "attn.c_proj", "mlp.c_proj", None, None),
    "gpt_neox": ("layers.1", "attention.dense", "mlp.dense_4h_to_h", None, None),
    "opt": ("decoder.layers.1", "self_attn.out_proj", "fc2", None, None),
    "opt_post_norm": ("decoder.layers.1", "self_attn.out_proj", "fc2", None, None),
}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_z_and_post_are_what_the_projections_read(architecture: str) -> None:
    model = tiny_language_model(architecture)
    names = ["attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"]
    x = model.capture(random_ids(2, 10), [f"blocks.1.{name}" for name in names])
    z, attn_out, post, mlp_out = x.values()
    path, projection, mlp_projection, *norms = BLOCKS[architecture]
    block = tiny_hf_model(architecture).base_model.get_submodule(path)
    attn_norm, mlp_norm = (block.get_submodule(norm) if norm else torch.nn.Identity() for norm in norms)
    with torch.no_grad():
        torch.testing.assert_close(attn_norm(block.get_submodule(projection)(z)), attn_out)
        torch.testing.assert_close(mlp_norm(block.get_submodule(mlp_projection)(post)), mlp_out)
    assert z.shape[-1] == model.width("blocks.1.attn.hook_z") == model.n_heads * model.d_head
    assert post.shape[-1] == model.width("blocks.1.mlp.hook_post") == 72


def test_windows_are_narrower_than_the_texts_of_these_tests() -> None:
    """What lies outside a sliding window must not be read, or the comparisons above would prove nothing."""
    assert WINDOW < 10
    model = tiny_language_model("mistral")
    ids, hook = random_ids(1, 12), "blocks.0.hook_attn_out"
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 300
    difference = (model.capture(ids, [hook])[hook] - model.capture(changed, [hook])[hook])[0].abs().amax(-1)
    assert bool((difference[:WINDOW] > 0).all())
    assert bool((difference[WINDOW:] == 0).all())


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_what_the_bridge_calls_post_in_a_mixture_of_experts(architecture: str) -> None:
    """Several experts read each token: TransformerLens gives hook_post the output, and the SDPA path does without."""
    model = tiny_language_model(architecture)
    post, out = "blocks.2.mlp.hook_post", "blocks.2.hook_mlp_out"
    assert post not in model.hook_widths()
    assert model.width(post) == 32
    x = model.capture(random_ids(2, 6), [post, out])
    assert torch.equal(x[post], x[out])


@pytest.mark.parametrize("path", ["sdpa", "bridge"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_row_equals_the_row_alone(
    architecture: str, side: str, path: Literal["sdpa", "bridge"]
) -> None:
    model = tiny_language_model(architecture, path)
    lengths = [12, 5]
    ids, mask = random_ids(2, 12), padding_mask(lengths, side)
    hook = "blocks.2.hook_resid_post"
    together = model.capture(ids, [hook], attention_mask=mask)[hook]
    logits = model.logits(ids, attention_mask=mask)
    for row in range(2):
        real = mask[row].bool()
        alone = ids[row][real][None]
        torch.testing.assert_close(together[row][real], model.capture(alone, [hook])[hook][0])
        torch.testing.assert_close(logits[row][real], model.logits(alone)[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edits_act_alike_on_both_paths(architecture: str) -> None:
    sdpa, bridge = both_paths(architecture, "eager")
    ids = random_ids(2, 9)
    plain = sdpa.logits(ids)
    names = [name for name in sdpa.hook_widths() if name.startswith("blocks.1.")]
    if architecture == "opt_post_norm":
        names.remove("blocks.1.hook_resid_mid")  # where the bridge gives on what it edits in another shape
    for name in names:
        direction = torch.randn(sdpa.width(name), generator=torch.Generator().manual_seed(1))

        def steer(x: torch.Tensor, positions: torch.Tensor, d: torch.Tensor = direction) -> torch.Tensor:
            return x * 0.5 + d * (positions % 2 == 0)[..., None]

        with sdpa.edited(Edit(name, steer)):
            here = sdpa.logits(ids)
        with bridge.edited(Edit(name, steer)):
            there = bridge.logits(ids)
        assert (here - plain).abs().max() > 0.01, name
        assert_agree(here, there, 1e-5)
    torch.testing.assert_close(sdpa.logits(ids), plain, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["sdpa", "bridge"])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("gpt_neox", "opt_post_norm")])
def test_edit_of_resid_mid_changes_the_residual_stream(
    architecture: str, path: Literal["sdpa", "bridge"]
) -> None:
    """Adding v after attention equals adding v to its output: it reaches the MLP *and* the residual."""
    model = tiny_language_model(architecture, path)
    ids, v = random_ids(2, 9), torch.randn(32, generator=torch.Generator().manual_seed(2))
    results = []
    for site in ("hook_resid_mid", "hook_attn_out"):
        with model.edited(Edit(f"blocks.1.{site}", lambda x, positions: x + v)):
            results.append(model.logits(ids))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_path_starts_a_bridge_for_other_hooks(architecture: str) -> None:
    hf_model = tiny_hf_model(architecture)
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), architecture)
    ids = random_ids(2, 9)
    before = model.logits(ids)
    normalised = f"blocks.1.{'ln1_post' if architecture == 'olmo2' else 'ln1'}.hook_normalized"
    names = ["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post", normalised]
    x = model.capture(ids, names)
    pattern = x["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (2, 4, 9, 9)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 9))
    assert pattern.triu(1).abs().max() == 0  # causal
    resid = model.capture(ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    assert_agree(x["blocks.1.hook_resid_post"], resid, 1e-5)
    assert model.width(normalised) == 32
    # The bridge has a rewired copy: the model itself still runs SDPA attention, to the same bits.
    assert hf_model.config._attn_implementation == ("eager" if architecture == "gemma2" else "sdpa")
    torch.testing.assert_close(model.logits(ids), before, rtol=0, atol=0)


def test_edit_at_a_bridge_hook_under_auto() -> None:
    """Uniform attention, set by hand at the pattern, equals the mean of the values so far."""
    model = LanguageModel.from_hf(tiny_hf_model("gpt2"), tiny_tokenizer(), "tiny")
    ids = random_ids(1, 6)
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    with model.edited(Edit("blocks.0.attn.hook_pattern", lambda x, positions: uniform.expand_as(x))):
        x = model.capture(ids, ["blocks.0.attn.hook_v", "blocks.0.attn.hook_z"])
    values = x["blocks.0.attn.hook_v"].flatten(2)
    expected = values.cumsum(1) / torch.arange(1, 7)[None, :, None]
    torch.testing.assert_close(x["blocks.0.attn.hook_z"], expected)


def test_existing_bridge() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = tiny_hf_model("llama", "eager")
    plain = LanguageModel.from_hf(tiny_hf_model("llama", "eager"), tiny_tokenizer(), "tiny")
    tokenizer = copy.deepcopy(tiny_tokenizer())  # it is given a beginning-of-text token
    bridge = build_bridge_from_module(
        hf_model, "LlamaForCausalLM", hf_config=hf_model.config, tokenizer=tokenizer, model_name="mine"
    )
    model = LanguageModel.from_bridge(bridge)
    ids = random_ids(2, 8)
    assert (model.name, model.n_layers, model.d_model, model.d_vocab) == ("mine", 3, 32, 320)
    hooks = list(plain.hook_widths())
    here, there = plain.capture(ids, hooks), model.capture(ids, hooks)
    assert all(torch.equal(here[name], there[name]) for name in hooks)
    assert {name: model.width(name) for name in hooks} == plain.hook_widths()
    for a, b in zip(plain.logit_lens_weights(), model.logit_lens_weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert model.generate(
        ["def ", "import os"], temperature=0, max_new_tokens=8, bos=False
    ) == plain.generate(["def ", "import os"], temperature=0, max_new_tokens=8)


def test_a_bridge_without_tokenizer_is_refused() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = tiny_hf_model("llama", "eager")
    bridge = build_bridge_from_module(hf_model, "LlamaForCausalLM", hf_config=hf_model.config)
    with pytest.raises(InputError) as error:
        LanguageModel.from_bridge(bridge)
    assert str(error.value) == ("The TransformerBridge has no tokenizer: give it one before it is wrapped.")
