"""What a preset chooses where a configuration leaves the choice open (None). What is given is never overridden.

``default``: what we measured best at a few million tokens. Batch and learning rate follow the length of the run
(:mod:`sae.recipe`); half of the run is decay, which a short run gains most from; no clipping, since with centred and
scaled inputs no step has needed it; b_dec starts at the mean, which is 0 after centring.

``fast``: a quick look. Steps twice as large and so half as many, which costs a little quality and saves the work
that every step does whatever its size (Adam over all weights, the decoder's norms).

``faithful``: the published recipe, as in SAEBench and dictionary_learning (2503.09532; 2406.04093, appendix A):
batches of 2,048, learning rate 3e-4, warm-up of 1,000 steps (of a short run, no more than a twentieth), decay over the
last fifth, gradients clipped at norm 1, b_dec at the geometric median. Made for hundreds of millions of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sae.recipe import batch_for, rate_for

PresetName = Literal["fast", "default", "faithful"]
BiasInit = Literal["mean", "geometric_median"]


@dataclass(frozen=True)
class Preset:
    """What it chooses, of the number of tokens read or the number of steps.

    Attributes:
        batch: tokens to a step, of the tokens read. rate: peak learning rate, of the steps and the width d_sae.
        warmup: fraction of the run, of the steps. decay: fraction of the run.
        clip_norm: largest norm of the gradient; 0 for no limit. init_b_dec: where b_dec starts.
    """

    batch: Callable[[int], int]
    rate: Callable[[int, int], float]
    warmup: Callable[[int], float]
    decay: float
    clip_norm: float
    init_b_dec: BiasInit


PRESETS: dict[PresetName, Preset] = {
    "default": Preset(batch_for, rate_for, lambda steps: 0.05, 0.5, 0.0, "mean"),
    "fast": Preset(lambda tokens: 2 * batch_for(tokens), rate_for, lambda steps: 0.05, 0.5, 0.0, "mean"),
    "faithful": Preset(
        batch=lambda tokens: 2048,
        rate=lambda steps, d_sae: 3e-4,
        warmup=lambda steps: min(1000 / max(steps, 1), 0.05),
        decay=0.2,
        clip_norm=1.0,
        init_b_dec="geometric_median",
    ),
}
