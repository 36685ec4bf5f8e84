"""The sparse part of a step as products with the whole ``[n, d_sae]`` tensor, where few zeros make that faster.

Tensor cores multiply by zeros faster than a gather fetches rows once d_sae / L0 is small:
:func:`sae.kernels.choice.dense_is_faster` says when. Products are made in the number format of the rows.
"""

import torch
from torch import Tensor

from sae.codes import Pattern, Transposed
from sae.kernels.triton_kernels import TritonKernels


class DenseKernels(TritonKernels):
    """Dense products; only the selection is a kernel of ours."""

    def gather_sum(self, values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
        """``codes · table``."""
        table = table.to(self.rows)
        codes = _scattered(_places(pattern), values, pattern.n_rows, pattern.d_sae, table.dtype)
        return (codes @ table).to(values.dtype)

    def gathered_dots(self, left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        """``left · rightᵀ``, of which the pattern's entries are kept."""
        right = right.to(self.rows)
        products = left.to(right.dtype) @ right.t()
        return products.view(-1)[_places(pattern)].view(pattern.indices.shape).to(left.dtype)

    def error_and_dots(
        self, values: Tensor, pattern: Pattern, decoder: Tensor, b_dec: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One product after the other."""
        error = self.gather_sum(values, pattern, decoder).add_(b_dec).sub_(goal)
        return error, self.gathered_dots(error, decoder, pattern)

    def weighted_sums(self, transposed: Transposed, table: Tensor, weights: Tensor) -> Tensor:
        """``codesᵀ · table``."""
        d_sae, nnz = len(transposed.counts), len(transposed.rows)
        table = table.to(self.rows)
        features = torch.arange(d_sae, device=table.device)
        places = transposed.rows * d_sae + features.repeat_interleave(transposed.counts, output_size=nnz)
        sorted_weights = weights.flatten()[transposed.order]
        codes = _scattered(places, sorted_weights, len(table), d_sae, table.dtype)
        return (codes.t() @ table).to(weights.dtype)


def _places(pattern: Pattern) -> Tensor:
    """Where each entry lies in the flattened ``[n, d_sae]`` tensor, int64 ``[nnz]``."""
    return pattern.rows() * pattern.d_sae + pattern.indices.flatten()


def _scattered(places: Tensor, values: Tensor, n: int, d_sae: int, dtype: torch.dtype) -> Tensor:
    flat = torch.zeros(n * d_sae, dtype=dtype, device=values.device)
    return flat.scatter_(0, places, values.flatten().to(dtype)).view(n, d_sae)
