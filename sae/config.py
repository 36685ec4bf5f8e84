"""The configuration of a training run: one set of dataclasses for Python, ``run.toml`` and the command line.

This module imports no torch, so that ``sae --help`` stays quick. Every field carries its sentence; the command
line makes its flags from them.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from activations.config import ExclusionRule, ModelDtype
from activations.corpus import CorpusConfig
from activations.errors import InputError

DEFAULT_TOKENS = 2_000_000


ArchitectureName = Literal["topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu"]
SELECTING = (
    "topk",
    "batch_topk",
    "matryoshka",
)  # these keep a number of features, k; the others pay for firing
SPARSITY_WEIGHTS = {"relu": 5.0, "gated": 1.0, "jumprelu": 10.0}


@dataclass(frozen=True)
class SAEConfig:
    """What the sparse autoencoder looks like, and what its loss is made of."""

    architecture: ArchitectureName = "topk"
    """One file each in sae/architectures/: equation, paper, loss."""
    d_sae: int = 4096
    """Number of features."""
    transcoder: bool = False
    """Read the activations of hook_name and write those of hook_out (set by giving hook_out)."""
    skip: bool = False
    """transcoder: add an affine map of the input to the output (2501.18823)."""
    k: int = 32
    """topk: features that fire per token; batch_topk and matryoshka: on average."""
    k_start: int | None = None
    """topk, batch_topk, matryoshka: k falls linearly from this number over the first k_anneal of the run."""
    k_anneal: float = 0.2
    """Fraction of the run over which k falls from k_start."""
    multi_topk: float = 0.0
    """topk: weight of the reconstruction from 4k features (2406.04093, section 4.3: 1/8)."""
    auxk: float = 1 / 32
    """topk, batch_topk, matryoshka: weight of the auxiliary loss that revives dead features."""
    levels: tuple[int, ...] = ()
    """matryoshka: widths of the nested dictionaries below d_sae; by default d_sae/16, d_sae/8, d_sae/4, d_sae/2."""
    level_weights: tuple[float, ...] = ()
    """matryoshka: weights of the levels, d_sae last; equal by default."""
    sparsity_weight: float | None = None
    """relu, gated, jumprelu: weight λ of the sparsity loss, for inputs scaled to a mean squared norm of d_in."""
    target_l0: float | None = None
    """relu, gated, jumprelu: L0 to reach and hold; λ is then moved by a controller."""
    p_end: float = 1.0
    """relu: the penalty's exponent falls from 1 to this over the second half of the run (p-annealing)."""
    bandwidth: float = 2.0
    """jumprelu: width of the window in which thresholds receive a gradient."""
    unit_decoder: bool | None = None
    """Keep decoder rows at norm 1; by default as the architecture's paper has it."""
    aligned: bool = False
    """Keep the product of every feature's encoder and decoder at 1 (2605.18629)."""
    tied_init: bool = True
    """Start with the encoder as the decoder's transpose."""

    def check(self) -> None:
        """Raise InputError unless these settings make sense."""
        if self.d_sae < 1:
            raise InputError(f"d_sae is {self.d_sae}, and an SAE needs at least one feature.")
        if self.architecture in SELECTING:
            self._check_selection()
        else:
            self._check_sparsity()
        if self.skip and not self.transcoder:
            raise InputError("skip is for a transcoder: give hook_out, or leave it out.")
        self._refuse_foreign()

    def _check_selection(self) -> None:
        if not 1 <= self.k < self.d_sae:
            raise InputError(
                f"k is {self.k}, and must be at least 1 and less than the number of features, {self.d_sae}."
            )
        if self.k_start is not None and not self.k <= self.k_start < self.d_sae:
            raise InputError(
                f"k_start is {self.k_start}, and must lie between k, {self.k}, and d_sae, {self.d_sae}."
            )
        if not 0 < self.k_anneal <= 1:
            raise InputError(f"k_anneal is {self.k_anneal}, and must be a fraction of the run.")
        if self.auxk < 0 or self.multi_topk < 0:
            raise InputError("auxk and multi_topk are weights, and must not be negative.")
        if self.architecture == "matryoshka":
            widths = self.resolved_levels()
            if any(low >= high for low, high in itertools.pairwise(widths)) or widths[0] < 1:
                raise InputError(
                    f"levels are {self.levels}, and must rise from at least 1 to below d_sae, {self.d_sae}."
                )
            if self.level_weights and (len(self.level_weights) != len(widths) or min(self.level_weights) < 0):
                raise InputError(
                    f"level_weights has {len(self.level_weights)} numbers, and needs {len(widths)}, none negative:"
                    f" one for each of the widths {', '.join(map(str, widths))}."
                )

    def _check_sparsity(self) -> None:
        if self.sparsity_weight is not None and self.sparsity_weight < 0:
            raise InputError(f"sparsity_weight is {self.sparsity_weight}, and must not be negative.")
        if self.target_l0 is not None and not 0 < self.target_l0 < self.d_sae:
            raise InputError(
                f"target_l0 is {self.target_l0}, and must be above 0 and below d_sae, {self.d_sae}."
            )
        if not 0 < self.p_end <= 1:
            raise InputError(f"p_end is {self.p_end}, and must be above 0 and at most 1.")
        if self.bandwidth <= 0:
            raise InputError(f"bandwidth is {self.bandwidth}, and must be above 0.")

    def _refuse_foreign(self) -> None:
        """No field may say something that this architecture does not heed."""
        default = SAEConfig()
        for name, architectures in _ONLY_FOR.items():
            if not self.heeds(name) and getattr(self, name) != getattr(default, name):
                raise InputError(
                    f"{name} is a setting of {', '.join(architectures)}, and the architecture is {self.architecture}:"
                    " leave it out, or choose another architecture."
                )

    def heeds(self, name: str) -> bool:
        """Whether the field of that name says something to this architecture."""
        return self.architecture in _ONLY_FOR.get(name, (self.architecture,))

    def resolved_levels(self) -> tuple[int, ...]:
        """matryoshka: the widths of all nested dictionaries, d_sae last."""
        inner = self.levels or tuple(self.d_sae // part for part in (16, 8, 4, 2))
        return (*inner, self.d_sae)

    def resolved_sparsity_weight(self) -> float:
        """``sparsity_weight``, or the architecture's default."""
        return SPARSITY_WEIGHTS[self.architecture] if self.sparsity_weight is None else self.sparsity_weight


_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "k": SELECTING,
    "k_start": SELECTING,
    "k_anneal": SELECTING,
    "auxk": SELECTING,
    "multi_topk": ("topk",),
    "levels": ("matryoshka",),
    "level_weights": ("matryoshka",),
    "sparsity_weight": tuple(SPARSITY_WEIGHTS),
    "target_l0": tuple(SPARSITY_WEIGHTS),
    "p_end": ("relu",),
    "bandwidth": ("jumprelu",),
}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, for how long."""

    model: str = "builtin"
    """The bundled model (builtin), a local Hugging Face folder, or a hub name."""
    hook_name: str = "blocks.3.hook_resid_post"
    """Where in the model the activations are read, by its TransformerLens name."""
    hook_out: str | None = None
    """Train a transcoder: read the activations at hook_name, predict those at this hook."""
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
    """Seeds the initial weights."""
    order_seed: int = 0
    """Seeds the order of the activations; runs that share it can be trained side by side."""
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
