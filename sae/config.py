"""The configuration of a training run: one set of dataclasses for Python, ``run.toml`` and the command line.

This module imports no torch, so that ``sae --help`` stays quick. Every field carries its sentence; the command
line makes its flags from them.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from activations.config import ExclusionRule, ModelDtype
from activations.corpus import CorpusConfig
from activations.errors import InputError
from sae.presets import PRESETS, BiasInit, PresetName

DEFAULT_TOKENS = 2_000_000
SEEDS = 2**32  # a step's number fits beside a seed in the 64 bits of a generator's


ArchitectureName = Literal["topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu"]
SELECTING = (
    "topk",
    "batch_topk",
    "matryoshka",
)  # these keep a number of features, k; the others pay for firing
THRESHOLDED = (
    "batch_topk",
    "matryoshka",
)  # a threshold that follows the weights takes the place of k at the end
LONGEST_ANNEAL = 0.8  # of a run: the threshold has a memory, and must not still hold an earlier k
SPARSITY_WEIGHTS = {"relu": 5.0, "gated": 1.0, "jumprelu": 0.1}  # where a controller begins
DEFAULT_L0 = 32.0  # as k is by default, so that architectures compare


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
    """relu, gated, jumprelu: weight λ of the sparsity loss, for inputs scaled to a mean squared norm of d_in; without
    target_l0 it stays, with it a controller begins there."""
    target_l0: float | None = None
    """relu, gated, jumprelu: L0 that a controller reaches and holds; where sparsity_weight is left out too, 32 (at most
    d_sae/4)."""
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
        _refuse_endless(self)
        if self.d_sae < 1:
            raise InputError(f"d_sae is {self.d_sae}, and an SAE needs at least one feature.")
        if self.architecture in SELECTING:
            self._check_selection()
        else:
            self._check_sparsity()
        if self.aligned and self.transcoder:
            raise InputError(
                "aligned is for sparse autoencoders: a transcoder's encoder and decoder lie in different spaces."
            )
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
        if self.architecture in THRESHOLDED and self.k_start is not None and self.k_anneal > LONGEST_ANNEAL:
            raise InputError(
                f"k_anneal is {self.k_anneal}, and {self.architecture} needs its last fifth at the final k, to learn"
                f" the threshold that goes with it: give at most {LONGEST_ANNEAL}."
            )
        if self.k_start is None and self.k_anneal != SAEConfig().k_anneal:
            raise InputError(
                "k_anneal says how long k falls from k_start: give k_start, or leave k_anneal out."
            )
        if self.auxk < 0 or self.multi_topk < 0:
            raise InputError("auxk and multi_topk are weights, and must not be negative.")
        if self.architecture == "matryoshka":
            widths = self.resolved_levels()
            if not self.levels and widths[0] < 1:
                raise InputError(
                    f"d_sae is {self.d_sae}, and the default levels divide it by up to 16: give at least 16 features,"
                    " or levels of your own."
                )
            if any(low >= high for low, high in itertools.pairwise(widths)) or widths[0] < 1:
                raise InputError(
                    f"levels are {', '.join(map(str, widths[:-1]))}, and must rise from at least 1 to below d_sae,"
                    f" {self.d_sae}."
                )
            if self.level_weights and (len(self.level_weights) != len(widths) or min(self.level_weights) < 0):
                raise InputError(
                    f"level_weights has {len(self.level_weights)} numbers, and needs {len(widths)}, none negative:"
                    f" one for each of the widths {', '.join(map(str, widths))}."
                )
            if self.level_weights and max(self.level_weights) == 0:
                raise InputError("level_weights are all 0, and one at least must be above 0.")

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


def _refuse_endless(config: object) -> None:
    """No number of a configuration may be infinite or none at all."""
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            shown = ", ".join(map(str, numbers))
            wanted = "hold finite numbers only" if isinstance(value, tuple) else "be a finite number"
            raise InputError(f"{name} is {shown}, and must {wanted}.")


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
    preset: PresetName = "default"
    """Chooses what is left open below: see sae/presets.py for what and why."""
    batch_tokens: int | None = None
    """Tokens per training step; by default chosen from the length of the run."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; chosen from the number of steps by default."""
    buffer_tokens: int | None = None
    """Without a store: activations in the shuffle buffer; by default half a gigabyte of them."""
    warmup: float | None = None
    """Fraction of the run over which the learning rate rises from 0 (default: 0.05)."""
    decay: float | None = None
    """Fraction of the run, at its end, over which the learning rate falls to 0 (default: 0.5)."""
    clip_norm: float | None = None
    """Largest norm of the gradient over all weights; 0 for no limit (default)."""
    init_b_dec: BiasInit | None = None
    """Where b_dec starts: the mean of the activations (default), or the geometric median of the first batch."""
    moments: Literal["float32", "8bit"] = "float32"
    """Adam's two moments: 4 bytes a weight each, or 1, quantised block by block (2110.02861; slower)."""
    ema: float = 0.0
    """Decay per step of an exponential mean of the weights, which then is the trained SAE; 0 for none (2406.04093)."""
    resample_every: int | None = None
    """Tokens between two resamplings of dead features (Bricken et al. 2023), until decay begins; by default none."""
    kernels: Literal["torch", "triton"] = "torch"
    """triton: our kernels (CUDA only, not timed yet) for the sparse part of topk, batch_topk and matryoshka, and for
    Adam in float32 without clipping or alignment."""
    product: Literal["float32", "bfloat16"] = "float32"
    """topk, batch_topk, matryoshka: format of the encoder product, with triton of gathered rows too."""
    shards: int = 1
    """Under torchrun: deal the features out to so many processes, for an SAE larger than one device."""
    checkpoint_every: int | None = None
    """Tokens between two checkpoints, the most that an interrupted run repeats; by default a tenth of the run."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl; tensorboard writes into the run folder."""
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
        _refuse_endless(self)
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}, and must be at least 1.")
        if self.passes < 1:
            raise InputError(f"passes is {self.passes}, and must be at least 1.")
        if self.context_length is not None and self.context_length < 8:
            raise InputError(f"context_length is {self.context_length}, and must be at least 8.")
        for name, seed in (
            ("seed", self.seed),
            ("order_seed", self.order_seed),
            ("shuffle_seed", self.corpus.shuffle_seed),
        ):
            if not 0 <= seed < SEEDS:
                raise InputError(f"{name} is {seed}, and must lie between 0 and {SEEDS - 1}.")
        for name in ("batch_tokens", "buffer_tokens", "resample_every", "checkpoint_every", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, and must be at least 1.")
        if self.sae.d_sae % self.shards:
            raise InputError(f"d_sae is {self.sae.d_sae}, and must be a multiple of shards, {self.shards}.")
        self._check_optimiser()
        if self.kernels != "torch":
            from activations.loading import resolve_device
            from sae.kernels.choice import check_available  # imports torch, which this module does not

            check_available(self.kernels, resolve_device(self.device))
        if self.order == "external" and self.store is None:
            raise InputError("order 'external' is for a store of activations: give --store, or leave it out.")
        if self.buffer_tokens is not None and self.store is not None:
            raise InputError(
                "buffer_tokens is for activations computed as training goes: leave it out, or the store."
            )
        if self.hook_out == self.hook_name:
            raise InputError(
                f"hook_out and hook_name are both {self.hook_name}: a transcoder reads one hook and writes another;"
                " leave hook_out out for a sparse autoencoder."
            )
        if self.sae.transcoder and self.hook_out is None:
            raise InputError("A transcoder writes another hook than it reads: give hook_out.")
        self.rule.check()
        self.resolved_sae().check()

    def _check_optimiser(self) -> None:
        rate = self.learning_rate
        if rate is not None and rate <= 0:
            raise InputError(f"learning_rate is {rate}, and must be above 0.")
        warmup, decay = self.resolved_warmup(), self.resolved_decay()
        if warmup < 0 or decay < 0 or warmup + decay > 1:
            raise InputError(
                f"warmup is {warmup:g} and decay {decay:g}, and they are fractions of the run: neither may be negative,"
                " nor their sum above 1."
            )
        before_decay = int((1 - decay) * self.tokens_read())
        if self.resample_every is not None and self.resample_every > before_decay:
            raise InputError(
                f"resample_every is {self.resample_every}, and nothing is resampled while the learning rate falls: it"
                f" must be at most {before_decay}, the tokens before that."
            )
        if self.resolved_clip_norm() < 0:
            raise InputError(f"clip_norm is {self.clip_norm}, and must not be negative.")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}, and must be at least 0 and below 1.")
        held = self.sae.architecture == "jumprelu" and self.resolved_sae().target_l0 is not None
        if self.ema and (held or self.sae.architecture in THRESHOLDED):
            raise InputError(
                f"ema averages weights, and the threshold of {self.sae.architecture}{' with target_l0' if held else ''}"
                " is that of the last ones: leave ema out"
                + (", or give sparsity_weight and no target_l0." if held else ".")
            )
        if self.product != "float32" and self.sae.architecture not in SELECTING:
            raise InputError(
                f"product is {self.product}, which is for {', '.join(SELECTING)}, and the architecture is"
                f" {self.sae.architecture}: leave it out."
            )

    def resolved(self) -> "TrainConfig":
        """The same training with everything worked out that was left open, and without what does not change the SAE."""
        return replace(
            self,
            sae=self.resolved_sae(),
            tokens=self.resolved_tokens(),
            preset="default",  # nothing is left for it to choose
            batch_tokens=self.resolved_batch_tokens(),
            learning_rate=self.resolved_learning_rate(),
            warmup=self.resolved_warmup(),
            decay=self.resolved_decay(),
            clip_norm=self.resolved_clip_norm(),
            init_b_dec=self.resolved_init_b_dec(),
            shards=1,
            checkpoint_every=None,
            log_to=(),
        )

    def resolved_sae(self) -> SAEConfig:
        """``sae``, a transcoder where ``hook_out`` is given, with an L0 to hold where nothing says how sparse to be."""
        sae = self.sae if self.hook_out is None else replace(self.sae, transcoder=True)
        unsaid = sae.sparsity_weight is None and sae.target_l0 is None
        if sae.architecture in SPARSITY_WEIGHTS and unsaid:
            sae = replace(sae, target_l0=min(DEFAULT_L0, sae.d_sae / 4))
        return sae

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Where activations are read; of a transcoder also where those are that it predicts."""
        return (self.hook_name,) if self.hook_out is None else (self.hook_name, self.hook_out)

    def resolved_tokens(self) -> int:
        """``tokens``, or 2 million."""
        return DEFAULT_TOKENS if self.tokens is None else self.tokens

    def tokens_read(self) -> int:
        """Training tokens, counted once for every pass."""
        return self.resolved_tokens() * self.passes

    def resolved_batch_tokens(self) -> int:
        """``batch_tokens``, or the preset's; never more than there are."""
        chosen = self.batch_tokens or PRESETS[self.preset].batch(self.tokens_read())
        return min(chosen, self.tokens_read())

    def n_steps(self) -> int:
        """Number of training steps (whole batches)."""
        return self.tokens_read() // self.resolved_batch_tokens()

    def resolved_learning_rate(self) -> float:
        """``learning_rate``, or the preset's for so many steps of an SAE of this width."""
        return self.learning_rate or PRESETS[self.preset].rate(self.n_steps(), self.sae.d_sae)

    def resolved_warmup(self) -> float:
        """``warmup``, or the preset's; no more than ``decay`` leaves where that alone was given."""
        if self.warmup is not None:
            return self.warmup
        warmup = PRESETS[self.preset].warmup(self.n_steps())
        return warmup if self.decay is None else max(min(warmup, 1 - self.decay), 0.0)

    def resolved_decay(self) -> float:
        """``decay``, or the preset's; no more than ``warmup`` leaves where that alone was given."""
        if self.decay is not None:
            return self.decay
        decay = PRESETS[self.preset].decay
        return decay if self.warmup is None else max(min(decay, 1 - self.warmup), 0.0)

    def resolved_clip_norm(self) -> float:
        """``clip_norm``, or the preset's; 0 for no limit."""
        return PRESETS[self.preset].clip_norm if self.clip_norm is None else self.clip_norm

    def resolved_init_b_dec(self) -> BiasInit:
        """``init_b_dec``, or the preset's."""
        return self.init_b_dec or PRESETS[self.preset].init_b_dec
