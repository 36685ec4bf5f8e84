"""Where the activations of a hook lie: their mean and scale, and which positions count.

All of it is measured on the first 100,000 tokens and then stands: more text, more processes or a store in the
place of a live stream change neither which positions count nor what an SAE starts from. Every hook is measured by
itself; where several are read side by side, a position counts that counts at each of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, counted_positions
from activations.config import ExclusionRule
from activations.errors import InputError
from activations.exclusion import Exclusion, Moments, is_text, norms
from activations.progress import Progress, silent

if TYPE_CHECKING:
    from activations.models import LanguageModel

SAMPLE_TOKENS = 100_000


@dataclass(frozen=True)
class Statistics:
    """mean: float32 [width]. scale: makes E‖(x − mean)·scale‖² = width. exclusion: which positions count."""

    mean: Tensor
    scale: float
    exclusion: Exclusion


def statistics_of(
    rows: Iterable[tuple[Tensor, Tensor, Tensor]], special_ids: Iterable[int], rule: ExclusionRule
) -> Statistics:
    """Statistics of the first 100,000 tokens that are not special (or of all, where the rule keeps those).

    Args:
        rows: (ids [n], activations [n, width], their norms [n]) in the order of the text; no more are taken than
            are needed.

    Raises:
        InputError: no token is left.
    """
    special = frozenset(special_ids) if rule.exclude_special else frozenset()
    sample: list[tuple[Tensor, Tensor]] = []
    missing = SAMPLE_TOKENS
    for ids, x, sizes in rows:
        kept = is_text(ids.to(x.device), special)
        if not kept.all():
            x, sizes = x[kept], sizes[kept]
        sample.append((x[:missing], sizes[:missing]))
        missing -= len(sample[-1][0])
        if missing <= 0:
            break
    if missing == SAMPLE_TOKENS:
        raise InputError("The corpus holds special tokens only: give one that holds text.")
    max_norm = float("inf")
    if rule.outlier_factor is not None:
        max_norm = rule.outlier_factor * float(torch.cat([sizes.cpu() for _, sizes in sample]).median())
    moments = Moments(sample[0][0].shape[-1])
    for x, sizes in sample:
        moments.add(x[sizes <= max_norm])
    return Statistics(moments.mean, moments.scale, Exclusion(special, max_norm))


def measure_statistics(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_name: str,
    rule: ExclusionRule | None = None,
    *,
    progress: Progress = silent,
) -> Statistics:
    """Statistics at a hook of a model that reads ``blocks``; see :func:`statistics_of`.

    Raises:
        InputError: unknown hook, or no token that counts.
    """
    with progress("measure", total=min(SAMPLE_TOKENS, blocks.n_tokens), unit="tokens") as step:

        def rows() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            for start, activations in capture_blocks(model, blocks, [hook_name]):
                x = activations[hook_name]
                counts = counted_positions(blocks, start, start + len(x)).to(x.device)
                yield (
                    blocks.ids_tensor(start, start + len(x)).to(x.device)[counts],
                    x[counts],
                    norms(x[counts]),
                )
                step(int(counts.sum()))

        return statistics_of(rows(), model.tokenizer.special_ids, rule or ExclusionRule())
