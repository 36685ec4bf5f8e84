"""Models off the SDPA path: Mamba and BERT from text, a vision transformer from pixels; quantised and spread models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    TEXT,
    one_thread,
    padding_mask,
    random_ids,
    tiny_config,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)
from torch import Tensor, nn

from activations.edits import Edit
from activations.errors import InputError
from activations.models import NO_LIMIT, LanguageModel
from activations.vision import VisionModel

IDS = random_ids(2, 9)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model of text that only the bridge serves."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ("mamba", "bert"):
        tiny_hf_model(architecture).save_pretrained(root / architecture)
        tiny_tokenizer().save_pretrained(root / architecture)
    return {architecture: root / architecture for architecture in ("mamba", "bert")}


@pytest.mark.parametrize("architecture", ["mamba", "bert"])
def test_a_folder_and_a_loaded_model_give_what_transformers_gives(
    architecture: str, folders: dict[str, Path]
) -> None:
    hf_model = tiny_hf_model(architecture)
    with torch.no_grad():
        output = hf_model(IDS, output_hidden_states=True)
    # transformers' list begins behind the first block of a Mamba, and in front of that of a BERT.
    states = output.hidden_states[int(architecture == "bert") :]
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    folder = LanguageModel.load(str(folders[architecture]), device="cpu")
    for model in (folder, LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")):
        assert (model.n_layers, model.d_model, model.d_vocab) == (3, 32, 320)
        assert model.hook_widths() == {}
        x = model.capture(IDS, names)
        for name, state in zip(names, states, strict=False):
            torch.testing.assert_close(x[name], state, rtol=1e-5, atol=2e-6)
            assert model.width(name) == 32
        assert torch.equal(model.logits(IDS), output.logits)
        pre = model.capture(IDS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
        assert torch.equal(pre, x[names[0]])
        out = {names[1]: torch.empty(2, 9, 32)}
        assert torch.equal(model.capture(IDS, names[1:2], out=out)[names[1]], x[names[1]])


def test_dimensions_where_there_is_no_attention() -> None:
    model = tiny_language_model("mamba")
    assert (model.n_heads, model.d_head, model.context_length) == (0, 0, NO_LIMIT)
    assert (tiny_language_model("bert").n_heads, tiny_language_model("bert").d_head) == (4, 8)


@pytest.mark.parametrize(("architecture", "side"), [("mamba", "right"), ("mamba", "left"), ("bert", "right")])
def test_padded_row_equals_the_row_alone(architecture: str, side: str) -> None:
    model = tiny_language_model(architecture)
    hook = "blocks.2.hook_resid_post"
    mask = padding_mask([9, 5], side)
    together = model.capture(IDS, [hook], attention_mask=mask)[hook]
    logits = model.logits(IDS, attention_mask=mask)
    for row in range(2):
        real = mask[row].bool()
        alone = IDS[row][real][None]
        torch.testing.assert_close(together[row][real], model.capture(alone, [hook])[hook][0])
        torch.testing.assert_close(logits[row][real], model.logits(alone)[0])


def test_a_bert_reads_both_ways() -> None:
    model = tiny_language_model("bert")
    changed = IDS.clone()
    changed[:, -1] = 5
    assert not torch.allclose(model.logits(IDS)[:, 0], model.logits(changed)[:, 0])
    pattern = model.capture(IDS, ["blocks.0.attn.hook_pattern"])["blocks.0.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 9))
    assert pattern.min() > 0


@pytest.mark.parametrize("architecture", ["mamba", "bert"])
def test_edits_and_replays(architecture: str) -> None:
    model = tiny_language_model(architecture)
    hook = "blocks.1.hook_resid_post"
    plain = model.logits(IDS)
    replay = model.replay(IDS, hook)
    torch.testing.assert_close(replay.logits, plain)
    with model.edited(Edit(hook, lambda x, positions: x + (positions % 2)[..., None])):
        edited = model.logits(IDS)
    assert (edited - plain).abs().max() > 0.01
    odd = (torch.arange(9) % 2)[None, :, None]
    torch.testing.assert_close(replay.logits_with(replay.activations + odd), edited)


def test_a_mamba_writes() -> None:
    """It has no KV cache: each step reads everything again, which must come out as transformers' own recurrence."""
    hf_model = tiny_hf_model("mamba")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")
    prompts = [TEXT[0], "import os"]
    together = model.generate(prompts, temperature=0, max_new_tokens=6)
    for prompt, found in zip(prompts, together, strict=True):
        ids = torch.tensor([model.tokenizer.encode(prompt)])
        with torch.no_grad():
            expected = hf_model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert found == model.tokenizer.decode(
            [i for i in expected.tolist() if i not in model.tokenizer.eos_ids]
        )
    hook, seen = "blocks.0.hook_resid_post", []

    def look(x: Tensor, positions: Tensor) -> Tensor:
        seen.append(positions.tolist())
        return x

    with model.edited(Edit(hook, look)):
        model.generate("import os", temperature=0, max_new_tokens=2)
    n = len(model.tokenizer.encode("import os"))
    assert seen == [[list(range(n))], [list(range(n + 1))]]


def test_what_makes_no_sense_for_a_bert() -> None:
    model = tiny_language_model("bert")
    with pytest.raises(InputError) as error:
        model.generate("def")
    assert str(error.value) == "bert is a masked language model and writes no text: choose a causal one."
    with pytest.raises(InputError) as error:
        model.logits(IDS, attention_mask=padding_mask([9, 5], "left"))
    assert str(error.value) == "bert reads a text behind padding as another one: pad on the right."
    with pytest.raises(InputError) as error:
        model.logit_lens_weights()
    assert str(error.value).startswith(
        "The logit lens of bert is not known: its architecture bert is not one of"
    )


def test_a_recurrent_model_that_reads_padding_as_text() -> None:
    from transformers import AutoModelForCausalLM, RwkvConfig

    config = RwkvConfig(vocab_size=320, num_hidden_layers=2, hidden_size=32, bos_token_id=0, eos_token_id=0)
    model = LanguageModel.from_hf(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "rwkv")
    hook = "blocks.1.hook_resid_post"
    mask = padding_mask([9, 5], "right")
    x = model.capture(IDS, [hook], attention_mask=mask)[hook]
    torch.testing.assert_close(x[1, :5], model.capture(IDS[1:, :5], [hook])[hook][0])
    with pytest.raises(InputError) as error:
        model.capture(IDS, [hook], attention_mask=padding_mask([9, 5], "left"))
    assert str(error.value) == "rwkv reads a text behind padding as another one: pad on the right."
    with pytest.raises(InputError) as error:
        model.generate(["def", "def read(self"], max_new_tokens=2)
    assert str(error.value) == (
        "rwkv cannot continue prompts of different lengths together: give them one by one."
    )
    assert len(model.generate(["def", "def"], max_new_tokens=2, temperature=0)) == 2


def test_berts_own_kind_of_tokenizer() -> None:
    """It has [CLS] and [SEP], and neither BOS nor end of text: documents end with the separator."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "def", "read", "##er", "import"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    hf_model = tiny_hf_model("bert")
    hf_model.config.eos_token_id = None
    model = LanguageModel.from_hf(hf_model, tokenizer, "tiny")
    assert (model.tokenizer.separator_id, model.tokenizer.adds_bos) == (3, False)
    assert model.tokenizer.encode("def reader") == [5, 6, 7]
    assert {2, 3} <= model.tokenizer.special_ids


def test_hooks_of_the_bridge_with_their_shapes() -> None:
    model = tiny_language_model("gpt2")
    shapes = model.bridge_shapes()
    by_name = {name: shape for names, shape in shapes.items() for name in names}
    assert by_name["blocks.1.attn.hook_pattern"] == ("batch", 4, "pos", "pos")
    assert by_name["blocks.1.attn.hook_q"] == ("batch", "pos", 4, 8)
    assert by_name["blocks.2.hook_resid_post"] == ("batch", "pos", 32)
    assert ("blocks.0.hook_in", "blocks.0.hook_resid_pre") in shapes
    assert "blocks.1.attn.hook_result" not in by_name  # listed by TransformerLens, and never fires
    x = model.capture(IDS, ["blocks.1.attn.hook_q"])["blocks.1.attn.hook_q"]
    assert x.shape == (2, 9, 4, 8)


def vit(class_name: str) -> Any:
    from transformers import ViTConfig
    from transformers.models.vit import modeling_vit

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=72,
        image_size=12,
        patch_size=4,
        num_labels=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(modeling_vit, class_name)(config).eval()


@pytest.mark.parametrize("class_name", ["ViTModel", "ViTForImageClassification"])
def test_a_vision_transformer_from_pixels(class_name: str, tmp_path: Path) -> None:
    hf_model = vit(class_name)
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = hf_model(pixels, output_hidden_states=True).hidden_states
    hf_model.save_pretrained(tmp_path / "vit")
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"]
    loaded = VisionModel.load(str(tmp_path / "vit"), device="cpu", dtype="float32")
    for model in (VisionModel.from_hf(hf_model, "vit"), loaded):
        assert (model.n_layers, model.d_model, model.n_heads, model.d_head) == (3, 32, 4, 8)
        x = model.capture(pixels, names)
        torch.testing.assert_close(x[names[0]], states[0])
        torch.testing.assert_close(x[names[1]], states[2])
        assert x[names[2]].shape == (2, 4, 10, 10)  # the class token and 3 x 3 patches
        assert model.width("blocks.1.mlp.hook_post") == 72
        out = {names[1]: torch.empty(2, 10, 32, dtype=torch.float16)}
        assert torch.equal(model.capture(pixels, names[1:2], out=out)[names[1]], x[names[1]].half())
    shapes = {name: shape for aliases, shape in loaded.bridge_shapes().items() for name in aliases}
    assert shapes["blocks.2.hook_mlp_out"] == ("batch", 10, 32)
    assert VisionModel.load(str(tmp_path / "vit"), device="cpu", dtype="float16").hash == loaded.hash
    hashes = {VisionModel.from_hf(hf_model, "vit").hash}
    hf_model.config.layer_norm_eps = 0.1
    assert len(hashes | {VisionModel.from_hf(hf_model, "vit").hash}) == 2


def test_pixels_and_models_that_do_not_go_together(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = VisionModel.from_hf(vit("ViTModel"), "vit")
    with pytest.raises(InputError) as error:
        model.capture(torch.zeros(2, 3, 12, 11), ["blocks.0.hook_resid_post"])
    assert str(error.value) == (
        "The pixels have shape [2, 3, 12, 11]; vit reads [batch, channels, height, width] = [batch, 3, 12, 12]."
    )
    with pytest.raises(InputError) as error:
        model.capture(torch.zeros(2, 3, 12, 12), ["blocks.3.hook_resid_post"])
    assert str(error.value) == "blocks.3.hook_resid_post does not exist: the layers of this model are 0 to 2."
    with pytest.raises(InputError) as error:
        VisionModel.load(str(folders["mamba"]))
    assert str(error.value) == f"{folders['mamba']} holds a mamba model, which reads no pictures."
    vit("ViTModel").save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError) as error:
        LanguageModel.load(str(tmp_path / "vit"))
    assert str(error.value) == (
        f"{tmp_path / 'vit'} holds a vit model, which is no causal or masked language model (one that reads pictures"
        " is loaded in Python, by VisionModel)."
    )


def test_an_architecture_that_transformer_lens_does_not_know() -> None:
    from transformers import GPT2LMHeadModel

    class OwnForCausalLM(GPT2LMHeadModel):
        pass

    model = LanguageModel.from_hf(OwnForCausalLM(tiny_config("gpt2")), tiny_tokenizer(), "own")
    assert model.capture(IDS, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"].shape == (2, 9, 32)
    with pytest.raises(InputError) as error:
        model.capture(IDS, ["blocks.0.attn.hook_pattern"])
    assert str(error.value) == (
        "TransformerLens cannot run the architecture OwnForCausalLM: choose a model of another one."
    )


def test_a_quantised_model_passes_through() -> None:
    """Linear layers in 8 bits, with packed weights in the place of parameters."""
    hf_model = torch.ao.quantization.quantize_dynamic(tiny_hf_model("llama"), {nn.Linear}, torch.qint8)
    projection = hf_model.model.layers[0].mlp.down_proj
    assert not isinstance(projection.weight, Tensor)
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "quantised")
    assert hf_model.model.layers[0].mlp.down_proj is projection
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert (model.width("blocks.0.mlp.hook_post"), model.width("blocks.0.attn.hook_z")) == (72, 40)
    with torch.no_grad():
        output = hf_model(IDS, output_hidden_states=True)
    x = model.capture(IDS, ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"])
    assert torch.equal(x["blocks.0.hook_resid_post"], output.hidden_states[1])
    assert x["blocks.1.mlp.hook_post"].shape == (2, 9, 72)
    assert torch.equal(model.logits(IDS), output.logits)
    other = torch.ao.quantization.quantize_dynamic(tiny_hf_model("llama", seed=1), {nn.Linear}, torch.qint8)
    other.model.embed_tokens = hf_model.model.embed_tokens
    same = torch.ao.quantization.quantize_dynamic(tiny_hf_model("llama"), {nn.Linear}, torch.qint8)
    hashes = [LanguageModel.from_hf(m, tiny_tokenizer(), "q").hash for m in (hf_model, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]  # the packed weights count too


def test_a_model_without_floating_parameters_passes_through() -> None:
    class Codes(nn.Module):
        """A projection kept as 8-bit integers, as quantisation libraries keep them."""

        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.in_features = linear.in_features
            self.scale = float(linear.weight.detach().abs().max()) / 127
            codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(codes, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.float() * self.scale).T

    hf_model = tiny_hf_model("llama")
    for layer in hf_model.model.layers:
        layer.mlp.down_proj = Codes(layer.mlp.down_proj)
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "codes")
    names = list(model.hook_widths())
    assert model.width("blocks.2.mlp.hook_post") == 72
    x = model.capture(IDS, names)
    assert all(x[name].dtype == torch.float32 for name in names)
    assert {p.dtype for p in hf_model.parameters()} == {torch.int8, torch.float32}


def test_a_model_that_is_spread_over_devices_passes_through() -> None:
    """Accelerate moves what flows between the parts; here all of them are on the CPU, one of them offloaded."""
    from accelerate import dispatch_model

    reference = tiny_language_model("llama")
    names = list(reference.hook_widths())
    expected = reference.capture(IDS, names)
    hf_model = tiny_hf_model("llama")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{layer}": "cpu" for layer in range(3)}
    hf_model = dispatch_model(hf_model, parts, force_hooks=True, main_device="cpu")
    hf_model.hf_device_map = parts
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "spread")
    assert model.device == torch.device("cpu")
    found = model.capture(IDS, names)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert torch.equal(model.logits(IDS), reference.logits(IDS))
    assert hf_model.hf_device_map == parts


def test_ids_go_where_the_embedding_is() -> None:
    """The first parameter of a model may be elsewhere; the embedding decides."""
    hf_model = tiny_hf_model("opt")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "spread")
    hf_model.model.decoder.layers[0].to("meta")
    assert model.device == torch.device("cpu")
    hf_model.model.decoder.embed_tokens.to("meta")  # offloaded: accelerate's hooks bring it when it is needed
    assert model.device == torch.device("cpu")
