"""Train the bundled model: a small Llama on the Python sources of this machine.

    python -m activations.builtin.train_model --tokens 30_000_000 --out model

Byte-level BPE of 4,096 tokens (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019), windows of 256
tokens cut anywhere in a stream of documents joined by ``<|endoftext|>``, AdamW with warm-up and cosine decay,
bfloat16 autocast. The test split (file names whose sha1 mod 50 is 0) is held out.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations.builtin.measure_model import measure_loss
from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.files import new_folder
from activations.models import LanguageModel
from activations.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
PACKAGES = (
    "_pytest", "accelerate", "aiohttp", "altair", "anyio", "attr", "click", "datasets", "fsspec", "git",
    "httpx", "huggingface_hub", "jinja2", "mpmath", "narwhals", "networkx", "numpy", "packaging", "pandas",
    "pip", "pygments", "pytest", "requests", "rich", "safetensors", "setuptools", "streamlit", "tokenizers",
    "torch", "tornado", "tqdm", "transformer_lens", "typer", "urllib3", "wandb", "yaml",
)  # fmt: skip
"""Read where they are installed, besides the standard library."""


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained and how; the defaults are those of the bundled weights."""

    n_tokens: int = 30_000_000
    vocab_size: int = 4096
    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 8
    d_mlp: int = 704
    context_length: int = 256
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return max(1, self.n_tokens // (self.batch_size * self.context_length))


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Warm-up over 4% of the run, full until 30%, then a cosine down to 5%."""
    warm_up = min(1.0, (step + 1) / max(1, 0.04 * n_steps))
    decay = max(0.0, (step / n_steps - 0.3) / 0.7)
    return warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * decay)))


def train_tokenizer(texts: Iterator[str], config: TrainingConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the separator is id 0 and is BOS, EOS and padding in one."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=config.context_length,
    )


def train_model(stream: np.ndarray, config: TrainingConfig, device: str) -> LlamaForCausalLM:
    """A model trained on windows cut from ``stream``, token ids [n_tokens]."""
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )
    with torch.device(device):
        model = LlamaForCausalLM(llama)
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = np.random.default_rng(config.seed)
    window = np.arange(config.context_length)
    for step in range(config.n_steps):
        starts = generator.integers(0, len(stream) - config.context_length + 1, config.batch_size)
        ids = torch.from_numpy(stream[starts[:, None] + window].astype(np.int64)).to(device)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config.n_steps)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == config.n_steps - 1:
            print(f"step {step + 1:,} of {config.n_steps:,}: {loss.item():.3f} nats per token", flush=True)
    return model


def token_stream(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of all texts, each behind a separator: int32 [n_tokens]."""
    stream: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        for ids in tokenizer.encode_batch(texts[start : start + 256]):
            stream.append(np.array([tokenizer.separator_id, *ids], dtype=np.int32))
    return np.concatenate(stream)


def make_model(corpus: Corpus, config: TrainingConfig, out: Path, device: str) -> None:
    """Train tokenizer and model on everything but the test split; write a Hugging Face folder to ``out``.

    Raises:
        InputError: ``out`` is not empty, or the corpus holds less than one window.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not empty: give a new folder.")
    texts = [document.text for split in ("train", "score") for document in corpus.documents(split)]
    if not texts:
        raise InputError(f"Corpus {corpus.config.name!r} is empty: give a source that holds text.")
    # Two fifths of the text give much the same merges as all of it, in half the time.
    hf_tokenizer = train_tokenizer((text for place, text in enumerate(texts) if place % 5 < 2), config)
    stream = token_stream(texts, Tokenizer(hf_tokenizer))
    if len(stream) < config.context_length:
        raise InputError(
            f"Corpus {corpus.config.name!r} holds {len(stream)} tokens to train on, fewer than one window"
            f" of {config.context_length}: give more text."
        )
    print(f"{len(texts):,} documents, {len(stream):,} tokens", flush=True)
    model = train_model(stream, config, device)
    with new_folder(out) as folder:
        model.half().save_pretrained(folder)
        hf_tokenizer.save_pretrained(folder)


def main() -> None:
    """Train a model from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--tokens", type=int, default=TrainingConfig.n_tokens, help="tokens to train on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    installed = tuple(package for package in PACKAGES if find_spec(package) is not None)
    corpus = Corpus(CorpusConfig(packages=installed))
    try:
        make_model(corpus, TrainingConfig(n_tokens=options.tokens), options.out, options.device)
        model = LanguageModel.load(str(options.out), device=options.device)
        loss = measure_loss(model, corpus.blocks(model.tokenizer, "test", 100_000, model.context_length))
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(f"test split: {loss.nats_per_token:.3f} nats per token, {loss.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
