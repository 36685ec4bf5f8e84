"""Reconstructions from nested prefixes of the features, for the price of one decoding.

Level l decodes the features below ``widths[l]``, so its error is that of the level before plus what the features
between add (a *band*):

    e_l = e_(l−1) + Σ_(i in band l) f_i W_dec,i,    e_(−1) = b_dec − goal,    L = Σ_l w_l · mean ‖e_l‖²

A feature of band j takes part in every level from j on, so its gradient comes from ``g_j = Σ_(l ≥ j) w_l e_l`` alone:
∂L/∂f_i = 2/n · g_j · W_dec,i and ∂L/∂W_dec,i = 2/n · Σ f_i g_j. Going back from the last level, e_l is taken apart
again as g_j grows; so two ``[n, d_out]`` tensors serve any number of levels, and every entry is decoded once in either
direction.

That needs the number of entries in each band, which a GPU's host does not know without waiting. There a row's bands
are rows of their own: one decoding gives ``[n, levels, d_out]``, and sums along the levels give errors and gradients.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.codes import Pattern, SparseCodes, Transposed
from sae.kernels.choice import serving
from sae.mesh import ALONE, Mesh, mesh_in_force
from sae.sparse import TORCH

_CHUNK_ROWS = 1024
_CHUNK_FEATURES = 2048


def nested_squared_error(
    codes: SparseCodes,
    decoder: Tensor,
    b_dec: Tensor,
    goal: Tensor,
    widths: tuple[int, ...],
    weights: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ_l weights[l] · mean_n ‖ŷ_l − goal‖²``, where ŷ_l decodes the features below ``widths[l]``.

    Differentiable in the codes' values, the decoder, b_dec and the goal (once: the gradient is taken in place).

    Args:
        codes: ragged, features ascending within a row. decoder: ``[d_sae, d_out]``. b_dec: ``[d_out]``.
        goal: ``[n, d_out]``. widths: ascending, d_sae last; of all shards, where features are sharded. weights: one per
            width.

    Returns:
        the sum; the mean of every level ``[levels]`` and the last level's ``ŷ − goal`` ``[n, d_out]``, both without
        gradient.
    """
    function = _ByBands if goal.device.type == "cpu" else _Stacked
    first = mesh_in_force().shard * codes.d_sae
    own = tuple(min(max(width - first, 0), codes.d_sae) for width in widths)
    total, levels, error = function.apply(codes.values, decoder, b_dec, goal, codes.pattern, own, weights)
    return total, levels, error


def _outputs(ctx: Any, means: list[Tensor], last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = sum((weight * mean for weight, mean in zip(ctx.weights, means, strict=True)), last.new_zeros(()))
    levels = torch.stack(means)
    ctx.mark_non_differentiable(levels, last)
    return total, levels, last


@dataclass(frozen=True)
class _Band:
    """The entries whose features lie between two widths.

    Attributes:
        low, high: the widths.
        pattern: features and rows of the entries, ragged. places: int64, where they stand among all entries.
    """

    low: int
    high: int
    pattern: Pattern
    places: Tensor

    def add_to(self, error: Tensor, values: Tensor, decoder: Tensor, sign: float, mesh: Mesh = ALONE) -> None:
        """Add ``sign`` times what these entries and those of other shards decode to, some rows at a time.

        Args:
            values: of all entries, not of the band's alone.
        """
        if mesh.n_shards > 1:
            added = torch.zeros_like(error)
            self.add_to(added, values, decoder, 1)
            error.add_(mesh.sum_over_features(added), alpha=sign)
            return
        own = values[self.places]
        for start in range(0, len(error), _CHUNK_ROWS):
            rows = error[start : start + _CHUNK_ROWS]
            pattern, span = self.pattern.slice(start, start + len(rows))
            rows.add_(TORCH.gather_sum(own[span], pattern, decoder), alpha=sign)

    def weighted_sums(self, transposed: Transposed, table: Tensor, values: Tensor, out: Tensor) -> None:
        """Write the band's rows of ``transposed.weighted_sums(table, values)`` into those of ``out``, some at a time.

        Args:
            transposed: of all entries. table: ``[n, d]``. values: of all entries. out: ``[d_sae, d]``.
        """
        for low in range(self.low, self.high, _CHUNK_FEATURES):
            features = slice(low, min(low + _CHUNK_FEATURES, self.high))
            counts, start = transposed.counts[features], int(transposed.offsets[low])
            entries = slice(start, start + int(counts.sum()))
            chunk = Transposed(
                transposed.order[entries],
                transposed.rows[entries],
                transposed.offsets[features] - start,
                counts,
            )
            out[features] = TORCH.weighted_sums(chunk, table, values)


def _bands(pattern: Pattern, widths: tuple[int, ...]) -> list[_Band]:
    """The entries of a ragged pattern, shared out; on the CPU."""
    assert pattern.row_offsets is not None
    bands = []
    features = pattern.indices.numpy()
    for low, high in zip((0, *widths), widths, strict=False):
        places = torch.from_numpy(np.flatnonzero((features >= low) & (features < high)))
        offsets = torch.searchsorted(places, pattern.row_offsets)
        bands.append(_Band(low, high, Pattern(pattern.d_sae, pattern.indices[places], offsets), places))
    return bands


class _ByBands(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        decoder: Tensor,
        b_dec: Tensor,
        goal: Tensor,
        pattern: Pattern,
        widths: tuple[int, ...],
        weights: tuple[float, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.pattern, ctx.bands, ctx.weights = pattern, _bands(pattern, widths), weights
        ctx.mesh = mesh_in_force()
        error = b_dec - goal
        means = []
        for band in ctx.bands:
            band.add_to(error, values, decoder, 1, ctx.mesh)
            means.append(torch.linalg.vector_norm(error).square() / len(goal))
        ctx.save_for_backward(values, decoder, error)
        last = error.clone()  # the backward pass takes the error apart in its place
        return _outputs(ctx, means, last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder, error = ctx.saved_tensors
        factor = grads[0] * (2 / len(error))
        d_values, d_decoder = torch.empty_like(values), torch.empty_like(decoder)
        transposed, weighted = ctx.pattern.transposed, values * factor
        slope = error * ctx.weights[-1]
        for level in reversed(range(len(ctx.bands))):
            band = ctx.bands[level]
            d_values[band.places] = TORCH.gathered_dots(slope, decoder, band.pattern) * factor
            band.weighted_sums(transposed, slope, weighted, out=d_decoder)
            if level:
                band.add_to(error, values, decoder, -1, ctx.mesh)
                slope.add_(error, alpha=ctx.weights[level - 1])
        d_b_dec = slope.sum(0) * factor
        d_goal = slope.mul_(-factor) if ctx.needs_input_grad[3] else None
        return d_values, d_decoder, d_b_dec, d_goal, None, None, None


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        decoder: Tensor,
        b_dec: Tensor,
        goal: Tensor,
        pattern: Pattern,
        widths: tuple[int, ...],
        weights: tuple[float, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, d_out), n_levels = goal.shape, len(widths)
        level = torch.zeros_like(pattern.indices)
        for width in widths[:-1]:
            level += pattern.indices >= width
        ctx.rows = pattern.rows() * n_levels + level
        starts = torch.arange(n * n_levels + 1, device=goal.device)
        ctx.nested = Pattern(pattern.d_sae, pattern.indices, torch.searchsorted(ctx.rows, starts))
        ctx.pattern, ctx.weights = pattern, weights
        ctx.kernels = serving(ctx.nested, decoder) or TORCH
        decoded = ctx.kernels.gather_sum(values, ctx.nested, decoder)
        added = mesh_in_force().sum_over_features(decoded).view(n, n_levels, d_out)
        errors = added.cumsum(1).add_((b_dec - goal).unsqueeze(1))
        ctx.save_for_backward(values, decoder, errors)
        means = [torch.linalg.vector_norm(error).square() / n for error in errors.unbind(1)]
        return _outputs(ctx, means, errors[:, -1].clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder, slopes = ctx.saved_tensors
        n, n_levels, d_out = slopes.shape
        factor = grads[0] * (2 / n)
        slopes[:, -1] *= ctx.weights[-1]
        for level in reversed(range(n_levels - 1)):
            slopes[:, level].mul_(ctx.weights[level]).add_(slopes[:, level + 1])
        table = slopes.view(n * n_levels, d_out)
        transposed = ctx.pattern.transposed
        transposed = replace(transposed, rows=ctx.rows[transposed.order])
        d_values = ctx.kernels.gathered_dots(table, decoder, ctx.nested) * factor
        d_decoder = ctx.kernels.weighted_sums(transposed, table, values * factor)
        d_goal = slopes[:, 0] * -factor if ctx.needs_input_grad[3] else None
        return d_values, d_decoder, slopes[:, 0].sum(0) * factor, d_goal, None, None, None
