"""sparsify's format (EleutherAI): ``cfg.json`` + ``sae.safetensors`` in a folder named after the hookpoint.

It holds TopK SAEs, ``top-k of relu(W_enc (x − b_dec) + b_enc)``, and TopK transcoders, which do not subtract b_dec and
may have a skip connection: the same formulas as ours, so every tensor is the same bits on both sides. Its decoder
lies as ours does, features as rows; ``num_latents`` 0 means d_in · expansion_factor; files of early versions lack some
keys of ``cfg.json``, and have defaults (``sparse_coder.py``, ``config.py`` of version 1.3.3).
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save

from activations.errors import InputError
from activations.files import new_folder, read_json, write_bytes, write_json
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.formats.folding import has_unit_rows
from sae.formats.origin import OURS, hook_of_module, origin_of, with_origin
from sae.formats.reading import as_table, check_tensors, whole
from sae.model import SparseAutoencoder

FORMAT = "sparsify"
CONFIG = "cfg.json"
TENSORS = "sae.safetensors"
RUN_CONFIG = "config.json"
_DEFAULTS: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 32,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
}


def read_sparsify(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE or a transcoder.

    Args:
        file: ``sae.safetensors``. content: what it holds.

    Raises:
        InputError: ``cfg.json`` is missing, asks for what we do not have, or does not fit the tensors.
    """
    path = file.parent / CONFIG
    config = as_table(read_json(path))
    said = _DEFAULTS | config
    if said["activation"] != "topk" or said.get("signed"):
        what = "signed activations" if said.get("signed") else f"the activation {said['activation']!r}"
        raise InputError(f"{path} asks for {what}, and this saescope has topk only of what sparsify has.")
    if said["skip_connection"] and not said["transcode"]:
        raise InputError(
            f"{path} asks for a skip connection in an SAE, and this saescope has them in transcoders only."
        )
    d_in = whole(path, said, "d_in")
    d_sae = (
        whole(path, said, "num_latents")
        if said["num_latents"]
        else d_in * whole(path, said, "expansion_factor")
    )
    transcoder, skip = bool(said["transcode"]), bool(said["skip_connection"])
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        **({"W_skip": (d_in, d_in)} if skip else {}),
    }
    tensors = check_tensors(file, content, shapes, CONFIG)
    sae_config = SAEConfig(d_sae=d_sae, k=whole(path, said, "k"), transcoder=transcoder, skip=skip)
    sae_config.check()
    weights = Weights(
        tensors["encoder.weight"],
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
    )
    return SparseAutoencoder(sae_config, weights, _metadata(file.parent, config, transcoder))


def write_sparsify(sae: SparseAutoencoder, folder: Path) -> None:
    """Write ``cfg.json`` and ``sae.safetensors``; the folder appears complete or not at all.

    Raises:
        InputError: the format cannot hold this SAE.
    """
    config = sae.config
    if config.architecture != "topk" or sae.normalisation is not None or sae.d_out != sae.d_in:
        raise InputError(
            f"sparsify holds TopK SAEs, and transcoders between hooks of one width, without normalisation; this is a"
            f" {config.architecture} SAE from width {sae.d_in} to {sae.d_out}"
            f"{f' with {sae.normalisation}' if sae.normalisation else ''}: write SAELens' format."
        )
    origin = origin_of(sae, FORMAT).get("config") or {OURS: sae.metadata}
    written = {
        **_DEFAULTS,
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": has_unit_rows(sae.W_dec),
        "num_latents": sae.d_sae,
        **origin,
        "k": config.k,
        "transcode": config.transcoder,
        "skip_connection": sae.W_skip is not None,
        "d_in": sae.d_in,
    }
    tensors = {
        "encoder.weight": sae.weights.encoder_rows,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        **({} if sae.W_skip is None else {"W_skip": sae.W_skip}),
    }
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    with new_folder(folder) as temporary:
        write_bytes(temporary / TENSORS, save(plain))
        write_json(temporary / CONFIG, written)


def _metadata(folder: Path, config: dict[str, Any], transcoder: bool) -> dict[str, Any]:
    """From the folder's name, which is the hookpoint, and the run's configuration one or two folders above."""
    place = folder.resolve()
    if place.name.startswith("seed"):
        place = place.parent
    run = next(
        (
            found
            for above in (place.parent, folder.resolve().parent)
            if (above / RUN_CONFIG).is_file() and isinstance(found := read_json(above / RUN_CONFIG), dict)
        ),
        {},
    )
    output = hook_of_module(place.name)
    found = {
        "model_name": run.get("model"),
        "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len"),
        "hook_name": hook_of_module(place.name, "input") if transcoder else output,
        "hook_name_out": output if transcoder else None,
    }
    return with_origin(found, FORMAT, config)
