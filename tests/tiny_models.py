"""Tiny random models of every supported architecture, and a tiny byte-level tokenizer, made on the spot."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from activations.models import LanguageModel

ARCHITECTURES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3",
    "opt",
    "opt_post_norm",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
]
"""What the SDPA path serves, with the variants of a family that are laid out differently."""

CONTEXT_LENGTH = 64
VOCABULARY = 320
END_OF_TEXT = 0

TEXT = [
    "def read(self, path):\n    return self.open(path).read()\n",
    "import os\nimport sys\nfor name in os.listdir('.'):\n    print(name, file=sys.stderr)\n",
    "# naïve café — 😀 日本語 привет\nclass Reader:\n    pass\n",
]


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens; id 0 is ``<|endoftext|>``, the end of text; no BOS."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


WINDOW = 5
"""Width of the sliding window of the architectures that have one."""

_ROTARY = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": CONTEXT_LENGTH,
}
_WINDOWED = {**_ROTARY, "sliding_window": WINDOW}
_GEMMA = {**_WINDOWED, "head_dim": 10, "query_pre_attn_scalar": 10}
_GEMMA3 = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
_OPT = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_dim": 72,
    "max_position_embeddings": CONTEXT_LENGTH,
}
_GPT_NEOX = {name: _ROTARY[name] for name in _ROTARY if name != "num_key_value_heads"}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, "head_dim": 10, "attention_bias": True},
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_inner": 72, "n_positions": CONTEXT_LENGTH},
    "gpt_neox": {**_GPT_NEOX, "use_parallel_residual": True},
    "gpt_neox_sequential": {**_GPT_NEOX, "use_parallel_residual": False},
    "mistral": _WINDOWED,
    "qwen2": {**_WINDOWED, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**_ROTARY, "head_dim": 10},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA3,
    "gemma3": {"text_config": {**_GEMMA3, "vocab_size": VOCABULARY}, "vision_config": _VISION},
    "phi3": _WINDOWED,
    "opt": _OPT,
    "opt_post_norm": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "olmo2": _ROTARY,
    "mixtral": {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_ROTARY, **_EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_ROTARY, **_EXPERTS, "head_dim": 10},
    "mamba": {"num_hidden_layers": 3, "hidden_size": 32, "state_size": 4},
    "bert": {**_GPT_NEOX, "type_vocab_size": 2},
}


def tiny_config(architecture: str) -> Any:
    """Three layers, d_model 32 and, where there are heads, four of them.

    The heads of a Llama, Qwen 3 or Gemma are 10 wide and share two keys.
    """
    model_type = {"gpt_neox_sequential": "gpt_neox", "opt_post_norm": "opt"}.get(architecture, architecture)
    tokens = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **CONFIGS[architecture], **tokens)


def tiny_hf_model(architecture: str, attention: str | None = None, seed: int = 0, config: Any = None) -> Any:
    """A random model whose every parameter, norm gains and biases too, differs from its initial value.

    ``attention`` is transformers' own choice by default: SDPA (eager for Gemma 2, whose capped scores SDPA lacks).
    ``config`` is :func:`tiny_config` by default.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto_class = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
        model = auto_class.from_config(config or tiny_config(architecture), attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """``[batch, length]`` token ids without the end-of-text token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(lengths: list[int], side: str) -> torch.Tensor:
    """``[batch, max(lengths)]`` with 1 at real tokens and the padding on ``side``."""
    longest = max(lengths)
    rows = [[1] * n + [0] * (longest - n) for n in lengths]
    return torch.tensor([row if side == "right" else row[::-1] for row in rows])


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tiny_language_model(architecture: str, path: Literal["auto", "sdpa", "bridge"] = "auto") -> LanguageModel:
    """A :class:`LanguageModel` over :func:`tiny_hf_model`, shared by the tests that only run it."""
    return LanguageModel.from_hf(tiny_hf_model(architecture), tiny_tokenizer(), architecture, path=path)
