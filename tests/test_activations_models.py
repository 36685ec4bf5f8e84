"""Loading a model, its dimensions and hash, capturing, and one clear sentence for what cannot be."""

import copy
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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

from activations import loading
from activations.errors import InputError
from activations.files import hash_json
from activations.hooked import computation_settings
from activations.models import LanguageModel


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_hf_model("llama")
    model.generation_config.eos_token_id = [0, 7]
    model.half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(name: str | Path, **options: Any) -> str:
    """The sentence with which loading is refused."""
    with pytest.raises(InputError) as error:
        LanguageModel.load(str(name), **options)
    return str(error.value)


def test_a_local_folder(saved: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(str(saved), device="cpu")
    assert model.name == str(saved)
    assert (model.n_layers, model.d_model, model.n_heads, model.d_head) == (3, 32, 4, 10)
    assert (model.d_vocab, model.context_length) == (320, CONTEXT_LENGTH)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32  # the checkpoint is float16, which is slow on a CPU
    assert LanguageModel.load(str(saved), dtype=torch.float16, device="cpu").dtype == torch.float16
    assert LanguageModel.load(str(saved), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert model.tokenizer.eos_ids == {0, 7}  # from generation_config.json
    moved = tmp_path / "moved"
    shutil.copytree(saved, moved)
    assert LanguageModel.load(str(moved), device="cpu", dtype="bfloat16").hash == model.hash
    ids = random_ids(1, 5)
    reference = tiny_hf_model("llama")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.half())
        expected = reference(ids).logits
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=0)


def test_the_bundled_model() -> None:
    model = LanguageModel.load(device="cpu")
    assert (model.name, model.n_layers, model.d_model, model.context_length) == ("builtin", 6, 256, 256)
    assert model.width("blocks.3.mlp.hook_post") == 704
    tokenizer = model.tokenizer
    # Its only special token is both BOS and end of text, and nothing adds it unasked.
    assert (tokenizer.bos_id, tokenizer.separator_id, tokenizer.adds_bos) == (0, 0, False)
    assert tokenizer.eos_ids == tokenizer.special_ids == {0}
    text = "def read(path):\n    return '€'\n"
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == text
    # An untrained model is at ln 4096 = 8.3 nats per token; this one was trained on such text.
    log_probabilities = model.logits(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    loss = -log_probabilities.gather(1, torch.tensor(ids[1:])[:, None]).mean()
    assert loss < 5
    with pytest.raises(InputError) as error:
        model.generate("def", max_new_tokens=256)
    assert str(error.value) == (
        "A prompt of 1 tokens and 256 new ones exceed the model's context of 256 tokens: at most 255 new"
        " tokens fit."
    )


def test_hash_of_a_model_in_memory() -> None:
    hf_model = tiny_hf_model("gpt2")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "mine")
    assert model.name == "mine"
    assert LanguageModel.from_hf(tiny_hf_model("gpt2"), tiny_tokenizer(), "yours").hash == model.hash
    assert LanguageModel.from_hf(tiny_hf_model("gpt2", seed=1), tiny_tokenizer(), "mine").hash != model.hash


def in_memory(config: Any) -> LanguageModel:
    """A Llama with this configuration whose weights do not depend on it."""
    return LanguageModel.from_hf(tiny_hf_model("llama", config=config), tiny_tokenizer(), "mine")


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"hidden_act": "gelu"},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_the_hash_covers_settings_that_shape_the_activations(settings: dict[str, Any]) -> None:
    plain, changed_config = tiny_language_model("llama"), tiny_config("llama")
    for name, value in settings.items():
        setattr(changed_config, name, value)
    changed = in_memory(changed_config)
    assert all(map(torch.equal, plain._hf_model.parameters(), changed._hf_model.parameters()))
    ids, hook = random_ids(1, 9), "blocks.2.hook_resid_post"
    assert not torch.allclose(plain.capture(ids, [hook])[hook], changed.capture(ids, [hook])[hook])
    assert changed.hash != plain.hash


def test_the_hash_covers_how_weights_are_quantised() -> None:
    config = tiny_config("llama")
    expected, hashes = computation_settings(config), set()
    for bits in (4, 8):
        config.quantization_config = {"quant_method": "gptq", "bits": bits}
        assert computation_settings(config) == {**expected, "quantization_config": config.quantization_config}
        hashes.add(hash_json(computation_settings(config)))
    assert len(hashes) == 2
    config.quantization_config = None
    assert computation_settings(config) == expected


def test_the_hash_leaves_out_settings_that_shape_nothing() -> None:
    hf_model = tiny_hf_model("llama")
    config = hf_model.config
    config.use_cache, config.pad_token_id, config.bos_token_id = False, 3, 5
    config.architectures, config._name_or_path, config.dtype = ["Llama"], "somewhere", torch.bfloat16
    config.output_hidden_states, config.id2label = True, {0: "good", 1: "bad"}
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "mine")
    assert model.hash == tiny_language_model("llama").hash
    eager = LanguageModel.from_hf(tiny_hf_model("llama", attention="eager"), tiny_tokenizer(), "mine")
    assert eager.hash == tiny_language_model("llama").hash


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3", "bert", "mamba"])
def test_the_hash_is_the_same_after_saving_and_loading(architecture: str, tmp_path: Path) -> None:
    def saved_and_loaded(hf_model: Any, folder: Path) -> LanguageModel:
        hf_model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return LanguageModel.load(str(folder), device="cpu")

    hf_model = tiny_hf_model(architecture)
    settings = computation_settings(hf_model.config)
    before = LanguageModel.from_hf(tiny_hf_model(architecture), tiny_tokenizer(), "mine").hash
    once = saved_and_loaded(hf_model, tmp_path / "once")
    twice = saved_and_loaded(once._hf_model, tmp_path / "twice")
    assert once.hash == twice.hash
    assert settings == computation_settings(hf_model.config) == computation_settings(once._hf_model.config)
    for model in (hf_model, once._hf_model):
        assert LanguageModel.from_hf(model, tiny_tokenizer(), "mine").hash == before
    assert settings["vocab_size"] == 320


WIDE_HEADS = {"llama", "qwen3", "gemma2", "gemma3_text", "gemma3", "qwen3_moe"}
"""Tiny models whose four heads are 10 wide, more than d_model / n_heads."""
LAYERS_OF_EXPERTS = {"mixtral": {0, 1, 2}, "qwen2_moe": {0, 2}, "qwen3_moe": {0, 2}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hook_widths(architecture: str) -> None:
    block = {
        "hook_resid_pre": 32,
        "attn.hook_z": 40 if architecture in WIDE_HEADS else 32,
        "hook_attn_out": 32,
        "hook_resid_mid": 32,
        "mlp.hook_in": 32,
        "mlp.hook_post": 72,
        "hook_mlp_out": 32,
        "hook_resid_post": 32,
    }
    expected = {f"blocks.{layer}.{name}": width for layer in range(3) for name, width in block.items()}
    for layer in range(3):
        if architecture == "gpt_neox":  # attention and MLP read the block's input in parallel
            del expected[f"blocks.{layer}.hook_resid_mid"]
        if layer in LAYERS_OF_EXPERTS.get(architecture, ()):  # each token goes through several
            del expected[f"blocks.{layer}.mlp.hook_post"]
    assert list(tiny_language_model(architecture).hook_widths().items()) == list(expected.items())


def test_capture_stops_after_the_last_hook_asked_for() -> None:
    hf_model = tiny_hf_model("llama")
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")
    ran: list[int] = []
    for index, layer in enumerate(hf_model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.capture(random_ids(1, 4), ["blocks.1.hook_resid_mid", "blocks.0.hook_resid_post"])
    assert ran == [0]
    assert model.capture(random_ids(1, 4), []) == {}
    assert ran == [0]


def test_captured_tensors_are_free_of_autograd_but_can_be_trained_on() -> None:
    x = tiny_language_model("llama").capture(random_ids(1, 4), ["blocks.1.hook_resid_post"])
    value = x["blocks.1.hook_resid_post"]
    assert not value.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (value * weight).sum().backward()  # an inference-mode tensor could not be saved for this
    assert weight.grad is not None


def test_captures_from_several_threads() -> None:
    model = tiny_language_model("gpt2")
    hook = "blocks.2.hook_resid_post"
    batches = [random_ids(2, 6, seed) for seed in range(12)]
    expected = [model.capture(ids, [hook])[hook] for ids in batches]
    found: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        for index in range(start, len(batches), 3):
            found[index] = model.capture(batches[index], [hook])[hook]

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], x) for index, x in enumerate(expected))


HOOK_SENTENCES = [
    (
        "llama",
        "blocks.1.hook_resid_posst",
        "blocks.1.hook_resid_posst does not exist; did you mean blocks.1.hook_resid_post?",
    ),
    (
        "llama",
        "blocks.3.hook_resid_post",
        "blocks.3.hook_resid_post does not exist: the layers of this model are 0 to 2.",
    ),
    (
        "gpt2",
        "blocks.1.attn.hook_x",
        "blocks.1.attn.hook_x does not exist; did you mean blocks.1.attn.hook_z?",
    ),
    (
        "gpt2",
        "residual",
        "residual does not exist: hooks bear TransformerLens names such as blocks.1.hook_resid_post.",
    ),
    (
        "gpt_neox",
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_mid does not exist: attention and MLP of this model read the block's input in"
        " parallel; the nearest hook is blocks.1.hook_resid_pre.",
    ),
]


@pytest.mark.parametrize("path", ["sdpa", "auto", "bridge"])
@pytest.mark.parametrize(("architecture", "hook", "sentence"), HOOK_SENTENCES)
def test_hooks_that_do_not_exist(architecture: str, hook: str, sentence: str, path: Any) -> None:
    model = tiny_language_model(architecture, path)
    for call in (lambda: model.width(hook), lambda: model.capture(random_ids(1, 4), [hook])):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == sentence


def test_hooks_that_no_sae_can_be_trained_on() -> None:
    model = tiny_language_model("llama")
    with pytest.raises(InputError) as error:
        model.width("blocks.0.attn.hook_pattern")
    assert str(error.value) == (
        "blocks.0.attn.hook_pattern gives a tensor of 4 dimensions, not one vector for each token: choose a"
        " hook such as hook_resid_post, hook_mlp_out or attn.hook_z."
    )
    with pytest.raises(InputError) as error:
        model.capture(random_ids(1, 4), ["blocks.0.hook_resid_post", "blocks.0.attn.hook_result"])
    assert str(error.value) == (
        "blocks.0.attn.hook_result did not fire: this model does not compute it in a forward pass."
    )
    with pytest.raises(InputError) as error:
        tiny_language_model("llama", "sdpa").width("blocks.0.attn.hook_pattern")
    assert str(error.value).startswith("blocks.0.attn.hook_pattern does not exist; did you mean blocks.0.")


def test_ids_that_cannot_be_read() -> None:
    model = tiny_language_model("llama")
    hook = ["blocks.0.hook_resid_post"]
    cases = [
        (
            lambda: model.capture(random_ids(1, CONTEXT_LENGTH + 1), hook),
            "A sequence of 65 tokens exceeds the model's context of 64 tokens.",
        ),
        (
            lambda: model.logits(random_ids(1, 4)[0]),
            "Token ids have shape (4,); they must be [batch, pos] with at least one position.",
        ),
        (
            lambda: model.logits(torch.empty(1, 0)),
            "Token ids have shape (1, 0); they must be [batch, pos] with at least one position.",
        ),
        (
            lambda: model.logits(random_ids(2, 4), attention_mask=padding_mask([4], "left")),
            "The attention mask has shape (1, 4); it must be (2, 4), the shape of the token ids.",
        ),
    ]
    for call, sentence in cases:
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == sentence


GIVE_FOLDER = "give the path of a folder that holds config.json, safetensors weights and a tokenizer"


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert refusal(missing) == (
        f"There is no folder {missing}, and it is no hub name either: give 'builtin', the path of a model"
        " folder or a name such as openai-community/gpt2."
    )
    file = tmp_path / "weights.txt"
    file.touch()
    assert refusal(file) == (
        f"{file} is a file, not a model: give the folder that holds config.json, safetensors weights and a"
        " tokenizer."
    )
    assert refusal(tmp_path) == (
        f"{tmp_path} is not a model: it has no config.json beside safetensors weights and a tokenizer."
    )


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    with socket.socket() as silent:  # accepts connections and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        assert loading.HUB_DEADLINE <= 8  # seconds, so that with the imports it fails within ten
        monkeypatch.setattr(loading, "HUB_DEADLINE", 0.3)
        start = time.monotonic()
        assert refusal("someone/model") == (
            "someone/model is no folder, and the Hugging Face hub cannot be reached to look for a model of"
            f" that name: {GIVE_FOLDER}."
        )
        assert time.monotonic() - start < 5
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_damaged_folders(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[:-100])
    assert refusal(folder) == f"{weights} is damaged or not a safetensors file: fetch it again."
    weights.write_bytes(b"not weights")
    assert refusal(folder) == f"{weights} is damaged or not a safetensors file: fetch it again."
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle would stand here")
    assert refusal(folder) == (
        f"{folder} holds no weights: a model needs *.safetensors files (no other format is read)."
    )

    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert refusal(folder) == (
        f"The weights in {folder} do not belong to its config.json: model.layers.1.mlp.up_proj.weight is"
        " missing (1 in all)."
    )
    weights.write_bytes(whole)

    config.write_text(json.dumps(json.loads(settings) | {"hidden_size": 64}))
    assert refusal(folder).startswith(f"The model in {folder} cannot be read: ")
    config.write_text("{")
    assert refusal(folder).startswith(f"{config} is not valid JSON (")
    config.write_text(settings)

    (folder / "tokenizer.json").write_text("{}")
    assert refusal(folder).startswith(f"The tokenizer in {folder} cannot be read: ")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refusal(folder) == (
        f"{folder} holds no tokenizer: save tokenizer.json and tokenizer_config.json beside the weights."
    )


def test_a_tokenizer_that_does_not_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    sentence = (
        "The tokenizer does not fit the model: its token ids go up to 319, and the model's embedding has 300"
        " rows."
    )
    assert refusal(folder) == sentence
    small = tiny_hf_model("llama")
    small.resize_token_embeddings(300)
    with pytest.raises(InputError) as error:
        LanguageModel.from_hf(small, tiny_tokenizer(), "tiny")
    assert str(error.value) == sentence


def test_a_special_token_that_only_another_part_of_a_model_knows() -> None:
    """Gemma 3's tokenizer has one for pictures, also beside its models of text, which have no row for it."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = LanguageModel.from_hf(tiny_hf_model("llama"), tokenizer, "tiny")
    with pytest.raises(InputError) as error:
        model.logits(torch.tensor([[5, 320]]))
    assert str(error.value) == (
        "Token id 320 does not exist: the embedding of tiny has 320 rows, so take ids of this model's tokenizer."
    )


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(
        f"open({str(trace)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder) == (
        f"{folder} holds a model of type 'evil', which this version of transformers does not know: update transformers,"
        " or choose another model."
    )
    assert not trace.exists()


def test_choices_that_do_not_exist(saved: Path) -> None:
    assert refusal(saved, dtype="int4") == "dtype is 'int4'; it must be 'float32', 'bfloat16' or 'float16'."
    assert refusal(saved, path="fast") == "path is 'fast'; it must be 'auto', 'sdpa' or 'bridge'."
    assert refusal(saved, device="tpu9") == (
        "The device 'tpu9' is not available on this machine; 'cpu' always is."
    )


def test_capturing_into_the_callers_tensors() -> None:
    model = tiny_language_model("gpt2")
    names = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    ids = random_ids(2, 6)
    plain = model.capture(ids, names)
    store = torch.full((2, 6, 100), 7.0)
    out = {names[0]: torch.empty(2, 6, 32, dtype=torch.float16), names[2]: store[..., 3:35]}
    found = model.capture(ids, names, out=out)
    assert found[names[0]] is out[names[0]]
    assert torch.equal(out[names[0]], plain[names[0]].half())
    assert torch.equal(store[..., 3:35], plain[names[2]])
    assert bool((store[..., :3] == 7).all() and (store[..., 35:] == 7).all())
    assert torch.equal(found[names[1]], plain[names[1]])
    with pytest.raises(InputError) as error:
        model.capture(ids, names, out={names[0]: torch.empty(2, 6, 31)})
    assert str(error.value) == (
        "The buffer for blocks.0.hook_mlp_out has shape (2, 6, 31); it must be (2, 6, 32), the shape of what flows"
        " there."
    )
    with pytest.raises(InputError) as error:
        model.capture(ids, names[1:], out=out)
    assert str(error.value) == (
        "out holds a buffer for blocks.0.hook_mlp_out, which is not among the hooks to capture."
    )


def test_every_process_on_a_machine_takes_its_own_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert loading.resolve_device(None) == torch.device("cuda")
    for rank in (0, 3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert loading.resolve_device(None) == torch.device("cuda", rank)
        assert loading.resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert loading.resolve_device(None) == torch.device("cpu")


def test_the_device_is_chosen_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert loading.resolve_device(None).type == expected
        chosen = loading.resolve_dtype(None, torch.device(expected))
        assert chosen == (torch.float32 if expected == "cpu" else None)  # None: the checkpoint's own
