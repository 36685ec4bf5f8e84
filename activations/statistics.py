"""Where the activations of a hook lie: their mean and scale, and which positions count.

A store measures all of this while it is written (:mod:`activations.store`). A live stream has nothing on disk, so
it is measured on the first tokens before training begins.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, kept_positions
from activations.exclusion import SAMPLE_TOKENS, Exclusion, Moments
from activations.progress import Progress, silent

if TYPE_CHECKING:
    from activations.models import LanguageModel


@dataclass(frozen=True)
class Statistics:
    """mean: float32 [width]. scale: makes E‖(x − mean)·scale‖² = width. exclusion: which positions count."""

    mean: Tensor
    scale: float
    exclusion: Exclusion


def measure_statistics(
    model: "LanguageModel", blocks: TokenBlocks, hook_name: str, *, progress: Progress = silent
) -> Statistics:
    """Measure on the first 100,000 tokens of ``blocks``, or all where there are fewer.

    Raises:
        InputError: unknown hook, or no token that is not special.
    """
    blocks = blocks.first_tokens(SAMPLE_TOKENS)
    moments = Moments(model.width(hook_name))
    captured: list[tuple[int, Tensor]] = []
    with progress("measure", total=blocks.ids.size, unit="tokens") as step:
        for start, activations in capture_blocks(model, blocks, [hook_name]):
            x = activations[hook_name]
            captured.append((start, x))
            step(x.shape[0] * x.shape[1])
    ids = ((blocks.ids_tensor(start, start + len(x)), x) for start, x in captured)
    exclusion = Exclusion.measure(model.tokenizer.special_ids, ids)
    for start, x in captured:
        moments.add(x[kept_positions(blocks, start, start + len(x), x, exclusion)])
    return Statistics(moments.mean, moments.scale, exclusion)
