"""A Llama as the HookedTransformer of older releases of TransformerLens, which other libraries read models with."""

from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights


def hooked_llama(hf: Any, tokenizer: Any) -> HookedTransformer:
    """The same model; loaded as SAELens loads models, from_pretrained_no_processing."""
    rope = getattr(hf.config, "rope_parameters", None) or {"rope_theta": hf.config.rope_theta}
    config = HookedTransformerConfig(
        n_layers=hf.config.num_hidden_layers,
        d_model=hf.config.hidden_size,
        n_heads=hf.config.num_attention_heads,
        d_head=hf.config.head_dim,
        d_mlp=hf.config.intermediate_size,
        d_vocab=hf.config.vocab_size,
        n_ctx=hf.config.max_position_embeddings,
        eps=hf.config.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=hf.config.head_dim,
        rotary_base=rope["rope_theta"],
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    model = HookedTransformer(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model
