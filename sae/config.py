"""The configuration of a training run: one set of dataclasses for Python, ``run.toml`` and the command line.

This module imports no torch, so that ``sae --help`` stays quick. Every field carries its sentence; the command
line makes its flags from them.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from activations.config import ExclusionRule, ModelDtype
from activations.corpus import CorpusConfig
from activations.errors import InputError

DEFAULT_TOKENS = 2_000_000


@dataclass(frozen=True)
class SAEConfig:
    """What the sparse autoencoder looks like."""

    architecture: Literal["topk", "relu"] = "topk"
    """topk: the k largest pre-activations fire (2406.04093); relu: L1 weighted by decoder norms (Anthropic 2024)."""
    d_sae: int = 4096
    """Number of features."""
    k: int = 32
    """topk: how many features fire per token."""
    l1: float = 5.0
    """relu: weight of the sparsity penalty, for inputs scaled to a mean squared norm of d_in."""
    auxk: float = 1 / 32
    """topk: weight of the auxiliary loss that revives dead features."""

    def check(self) -> None:
        """Raise InputError unless these settings make sense."""
        if self.d_sae < 1:
            raise InputError(f"d_sae is {self.d_sae}, and an SAE needs at least one feature.")
        if self.architecture == "topk" and not 1 <= self.k < self.d_sae:
            raise InputError(
                f"k is {self.k}, and must be at least 1 and less than the number of features, {self.d_sae}."
            )
        if self.architecture == "relu" and self.l1 < 0:
            raise InputError(f"l1 is {self.l1}, and must not be negative.")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, for how long."""

    model: str = "builtin"
    """The bundled model (builtin), a local Hugging Face folder, or a hub name."""
    hook_name: str = "blocks.3.hook_resid_post"
    """Where in the model the activations are read, by its TransformerLens name."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text that the model reads."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    """The sparse autoencoder."""
    store: str | None = None
    """A folder that sae capture wrote: its activations in the place of those of a model that reads text now."""
    order: Literal["exact", "external"] = "exact"
    """With a store: exact reads rows where they lie, external writes a shuffled copy first (for more than memory)."""
    tokens: int | None = None
    """Training tokens; 2 million by default, or all that the store holds."""
    passes: int = 1
    """How often the training tokens are read, in another order each time."""
    context_length: int | None = None
    """Tokens per sequence; by default what the model was made for, at most 1,024."""
    batch_tokens: int | None = None
    """Tokens per training step; by default chosen from the length of the run."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; chosen from the number of steps by default."""
    buffer_tokens: int | None = None
    """Without a store: activations in the shuffle buffer; by default half a gigabyte of them."""
    warmup: float = 0.05
    """Fraction of the run over which the learning rate rises from 0."""
    decay: float = 0.5
    """Fraction of the run, at its end, over which the learning rate falls to 0."""
    seed: int = 0
    """Seeds the data order and the initial weights."""
    rule: ExclusionRule = field(default_factory=ExclusionRule)
    """Which positions the SAE does not see."""
    device: str | None = None
    """cuda, mps or cpu; by default the first of them that is there."""
    dtype: ModelDtype | None = None
    """Number format the model computes in; by default float32, on CUDA that of its checkpoint."""
    center_writing_weights: bool = False
    """Subtract from activations their mean over d_model, as TransformerLens does (matters with LayerNorm only)."""

    def check(self) -> None:
        """Raise InputError for settings that no run can have."""
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}, and must be at least 1.")
        if self.passes < 1:
            raise InputError(f"passes is {self.passes}, and must be at least 1.")
        if self.context_length is not None and self.context_length < 8:
            raise InputError(f"context_length is {self.context_length}, and must be at least 8.")
        if self.seed < 0 or self.corpus.shuffle_seed < 0:
            raise InputError(f"seed is {min(self.seed, self.corpus.shuffle_seed)}, and must not be negative.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"batch_tokens is {self.batch_tokens}, and must be at least 1.")
        if self.buffer_tokens is not None and self.buffer_tokens < 1:
            raise InputError(f"buffer_tokens is {self.buffer_tokens}, and must be at least 1.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise InputError(f"learning_rate is {self.learning_rate}, and must be above 0.")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise InputError(
                "warmup and decay are fractions of the run: neither may be negative, nor their sum above 1."
            )
        if self.order == "external" and self.store is None:
            raise InputError("order 'external' is for a store of activations: give --store, or leave it out.")
        self.rule.check()

    def resolved_tokens(self) -> int:
        """``tokens``, or 2 million."""
        return DEFAULT_TOKENS if self.tokens is None else self.tokens

    def tokens_read(self) -> int:
        """Training tokens, counted once for every pass."""
        return self.resolved_tokens() * self.passes

    def resolved_batch_tokens(self) -> int:
        """``batch_tokens``, or ``1024 · √(tokens read / 4 million)`` as a power of two from 64 to 4,096.

        So a longer run has both more and larger steps. Measured on the bundled model: 1,024 beats 512 and 2,048 at
        4 million, 256 beats 64 at 200,000.
        """
        if self.batch_tokens is not None:
            return min(self.batch_tokens, self.tokens_read())
        exponent = round(10 + math.log2(self.tokens_read() / 4_000_000) / 2)
        return min(2 ** min(max(exponent, 6), 12), self.tokens_read())

    def n_steps(self) -> int:
        """Number of training steps (whole batches)."""
        return self.tokens_read() // self.resolved_batch_tokens()

    def resolved_learning_rate(self) -> float:
        """``learning_rate``, or a power law in the number of steps, at most 6e-3.

        The law ``4.3e-3 · (4000 / steps)^0.65`` passes through the best of what we measured on the bundled model (3,906
        steps of 1,024 tokens, 3e-3 to 6e-3) and through SAEBench's recipe (3e-4 for 244,000 steps of 2,048 tokens,
        2503.09532). The usual 2e-4/√(d_sae / 2¹⁴) is made for such long runs, and starves a short one.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return min(6e-3, 4.3e-3 * (4000 / max(self.n_steps(), 1)) ** 0.65)
