"""TopK: ``f = topk_k(relu((x − b_dec) W_enc + b_enc))``, ``x̂ = f W_dec + b_dec``, ‖W_dec,i‖ = 1.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (2406.04093). The loss is ``‖x̂ − x‖²`` plus AuxK:
the k_aux dead features with the largest pre-activations also reconstruct the residual ``e = x − x̂`` (not
differentiated), so that features that never win a place among the k still learn:

    L = mean ‖x̂ − x‖² + auxk · min(n_dead / k_aux, 1) · mean ‖ê − e‖² · (mean ‖x‖² / mean ‖e‖²),  k_aux = d_in / 2

The last factor is the paper's normalisation of the auxiliary term by the residual's size, in the units of the
main term. The auxiliary features' pre-activations are not clipped at 0: a dead feature whose pre-activations are
all negative would otherwise receive no gradient (as in SAELens 6; the paper clips).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.sparse import decode, encode_topk, squared_error, topk_codes


@dataclass(frozen=True)
class TopK(Architecture):
    """k features fire per token."""

    name: ClassVar[str] = "topk"
    paper_unit_decoder: ClassVar[bool] = True

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """See the module's equation."""
        config = self.config
        codes = topk_codes(x, self.input_bias(weights), weights.encoder_rows, weights.b_enc, config.k)
        mse, error = squared_error(codes, weights.W_dec, weights.b_dec, self.goal(weights, x, y))
        terms = {"mse": mse.detach()}
        total = mse
        if len(moment.dead) and config.auxk:
            auxiliary = self._auxiliary(weights, x, -error, moment.dead)
            terms["auxk"] = auxiliary.detach()
            total = mse + config.auxk * auxiliary
        fires = codes.values.detach() != 0
        firings = torch.zeros(config.d_sae, device=x.device).index_add_(
            0, codes.indices.flatten(), fires.flatten().float()
        )
        return Loss(total, terms, fires.sum(), firings > 0)

    def _auxiliary(self, weights: Weights, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        k_aux = min(x.shape[1] // 2, len(dead))
        if k_aux == 0:
            return x.new_zeros(())
        codes = topk_codes(
            x,
            None if self.config.transcoder else weights.b_dec.detach(),
            weights.encoder_rows.index_select(0, dead),
            weights.b_enc.index_select(0, dead),
            k_aux,
            relu=False,
        )
        estimate = decode(codes, weights.W_dec.index_select(0, dead), torch.zeros_like(weights.b_dec))
        scale = x.square().sum() / error.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
        return (estimate - error).square().sum(1).mean() * scale * min(len(dead) / (x.shape[1] // 2), 1.0)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """The k largest positive activations of each row (fewer where fewer are positive)."""
        values, indices = encode_topk(
            self.centred(weights, x), weights.encoder_rows, weights.b_enc, self.config.k
        )
        return SparseCodes.from_topk(indices, values, self.config.d_sae)
