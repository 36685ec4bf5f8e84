"""What the architectures that keep the largest pre-activations share: a k that may fall, AuxK, and counting."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.auxk import auxk_loss
from sae.codes import SparseCodes


@dataclass(frozen=True)
class Reconstruction:
    """What a batch was reconstructed from, and how well.

    Attributes:
        codes: the features that fire; entries that are 0 do not.
        total: scalar to minimise, AuxK not included. terms: as in :class:`sae.architectures.base.Loss`.
        error: ``ŷ − goal`` ``[n, d_out]``, without gradient.
        state: the architecture's state after this batch.
    """

    codes: SparseCodes
    total: Tensor
    terms: dict[str, Tensor]
    error: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Selecting(Architecture):
    """An architecture that keeps k features per token, or on average."""

    paper_unit_decoder: ClassVar[bool] = True

    @abstractmethod
    def reconstruct(
        self, weights: Weights, x: Tensor, goal: Tensor, k: int, moment: Moment
    ) -> Reconstruction:
        """Select and decode; arguments as in :meth:`loss`, ``goal`` as :meth:`goal` gives it, k as it is now."""

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """The architecture's reconstruction loss plus ``auxk`` times AuxK (:mod:`sae.auxk`)."""
        auxk = self.config.auxk
        found = self.reconstruct(weights, x, self.goal(weights, x, y), self.k_at(moment.done), moment)
        total, terms = found.total, found.terms
        if len(moment.dead) + moment.dead_elsewhere and auxk:
            auxiliary = auxk_loss(
                weights, self.input_bias(weights), x, y, -found.error, moment.dead, moment.dead_elsewhere
            )
            terms = {**terms, "auxk": auxiliary.detach()}
            total = total + auxk * auxiliary
        fires = found.codes.values.detach() != 0
        firings = torch.zeros(len(weights.b_enc), dtype=torch.float32, device=x.device).index_add_(
            0, found.codes.indices.flatten(), fires.flatten().float()
        )
        return Loss(total, terms, fires.sum(), firings > 0, found.state)

    def k_at(self, done: float) -> int:
        """k when a fraction ``done`` of the run has passed: it falls linearly from k_start over the first k_anneal."""
        config = self.config
        if config.k_start is None:
            return config.k
        return round(config.k_start + (config.k - config.k_start) * min(done / config.k_anneal, 1.0))
