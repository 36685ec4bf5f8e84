"""What can be said of a feature without any text: which tokens it promotes, which features resemble it."""

from typing import NamedTuple

import torch
from torch import Tensor

_TILE_BYTES = 32 << 20


class LogitLens(NamedTuple):
    """Most promoted and most suppressed tokens of each feature, strongest effect first.

    promoted, suppressed: int64 ``[d_sae, n]``, token ids.
    promoted_logit, suppressed_logit: float32 ``[d_sae, n]``, effect on the logit per unit of activation, less
        its mean over the vocabulary, with the final normalisation's divisor taken as 1.
    """

    promoted: Tensor
    promoted_logit: Tensor
    suppressed: Tensor
    suppressed_logit: Tensor


@torch.no_grad()
def logit_lens(W_dec: Tensor, gain: Tensor, W_U: Tensor, n: int) -> LogitLens:
    """``(W_dec[f] ⊙ gain) · W_U`` (nostalgebraist 2020), minus its mean over the vocabulary, which changes no
    probability.

    Args:
        W_dec: ``[d_sae, d_model]``. gain: ``[d_model]``, of the final normalisation.
        W_U: ``[d_model, d_vocab]``.
        n: how many tokens at either end.
    """
    n = min(n, W_U.shape[1])
    tiles = []
    for rows in W_dec.split(_tile_rows(W_U.shape[1])):
        logits = (rows.to(W_U) * gain) @ W_U
        logits -= logits.mean(dim=1, keepdim=True)
        highest, lowest = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        tiles.append((highest.indices, highest.values, lowest.indices, lowest.values))
    return LogitLens(*(torch.cat(parts).cpu() for parts in zip(*tiles, strict=True)))


class Neighbours(NamedTuple):
    """The features with the most similar decoder rows: int64 ids and float32 cosines, ``[d_sae, n]``."""

    feature: Tensor
    cosine: Tensor


@torch.no_grad()
def decoder_neighbours(W_dec: Tensor, n: int) -> Neighbours:
    """Nearest neighbours of each feature by the cosine of decoder rows, itself left out.

    Args:
        W_dec: ``[d_sae, d_in]``. n: how many; at most d_sae - 1 are given.
    """
    n = min(n, len(W_dec) - 1)
    directions = torch.nn.functional.normalize(W_dec.float(), dim=1)
    step = _tile_rows(len(W_dec))
    tiles = []
    for start in range(0, len(W_dec), step):
        cosines = directions[start : start + step] @ directions.T
        cosines.diagonal(start).fill_(-torch.inf)
        tiles.append(cosines.topk(n, dim=1))
    return Neighbours(
        torch.cat([t.indices for t in tiles]).cpu(), torch.cat([t.values for t in tiles]).clamp(max=1).cpu()
    )


def _tile_rows(columns: int) -> int:
    return max(1, _TILE_BYTES // (4 * columns))
