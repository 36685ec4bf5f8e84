"""What can be said of features without any text: which tokens they promote, which features resemble them."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.sparse import topk_of_tile

_TILE_BYTES = 32 << 20


class LogitLens(NamedTuple):
    """Most promoted and most suppressed tokens of each feature, strongest effect first.

    promoted_id, suppressed_id: int64 ``[n, most]``, token ids.
    promoted_logit, suppressed_logit: float32 ``[n, most]``, effect on the logit per unit of activation, less
        its mean over the vocabulary, with the final normalisation's divisor taken as 1.
    moments: float32 ``[n, 4]``, of the effects on all logits: mean, standard deviation, skewness and kurtosis
        (3 for a normal distribution).
    """

    promoted_id: Tensor
    promoted_logit: Tensor
    suppressed_id: Tensor
    suppressed_logit: Tensor
    moments: Tensor


@torch.no_grad()
def logit_lens(W_dec: Tensor, gain: Tensor, W_U: Tensor, most: int) -> LogitLens:
    """``(W_dec[f] ⊙ gain) · W_U`` (nostalgebraist 2020), minus its mean over the vocabulary, which changes no
    probability.

    Args:
        W_dec: ``[n, d_model]``. gain: ``[d_model]``, of the final normalisation.
        W_U: ``[d_model, d_vocab]``.
        most: how many tokens at either end.
    """
    most = min(most, W_U.shape[1])
    tiles = []
    for rows in W_dec.split(_tile_rows(W_U.shape[1])):
        logits = (rows.to(W_U) * gain) @ W_U
        mean = logits.mean(dim=1, keepdim=True)
        logits -= mean
        highest = _largest(logits, most)
        lowest_logit, lowest = _largest(-logits, most)
        std = logits.std(dim=1, correction=0, keepdim=True)
        standard = logits / std.clamp_min(1e-30)
        skew, kurtosis = standard.pow(3).mean(1, keepdim=True), standard.pow(4).mean(1, keepdim=True)
        moments = torch.cat([mean, std, skew, kurtosis], dim=1)
        tiles.append((highest[1], highest[0], lowest, -lowest_logit, moments))
    return LogitLens(*(torch.cat(parts).cpu() for parts in zip(*tiles, strict=True)))


class Neighbours(NamedTuple):
    """The features with the most similar decoder rows: int64 ids and float32 cosines, ``[n, most]``."""

    feature: Tensor
    cosine: Tensor


@torch.no_grad()
def decoder_neighbours(directions: Tensor, start: int, n: int, most: int) -> Neighbours:
    """Nearest neighbours of features ``start`` to ``start + n`` by the cosine of decoder rows, themselves left out.

    Args:
        directions: ``[d_sae, d_in]``, decoder rows of norm 1.
        most: how many; at most d_sae - 1 are given, nearest first.
    """
    most = min(most, len(directions) - 1)
    assert most > 0, "one feature has no neighbours"
    tiles = []
    step = _tile_rows(len(directions))
    for first in range(start, start + n, step):
        rows = directions[first : min(first + step, start + n)]
        cosines = rows @ directions.T
        cosines.diagonal(first).fill_(-torch.inf)
        tiles.append(_largest(cosines, most))
    return Neighbours(
        torch.cat([indices for _, indices in tiles]).cpu(),
        torch.cat([values for values, _ in tiles]).clamp(max=1).cpu(),
    )


def _largest(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row ``[n, most]``, largest first, and int64 indices; of equals the smaller first."""
    values, indices = topk_of_tile(rows.float().contiguous(), most)
    by_index = indices.long().argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.long().gather(1, by_index)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), indices.gather(1, order)


def _tile_rows(columns: int) -> int:
    return max(1, _TILE_BYTES // (4 * columns))
