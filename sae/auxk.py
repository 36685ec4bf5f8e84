"""AuxK: dead features reconstruct what the others leave over, so that they learn although they never fire.

Gao et al. 2024 (2406.04093, section 2.4). The k_aux dead features with the largest pre-activations of each row
reconstruct the residual ``e = y − ŷ`` (not differentiated):

    min(n_dead / k_aux, 1) · mean ‖ê − e‖² · (mean ‖y‖² / mean ‖e‖²),  k_aux = d_in / 2

The last factor is the paper's normalisation of the auxiliary term by the residual's size, in the units of the
main term. The auxiliary features' pre-activations are not clipped at 0: a dead feature whose pre-activations are
all negative would otherwise receive no gradient (as in SAELens 6; the paper clips).
"""

import torch
from torch import Tensor

from sae.architectures.base import Weights
from sae.mesh import mesh_in_force
from sae.sparse import decode, topk_codes


def auxk_loss(
    weights: Weights,
    input_bias: Tensor | None,
    x: Tensor,
    y: Tensor,
    residual: Tensor,
    dead: Tensor,
    dead_elsewhere: int = 0,
) -> Tensor:
    """See the module's equation; a scalar, differentiable in the weights of the dead features alone.

    Args:
        input_bias: ``[d_in]``, what is subtracted from the input, held fixed; or None.
        x: ``[n, d_in]``. y: ``[n, d_out]``, x itself for an SAE. residual: ``[n, d_out]``, without gradient.
        dead: int64 indices of the dead features. dead_elsewhere: their number on other shards; at least one in all.
    """
    n_dead = len(dead) + dead_elsewhere
    k_aux = min(x.shape[1] // 2, n_dead)
    if k_aux == 0:
        return x.new_zeros(())
    bias = weights.b_enc.index_select(0, dead)
    if len(dead) == 0:  # a shard without any takes part with a feature that never is among the largest
        dead, bias = dead.new_zeros(1), weights.b_enc.new_full((1,), -torch.inf)
    codes = topk_codes(
        x,
        None if input_bias is None else input_bias.detach(),
        weights.encoder_rows.index_select(0, dead),
        bias,
        k_aux,
        relu=False,
    )
    estimate = decode(codes, weights.W_dec.index_select(0, dead), torch.zeros_like(weights.b_dec))
    power = mesh_in_force().sum_over_data(torch.stack([y.square().sum(), residual.square().sum()]))
    scale = power[0] / power[1].clamp_min(torch.finfo(y.dtype).tiny)
    return (estimate - residual).square().sum(1).mean() * scale * min(n_dead / (x.shape[1] // 2), 1.0)
