"""Llama Scope's formats: ``hyperparams.json`` + ``checkpoints/final.safetensors``, and ``config.json`` +
``sae_weights.safetensors`` of later releases (OpenMOSS' own format, by whatever names its tensors went).

The weights work on ``x · s_in`` with ``s = √d_model / (mean norm of the activations)`` and give ``y · s_out``; here
they are in the units of x and y, as OpenMOSS' own inference form has them (2410.20526). The encoder reads x itself, so
b_D is folded into its bias unless it is a transcoder. With ``sparsity_include_decoder_norm`` (the default) a
pre-activation is judged by its product with the norm of its decoder row; activations are not changed by that:

    f_i = z_i · 1[z_i ‖W_D,i‖ > θ]

The first releases state one θ for all features, for weights in the units of x; later ones log θ per feature, for the
weights as they lie in the file.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import read_json
from sae.architectures.base import Weights
from sae.config import ArchitectureName, SAEConfig
from sae.formats.folding import in_units_of_activations, unit_decoder, with_input_bias
from sae.formats.origin import with_origin
from sae.formats.reading import as_table, check_tensors, matrix_shape, number, whole
from sae.model import SparseAutoencoder

FORMAT = "llama_scope"
CONFIGS = ("hyperparams.json", "config.json")
NORM = "dataset_average_activation_norm"
_NAMES = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}
_LOG_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_ARCHITECTURES: dict[Any, ArchitectureName] = {"relu": "relu", "topk": "topk", "jumprelu": "jumprelu"}


def read_llama_scope(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE or a transcoder.

    Args:
        file: ``checkpoints/final.safetensors`` or ``sae_weights.safetensors``. content: what it holds.

    Raises:
        InputError: its configuration is missing, asks for what we do not have, or does not fit the tensors.
    """
    path = _config_beside(file)
    config = as_table(read_json(path))
    architecture = _architecture(path, config)
    weights = _weights(file, content, config)
    d_sae, d_in = weights.encoder_rows.shape
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    transcoder = writes not in (None, reads) or weights.W_dec.shape[1] != d_in
    by_norm = config.get("sparsity_include_decoder_norm", True)
    if weights.threshold is not None:
        weights = replace(weights, threshold=_judged(weights.threshold, weights.W_dec, by_norm))
    weights = in_units_of_activations(weights, *_scales(path, config, content, d_in))
    if architecture == "jumprelu" and weights.threshold is None:
        theta = torch.full((d_sae,), number(path, config, "jump_relu_threshold"), dtype=torch.float64)
        weights = replace(weights, threshold=_judged(theta, weights.W_dec, by_norm))
    if architecture == "topk" and by_norm:
        weights = unit_decoder(weights)
    k = whole(path, config, "top_k") if architecture == "topk" else SAEConfig.k
    sae_config = SAEConfig(architecture=architecture, d_sae=d_sae, k=k, transcoder=transcoder)
    sae_config.check()
    is_llama = "Llama3_1-8B-Base" in file.as_posix()  # its files name hooks, but no model
    found = {
        "model_name": "meta-llama/Llama-3.1-8B" if is_llama else config.get("model_name"),
        "hook_name": reads,
        "hook_name_out": writes if transcoder else None,
    }
    return SparseAutoencoder(
        sae_config, weights if transcoder else with_input_bias(weights), with_origin(found, FORMAT, config)
    )


def _judged(theta: Tensor, decoder: Tensor, by_norm: bool) -> Tensor:
    """Thresholds of pre-activations, from those of their products with decoder norms."""
    norms = decoder.double().norm(dim=1).clamp_min(1e-20) if by_norm else 1.0
    return (theta.double() / norms).float()


def _config_beside(file: Path) -> Path:
    folders = [file.parent, *([file.parent.parent] if file.parent.name == "checkpoints" else [])]
    found = [folder / name for folder in folders for name in CONFIGS if (folder / name).is_file()]
    if not found:
        raise InputError(f"{file} cannot be read alone: it lacks the {' or '.join(CONFIGS)} of its release.")
    return found[0]


def _architecture(path: Path, config: dict[str, Any]) -> ArchitectureName:
    if config.get("use_glu_encoder"):
        raise InputError(
            f"{path} asks for a gated linear unit as the encoder, which this saescope does not have."
        )
    named = str(config.get("act_fn", "jumprelu")).lower()
    if named not in _ARCHITECTURES:
        raise InputError(
            f"{path} asks for the activation {named!r}, and {', '.join(_ARCHITECTURES)} are read (a BatchTopK SAE has"
            " no threshold in this format: it cannot be used outside of training)."
        )
    return _ARCHITECTURES[named]


def _weights(file: Path, content: dict[str, Any], config: dict[str, Any]) -> Weights:
    """The tensors as they lie in the file, a threshold in the units of the normalised activations."""
    named = {name: value for name, value in content.items() if not name.startswith(NORM)}
    transposed = "W_E" in named
    tensors = {_NAMES.get(name, name): value for name, value in named.items()}
    d_sae, d_in = matrix_shape(file, tensors, "encoder.weight")[:: -1 if transposed else 1]
    sizes = matrix_shape(file, tensors, "decoder.weight")
    d_out = sizes[1] if transposed else sizes[0]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_in, d_sae) if transposed else (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_sae, d_out) if transposed else (d_out, d_sae),
        "decoder.bias": (d_out,),
    }
    if not config.get("use_decoder_bias", True):
        del shapes["decoder.bias"]
    shapes |= {name: (d_sae,) for name in _LOG_THRESHOLDS if name in tensors}
    plain = check_tensors(file, tensors, shapes, "its format")

    def rows(name: str, lies_transposed: bool) -> Tensor:
        return plain[name].t().contiguous() if lies_transposed else plain[name]

    log_threshold = next((plain[name] for name in _LOG_THRESHOLDS if name in plain), None)
    jumps = str(config.get("act_fn", "jumprelu")).lower() == "jumprelu"
    return Weights(
        rows("encoder.weight", transposed),
        plain["encoder.bias"],
        rows("decoder.weight", not transposed),
        plain.get("decoder.bias", torch.zeros(d_out)),
        threshold=log_threshold.exp() if jumps and log_threshold is not None else None,
    )


def _scales(path: Path, config: dict[str, Any], content: dict[str, Any], d_in: int) -> tuple[float, float]:
    """What inputs were multiplied by, and outputs have to be divided by."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise InputError(
            f"{path} asks for norm_activation {kind!r}, and dataset-wise and inference are read."
        )
    norms = as_table(config.get(NORM))
    prefix = f"{NORM}."
    norms |= {
        name.removeprefix(prefix): float(value) for name, value in content.items() if name.startswith(prefix)
    }
    reads = "in" if "in" in norms else str(config.get("hook_point_in"))
    writes = "out" if "out" in norms else str(config.get("hook_point_out") or reads)
    width = math.sqrt(d_in)
    return width / number(path, norms, reads), width / number(path, norms, writes)
