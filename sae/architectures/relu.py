"""ReLU with an L1 penalty weighted by decoder norms: ``f = relu((x − b_dec) W_enc + b_enc)``, ``x̂ = f W_dec + b_dec``.

    L = mean ‖x̂ − x‖² + λ(t) · mean Σ_i f_i ‖W_dec,i‖

Anthropic, "Circuits Updates, April 2024" (the loss of "Scaling Monosemanticity"): decoder norms are free, λ rises
linearly from 0 over the first 5% of the run, inputs are scaled to a mean squared norm of d_in.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Loss, Weights
from sae.codes import SparseCodes
from sae.dense_tiles import dense_relu_loss
from sae.sparse import encode_relu, relu_codes, squared_error

SPARSE_BELOW = 1 / 8  # of the features firing per row: there the sparse path overtakes the dense formula
L1_WARMUP = 0.05


@dataclass(frozen=True)
class ReLU:
    """Any positive pre-activation fires. Attributes: d_sae, and ``l1``, the weight λ of the penalty."""

    d_sae: int
    l1: float
    name: ClassVar[str] = "relu"
    unit_decoder: ClassVar[bool] = False

    def initial_weights(self, d_in: int, generator: torch.Generator) -> Weights:
        """Tied random rows of norm 0.1, zero biases."""
        return Weights.tied(d_in, self.d_sae, generator, norm=0.1)

    def loss(self, weights: Weights, x: Tensor, dead: Tensor, done: float) -> Loss:
        """See the module's equation. ``dead`` is not used: this loss has no auxiliary term.

        The path (dense tiles or sparse) is chosen by how many features fire on the first rows of the batch.
        """
        l1 = self.l1 * min(done / L1_WARMUP, 1.0)
        if self._density(weights, x) > SPARSE_BELOW:
            total, sparsity, entries, fired = dense_relu_loss(
                x, weights.encoder_rows, weights.b_enc, weights.W_dec, weights.b_dec, l1
            )
            mse = total.detach() - l1 * sparsity
            return Loss(total, {"mse": mse, "l1": sparsity}, entries, fired)
        codes = relu_codes(x, weights.b_dec, weights.encoder_rows, weights.b_enc)
        mse, _ = squared_error(codes, weights.W_dec, weights.b_dec, x)
        sums = torch.zeros_like(weights.b_enc).index_add(0, codes.indices, codes.values)
        sparsity = (sums @ weights.W_dec.norm(dim=1)) / len(x)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=x.device)
        fired[codes.indices] = True
        entries = torch.tensor(codes.nnz, device=x.device)
        return Loss(mse + l1 * sparsity, {"mse": mse.detach(), "l1": sparsity.detach()}, entries, fired)

    @torch.no_grad()
    def _density(self, weights: Weights, x: Tensor) -> float:
        sample = x[:64] - weights.b_dec
        return float((torch.addmm(weights.b_enc, sample, weights.encoder_rows.t()) > 0).float().mean())

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """All positive activations."""
        return encode_relu(x - weights.b_dec, weights.encoder_rows, weights.b_enc)
