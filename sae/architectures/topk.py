"""TopK: ``f = topk_k(relu((x − b_dec) W_enc + b_enc))``, ``x̂ = f W_dec + b_dec``, ‖W_dec,i‖ = 1.

    L = mean ‖x̂ − x‖² + multi_topk · mean ‖x̂_4k − x‖² + auxk · AuxK

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (2406.04093). AuxK: :mod:`sae.auxk`. Multi-TopK (the
paper's section 4.3, with weight 1/8) also reconstructs from the 4k largest, so that the SAE holds up when more
features are let through than it was trained with.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sae.architectures.base import Moment, Weights
from sae.architectures.selecting import Reconstruction, Selecting
from sae.codes import Pattern, SparseCodes
from sae.sparse import encode_topk, squared_error, topk_codes, topk_of_tile, winning

MULTI = 4


@dataclass(frozen=True)
class TopK(Selecting):
    """k features fire per token."""

    name: ClassVar[str] = "topk"

    def reconstruct(
        self, weights: Weights, x: Tensor, goal: Tensor, k: int, moment: Moment
    ) -> Reconstruction:
        """See the module's equation."""
        config = self.config
        wide_k = min(MULTI * k, config.d_sae) if config.multi_topk else k
        wide = topk_codes(x, self.input_bias(weights), weights.encoder_rows, weights.b_enc, wide_k)
        codes = _largest(wide, k) if config.multi_topk else wide
        mse, error = squared_error(codes, weights.W_dec, weights.b_dec, goal)
        total, terms = mse, {"mse": mse.detach()}
        if config.multi_topk:
            wide_mse, _ = squared_error(wide, weights.W_dec, weights.b_dec, goal)
            terms["multi_topk"] = wide_mse.detach()
            total = mse + config.multi_topk * wide_mse
        return Reconstruction(codes, total, terms, error)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """The k largest positive activations of each row (fewer where fewer are positive)."""
        values, indices = encode_topk(
            self.centred(weights, x), weights.encoder_rows, weights.b_enc, self.config.k
        )
        return SparseCodes.from_topk(indices, values, self.config.d_sae)


def _largest(codes: SparseCodes, k: int) -> SparseCodes:
    """The k largest entries of each row of codes in the fixed layout, with their gradients."""
    _, places = topk_of_tile(codes.values.detach(), k, relu=True)
    places = places.long()
    indices = codes.indices.gather(1, places)
    return winning(SparseCodes(Pattern(codes.d_sae, indices), codes.values.gather(1, places)), k)
