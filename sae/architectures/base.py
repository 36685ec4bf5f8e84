"""What every architecture provides: its inference, its loss and its initial weights.

An architecture is one file with one small class, registered in :mod:`sae.architectures.registry`. The trainer
and the inference class know nothing else about it.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sae.codes import SparseCodes


@dataclass(frozen=True)
class Weights:
    """The trainable tensors of an SAE, features as rows.

    Attributes:
        encoder_rows: ``[d_sae, d_in]``, the transpose of W_enc. b_enc: ``[d_sae]``.
        W_dec: ``[d_sae, d_in]``. b_dec: ``[d_in]``.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(vars(self))

    @classmethod
    def tied(cls, d_in: int, d_sae: int, generator: torch.Generator, norm: float = 1.0) -> "Weights":
        """Random decoder rows of one norm, encoder = decoder transposed, biases 0 (Gao et al. 2024)."""
        rows = torch.randn(d_sae, d_in, generator=generator)
        rows *= norm / rows.norm(dim=1, keepdim=True)
        return cls(rows.clone(), torch.zeros(d_sae), rows, torch.zeros(d_in))


@dataclass(frozen=True)
class Loss:
    """One evaluation of the training loss on a batch.

    Attributes:
        total: scalar to minimise, with gradients.
        terms: its parts, detached scalars, by name; ``mse`` is the mean over rows of ‖x̂ − x‖².
        entries: number of firings in the batch, an integer scalar tensor.
        fired: bool ``[d_sae]``, the features that fired.
    """

    total: Tensor
    terms: dict[str, Tensor]
    entries: Tensor
    fired: Tensor


class Architecture(Protocol):
    """One kind of SAE. ``unit_decoder`` says whether decoder rows are kept at norm 1 during training."""

    name: ClassVar[str]
    unit_decoder: ClassVar[bool]

    def initial_weights(self, d_in: int, generator: torch.Generator) -> Weights:
        """Fresh weights on the CPU, in float32."""
        ...

    def loss(self, weights: Weights, x: Tensor, dead: Tensor, done: float) -> Loss:
        """The training loss of ``x [n, d_in]``.

        Args:
            dead: int64 indices of the features that have not fired for a long time.
            done: fraction of the run that has passed, for schedules.
        """
        ...

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """Inference: the codes of ``x [n, d_in]``, no gradient."""
        ...
