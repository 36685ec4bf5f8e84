"""The ReLU loss while most features fire: the dense formula, row tile by row tile.

Early in training a ReLU SAE has half of all pre-activations positive, and sparse codes would be larger than the
dense tensor. The loss of a row depends on no other row, so each tile's gradients are taken right after its
forward pass and accumulated: memory is that of one tile, and nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor

from sae.sparse import tile_rows


class _DenseReLULoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encoder_rows: Tensor,
        b_enc: Tensor,
        decoder: Tensor,
        b_dec: Tensor,
        x: Tensor,
        l1: float,
        fired: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(x)
        norms = decoder.norm(dim=1)
        grads = [torch.zeros_like(p) for p in (encoder_rows, b_enc, decoder, b_dec)]
        feature_sums = torch.zeros_like(b_enc)
        squared_error = x.new_zeros(())
        entries = torch.zeros((), dtype=torch.int64, device=x.device)
        step = tile_rows(len(encoder_rows), x.element_size())
        for start in range(0, n, step):
            centred = x[start : start + step] - b_dec
            activations = torch.addmm(b_enc, centred, encoder_rows.t()).relu_()
            positive = activations > 0
            error = activations @ decoder - centred
            squared_error += error.square().sum()
            feature_sums += activations.sum(0)
            counts = positive.sum(0)
            entries += counts.sum()
            fired |= counts > 0
            d_output = error * (2 / n)
            grads[2].addmm_(activations.t(), d_output)
            d_pre = torch.addmm(norms * (l1 / n), d_output, decoder.t()).mul_(positive)
            grads[0].addmm_(d_pre.t(), centred)
            grads[1] += d_pre.sum(0)
            grads[3] += d_output.sum(0)
        grads[3] -= grads[1] @ encoder_rows
        grads[2] += (feature_sums / norms.clamp_min(1e-12))[:, None] * decoder * (l1 / n)
        ctx.save_for_backward(*grads)
        sparsity = (feature_sums @ norms) / n
        ctx.mark_non_differentiable(sparsity, entries)
        return squared_error / n + l1 * sparsity, sparsity, entries

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * grad_outputs[0] for grad in ctx.saved_tensors), None, None, None


def dense_relu_loss(
    x: Tensor, encoder_rows: Tensor, b_enc: Tensor, decoder: Tensor, b_dec: Tensor, l1: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mean_n ‖x̂ − x‖² + l1 · mean_n Σ_i f_i ‖W_dec,i‖`` with f = relu((x − b_dec) W_enc + b_enc), dense formula.

    Args:
        x: ``[n, d_in]``. encoder_rows, decoder: ``[d_sae, d_in]``. b_enc: ``[d_sae]``. b_dec: ``[d_in]``.

    Returns:
        loss (differentiable in the four weights), the mean of ``Σ_i f_i ‖W_dec,i‖``, the number of firings, and
        bool ``[d_sae]``: which features fired.
    """
    fired = torch.zeros(len(b_enc), dtype=torch.bool, device=x.device)
    loss, sparsity, entries = _DenseReLULoss.apply(encoder_rows, b_enc, decoder, b_dec, x, l1, fired)
    return loss, sparsity, entries, fired
