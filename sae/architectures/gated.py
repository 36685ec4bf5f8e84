"""Gated: whether a feature fires and how strongly are decided apart, so that the penalty does not shrink activations.

    π = (x − b_dec) W_enc + b_gate,    m = exp(r_mag) · (x − b_dec) W_enc + b_mag,    f = 1[π > 0] · relu(m)
    L = mean ‖x̂ − x‖² + λ(t) · mean Σ_i relu(π_i) ‖W_dec,i‖ + mean ‖x̂'(relu(π)) − x‖²,    x̂(f) = f W_dec + b_dec

Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (2404.16014). The last term's
x̂' has the decoder, b_dec and any skip connection held fixed: it tells the gate what a feature is good for, which
1[π > 0] cannot. ‖W_dec,i‖ = 1 in the paper; the factor keeps a free decoder from escaping the penalty. b_gate is
``Weights.b_enc``; λ rises linearly from 0 over the first 5% of the run.

With ``target_l0``, a controller (:mod:`sae.l0_control`) sets λ and shifts b_gate, which starts where few features
fire; exp(r_mag) then starts where their magnitudes add up to what those of relu(π) do, as the auxiliary term needs it.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.l0_control import BiasControl
from sae.paying import DenseTile, Entries, Rule, above, paid_loss
from sae.sparse import map_tiles


class _GatedRule(Rule):
    """The module's equation at one entry."""

    def __init__(self, weights: Weights, weight: Tensor | float, n: int) -> None:
        assert weights.r_mag is not None
        assert weights.b_mag is not None
        self.gain, self.b_mag = weights.r_mag.detach().exp(), weights.b_mag.detach()
        self.offset = self.b_mag - self.gain * weights.b_enc.detach()  # so that m = exp(r_mag) · π + offset
        self.norms = weights.W_dec.detach().norm(dim=1)
        self.weight, self.n = weight, n
        self.gate_sums = self.gate_slopes = torch.zeros_like(self.norms)
        self.magnitude_slopes = self.gain_slopes = torch.zeros_like(self.norms)

    def fires(self, pre: Tensor) -> Tensor:
        """Where the gate is open."""
        return above(pre, 0.0)

    def codes(self, entries: Entries) -> tuple[Tensor, ...]:
        """f, and relu(π) for the auxiliary reconstruction."""
        magnitude = (entries.pre * entries.spread(self.gain)).add_(entries.spread(self.offset))
        return magnitude.relu_().mul_(entries.pre > 0), entries.pre.relu()

    def slopes(self, entries: Entries, codes: tuple[Tensor, ...], from_error: list[Tensor]) -> Tensor:
        """Through the magnitude from the first reconstruction, through the gate from everything else."""
        f, gate = codes
        by_magnitude, by_gate = from_error
        by_magnitude.mul_(f > 0)
        by_gate.add_(entries.spread(self.norms * (self.weight / self.n))).mul_(gate > 0)
        self.gate_sums = self.gate_sums + entries.sums(gate)
        self.gate_slopes = self.gate_slopes + entries.sums(by_gate)
        self.magnitude_slopes = self.magnitude_slopes + entries.sums(by_magnitude)
        self.gain_slopes = self.gain_slopes + entries.sums(by_magnitude * f)
        return by_gate.add_(by_magnitude.mul_(entries.spread(self.gain)))

    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        """λ · mean Σ_i relu(π_i) ‖W_dec,i‖."""
        l1 = (self.gate_sums @ self.norms) / self.n
        return self.weight * l1, {"l1": l1}

    def gradients(self) -> dict[str, Tensor]:
        """Of both biases, the gain and the decoder's norms; m − b_mag = exp(r_mag) (x − b_dec) W_enc."""
        return {
            "b_enc": self.gate_slopes,
            "b_mag": self.magnitude_slopes,
            "r_mag": self.gain_slopes - self.b_mag * self.magnitude_slopes,
            "norms": self.gate_sums * (self.weight / self.n),
        }


@dataclass(frozen=True)
class Gated(Architecture):
    """A feature fires where its gate is open and its magnitude positive."""

    name: ClassVar[str] = "gated"
    paper_unit_decoder: ClassVar[bool] = True

    def initial_weights(self, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        """As in the base class, with the magnitude equal to the gate's pre-activation, or as the module's text says."""
        weights, quantile = super().initial_weights(d_in, d_out, generator), self.control.first_quantile()
        zeros = torch.zeros(self.config.d_sae)
        if quantile is None:
            return replace(weights, r_mag=zeros, b_mag=zeros.clone())
        return replace(weights, b_enc=zeros - quantile, r_mag=zeros + _log_gain(quantile), b_mag=zeros)

    @property
    def control(self) -> BiasControl:
        """Of λ and the gates' biases."""
        return BiasControl(self.config)

    def initial_state(self) -> dict[str, Tensor]:
        """What the controller of L0 carries, if there is a target."""
        return self.control.initial_state()

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """See the module's equation. ``moment.dead`` is not used."""
        weights = self.control.shifted(weights, moment.state)
        rule = _GatedRule(weights, self.control.sparsity_weight(moment), len(x))
        total, terms, firings = paid_loss(self, rule, weights, x, y)
        state = self.control.next_state(moment, len(x), firings, rule.gate_sums)
        return Loss(total, terms, firings.sum(), firings > 0, state)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """Positive magnitudes behind open gates."""
        rule = _GatedRule(weights, 0.0, len(x))
        return SparseCodes.concatenate(
            map_tiles(
                lambda tile: SparseCodes.from_dense(rule.codes(DenseTile(tile))[0]),
                self.centred(weights, x),
                weights.encoder_rows,
                weights.b_enc,
            )
        )

    def finished(self, weights: Weights, state: dict[str, Tensor]) -> tuple[SAEConfig, Weights]:
        """With the controller's shift in the gates' biases."""
        return super().finished(self.control.shifted(weights, state), state)


def _log_gain(quantile: float) -> float:
    """``log(E[(z − q) z] / E[z²])`` over the standard normal z that exceed q; by parts, E[(z − q)⁺ z] is P(z > q)."""
    normal = NormalDist()
    firing = 1 - normal.cdf(quantile)
    return math.log(firing / (firing + quantile * normal.pdf(quantile)))
