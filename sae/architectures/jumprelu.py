"""JumpReLU: ``f = z · 1[z > θ]`` with ``z = (x − b_dec) W_enc + b_enc``, ``x̂ = f W_dec + b_dec``; θ is learned.

Rajamanoharan et al. 2024, "Jumping ahead" (2407.14435).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.sparse import map_tiles


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """A feature fires where its pre-activation exceeds its own threshold."""

    name: ClassVar[str] = "jumprelu"
    paper_unit_decoder: ClassVar[bool] = False

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """Follows."""
        raise NotImplementedError

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """The pre-activations above 0 and above ``weights.threshold [d_sae]``."""
        assert weights.threshold is not None
        threshold = weights.threshold.clamp_min(0)

        def codes_of(tile: Tensor) -> SparseCodes:
            return SparseCodes.from_dense(tile.mul_(tile > threshold))

        return SparseCodes.concatenate(
            map_tiles(codes_of, self.centred(weights, x), weights.encoder_rows, weights.b_enc)
        )
