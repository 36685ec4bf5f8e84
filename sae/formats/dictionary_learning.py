"""dictionary_learning's format: ``ae.pt`` (a pickled state_dict) + ``config.json``; all its classes.

How its classes compute, and what becomes of them here (``dictionary.py``, ``trainers/`` of version 0.1.0):

    AutoEncoder             relu(W_enc (x − bias) + b), bias added again           relu
    AutoEncoderNew          relu(W_enc x + b)                                      relu, bias folded
    AutoEncoderTopK         top-k of relu(W_enc (x − b_dec) + b)                   topk
    BatchTopKSAE            the same above one threshold (−1: not yet measured)    jumprelu
    MatryoshkaBatchTopKSAE  the same                                               jumprelu
    GatedAutoEncoder        gate and magnitude of x − decoder_bias                 gated
    JumpReluAutoEncoder     W_enc x + b above a threshold per feature              jumprelu, bias folded

Written is the class that an SAE was read as, else the plainest that computes the same: of ``jumprelu`` SAEs with one
threshold for all features (what BatchTopK and Matryoshka leave) that is BatchTopKSAE, whose input is centred like ours.

Two classes do not take the decoder's bias off their input: it is folded into the encoder's on reading and out of it
on writing, which gives that bias back to within one rounding of float32; everything else comes back bit by bit.
What was trained with the buffer's ``io`` "in_and_out" is a transcoder, and its class's bias is folded likewise. The
library normalises an AutoEncoder's decoder when it loads one: ours stays as it lies in the file.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.files import new_folder, read_json, write_bytes, write_json
from sae.architectures.base import Weights
from sae.config import ArchitectureName, SAEConfig
from sae.formats.folding import constant, with_input_bias, without_input_bias
from sae.formats.origin import OURS, hook_of_module, origin_of, with_origin
from sae.formats.reading import as_table, check_tensors, matrix_shape
from sae.model import SparseAutoencoder

FORMAT = "dictionary_learning"
CONFIG = "config.json"
TENSORS = "ae.pt"
_SCALARS = ("k", "threshold", "group_sizes")
_MEANINGS = {"k": "a whole number", "threshold": "a number", "group_sizes": "a list of widths"}
_LINEAR = {"encoder.weight": "encoder_rows", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_PARAMETERS = {"W_enc": "encoder_rows.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


@dataclass(frozen=True)
class _Class:
    """One of its classes: which of our weights each tensor is (``.T``: transposed), and what it does with them.

    centred: whether the decoder's bias is taken off the input. scalars: the buffers beside the weights.
    """

    architecture: ArchitectureName
    tensors: Mapping[str, str]
    centred: bool = True
    scalars: tuple[str, ...] = ()


_CLASSES = {
    "AutoEncoder": _Class("relu", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": _Class("relu", {**_LINEAR, "decoder.bias": "b_dec"}, centred=False),
    "AutoEncoderTopK": _Class("topk", {**_LINEAR, "b_dec": "b_dec"}, scalars=("k", "threshold")),
    "BatchTopKSAE": _Class("jumprelu", {**_LINEAR, "b_dec": "b_dec"}, scalars=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _PARAMETERS, scalars=_SCALARS),
    "GatedAutoEncoder": _Class(
        "gated",
        {
            "encoder.weight": "encoder_rows",
            "gate_bias": "b_enc",
            "mag_bias": "b_mag",
            "r_mag": "r_mag",
            "decoder.weight": "W_dec.T",
            "decoder_bias": "b_dec",
        },
    ),
    "JumpReluAutoEncoder": _Class("jumprelu", {**_PARAMETERS, "threshold": "threshold"}, centred=False),
}
_WRITTEN_AS = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
}


def read_dictionary_learning(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE from a trainer's folder.

    Args:
        file: ``ae.pt``, or a checkpoint. content: what it holds.

    Raises:
        InputError: the tensors are of no class of the library, or do not fit its ``config.json``.
    """
    config = _config_beside(file)
    trainer, buffer = as_table(config.get("trainer")), as_table(config.get("buffer"))
    content = content["ae"] if isinstance(content.get("ae"), dict) else content  # a backup made in training
    name = _class_of(file, content, trainer.get("dict_class"))
    kind = _CLASSES[name]
    big = {key: value for key, value in content.items() if key not in kind.scalars}
    encoder = "encoder.weight" if "encoder.weight" in kind.tensors else "W_enc"
    sizes = matrix_shape(file, big, encoder)
    d_sae, d_in = sizes if encoder == "encoder.weight" else sizes[::-1]
    shapes = {key: _shape(ours, d_in, d_sae) for key, ours in kind.tensors.items()}
    tensors = check_tensors(file, big, shapes, f"the class {name}")
    scalars = _read_scalars(file, content, kind, trainer)
    weights = _weights(kind, tensors, scalars, d_sae)
    transcoder = buffer.get("io") == "in_and_out"
    if transcoder and kind.centred:
        weights = without_input_bias(weights)
    elif not transcoder and not kind.centred:
        weights = with_input_bias(weights)
    k = int(scalars["k"]) if name == "AutoEncoderTopK" else SAEConfig.k
    sae_config = SAEConfig(architecture=kind.architecture, d_sae=d_sae, k=k, transcoder=transcoder)
    sae_config.check()
    hook_in, hook_out = _hooks(trainer, transcoder)
    found = {
        "model_name": trainer.get("lm_name"),
        "hook_name": hook_in,
        "hook_name_out": hook_out,
        "context_size": buffer.get("ctx_len"),
    }
    return SparseAutoencoder(
        sae_config, weights, with_origin(found, FORMAT, config, dict_class=name, scalars=scalars)
    )


def write_dictionary_learning(sae: SparseAutoencoder, folder: Path) -> None:
    """Write ``ae.pt`` and ``config.json``; the folder appears complete or not at all.

    Raises:
        InputError: no class of the library computes what this SAE does.
    """
    origin = origin_of(sae, FORMAT)
    name = _written_as(sae, origin)
    kind = _CLASSES[name]
    weights = sae.weights
    if sae.config.transcoder and kind.centred:
        weights = with_input_bias(weights)
    elif not sae.config.transcoder and not kind.centred:
        weights = without_input_bias(weights)
    tensors = {
        key: _turned(getattr(weights, ours.removesuffix(".T")), ours) for key, ours in kind.tensors.items()
    }
    scalars = {"k": _k(sae), **(origin.get("scalars") or {})}
    if name == "AutoEncoderTopK":
        scalars["k"] = sae.config.k
    if kind.architecture == "jumprelu" and kind.scalars:
        assert weights.threshold is not None
        scalars["threshold"] = constant(weights.threshold)
    state = {key: tensor.detach().cpu().float().contiguous() for key, tensor in tensors.items()}
    state |= _scalar_tensors(kind, scalars)
    stream = io.BytesIO()
    torch.save(state, stream)
    with new_folder(folder) as temporary:
        write_bytes(temporary / TENSORS, stream.getvalue())
        as_read = origin.get("config") if origin.get("dict_class") == name else None
        write_json(temporary / CONFIG, as_read or _config_for(sae, name, scalars))


def _class_of(file: Path, content: Mapping[str, Any], named: object) -> str:
    """The class that a state_dict is of: the one that the configuration names, if its tensors are these."""
    names = set(content)
    fitting = [
        name
        for name, kind in _CLASSES.items()
        if set(kind.tensors) <= names and names <= set(kind.tensors) | set(kind.scalars)
    ]
    if named is None and len(fitting) == 1:
        return fitting[0]
    if named is None and fitting:
        raise InputError(
            f"{file} may be of the class {' or '.join(fitting)}: put the {CONFIG} that the library wrote beside it."
        )
    if named not in fitting:
        raise InputError(
            f"{file} holds the tensors {', '.join(sorted(names))}, which are not those of"
            f" {f'the class {named}' if named is not None else 'any class of dictionary_learning'}."
        )
    return str(named)


def _shape(ours: str, d_in: int, d_sae: int) -> tuple[int, ...]:
    """Of the tensor that is this one of our weights."""
    shape = {"encoder_rows": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}.get(
        ours.removesuffix(".T"), (d_sae,)
    )
    return shape[::-1] if ours.endswith(".T") else shape


def _turned(tensor: Tensor, ours: str) -> Tensor:
    return tensor.t().contiguous() if ours.endswith(".T") else tensor


def _weights(kind: _Class, tensors: dict[str, Tensor], scalars: dict[str, Any], d_sae: int) -> Weights:
    found = {ours.removesuffix(".T"): _turned(tensors[key], ours) for key, ours in kind.tensors.items()}
    if kind.architecture == "jumprelu" and kind.scalars:
        found["threshold"] = torch.full((d_sae,), float(scalars["threshold"]))
    return Weights(**found)


def _read_scalars(
    file: Path, content: Mapping[str, Any], kind: _Class, trainer: Mapping[str, Any]
) -> dict[str, Any]:
    """k, threshold and group sizes as plain numbers; files of early versions have them in the configuration only."""
    given: dict[str, Any] = {
        "k": trainer.get("k"),
        "threshold": -1.0,
        "group_sizes": trainer.get("group_sizes"),
    }
    found: dict[str, Any] = {}
    for name in kind.scalars:
        value = content.get(name, given[name])
        found[name] = value.tolist() if isinstance(value, Tensor) else value
    for name, value in found.items():
        kinds = {"k": int, "threshold": float, "group_sizes": list}
        if not isinstance(value, kinds[name]) or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{file} says {name} = {value!r}, which must be {_MEANINGS[name]}.")
    return found


def _scalar_tensors(kind: _Class, scalars: Mapping[str, Any]) -> dict[str, Tensor]:
    dtypes = {"k": torch.int32, "threshold": torch.float32, "group_sizes": torch.int64}
    values = {"threshold": -1.0, **scalars}
    return {name: torch.tensor(values[name], dtype=dtypes[name]) for name in kind.scalars}


def _written_as(sae: SparseAutoencoder, origin: Mapping[str, Any]) -> str:
    """The class to write: the one it was read as if that still fits, else the plainest of its architecture."""
    if sae.weights.W_skip is not None or sae.d_out != sae.d_in:
        raise InputError(
            "dictionary_learning has no class for a transcoder with a skip connection or with an output of another"
            " width: write SAELens' format."
        )
    if sae.normalisation is not None:
        raise InputError(
            f"dictionary_learning has no class that applies {sae.normalisation} to its input: write SAELens' format."
        )
    name = origin.get("dict_class")
    kind = _CLASSES.get(str(name))
    threshold = sae.weights.threshold
    one_value = threshold is not None and constant(threshold) is not None
    same = kind is not None and kind.architecture == sae.config.architecture
    if kind is not None and same and (kind.architecture != "jumprelu" or not kind.scalars or one_value):
        return str(name)
    if one_value and not sae.config.transcoder:
        return "BatchTopKSAE"
    return _WRITTEN_AS[sae.config.architecture]


def _k(sae: SparseAutoencoder) -> int:
    """The k of a BatchTopKSAE, which only training uses: that of the metadata, else the default."""
    k = sae.metadata.get("k")
    return max(1, round(k)) if isinstance(k, int | float) and math.isfinite(k) else SAEConfig.k


def _hooks(trainer: Mapping[str, Any], transcoder: bool) -> tuple[str | None, str | None]:
    """Where the SAE reads and, for a transcoder, writes; by default the residual stream behind the layer."""
    layer = trainer.get("layer")
    place = str(trainer.get("submodule_name") or "resid_post")
    hook = hook_of_module(place)
    if hook is None and isinstance(layer, int):
        part = next((part for part in ("mlp", "attention", "attn") if part in place), "")
        hook = hook_of_module(
            f"layers.{layer}.{part}".rstrip("."), "input" if "resid_pre" in place else "output"
        )
    if not transcoder:
        return hook, None
    return (hook_of_module(f"layers.{layer}.mlp", "input") if hook and "mlp" in hook else None), hook


def _config_beside(file: Path) -> dict[str, Any]:
    """The trainer's ``config.json``; checkpoints lie one folder deeper."""
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    return as_table(read_json(folder / CONFIG)) if (folder / CONFIG).is_file() else {}


def _config_for(sae: SparseAutoencoder, name: str, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as the library's trainers write it, as far as it is known, and our metadata."""
    trainer = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        **({"k": scalars["k"]} if "k" in _CLASSES[name].scalars else {}),
        "device": "cpu",
        "layer": _layer(sae),
        "lm_name": sae.metadata.get("model_name"),
        "submodule_name": sae.metadata.get("hook_name"),
    }
    buffer = {
        "d_submodule": sae.d_in,
        "io": "in_and_out" if sae.config.transcoder else "out",
        "ctx_len": sae.metadata.get("context_size"),
    }
    return {"trainer": trainer, "buffer": buffer, OURS: sae.metadata}


def _layer(sae: SparseAutoencoder) -> int | None:
    parts = str(sae.metadata.get("hook_name", "")).split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None
