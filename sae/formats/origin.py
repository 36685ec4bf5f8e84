"""What a foreign file says besides its tensors, kept so that writing it again loses nothing; hook names of others."""

import re
from typing import Any

from sae.model import SparseAutoencoder

ORIGIN = "origin"
OURS = "saescope"  # the key under which our metadata lies in a foreign configuration


def origin_of(sae: SparseAutoencoder, file_format: str) -> dict[str, Any]:
    """What the file of this format said that ``sae`` was read from; empty where it was none."""
    origin = sae.metadata.get(ORIGIN)
    return dict(origin) if isinstance(origin, dict) and origin.get("format") == file_format else {}


def with_origin(
    found: dict[str, Any], file_format: str, config: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """Metadata of an SAE read from a foreign file.

    Args:
        found: model_name, hook_name and such, as far as the file says (None is left out).
        config: the file's whole configuration. facts: what else is needed to write it again.
    """
    if isinstance(config.get(OURS), dict):
        return dict(config[OURS])
    known = {key: value for key, value in found.items() if value is not None}
    return {**known, ORIGIN: {"format": file_format, "config": config, **facts}}


def hook_of_module(module: object, side: str = "output") -> str | None:
    """The TransformerLens hook at a module of a Hugging Face model; None where there is no telling.

    Args:
        module: such as ``layers.10``, ``h.3.mlp`` or ``model.layers.7.self_attn.o_proj.input``.
        side: of the module, where its name does not end in it.
    """
    match = re.fullmatch(
        r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)((?:\.\w+)*?)(?:\.(input|output))?", str(module)
    )
    if match is None:
        return None
    layer, part, side = match[1], match[2].lstrip("."), match[3] or side
    return {
        ("", "input"): f"blocks.{layer}.hook_resid_pre",
        ("", "output"): f"blocks.{layer}.hook_resid_post",
        ("mlp", "input"): f"blocks.{layer}.mlp.hook_in",
        ("pre_feedforward_layernorm", "output"): f"blocks.{layer}.mlp.hook_in",
        ("mlp", "output"): f"blocks.{layer}.hook_mlp_out",
        ("post_feedforward_layernorm", "output"): f"blocks.{layer}.hook_mlp_out",
        ("self_attn", "output"): f"blocks.{layer}.hook_attn_out",
        ("attn", "output"): f"blocks.{layer}.hook_attn_out",
        ("attention", "output"): f"blocks.{layer}.hook_attn_out",
        ("self_attn.o_proj", "input"): f"blocks.{layer}.attn.hook_z",
        ("attn.c_proj", "input"): f"blocks.{layer}.attn.hook_z",
        ("attention.dense", "input"): f"blocks.{layer}.attn.hook_z",
    }.get((part, side))
