"""ReLU with an L1 penalty weighted by decoder norms: ``f = relu((x − b_dec) W_enc + b_enc)``, ``x̂ = f W_dec + b_dec``.

    L = mean ‖x̂ − x‖² + λ(t) · mean Σ_i f_i ‖W_dec,i‖

Anthropic, "Circuits Updates, April 2024" (the loss of "Scaling Monosemanticity"): decoder norms are free, λ rises
linearly from 0 over the first 5% of the run, inputs are scaled to a mean squared norm of d_in.

With p-annealing (Karvonen et al. 2024, 2408.00113) f_i becomes ``(f_i + δ)^p − δ^p``, where p falls linearly from
1 to ``p_end`` over the second half of the run: a small p punishes firing rather than firing strongly. δ = 1/100
bounds the slope at 0, where the paper's f^p is infinitely steep. λ is multiplied, as in the paper, by whatever
keeps the penalty's size when p changes: here, from each batch to the next, by the ratio of the two penalties (p
before, p now) on the batch.

With ``target_l0``, a controller (:mod:`sae.l0_control`) sets λ and shifts the biases. Encoder and decoder rows then
start with norm 1 in the place of 0.1, and biases where few enough features fire for that.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.l0_control import BiasControl
from sae.mesh import mesh_in_force
from sae.paying import Entries, Rule, above, paid_loss
from sae.sparse import encode_relu

OFFSET = 0.01  # δ
ANNEAL_FROM = 0.5  # of the run


class _ReLURule(Rule):
    """The module's equation at one entry."""

    def __init__(
        self, weights: Weights, weight: Tensor | float, n: int, p: float = 1.0, p_before: Tensor | None = None
    ) -> None:
        self.norms = weights.W_dec.detach().norm(dim=1)
        self.weight, self.n, self.p, self.p_before = weight, n, p, p_before
        self.powers = self.powers_before = self.sums = torch.zeros_like(self.norms)

    def fires(self, pre: Tensor) -> Tensor:
        """Where pre-activations are positive."""
        return above(pre, 0.0)

    def codes(self, entries: Entries) -> tuple[Tensor, ...]:
        """The positive pre-activations."""
        return (entries.pre.relu(),)

    def slopes(self, entries: Entries, codes: tuple[Tensor, ...], from_error: list[Tensor]) -> Tensor:
        """Of error and penalty, where a feature fires."""
        f, slope = codes[0], from_error[0]
        penalty = entries.spread(self.norms * (self.weight / self.n))
        sums = entries.sums(f)
        self.sums = self.sums + sums
        self.powers = self.powers + (sums if self.p == 1 else entries.sums(_power(f, self.p)))
        if self.p != 1:
            penalty = penalty * self.p * (f + OFFSET).pow_(self.p - 1)
        if self.p_before is not None:
            self.powers_before = self.powers_before + entries.sums(_power(f, self.p_before))
        return slope.add_(penalty).mul_(f > 0)

    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        """λ · mean Σ_i f_i ‖W_dec,i‖, or with powers of f_i."""
        l1 = (self.powers @ self.norms) / self.n
        return self.weight * l1, {"l1": l1}

    def gradients(self) -> dict[str, Tensor]:
        """Of the decoder's norms."""
        return {"norms": self.powers * (self.weight / self.n)}

    def rescaling(self) -> Tensor:
        """The penalty with the exponent before, as a multiple of the penalty now; 1 where nothing fires."""
        own = torch.stack([self.powers_before @ self.norms, self.powers @ self.norms])
        before, now = mesh_in_force().sum_over_all(own)
        return torch.where(now > 0, before / now, torch.ones_like(now))


def _power(f: Tensor, p: float | Tensor) -> Tensor:
    """``(f + δ)^p − δ^p``."""
    return (f + OFFSET) ** p - OFFSET**p


@dataclass(frozen=True)
class ReLU(Architecture):
    """Any positive pre-activation fires."""

    name: ClassVar[str] = "relu"
    paper_unit_decoder: ClassVar[bool] = False
    initial_decoder_norm: ClassVar[float] = 0.1

    def initial_weights(self, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        """As in the base class, or as the module's text says where there is a target."""
        weights, quantile = super().initial_weights(d_in, d_out, generator), self.control.first_quantile()
        if quantile is None:
            return weights
        return replace(
            weights,
            encoder_rows=weights.encoder_rows / self.initial_decoder_norm,
            W_dec=weights.W_dec / self.initial_decoder_norm,
            b_enc=torch.full((self.config.d_sae,), -quantile),
        )

    @property
    def control(self) -> BiasControl:
        """Of λ and the biases."""
        return BiasControl(self.config)

    def initial_state(self) -> dict[str, Tensor]:
        """What the controller of L0 and p-annealing carry, if they are asked for: the last p, and the factor on λ."""
        annealing = {"p": torch.ones(()), "p_factor": torch.ones(())} if self.config.p_end < 1 else {}
        return self.control.initial_state() | annealing

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """See the module's equation. ``moment.dead`` is not used: this loss has no auxiliary term."""
        weights = self.control.shifted(weights, moment.state)
        weight = self.control.sparsity_weight(moment) * moment.state.get("p_factor", 1.0)
        p = 1 - (1 - self.config.p_end) * max(moment.done - ANNEAL_FROM, 0) / (1 - ANNEAL_FROM)
        rule = _ReLURule(weights, weight, len(x), p, moment.state["p"] if p < 1 else None)
        total, terms, firings = paid_loss(self, rule, weights, x, y)
        state = self.control.next_state(moment, len(x), firings, rule.sums)
        if p < 1:
            annealed = {
                "p": torch.full_like(moment.state["p"], p),
                "p_factor": moment.state["p_factor"] * rule.rescaling(),
            }
            state = state | annealed
        return Loss(total, terms, firings.sum(), firings > 0, state)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """All positive activations."""
        return encode_relu(self.centred(weights, x), weights.encoder_rows, weights.b_enc)

    def finished(self, weights: Weights, state: dict[str, Tensor]) -> tuple[SAEConfig, Weights]:
        """With the controller's shift in the biases."""
        return super().finished(self.control.shifted(weights, state), state)
