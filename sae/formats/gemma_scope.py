"""Gemma Scope's formats: ``params.npz`` of the first release, ``config.json`` + ``params.safetensors`` of the second.

Both hold JumpReLU SAEs whose encoder reads x itself, ``z = x w_enc + b_enc``, ``f = relu(z) · 1[z > threshold]``,
``x̂ = f w_dec + b_dec`` (2408.05147): b_dec is folded into the encoder's bias. The same files hold transcoders, in the
second release with an affine connection as well, ``ŷ = f w_dec + b_dec + x affine_skip_connection``.

The first release has no configuration: where an SAE belongs is read from the names of its repository and folders.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from activations.errors import InputError
from activations.files import read_json
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.formats.folding import with_input_bias
from sae.formats.origin import hook_of_module, with_origin
from sae.formats.reading import as_table, check_tensors, matrix_shape
from sae.model import SparseAutoencoder

FIRST, SECOND = "gemma_scope", "gemma_scope_2"
CONFIG = "config.json"
SKIP = "affine_skip_connection"


def read_gemma_scope(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE or a transcoder of the first release.

    Args:
        file: ``params.npz``. content: what it holds.

    Raises:
        InputError: the tensors do not fit each other.
    """
    tensors = _tensors(file, content)
    found = _found_in_names(file)
    transcoder = "hook_name_out" in found or _changes_width(tensors)
    return _sae(tensors, transcoder, with_origin(found, FIRST, {}))


def read_gemma_scope_2(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE, a transcoder or an affine transcoder of the second release.

    Args:
        file: ``params.safetensors``. content: what it holds.

    Raises:
        InputError: it is a cross-layer transcoder, of another architecture, or its tensors do not fit each other.
    """
    if getattr(content["w_dec"], "ndim", 0) == 3:
        raise InputError(
            f"{file} holds a cross-layer transcoder, which writes to several layers: this saescope reads SAEs and"
            " transcoders to one hook."
        )
    path = file.parent / CONFIG
    config = as_table(read_json(path)) if path.is_file() else {}
    named = config.get("architecture", "jump_relu")
    if named != "jump_relu":
        raise InputError(
            f"{path} names the architecture {named!r}, and Gemma Scope's files are of jump_relu."
        )
    tensors = _tensors(file, content)
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    transcoder = SKIP in tensors or writes not in (None, reads) or _changes_width(tensors)
    found = {
        "model_name": config.get("model_name"),
        "hook_name": hook_of_module(reads),
        "hook_name_out": hook_of_module(writes) if transcoder else None,
    }
    return _sae(tensors, transcoder, with_origin(found, SECOND, config))


def _tensors(file: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    d_in, d_sae = matrix_shape(file, content, "w_enc")
    _, d_out = matrix_shape(file, content, "w_dec")
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (d_in, d_sae),
        "w_dec": (d_sae, d_out),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
    }
    if SKIP in content:
        shapes[SKIP] = (d_in, d_out)
    return check_tensors(file, content, shapes, "its format")


def _changes_width(tensors: dict[str, Tensor]) -> bool:
    return tensors["w_dec"].shape[1] != tensors["w_enc"].shape[0]


def _sae(tensors: dict[str, Tensor], transcoder: bool, metadata: dict[str, Any]) -> SparseAutoencoder:
    skip = tensors.get(SKIP)
    weights = Weights(
        tensors["w_enc"].t().contiguous(),
        tensors["b_enc"],
        tensors["w_dec"],
        tensors["b_dec"],
        threshold=tensors["threshold"],
        W_skip=None if skip is None else skip.t().contiguous(),
    )
    config = SAEConfig(
        architecture="jumprelu",
        d_sae=len(tensors["w_dec"]),
        transcoder=transcoder,
        skip=skip is not None,
    )
    return SparseAutoencoder(config, weights if transcoder else with_input_bias(weights), metadata)


def _found_in_names(file: Path) -> dict[str, Any]:
    """Model and hook, of a file in ``…gemma-scope-2b-pt-res…/layer_20/width_16k/average_l0_71/params.npz``."""
    text = file.as_posix()
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b", text)
    layer = re.search(r"/layer_(\d+)/", text)
    if repository is None:
        return {}
    size, kind, place = repository.groups()
    found = {"model_name": f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")}
    if layer is None:  # of the embedding
        return found
    hooks = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "mlp.hook_in",
    }
    found["hook_name"] = f"blocks.{layer[1]}.{hooks[place]}"
    if place == "transcoders":
        found["hook_name_out"] = f"blocks.{layer[1]}.hook_mlp_out"
    return found
