"""SAELens' folder format, which is also ours: ``cfg.json`` + ``sae_weights.safetensors``.

Read and written so that SAELens 6 loads our SAEs unchanged (``SAE.load_from_disk``) and we load theirs. In their
vocabulary our ``relu`` is ``standard``. Our TopK SAEs have unit decoder rows and are written with
``rescale_acts_by_decoder_norm`` true, where that rescaling changes nothing.
"""

import json
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from activations.errors import InputError
from activations.files import new_folder, read_json, write_bytes, write_json
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

CONFIG = "cfg.json"
TENSORS = "sae_weights.safetensors"
# SAELens takes files without this key, or below 6.0.0, for its old layout and drops their metadata.
SAELENS_VERSION = "6.54.12"
_NAMES: dict[str, Literal["topk", "relu"]] = {"topk": "topk", "standard": "relu"}


def write_saelens(sae: SparseAutoencoder, folder: Path) -> None:
    """Write an SAE; the folder appears complete or not at all."""
    topk = sae.config.architecture == "topk"
    weights = sae.weights
    config: dict[str, Any] = {
        "architecture": "topk" if topk else "standard",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(sae.metadata.get("hook_name")).endswith(".hook_z") else "none",
        "metadata": {**sae.metadata, "sae_lens_version": SAELENS_VERSION},
    }
    if topk:
        # Without unit rows (an SAE from elsewhere) the flag would make another function of the same weights.
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": _has_unit_rows(weights.W_dec)}
    tensors = {
        "W_enc": weights.encoder_rows.t(),
        "b_enc": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    with new_folder(folder) as temporary:
        write_bytes(temporary / TENSORS, save(plain))
        write_json(temporary / CONFIG, config)


def read_saelens(folder: Path) -> SparseAutoencoder:
    """Read an SAE.

    Raises:
        InputError: a file is missing or corrupt, the tensors do not fit the configuration, or the architecture or
            an input normalisation is one we do not have.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no SAE: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in _NAMES:
        raise InputError(
            f"{folder / CONFIG} names the architecture {name!r}, and this saescope knows {', '.join(sorted(_NAMES))}."
        )
    topk = _NAMES[name] == "topk"
    try:
        d_in, d_sae = int(config["d_in"]), int(config["d_sae"])
        k = int(config["k"]) if topk else SAEConfig.k
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{folder / CONFIG} lacks a whole number for d_in, d_sae{' or k' if topk else ''}."
        ) from None
    sae_config = SAEConfig(architecture=_NAMES[name], d_sae=d_sae, k=k)
    sae_config.check()
    if config.get("normalize_activations", "none") not in ("none", "expected_average_only_in"):
        raise InputError(
            f"{folder / CONFIG} asks for normalize_activations={config['normalize_activations']!r} at run time, which"
            " this saescope does not do: fold the normalisation into the weights first."
        )
    tensors = _read_tensors(folder / TENSORS)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != shapes:
        raise InputError(f"{folder / TENSORS} holds {found}, where {CONFIG} promises {shapes}.")
    weights = Weights(tensors["W_enc"].t().contiguous(), tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
    if not config.get("apply_b_dec_to_input", True):
        weights = Weights(
            weights.encoder_rows,
            weights.b_enc + weights.encoder_rows @ weights.b_dec,
            weights.W_dec,
            weights.b_dec,
        )
    if topk and config.get("rescale_acts_by_decoder_norm", False):
        weights = _unit_decoder(weights)
    return SparseAutoencoder(sae_config, weights, dict(config.get("metadata") or {}))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path.parent} holds no SAE: it has no {path.name}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, json.JSONDecodeError, struct.error, OSError):
        raise InputError(f"{path} is corrupt: it is not a readable safetensors file.") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise InputError(f"{path} is corrupt: it holds values that are not finite.")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _unit_decoder(weights: Weights) -> Weights:
    """What rescaling by decoder norms makes of the weights: unit rows, activations grown by the norms."""
    if _has_unit_rows(weights.W_dec):
        return weights
    norms = weights.W_dec.norm(dim=1).clamp_min(1e-8)
    return Weights(
        weights.encoder_rows * norms[:, None],
        weights.b_enc * norms,
        weights.W_dec / norms[:, None],
        weights.b_dec,
    )


def _has_unit_rows(decoder: Tensor) -> bool:
    return bool(((decoder.norm(dim=1) - 1).abs() < 1e-6).all())
