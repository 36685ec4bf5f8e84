"""Our Triton kernels behind the interface of :class:`sae.kernels.choice.Kernels`. Importing this imports Triton."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.codes import Pattern, Transposed
from sae.kernels import decoding, grouped, selection


@dataclass(frozen=True)
class TritonKernels:
    """One kernel each: see the modules that they come from.

    Attributes:
        rows: number format of the rows that are gathered, which are copied into it; None leaves them as they are.
    """

    rows: torch.dtype | None = None

    def topk(self, tile: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
        """See :func:`sae.kernels.selection.topk`; what that does not take is left to ``torch.topk``."""
        k = min(k, tile.shape[1])
        if selection.supported(tile, k):
            return selection.topk(tile, k)
        return tile.topk(k, dim=1, sorted=False)

    def gather_sum(self, values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
        """See :func:`sae.kernels.decoding.gather_sum`."""
        return decoding.gather_sum(values, pattern, table.to(self.rows))

    def gathered_dots(self, left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        """See :func:`sae.kernels.decoding.gathered_dots`."""
        return decoding.gathered_dots(left, right.to(self.rows), pattern)

    def error_and_dots(
        self, values: Tensor, pattern: Pattern, decoder: Tensor, b_dec: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`sae.kernels.decoding.error_and_dots`."""
        return decoding.error_and_dots(values, pattern, decoder.to(self.rows), b_dec, goal)

    def weighted_sums(self, transposed: Transposed, table: Tensor, weights: Tensor) -> Tensor:
        """See :func:`sae.kernels.grouped.weighted_sums`."""
        return grouped.weighted_sums(transposed, table.to(self.rows), weights)
