"""Dead features started anew as the directions of inputs that are reconstructed badly.

Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling": rows of the batch are drawn with a
probability in proportion to the square of their loss. A dead feature's decoder becomes the direction of what such a
row has to reconstruct, its encoder the direction of what it reads, at a fifth of the alive encoders' mean norm; its
biases and the optimiser's moments of its rows start from the beginning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from sae.architectures.base import Weights
from sae.optimizer import forget

ENCODER_NORM = 0.2


@torch.no_grad()
def resample(
    weights: Weights,
    dead: Tensor,
    reads: Tensor,
    writes: Tensor,
    losses: Tensor,
    initial: Mapping[str, Tensor],
    optimizer: Optimizer,
    generator: torch.Generator,
) -> Tensor:
    """Start dead features anew, in place; at most as many as there are rows with a loss.

    Args:
        dead: int64, the features.
        reads: ``[n, d_in]``, what the encoder reads. writes: ``[n, d_out]``, what the features have to add up to.
        losses: ``[n]``, squared error of every row.
        initial: by name, what the weights of shape ``[d_sae]`` were at the beginning.
        generator: on the CPU.

    Returns:
        int64, the features that were resampled.
    """
    chance = losses.double().square().cpu()
    n = min(len(dead), int((chance > 0).sum()))
    if n == 0:
        return dead[:0]
    rows = torch.multinomial(chance / chance.max(), n, generator=generator).to(dead.device)
    alive = torch.ones(len(weights.b_enc), dtype=torch.bool, device=dead.device)
    alive[dead] = len(dead) == len(alive)  # where none is alive, all of them say what norms are usual
    dead = dead[:n]
    encoder_norm = ENCODER_NORM * weights.encoder_rows[alive].norm(dim=1).mean()
    weights.encoder_rows[dead] = normalize(reads[rows], dim=1) * encoder_norm
    weights.W_dec[dead] = normalize(writes[rows], dim=1) * weights.W_dec[alive].norm(dim=1).mean()
    for name, value in initial.items():
        weights.tensors()[name][dead] = value[dead].to(dead.device)
    for name in ("encoder_rows", "W_dec", *initial):
        forget(optimizer, weights.tensors()[name], dead)
    return dead
