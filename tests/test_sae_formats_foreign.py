"""Gemma Scope, Gemma Scope 2, Llama Scope and OpenAI: the published formula, in dense float64, from the file's tensors.

The files of the first three are in ``fixtures/saelens/foreign``, with what SAELens makes of the same ones.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from sae.formats.convert import convert
from sae.formats.detect import load
from sae.formats.reading import read_content
from sae.model import SparseAutoencoder

FOREIGN = Path(__file__).parent / "fixtures" / "saelens" / "foreign"
GEMMA = FOREIGN / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_4"
GEMMA_TRANSCODER = FOREIGN / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_4"
GEMMA_2 = FOREIGN / "gemma-scope-2-1b-pt"
LLAMA = FOREIGN / "Llama3_1-8B-Base-LXR-8x" / "Llama3_1-8B-Base-L1R-8x"
LLAMA_LATER = FOREIGN / "Llama-Scope-R1-Distill" / "400M" / "L1R"
HOOK = "blocks.1.hook_resid_post"

x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


def check(sae: SparseAutoencoder, codes: Tensor, output: Tensor) -> None:
    """Compare with what a formula gives for ``x``."""
    assert codes.count_nonzero() > 32
    found = sae.encode(x)
    close(found.to_dense(), codes)
    close(sae.decode(found, x), output)
    close(sae(x), output)


def doubles(path: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in read_content(path).items()}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


def gemma_formula(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    z = x.double() @ t["w_enc"] + t["b_enc"]
    codes = z.relu() * (z > t["threshold"])
    output = codes @ t["w_dec"] + t["b_dec"]
    return codes, output + x.double() @ t[
        "affine_skip_connection"
    ] if "affine_skip_connection" in t else output


@pytest.mark.parametrize("folder", [GEMMA, GEMMA_TRANSCODER], ids=["sae", "transcoder"])
def test_gemma_scope(folder: Path) -> None:
    sae = load(folder)
    check(sae, *gemma_formula(doubles(folder / "params.npz")))
    assert load(folder / "params.npz").hash == sae.hash
    assert sae.metadata["model_name"] == "google/gemma-2-2b"
    if folder is GEMMA:
        assert sae.hook_name == sae.hook_out == HOOK
    else:
        assert (sae.hook_name, sae.hook_out) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


@pytest.mark.parametrize("kind", ["resid_post", "transcoder", "transcoder_affine"])
def test_gemma_scope_2(kind: str) -> None:
    folder = GEMMA_2 / kind / "layer_1_width_16k_l0_small"
    sae = load(folder)
    check(sae, *gemma_formula(doubles(folder / "params.safetensors")))
    assert sae.metadata["model_name"] == "google/gemma-3-1b-pt"
    if kind == "resid_post":
        assert sae.hook_name == sae.hook_out == HOOK
    else:
        assert (sae.hook_name, sae.hook_out) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
        assert (sae.d_out, sae.W_skip is not None) == (6, kind == "transcoder_affine")


def llama_formula(
    t: dict[str, Tensor], scale_in: float, scale_out: float, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """On activations whose mean norm is √d_model, before anything is folded; ``theta`` for those."""
    z = (x.double() * scale_in) @ t["encoder.weight"].t() + t["encoder.bias"]
    codes = z.relu() * (z * t["decoder.weight"].norm(dim=0) > theta)
    output = codes @ t["decoder.weight"].t() + t["decoder.bias"]
    return codes / scale_in, output / scale_out


def test_llama_scope() -> None:
    """θ is stated in the units of the activations: normalised, it is θ · √d_model / norm."""
    config = json.loads((LLAMA / "hyperparams.json").read_text())
    scale = math.sqrt(8) / config["dataset_average_activation_norm"]["in"]
    theta = torch.tensor(config["jump_relu_threshold"] * scale)
    sae = load(LLAMA)
    check(sae, *llama_formula(doubles(LLAMA / "checkpoints" / "final.safetensors"), scale, scale, theta))
    assert (sae.hook_name, sae.metadata["model_name"]) == (HOOK, "meta-llama/Llama-3.1-8B")
    assert load(LLAMA / "checkpoints" / "final.safetensors").hash == sae.hash


def test_a_llama_scope_transcoder(tmp_path: Path) -> None:
    """Two norms; the decoder has unit rows once it is in the units of the output, where θ was measured."""
    folder = tmp_path / "Llama3_1-8B-Base-L1TC-8x"
    shutil.copytree(LLAMA, folder)
    config = json.loads((folder / "hyperparams.json").read_text())
    config |= {
        "hook_point_out": "blocks.1.hook_mlp_out",
        "dataset_average_activation_norm": {"in": 2.0, "out": 0.5},
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    t = doubles(folder / "checkpoints" / "final.safetensors")
    scale_in, scale_out = math.sqrt(8) / 2.0, math.sqrt(8) / 0.5
    # A pre-activation z of the normalised input is z / s_in in the units of the input, and the decoder W s_in / s_out.
    theta = torch.tensor(config["jump_relu_threshold"] * scale_out)
    sae = load(folder)
    check(sae, *llama_formula(t, scale_in, scale_out, theta))
    assert (sae.hook_name, sae.hook_out) == (HOOK, "blocks.1.hook_mlp_out")


@pytest.mark.parametrize("names", ["linear", "parameters"])
def test_llama_scope_later(names: str, tmp_path: Path) -> None:
    """log θ per feature for normalised activations, the norm among the tensors; decoder rows of any norm."""
    folder = tmp_path / "L1R"
    shutil.copytree(LLAMA_LATER, folder)
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["decoder.weight"] = (tensors["decoder.weight"] * torch.rand(24) * 2).contiguous()
    t = {name: tensor.double() for name, tensor in tensors.items()}
    if names == "parameters":
        renamed = {
            "W_E": "encoder.weight",
            "b_E": "encoder.bias",
            "W_D": "decoder.weight",
            "b_D": "decoder.bias",
        }
        for new, old in renamed.items():
            tensors[new] = tensors.pop(old).t().contiguous()
        threshold = tensors.pop("log_jumprelu_threshold")
        tensors["activation_function.log_jumprelu_threshold"] = threshold
    save_file(tensors, file)
    scale = math.sqrt(8) / float(t[f"dataset_average_activation_norm.{HOOK}"])
    check(load(folder), *llama_formula(t, scale, scale, t["log_jumprelu_threshold"].exp()))


def test_llama_scope_by_topk(tmp_path: Path) -> None:
    folder = tmp_path / "L1R"
    shutil.copytree(LLAMA_LATER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"act_fn": "topk", "norm_activation": "inference"})
    )
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["decoder.weight"] *= torch.rand(24) * 2
    del tensors["log_jumprelu_threshold"]
    save_file(tensors, file)
    t = doubles(file)
    z = (x.double() @ t["encoder.weight"].t() + t["encoder.bias"]).relu()
    gate = z * t["decoder.weight"].norm(dim=0)
    codes = torch.zeros_like(z).scatter(1, gate.topk(4).indices, 1.0) * z
    sae = load(folder)
    # Ours has decoder rows of norm 1: activations are larger by the norms.
    check(sae, codes * t["decoder.weight"].norm(dim=0), codes @ t["decoder.weight"].t() + t["decoder.bias"])


SAELENS_READS = [
    GEMMA,
    GEMMA_TRANSCODER,
    *(
        GEMMA_2 / kind / "layer_1_width_16k_l0_small"
        for kind in ("resid_post", "transcoder", "transcoder_affine")
    ),
    LLAMA,
    LLAMA_LATER,
]


@pytest.mark.parametrize("folder", SAELENS_READS, ids=lambda folder: str(folder.relative_to(FOREIGN)))
def test_saelens_makes_the_same_of_it(folder: Path) -> None:
    """Codes up to their units: SAELens leaves those of Llama Scope in the units of the normalised activations."""
    expected = load_file(folder / "expected.safetensors")
    sae = load(folder)
    scale = math.sqrt(8) / 1.25 if folder in (LLAMA, LLAMA_LATER) else 1.0
    codes = sae.encode(expected["x"])
    close(codes.to_dense() * scale, expected["codes"])
    close(sae.decode(codes, expected["x"]), expected["reconstruction"])


# ---- OpenAI


def openai_file(folder: Path, activation: str | None = "TopK", **more: Any) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"pre_bias": (8,), "encoder.weight": (24, 8), "latent_bias": (24,), "decoder.weight": (8, 24)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    content: dict[str, Any] = {
        **tensors,
        "stats_last_nonzero": torch.zeros(24, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(24, dtype=torch.int64),
        "latents_mean_square": torch.ones(24),
        **more,
    }
    if activation is not None:
        content |= {"activation": activation, "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}
    path = folder / "11.pt"
    torch.save(content, path)
    return path, {name: tensor.double() for name, tensor in tensors.items()}


def test_openai_topk(tmp_path: Path) -> None:
    """Every vector is normalised before it is encoded; activations are in the units of what came in."""
    path, t = openai_file(tmp_path)
    mean, std = x.double().mean(1, keepdim=True), x.double().std(1, keepdim=True)
    n = (x.double() - mean) / (std + 1e-5)
    z = (n - t["pre_bias"]) @ t["encoder.weight"].t() + t["latent_bias"]
    top = z.topk(4)
    codes = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    output = (codes @ t["decoder.weight"].t() + t["pre_bias"]) * std + mean
    check(load(path), codes * std, output)
    assert load(tmp_path).hash == load(path).hash  # it is the only file of weights in its folder


@pytest.mark.parametrize("named", ["ReLU", None])
def test_openai_relu(named: str | None, tmp_path: Path) -> None:
    path, t = openai_file(tmp_path, named)
    codes = ((x.double() - t["pre_bias"]) @ t["encoder.weight"].t() + t["latent_bias"]).relu()
    check(load(path), codes, codes @ t["decoder.weight"].t() + t["pre_bias"])


def test_a_normalising_sae_decodes_with_its_input_only(tmp_path: Path) -> None:
    path, _ = openai_file(tmp_path)
    sae = load(path)
    with pytest.raises(InputError, match="give decode the x that was encoded"):
        sae.decode(sae.encode(x))
    convert(path, tmp_path / "ours")
    close(SparseAutoencoder.load(tmp_path / "ours")(x), sae(x))
    constant = torch.full((1, 8), 3.0)  # no deviation to divide by
    close(sae(constant), constant)
    assert bool((sae.encode(constant).values != 0).all())


def test_openai_activations_that_we_do_not_have(tmp_path: Path) -> None:
    path, _ = openai_file(tmp_path, "Identity")
    assert refusal(path) == (
        f"{path} has the activation 'Identity' with k = 4: ReLU, or TopK with its k, is read."
    )


# ---- what is refused


def test_a_cross_layer_transcoder(tmp_path: Path) -> None:
    folder = tmp_path / "clt"
    shutil.copytree(GEMMA_2 / "transcoder" / "layer_1_width_16k_l0_small", folder)
    tensors = load_file(folder / "params.safetensors")
    save_file({**tensors, "w_dec": torch.randn(24, 3, 6)}, folder / "params.safetensors")
    assert "holds a cross-layer transcoder" in refusal(folder)


def test_another_architecture_in_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "topk"
    shutil.copytree(GEMMA_2 / "resid_post" / "layer_1_width_16k_l0_small", folder)
    (folder / "config.json").write_text('{"architecture": "topk"}')
    assert refusal(folder) == (
        f"{folder / 'config.json'} names the architecture 'topk', and Gemma Scope's files are of jump_relu."
    )


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"use_glu_encoder": True}, "asks for a gated linear unit as the encoder"),
        ({"act_fn": "batchtopk"}, "asks for the activation 'batchtopk', and relu, topk, jumprelu are read"),
        (
            {"norm_activation": "token-wise"},
            "asks for norm_activation 'token-wise', and dataset-wise and inference",
        ),
        ({"dataset_average_activation_norm": {}}, f"says {HOOK} = None, and it must be a number above 0."),
        (
            {"jump_relu_threshold": "high"},
            "says jump_relu_threshold = 'high', and it must be a number above 0.",
        ),
    ],
)
def test_settings_of_llama_scope_that_we_do_not_have(
    keys: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "L1R"
    shutil.copytree(LLAMA, folder)
    path = folder / "hyperparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    assert sentence in refusal(folder)


def test_llama_scope_without_its_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "L1R"
    shutil.copytree(LLAMA, folder)
    (folder / "hyperparams.json").unlink()
    assert refusal(folder) == (
        f"{folder / 'checkpoints' / 'final.safetensors'} cannot be read alone: it lacks the hyperparams.json or"
        " config.json of its release."
    )


@pytest.mark.parametrize("change", ["missing", "shape", "not finite"])
def test_tensors_that_do_not_fit(change: str, tmp_path: Path) -> None:
    with np.load(GEMMA / "params.npz") as arrays:
        found = dict(arrays)
    if change == "missing":
        del found["b_dec"]
    elif change == "shape":
        found["b_dec"] = np.zeros(9, np.float32)
    else:
        found["b_dec"] = np.full(8, np.inf, np.float32)
    np.savez(tmp_path / "params.npz", **found)
    if change == "not finite":
        assert (
            refusal(tmp_path) == f"{tmp_path / 'params.npz'} is corrupt: it holds values that are not finite."
        )
    else:
        assert "where its format promises {'w_enc': (8, 24), 'w_dec': (24, 8)" in refusal(tmp_path)
