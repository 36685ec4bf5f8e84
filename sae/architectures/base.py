"""What every architecture provides: its inference, its loss and its initial weights.

An architecture is one file with one small class, registered in :mod:`sae.architectures.registry`. The trainer
and the inference class know nothing else about it.

Any architecture can be a *transcoder*: it then predicts another hook's activations ``y`` from ``x`` (2406.11944),
``b_dec`` is not subtracted from its input, and ``W_skip`` may add an affine map of the input to its output
(2501.18823). For a sparse autoencoder y is x.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sae.codes import SparseCodes
from sae.config import SAEConfig

REPLICATED = ("b_dec", "W_skip")
"""Weights without a row for every feature: where features are sharded, each process has all of them."""


@dataclass(frozen=True)
class Weights:
    """The tensors of an SAE, features as rows; those that an architecture does not have are None.

    Attributes:
        encoder_rows: ``[d_sae, d_in]``, the transpose of W_enc. b_enc: ``[d_sae]`` (gated: the gate's bias).
        W_dec: ``[d_sae, d_out]``. b_dec: ``[d_out]``; d_out is d_in but for transcoders.
        threshold: ``[d_sae]``, jumprelu: a feature fires where its pre-activation exceeds it.
        log_threshold: ``[d_sae]``, jumprelu in training: its logarithm.
        r_mag, b_mag: ``[d_sae]``, gated: logarithm of the magnitude's rescaling, and its bias.
        W_skip: ``[d_out, d_in]``, transcoders with a skip connection.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    log_threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    W_skip: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def tied(cls, d_in: int, d_sae: int, generator: torch.Generator, norm: float = 1.0) -> "Weights":
        """Random decoder rows of one norm, encoder = decoder transposed, biases 0 (Gao et al. 2024)."""
        rows = _random_rows(d_sae, d_in, norm, generator)
        return cls(rows.clone(), torch.zeros(d_sae), rows, torch.zeros(d_in))


@dataclass(frozen=True)
class Moment:
    """Where training stands when a loss is asked for.

    Attributes:
        done: fraction of the run that has passed, for schedules.
        dead: int64 indices of the features of this shard that have not fired for a long time.
        state: what the architecture carries from step to step (small tensors, by name; see
            :meth:`Architecture.initial_state`). It belongs to the checkpoint.
        dead_elsewhere: number of such features on other shards.
    """

    done: float
    dead: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    dead_elsewhere: int = 0


@dataclass(frozen=True)
class Loss:
    """One evaluation of the training loss on a batch.

    Attributes:
        total: scalar to minimise, with gradients.
        terms: its parts, detached scalars, by name; ``mse`` is the mean over rows of ‖ŷ − y‖².
        entries: number of firings in the batch, an integer scalar tensor.
        fired: bool ``[d_sae]``, the features that fired.
        state: the architecture's state after this batch; a loss changes nothing in place.
    """

    total: Tensor
    terms: dict[str, Tensor]
    entries: Tensor
    fired: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture(ABC):
    """One kind of SAE, with its configuration.

    Class attributes:
        name: as in the configuration. paper_unit_decoder: whether its paper keeps decoder rows at norm 1.
        initial_decoder_norm: of every decoder row.
    """

    config: SAEConfig
    name: ClassVar[str]
    paper_unit_decoder: ClassVar[bool]
    initial_decoder_norm: ClassVar[float] = 1.0

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are kept at norm 1 during training."""
        chosen = self.config.unit_decoder
        return self.paper_unit_decoder if chosen is None else chosen

    def initial_weights(self, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        """Fresh weights on the CPU, in float32: random decoder rows of one norm, zero biases.

        The encoder is the decoder's transpose (Gao et al. 2024), or random rows of the same norm where it cannot be
        (a transcoder) or should not (``tied_init`` false). A transcoder's skip connection starts at 0.
        """
        d_sae, norm = self.config.d_sae, self.initial_decoder_norm
        weights = Weights.tied(d_out, d_sae, generator, norm)
        if self.config.transcoder or not self.config.tied_init:
            weights = replace(weights, encoder_rows=_random_rows(d_sae, d_in, norm, generator))
        return replace(weights, W_skip=torch.zeros(d_out, d_in)) if self.config.skip else weights

    def initial_state(self) -> dict[str, Tensor]:
        """What :attr:`Moment.state` holds at the first step; scalars or ``[d_sae]``, on the CPU."""
        return {}

    @abstractmethod
    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """The training loss of ``x [n, d_in]``, where ``y [n, d_out]`` is to be reconstructed (x itself for an SAE)."""

    @abstractmethod
    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """Inference: the codes of ``x [n, d_in]``, no gradient; ``weights`` as :meth:`finished` gave them."""

    def finished(self, weights: Weights, state: dict[str, Tensor]) -> tuple[SAEConfig, Weights]:
        """Configuration and weights for inference, of a training that stopped here (detached, sharing memory)."""
        return self.config, Weights(**{name: tensor.detach() for name, tensor in weights.tensors().items()})

    def input_bias(self, weights: Weights) -> Tensor | None:
        """What is subtracted from the input: b_dec, or nothing for a transcoder."""
        return None if self.config.transcoder else weights.b_dec

    def centred(self, weights: Weights, x: Tensor) -> Tensor:
        """``x − b_dec``, or x itself for a transcoder; no gradient."""
        return x if self.config.transcoder else x - weights.b_dec.detach()

    def goal(self, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        """What features and b_dec have to reconstruct: y, less ``W_skip x`` where there is a skip connection."""
        return y if weights.W_skip is None else y - x @ weights.W_skip.t()


def _random_rows(n: int, width: int, norm: float, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, width, generator=generator)
    return rows.mul_(norm / rows.norm(dim=1, keepdim=True))
