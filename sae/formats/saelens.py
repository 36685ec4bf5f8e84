"""SAELens' folder format, which is also ours: ``cfg.json`` + ``sae_weights.safetensors``.

Read and written so that SAELens 6 loads our SAEs unchanged (``SAE.load_from_disk``) and we load theirs. In their
vocabulary our ``relu`` is ``standard``, a transcoder has an architecture of its own (``transcoder``,
``skip_transcoder``, ``jumprelu_transcoder``, ``jumprelu_skip_transcoder``), and BatchTopK and Matryoshka SAEs are
``jumprelu``. It has no transcoders that select or are gated: those we write in the same layout as
``topk_transcoder``, ``gated_skip_transcoder`` and so on, which SAELens refuses. Our TopK SAEs have unit decoder rows
and are written with ``rescale_acts_by_decoder_norm`` true, where that rescaling changes nothing.

Read besides: training checkpoints (BatchTopK and Matryoshka with the threshold they had reached), and the layout
before 6.0, where everything lay flat in ``cfg.json`` and TopK was an activation function.

Folded on reading, so that the file we write afterwards differs while the function does not: a decoder bias that is
not taken off the input, decoder norms that TopK rescales by, the scaling factor of a checkpoint. Keys of ``cfg.json``
that we do not know are kept in the metadata.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save
from torch import Tensor

from activations.errors import InputError
from activations.files import new_folder, read_json, write_bytes, write_json
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.formats.folding import has_unit_rows, in_units_of_activations, unit_decoder, with_input_bias
from sae.formats.reading import as_table, check_tensors, number, read_content
from sae.model import SparseAutoencoder
from sae.normalising import Normalisation

CONFIG = "cfg.json"
TENSORS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"  # of a checkpoint: the norm scaling that its weights have yet to absorb
# SAELens takes files without this key, or below 6.0.0, for its old layout and drops their metadata.
SAELENS_VERSION = "6.54.12"
_OURS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_THEIRS = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_STRUCTURE = {
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "k",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "rescale_acts_by_decoder_norm",
    "metadata",
}
"""Keys of ``cfg.json`` that say what the SAE computes; the rest says where it comes from."""
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def write_saelens(sae: SparseAutoencoder, folder: Path) -> None:
    """Write an SAE; the folder appears complete or not at all."""
    name = _THEIRS[sae.config.architecture]
    weights = sae.weights
    transcoder = sae.config.transcoder
    if transcoder:
        kind = ("skip_" if weights.W_skip is not None else "") + "transcoder"
        name = kind if name == "standard" else f"{name}_{kind}"
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": sae.normalisation or "none",
        "reshape_activations": "hook_z" if str(sae.metadata.get("hook_name")).endswith(".hook_z") else "none",
        "metadata": {**sae.metadata, "sae_lens_version": SAELENS_VERSION},
    }
    if transcoder:
        config["d_out"] = sae.d_out
    if sae.config.architecture == "topk":
        # Without unit rows (an SAE from elsewhere) the flag would make another function of the same weights.
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": has_unit_rows(weights.W_dec)}
    tensors = {"W_enc": weights.encoder_rows.t(), **weights.tensors()}
    del tensors["encoder_rows"]
    if sae.config.architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    plain = {key: tensor.detach().cpu().float().contiguous() for key, tensor in tensors.items()}
    with new_folder(folder) as temporary:
        write_bytes(temporary / TENSORS, save(plain))
        write_json(temporary / CONFIG, config)


def read_saelens(folder: Path, content: dict[str, Any] | None = None) -> SparseAutoencoder:
    """Read an SAE.

    Args:
        content: what :func:`sae.formats.reading.read_content` gave for its tensors, if they are read already.

    Raises:
        InputError: a file is missing or corrupt, the tensors do not fit the configuration, or the architecture or
            an input normalisation is one we do not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no SAE: it has no {CONFIG}.")
    config = _modern(as_table(read_json(path)))
    name = config.get("architecture")
    base, transcoder, skip = _split(name) if isinstance(name, str) else ("", False, False)
    if base not in _OURS:
        raise InputError(
            f"{path} names the architecture {name!r}, and this saescope knows {', '.join(sorted(_OURS))}, and"
            " transcoders of them."
        )
    # Their "dtype" says how the tensors are stored, which those say themselves.
    sae_config, shapes = _structure(path, config, base, transcoder, skip)
    if content is None:
        if not (folder / TENSORS).is_file():
            raise InputError(f"{folder} holds no SAE: it has no {TENSORS}.")
        content = read_content(folder / TENSORS)
    metadata = {key: value for key, value in config.items() if key not in _STRUCTURE}
    metadata |= as_table(config.get("metadata"))
    metadata.pop("normalize_activations", None)  # what the configuration says is so
    metadata |= _normalisation(folder, config, transcoder)
    content = _without_ones(content)
    in_training = base in ("batchtopk", "matryoshka_batchtopk")
    if in_training:
        metadata.setdefault("training_architecture", base)
        if "k" in config:
            metadata.setdefault("k", config["k"])  # the mean number of features, so that it need not be whole
        _one_threshold(content, sae_config.d_sae)
    elif base == "jumprelu" and isinstance(content.get("log_threshold"), Tensor):  # in training, before 6.48
        content["threshold"] = content.pop("log_threshold").float().exp()
    tensors = check_tensors(folder / TENSORS, content, shapes, CONFIG)
    weights = _weights(tensors)
    if not transcoder and not config.get("apply_b_dec_to_input", True):
        weights = with_input_bias(weights)
    if config.get("rescale_acts_by_decoder_norm", False):
        if base == "topk":
            weights = unit_decoder(weights)
        elif in_training:  # selection was by rescaled activations, and so is the threshold
            weights = replace(unit_decoder(weights), threshold=weights.threshold)
    scale = _scaling_factor(folder)
    if scale is not None:
        weights = in_units_of_activations(weights, scale, scale)
    return SparseAutoencoder(sae_config, weights, metadata)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of any version in today's layout; before 6.0 all of it lay at the top."""
    version = as_table(config.get("metadata")).get("sae_lens_version")
    if version is not None or ("activation_fn_str" not in config and "architecture" in config):
        return config
    new = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    arguments = as_table(new.get("activation_fn_kwargs"))
    if new.get("activation_fn") == "topk" and "k" in arguments:
        new |= {"architecture": "topk", "k": arguments["k"]}
    new.setdefault("architecture", "standard")
    normalise = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if normalise is True else normalise
    return new


def _split(name: str) -> tuple[str, bool, bool]:
    """(architecture, whether a transcoder, whether with a skip connection) of a name in ``cfg.json``."""
    base = name.removesuffix("transcoder")
    if base == name:
        return name, False, False
    rest = base.rstrip("_").removesuffix("skip").rstrip("_")
    return rest or "standard", True, base.rstrip("_").endswith("skip")


def _structure(
    path: Path, config: dict[str, Any], base: str, transcoder: bool, skip: bool
) -> tuple[SAEConfig, dict[str, tuple[int, ...]]]:
    """Our configuration, and the shapes of the tensors it promises."""
    topk = base == "topk"
    try:
        d_in, d_sae = _whole(config["d_in"]), _whole(config["d_sae"])
        d_out = _whole(config["d_out"]) if transcoder else d_in
        k = _whole(config["k"]) if topk else SAEConfig.k
    except (KeyError, TypeError, ValueError, OverflowError):
        names = ["d_in", "d_sae", *(["d_out"] if transcoder else []), *(["k"] if topk else [])]
        raise InputError(f"{path} lacks a whole number for {', '.join(names[:-1])} or {names[-1]}.") from None
    architecture = _OURS[base]
    sae_config = SAEConfig(architecture=architecture, d_sae=d_sae, k=k, transcoder=transcoder, skip=skip)  # type: ignore[arg-type]
    sae_config.check()
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if architecture == "gated":
        del shapes["b_enc"]
        shapes |= {"b_gate": (d_sae,), "r_mag": (d_sae,), "b_mag": (d_sae,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if skip:
        shapes["W_skip"] = (d_out, d_in)
    return sae_config, shapes


def _whole(value: Any) -> int:
    """A whole number; ValueError, TypeError or OverflowError if it is none."""
    if int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _weights(tensors: dict[str, Tensor]) -> Weights:
    rest = {name: tensor for name, tensor in tensors.items() if name != "W_enc"}
    if "b_gate" in rest:
        rest["b_enc"] = rest.pop("b_gate")
    return Weights(encoder_rows=tensors["W_enc"].t().contiguous(), **rest)


def _normalisation(folder: Path, config: dict[str, Any], transcoder: bool) -> dict[str, Any]:
    """What the metadata says of a normalisation at run time; one that training measured has been folded since."""
    name = config.get("normalize_activations") or "none"
    if name in get_args(Normalisation) and not transcoder:
        return {"normalize_activations": name}
    if name not in ("none", "expected_average_only_in"):
        raise InputError(
            f"{folder / CONFIG} asks for normalize_activations={name!r} at run time, which this saescope does not do:"
            " fold the normalisation into the weights first."
        )
    return {}


def _scaling_factor(folder: Path) -> float | None:
    """What inputs were multiplied by while a checkpoint was trained; finished SAEs have it in their weights."""
    path = folder / SCALER
    if not path.is_file():
        return None
    scaler = as_table(read_json(path))
    if scaler.get("has_whitening"):
        raise InputError(
            f"{folder} is a checkpoint trained on whitened activations: export it with SAELens first."
        )
    return None if scaler.get("scaling_factor") is None else number(path, scaler, "scaling_factor")


def _one_threshold(content: dict[str, Any], d_sae: int) -> None:
    """Give every feature the threshold that a BatchTopK in training keeps for all of them."""
    threshold = content.get("topk_threshold")
    if isinstance(threshold, Tensor) and threshold.numel() == 1:
        del content["topk_threshold"]
        content["threshold"] = threshold.float().reshape(()).expand(d_sae)


def _without_ones(content: dict[str, Any]) -> dict[str, Any]:
    """Old files carry a ``scaling_factor`` per feature that, unless it was fine-tuned, is 1 throughout."""
    factor = content.get("scaling_factor")
    if isinstance(factor, Tensor) and bool((factor == 1).all()):
        return {name: tensor for name, tensor in content.items() if name != "scaling_factor"}
    return dict(content)
