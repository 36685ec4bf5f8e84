"""How the families of Hugging Face models that the SDPA path serves are laid out.

An :class:`Architecture` names, for one family, the modules whose inputs and outputs are TransformerLens' hooks. Read
from the forward passes of transformers; the parity tests compare every family with ``TransformerBridge``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from activations.hooks import Site

BLOCK_HOOKS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""What the SDPA path serves in every block, in the order of the computation."""

PROJECTED_HOOKS = frozenset({"attn.hook_z", "mlp.hook_post"})
"""What an output projection reads, and so as wide as that; every other hook above is d_model wide."""

STREAM_HOOKS = frozenset(
    {"hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"}
)
"""The residual stream and what is added to it: where centred writing weights show."""


@dataclass(frozen=True)
class Architecture:
    """Where one family of Hugging Face models keeps its parts: paths inside the base model or a block.

    Attributes:
        blocks: the list of blocks, inside the base model.
        z: its input is ``attn.hook_z``.
        attn_out: its output is ``hook_attn_out``; the normalisation after attention where there is one.
        resid_mid: its input is ``hook_resid_mid``; None where attention and MLP read the block's input in parallel.
            (In an OPT with its normalisations behind attention and MLP, TransformerLens gives this name to what the
            second one reads, which is after the MLP.)
        mlp_in: its input is ``mlp.hook_in``, what the MLP reads, behind the normalisation where there is one.
        mlp_post: its input is ``mlp.hook_post``. A mixture of experts has no such module: each token goes through
            several experts, and the bridge gives what it calls by that name.
        mlp_out: its output is ``hook_mlp_out``; the normalisation after the MLP where there is one.
        final_norm: inside the base model; None where there is none.
        project_out: a projection between final normalisation and unembedding, inside the base model, if any.
        gain_offset: what the final normalisation adds to its weight before it multiplies by it (Gemma: 1).
        pre_layer_norm: whether everything reads the residual stream through a LayerNorm, so that the stream's mean
            has no effect.
        flat_mlp: whether the MLP runs on ``[batch * pos, width]``.
    """

    blocks: str = "layers"
    z: str = "self_attn.o_proj"
    attn_out: str = "self_attn"
    resid_mid: str | None = "post_attention_layernorm"
    mlp_in: str = "mlp"
    mlp_post: str = "mlp.down_proj"
    mlp_out: str = "mlp"
    final_norm: str | None = "norm"
    project_out: str | None = None
    gain_offset: float = 0.0
    pre_layer_norm: bool = False
    flat_mlp: bool = False


LLAMA = Architecture()
GPT2 = Architecture(
    blocks="h",
    z="attn.c_proj",
    attn_out="attn",
    resid_mid="ln_2",
    mlp_post="mlp.c_proj",
    final_norm="ln_f",
    pre_layer_norm=True,
)
GPT_NEOX = Architecture(
    z="attention.dense",
    attn_out="attention",
    mlp_post="mlp.dense_4h_to_h",
    final_norm="final_layer_norm",
    pre_layer_norm=True,
)
GEMMA = Architecture(
    attn_out="post_attention_layernorm",
    resid_mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    gain_offset=1.0,
)
OLMO2 = Architecture(
    attn_out="post_attention_layernorm", resid_mid="mlp", mlp_out="post_feedforward_layernorm"
)
OPT = Architecture(
    blocks="decoder.layers",
    z="self_attn.out_proj",
    resid_mid="final_layer_norm",
    mlp_in="fc1",
    mlp_post="fc2",
    mlp_out="fc2",
    final_norm="decoder.final_layer_norm",
    pre_layer_norm=True,
    flat_mlp=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen2_moe": LLAMA,
    "qwen3_moe": LLAMA,
    "phi3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": replace(GEMMA, blocks="language_model.layers", final_norm="language_model.norm"),
    "olmo2": OLMO2,
    "opt": OPT,
}
"""Hugging Face ``model_type`` → layout, for the families that the SDPA path serves."""


def architecture_of(config: Any) -> Architecture | None:
    """The layout of models of this Hugging Face configuration; None where the SDPA path does not serve them."""
    architecture = ARCHITECTURES.get(config.model_type)
    if config.model_type == "gpt_neox" and config.use_parallel_residual:
        return replace(GPT_NEOX, resid_mid=None)
    if config.model_type == "opt":
        pre_norm = bool(config.do_layer_norm_before)
        narrow = config.word_embed_proj_dim != config.hidden_size
        return replace(
            OPT,
            final_norm=OPT.final_norm if pre_norm and not config._remove_final_layer_norm else None,
            project_out="decoder.project_out" if narrow else None,
            pre_layer_norm=pre_norm,
        )
    return architecture


def model_sites(
    base_model: nn.Module, architecture: Architecture, *, centred: bool = False
) -> dict[str, Site]:
    """Every hook that the SDPA path serves on ``base_model``, in the order of the computation.

    Args:
        base_model: the model without unembedding.
        architecture: its layout.
        centred: whether what is captured in the residual stream has its mean subtracted.
    """
    flat = architecture.flat_mlp
    sites: dict[str, Site] = {}
    for layer, block in enumerate(base_model.get_submodule(architecture.blocks).children()):
        at = {
            "hook_resid_pre": Site(block, "input", centred=centred),
            "attn.hook_z": Site(block.get_submodule(architecture.z), "input"),
            "hook_attn_out": Site(block.get_submodule(architecture.attn_out), "output", centred=centred),
            "mlp.hook_in": Site(block.get_submodule(architecture.mlp_in), "input", flat=flat),
            "hook_mlp_out": Site(
                block.get_submodule(architecture.mlp_out), "output", flat=flat, centred=centred
            ),
            "hook_resid_post": Site(block, "output", centred=centred),
        }
        if architecture.resid_mid is not None:
            module = block.get_submodule(architecture.resid_mid)
            at["hook_resid_mid"] = Site(module, "input", in_place=True, flat=flat, centred=centred)
        parent, _, projection = architecture.mlp_post.rpartition(".")
        if hasattr(block.get_submodule(parent), projection):
            at["mlp.hook_post"] = Site(block.get_submodule(architecture.mlp_post), "input", flat=flat)
        sites.update({f"blocks.{layer}.{name}": at[name] for name in BLOCK_HOOKS if name in at})
    return sites


def logit_lens_weights(causal_lm: Any, architecture: Architecture) -> tuple[Tensor, Tensor]:
    """Gain of the final normalisation ``[d_model]`` and unembedding ``W_U [d_model, d_vocab]``, float32.

    ``W_U`` includes the projection that some models have before it; the gain is 1 where no normalisation follows the
    last block.
    """
    base_model = causal_lm.base_model
    unembedding = causal_lm.get_output_embeddings().weight.detach().float().T
    if architecture.project_out is not None:
        unembedding = (
            base_model.get_submodule(architecture.project_out).weight.detach().float().T @ unembedding
        )
    if architecture.final_norm is None:
        return torch.ones(unembedding.shape[0], device=unembedding.device), unembedding
    weight = base_model.get_submodule(architecture.final_norm).weight
    return weight.detach().float() + architecture.gain_offset, unembedding
