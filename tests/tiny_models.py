"""Tiny random models of every supported architecture, and a tiny byte-level tokenizer, made on the spot."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from activations.models import LanguageModel

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "gpt_neox_sequential"]
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


def tiny_config(architecture: str) -> Any:
    """Three layers, d_model 32, four heads of 8; the Llama's heads are 10 wide and share two keys."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": END_OF_TEXT}
    if architecture == "llama":
        return LlamaConfig(
            num_hidden_layers=3,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=72,
            max_position_embeddings=CONTEXT_LENGTH,
            attention_bias=True,
            **tokens,
        )
    if architecture == "gpt2":
        return GPT2Config(n_layer=3, n_embd=32, n_head=4, n_inner=72, n_positions=CONTEXT_LENGTH, **tokens)
    return GPTNeoXConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=CONTEXT_LENGTH,
        use_parallel_residual=architecture == "gpt_neox",
        **tokens,
    )


def tiny_hf_model(architecture: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A random model whose every parameter, norm gains and biases too, differs from its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation=attention)
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
