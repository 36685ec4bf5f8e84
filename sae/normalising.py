"""Normalisations that an SAE applies to every vector it reads and undoes in its reconstruction.

Some published SAEs have one: OpenAI's TopK SAEs (2406.04093, appendix A.1) and SAELens' ``layer_norm`` and
``constant_norm_rescale``. Unlike one scale for all vectors it cannot be folded into weights. For ``x = scale · n +
mean`` the SAE works on n, and

    x̂ = scale · (Σ g_i W_dec,i + b_dec) + mean = Σ (scale · g_i) W_dec,i + scale · b_dec + mean

so activations ``f_i = scale · g_i`` are in the units of x, as everywhere: a feature that fires with f_i adds
f_i · W_dec,i to the activations of the model.
"""

import math
from typing import Literal

from torch import Tensor

Normalisation = Literal["layer_norm", "constant_norm_rescale"]
_EPSILON = 1e-5
_SMALLEST = 1e-30  # for the scale of a vector that is constant or 0


def normalised(kind: Normalisation, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the SAE works on, and what leads back.

    ``layer_norm``: mean over the width, unbiased standard deviation s, ``(x − mean) / (s + 1e-5)``.
    ``constant_norm_rescale``: ``x / (‖x‖ / √d_in)``.

    Args:
        x: ``[n, d_in]``.

    Returns:
        n ``[n, d_in]``, scale ``[n, 1]``, mean ``[n, 1]``.
    """
    if kind == "layer_norm":
        mean = x.mean(dim=1, keepdim=True)
        centred = x - mean
        scale = centred.std(dim=1, keepdim=True).clamp_min(_SMALLEST)
        return centred / (scale + _EPSILON), scale, mean
    scale = (x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1])).clamp_min(_SMALLEST)
    return x / scale, scale, scale.new_zeros(len(x), 1)
