"""ReLU with an L1 penalty weighted by decoder norms: ``f = relu((x − b_dec) W_enc + b_enc)``, ``x̂ = f W_dec + b_dec``.

    L = mean ‖x̂ − x‖² + λ(t) · mean Σ_i f_i ‖W_dec,i‖

Anthropic, "Circuits Updates, April 2024" (the loss of "Scaling Monosemanticity"): decoder norms are free, λ rises
linearly from 0 over the first 5% of the run, inputs are scaled to a mean squared norm of d_in.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.dense_tiles import dense_relu_loss
from sae.sparse import encode_relu, relu_codes, squared_error

SPARSE_BELOW = 1 / 8  # of the features firing per row: there the sparse path overtakes the dense formula
L1_WARMUP = 0.05


@dataclass(frozen=True)
class ReLU(Architecture):
    """Any positive pre-activation fires."""

    name: ClassVar[str] = "relu"
    paper_unit_decoder: ClassVar[bool] = False
    initial_decoder_norm: ClassVar[float] = 0.1

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """See the module's equation. ``moment.dead`` is not used: this loss has no auxiliary term.

        The path (dense tiles or sparse) is chosen by how many features fire on the first rows of the batch.
        """
        l1 = self.config.resolved_sparsity_weight() * min(moment.done / L1_WARMUP, 1.0)
        if self._density(weights, x) > SPARSE_BELOW:
            total, sparsity, entries, fired = dense_relu_loss(
                x, weights.encoder_rows, weights.b_enc, weights.W_dec, weights.b_dec, l1
            )
            mse = total.detach() - l1 * sparsity
            return Loss(total, {"mse": mse, "l1": sparsity}, entries, fired)
        codes = relu_codes(x, self.input_bias(weights), weights.encoder_rows, weights.b_enc)
        mse, _ = squared_error(codes, weights.W_dec, weights.b_dec, self.goal(weights, x, y))
        sums = torch.zeros_like(weights.b_enc).index_add(0, codes.indices, codes.values)
        sparsity = (sums @ weights.W_dec.norm(dim=1)) / len(x)
        fired = torch.zeros(self.config.d_sae, dtype=torch.bool, device=x.device)
        fired[codes.indices] = True
        entries = torch.tensor(codes.nnz, device=x.device)
        return Loss(mse + l1 * sparsity, {"mse": mse.detach(), "l1": sparsity.detach()}, entries, fired)

    @torch.no_grad()
    def _density(self, weights: Weights, x: Tensor) -> float:
        sample = self.centred(weights, x[:64])
        return float((torch.addmm(weights.b_enc, sample, weights.encoder_rows.t()) > 0).float().mean())

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """All positive activations."""
        return encode_relu(self.centred(weights, x), weights.encoder_rows, weights.b_enc)
