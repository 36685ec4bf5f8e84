"""How well an SAE in training reconstructs activations that it has not seen, in the form in which it is used."""

import torch
from torch import Tensor

from sae.model import SparseAutoencoder

_ROWS = 1024  # at a time


@torch.no_grad()
def held_out_metrics(sae: SparseAutoencoder, activations: Tensor) -> dict[str, float]:
    """Explained variance ``1 − Σ‖ŷ − y‖² / Σ‖y − ȳ‖²`` and L0 of finished weights.

    Args:
        activations: raw, ``[n, d_in]``; for a transcoder ``[n, d_in + d_out]``, both hooks side by side.
    """
    read, written = activations[:, : sae.d_in], activations[:, -sae.d_out :]
    mean = written.double().mean(0)
    error = spread = entries = 0.0
    for start in range(0, len(activations), _ROWS):
        x, y = (part[start : start + _ROWS].to(sae.device) for part in (read, written))
        codes = sae.encode(x)
        error += float((sae.decode(codes, x) - y).double().square().sum())
        spread += float((y - mean.to(y)).double().square().sum())
        entries += codes.nnz
    return {
        "held_out_explained_variance": 1 - error / spread,
        "held_out_l0": entries / len(activations),
    }
