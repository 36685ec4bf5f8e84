"""What the decoder and the encoder have to fulfil at every step, and the gradient that respects it.

*Unit decoder*: every decoder row has norm 1. The component of its gradient along the row is removed, and rows are
rescaled after the step (Bricken et al. 2023).

*Aligned*: every feature's encoder e and decoder d have the product ⟨e, d⟩ = 1 (2605.18629), so that a feature reads
exactly what it writes. After the step e is moved along d: e + (1 − ⟨e, d⟩) d / ‖d‖². The gradient is the one through
this map: with c = ⟨∂e, d⟩ / ‖d‖², that of e loses c·d and that of d loses c·e.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.architectures.base import Weights
from sae.sparse import row_dots

_TINY = 1e-8


@dataclass(frozen=True)
class Constraints:
    """Which of them hold; see the module."""

    unit_decoder: bool
    aligned: bool

    @torch.no_grad()
    def project(self, weights: Weights) -> None:
        """Make the gradients of weights that fulfil the constraints respect them, in place."""
        encoder, decoder = weights.encoder_rows, weights.W_dec
        if self.aligned and encoder.grad is not None and decoder.grad is not None:
            along = (row_dots(encoder.grad, decoder) / _squares(decoder))[:, None]
            encoder.grad.addcmul_(along, decoder, value=-1)
            decoder.grad.addcmul_(along, encoder, value=-1)
        if self.unit_decoder and decoder.grad is not None:
            decoder.grad.addcmul_(decoder, row_dots(decoder.grad, decoder)[:, None], value=-1)

    @torch.no_grad()
    def enforce(self, weights: Weights) -> None:
        """Make the weights fulfil the constraints, in place."""
        encoder, decoder = weights.encoder_rows, weights.W_dec
        if self.unit_decoder:
            decoder.div_(row_dots(decoder, decoder).sqrt_().clamp_min_(_TINY)[:, None])
        if self.aligned:
            missing = (1 - row_dots(encoder, decoder)) / _squares(decoder)
            encoder.addcmul_(missing[:, None], decoder)


def _squares(rows: Tensor) -> Tensor:
    return row_dots(rows, rows).clamp_min_(_TINY**2)
