"""The units that training computes in: activations are centred and scaled by one number, folded away at the end.

With x the raw activations, an SAE is trained on ``(x − μ)·s``, whose mean squared norm is d_in; so learning rates and
sparsity weights mean the same for every model. A transcoder's output has a mean and a scale of its own. Nobody
downstream sees any of it: :meth:`Scaling.folded` gives the same function of raw activations.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae.architectures.base import Weights


@dataclass(frozen=True)
class Scaling:
    """mean: ``[d_in]``. scale: multiplies the centred activation. mean_out, scale_out: a transcoder's output."""

    mean: Tensor
    scale: float
    mean_out: Tensor | None = None
    scale_out: float | None = None

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return len(self.mean)

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return len(self.mean if self.mean_out is None else self.mean_out)

    def apply(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations in the units of training.

        Args:
            activations: ``[n, d_in]``; for a transcoder ``[n, d_in + d_out]``, both hooks side by side.

        Returns:
            x ``[n, d_in]`` and y ``[n, d_out]``; the same tensor for an SAE.
        """
        activations = activations.to(self.mean.device)
        if self.mean_out is None or self.scale_out is None:
            x = (activations - self.mean).mul_(self.scale)
            return x, x
        read, written = activations.split([self.d_in, self.d_out], dim=1)
        return (read - self.mean).mul_(self.scale), (written - self.mean_out).mul_(self.scale_out)

    def to(self, device: torch.device | str) -> "Scaling":
        """The same with its tensors on this device."""
        mean_out = None if self.mean_out is None else self.mean_out.to(device)
        return replace(self, mean=self.mean.to(device), mean_out=mean_out)

    def folded(self, weights: Weights) -> Weights:
        """The weights in the units of raw activations; the decoder's rows stay as they are.

        With f and ŷ computed on scaled activations, features are divided by the output's scale s_out: then
        ``b_dec/s_out + μ_out`` and an unchanged W_dec give raw outputs. An SAE (s_out = s) subtracts b_dec from
        its input, so W_enc stays as well and b_enc becomes b_enc/s. A transcoder subtracts nothing: W_enc becomes
        W_enc·s/s_out, and b_enc takes up −μ W_enc. Thresholds are divided like the features.
        """
        w = Weights(**{name: tensor.detach().clone() for name, tensor in weights.tensors().items()})
        out = self.scale if self.scale_out is None else self.scale_out
        mean_out = self.mean if self.mean_out is None else self.mean_out
        w.b_dec.div_(out).add_(mean_out)
        for tensor in (w.b_enc, w.b_mag, w.threshold):
            if tensor is not None:
                tensor.div_(out)
        if self.mean_out is not None:
            w = self._reading_raw(w, self.scale / out)
        return w

    def _reading_raw(self, w: Weights, ratio: float) -> Weights:
        """The input side of a transcoder: encoder and skip connection read x in the place of (x − μ)·s."""
        rows = w.encoder_rows * ratio
        shift = rows @ self.mean
        w = replace(w, encoder_rows=rows, b_enc=w.b_enc - shift)
        if w.r_mag is not None and w.b_mag is not None:
            w = replace(w, b_mag=w.b_mag - torch.exp(w.r_mag) * shift)
        if w.W_skip is not None:
            skip = w.W_skip * ratio
            w = replace(w, W_skip=skip, b_dec=w.b_dec - skip @ self.mean)
        return w
