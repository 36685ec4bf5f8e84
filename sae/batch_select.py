"""BatchTopK's selection: the largest pre-activations of a whole batch, exactly, without an ``[n, d_sae]`` tensor.

On a CPU one pass over the tiles picks out candidates, all entries above a cut, and the selection is made among them.
Each piece of a tile finds its own cut: with k the mean number of entries that a row will keep, at least half of all
rows keep at most 2k (Markov's inequality), so the 2k-th largest entry of a typical row lies below the batch's
threshold. Whether it did is known afterwards; where it did not, the candidates at hand still bound the threshold from
below, and a second pass with that bound finds everything. Comparing with a number and collecting the few hits is
cheaper than TopK's selection row by row.

Elsewhere the host does not know how many candidates there are unless it waits for the device. There the largest of
every tile are found by ``topk``, and the largest of those.

Several processes (:mod:`sae.mesh`) bring candidates of their own, and the threshold is that of all of them; then the
host does wait, for the number of its winners.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae.codes import Pattern, SparseCodes
from sae.global_select import nth_largest, winners_of_batch
from sae.mesh import ALONE, Mesh, mesh_in_force
from sae.sparse import differentiable, map_tiles

Array = npt.NDArray[Any]

_SAMPLED_ROWS = 16  # of every piece of a tile, to find a cut; half of them may have more than 2k entries
_SLACK = 2
_BLOCK = 1 << 18  # entries compared at a time, so that the outcome stays in the cache


@dataclass(frozen=True)
class _Candidates:
    """All entries of some rows above a cut (or the ``count`` largest of these), in row-major order.

    Attributes:
        n_rows: how many rows were searched. places: int64, entries of the flattened rows. values: their values.
        cut: see above.
    """

    n_rows: int
    places: Array
    values: Array
    cut: float


def batch_topk_codes(
    x: Tensor, input_bias: Tensor | None, encoder_rows: Tensor, encoder_bias: Tensor, count: int
) -> SparseCodes:
    """BatchTopK encoder with gradients (Bussmann et al. 2024, 2412.06410).

    Args:
        x: ``[n, d_in]`` (receives no gradient). input_bias: ``[d_in]``, or None for nothing to subtract.
        encoder_rows: ``[d_sae, d_in]``. encoder_bias: ``[d_sae]``. count: how many entries to keep, n·k.

    Returns:
        ragged codes, ``values`` differentiable; see :func:`encode_batch_topk`. Of several processes each gives a number
        of entries for its own rows, and keeps those of its entries that are among the largest of all.
    """
    with torch.no_grad():
        centred = x if input_bias is None else x - input_bias
        codes = encode_batch_topk(centred, encoder_rows, encoder_bias, count, mesh_in_force())
    return differentiable(codes, centred, input_bias, encoder_rows, encoder_bias, relu=True)


@torch.no_grad()
def encode_batch_topk(
    centred: Tensor, encoder_rows: Tensor, encoder_bias: Tensor, count: int, mesh: Mesh = ALONE
) -> SparseCodes:
    """The ``count`` largest positive entries of ``centred · W_enc + b_enc``; no gradient.

    Args:
        centred: ``[n, d_in]``, the input minus b_dec. encoder_rows: ``[d_sae, d_in]``. encoder_bias: ``[d_sae]``.

    Returns:
        ragged codes, features ascending within a row. On a CPU fewer entries than ``count`` where fewer are positive,
        and among equal values the first in row-major order; elsewhere always ``count``, of which some may be 0, and
        equal values as ``torch.topk`` chooses. A NaN counts as larger than any number, so that it is seen.
    """
    n, d_sae = len(centred), len(encoder_rows)
    if centred.device.type != "cpu":
        places, values = _topk_of_tiles(centred, encoder_rows, encoder_bias, count * mesh.n_data)
    else:
        places, values = _search(centred, encoder_rows, encoder_bias, count, mesh)
    if mesh.size > 1:
        won = winners_of_batch(values, count * mesh.n_data, mesh).nonzero().flatten()
        places, values = places[won], values[won]
    starts = torch.arange(n + 1, device=places.device) * d_sae
    pattern = Pattern(d_sae, (places % d_sae).int(), torch.searchsorted(places, starts))
    return SparseCodes(pattern, values)


def _topk_of_tiles(
    centred: Tensor, encoder_rows: Tensor, encoder_bias: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Places in the flattened batch, ascending, and values, negative ones clipped at 0: ``[count]`` each, or all."""

    def largest(tile: Tensor) -> tuple[int, Tensor, Tensor]:
        values, places = tile.flatten().topk(min(count, tile.numel()), sorted=False)
        return len(tile), places, values

    start, all_places, all_values = 0, [], []
    for n_rows, places, values in map_tiles(largest, centred, encoder_rows, encoder_bias):
        all_places.append(places + start * len(encoder_rows))
        all_values.append(values)
        start += n_rows
    candidates = torch.cat(all_values)
    values, chosen = candidates.topk(min(count, len(candidates)), sorted=False)
    places, order = torch.cat(all_places)[chosen].sort()
    return places, values[order].relu_()


def _search(
    centred: Tensor, encoder_rows: Tensor, encoder_bias: Tensor, count: int, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Places in the flattened batch, ascending, and values, all positive; see the module.

    Of several processes each finds all of its entries that can be among the largest.
    """
    per_row = math.ceil(_SLACK * count / max(len(centred), 1))
    count *= mesh.n_data
    found = map_tiles(
        lambda tile: _above(tile.numpy(), _likely_cut(tile.numpy(), per_row), count),
        centred,
        encoder_rows,
        encoder_bias,
    )
    values = np.concatenate([part.values for part in found])
    bound, highest = _threshold(values, count), max(part.cut for part in found)
    if mesh.size > 1:
        bound = float(nth_largest(torch.from_numpy(values), count, mesh))
        highest = -float(mesh.smallest_of_all(torch.tensor(-highest, dtype=torch.float64)))
    if highest > 0 and highest >= bound:  # something between the cut and the bound may have been missed
        cut = float(np.nextafter(values.dtype.type(bound), values.dtype.type(0)))  # so that ties are found
        found = map_tiles(lambda tile: _above(tile.numpy(), cut, count), centred, encoder_rows, encoder_bias)
        values = np.concatenate([part.values for part in found])
    starts = np.cumsum([0] + [part.n_rows for part in found[:-1]]) * len(encoder_rows)
    places = np.concatenate([part.places + start for part, start in zip(found, starts, strict=True)])
    kept = _largest(values, count)
    return torch.from_numpy(places[kept]), torch.from_numpy(values[kept])


def _likely_cut(tile: Array, per_row: int) -> float:
    """The ``per_row``-th largest entry of a typical row of ``tile [rows, d_sae]``, at least 0."""
    rows = tile[:: math.ceil(len(tile) / _SAMPLED_ROWS)]
    place = max(tile.shape[1] - per_row, 0)
    return max(float(np.median(np.partition(rows, place, axis=1)[:, place])), 0.0)


def _above(tile: Array, cut: float, count: int) -> _Candidates:
    """The entries of ``tile [rows, d_sae]`` above ``cut``; of more than ``count`` only the largest."""
    flat = tile.reshape(-1)
    found = []
    for start in range(0, len(flat), _BLOCK):
        below = flat[start : start + _BLOCK] <= tile.dtype.type(cut)
        found.append(np.flatnonzero(np.logical_not(below, out=below)) + start)  # a NaN is not below
    places = np.concatenate(found)
    values = flat[places]
    if len(places) > count:
        kept = _largest(values, count)
        places, values = places[kept], values[kept]
    return _Candidates(len(tile), places, values, cut)


def _threshold(values: Array, count: int) -> float:
    """The ``count``-th largest of ``values``, 0 where there are fewer."""
    place = len(values) - count
    return float(np.partition(values, place)[place]) if place >= 0 else 0.0


def _largest(values: Array, count: int) -> Array:
    """Where the ``count`` largest of ``values`` stand, ascending; among equals the first ones are taken."""
    if len(values) <= count:
        return np.arange(len(values))
    threshold = _threshold(values, count)
    kept = ~(values <= threshold)
    ties = np.flatnonzero(values == threshold)
    kept[ties[: max(count - int(kept.sum()), 0)]] = True
    return np.flatnonzero(kept)  # taking from numbered places is faster than from a mask
