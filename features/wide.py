"""Examples in wider surroundings than the index keeps: their blocks are read and encoded again."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from activations.capture import capture_range, kept_at_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.index import Example
    from features.run import Run


def widened(
    run: "Run", examples: "Sequence[Example]", feature: int, width: int, before: int
) -> "list[Example]":
    """The same examples with ``width`` tokens around each, as far as their block reaches.

    Args:
        run: the run of the index that the examples are of. before: how many of the tokens lie before the example.

    Raises:
        InputError: model or SAE cannot be loaded.
    """
    index = run.index
    context = index.blocks.context_length
    wide = []
    for example in examples:
        block, place = divmod(example.position, context)
        start = max(place - before, 0)
        stop = min(start + width, int((index.blocks.documents[block] >= 0).sum()))
        activations = _of_block(run, block, feature)[start:stop]
        activations[place - start] = example.value  # as the index has it, from the store or in another batch
        offset = block * context
        tokens = index.pieces(offset + start, offset + stop)
        wide.append(replace(example, tokens=tokens, activations=activations, peak=place - start))
    return wide


@torch.no_grad()
def _of_block(run: "Run", block: int, feature: int) -> np.ndarray:
    """What a feature does in one block: float32 ``[context_length]``, 0 where positions do not count."""
    blocks, sae = run.index.blocks, run.sae
    exclusions = sae.exclusions(run.model.tokenizer)
    found = capture_range(run.model, blocks, list(exclusions), (block, block + 1))
    kept = kept_at_all(blocks, block, block + 1, found, exclusions)[0].cpu()
    codes = sae.encode(found[sae.hook_name][0].to(sae.b_dec))
    activations: np.ndarray = (codes.column(feature).cpu().float() * kept).numpy()
    return activations
