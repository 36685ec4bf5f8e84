"""JumpReLU: ``f = z · 1[z > θ]`` with ``z = (x − b_dec) W_enc + b_enc``, ``x̂ = f W_dec + b_dec``; θ = exp(t) is learned.

    L = mean ‖x̂ − x‖² + λ_S · mean Σ_i tanh(c · f_i ‖W_dec,i‖) + λ_P · mean Σ_i relu(θ_i − z_i) ‖W_dec,i‖
    ∂f_i/∂z_i := 1[z_i > θ_i],    ∂f_i/∂t_i := −(θ_i / ε) · 1[|z_i − θ_i| < ε/2],    c = 4, λ_P = 3e-6, ε = ``bandwidth``

Conerly et al. 2025, "Circuits Updates, January 2025" (JumpReLU itself: Rajamanoharan et al. 2024, 2407.14435).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.paying import Entries, Rule, paid_loss
from sae.sparse import map_tiles

INITIAL_THRESHOLD = 0.1
TANH_SCALE = 4.0
SILENCE_WEIGHT = 3e-6


class _JumpRule(Rule):
    def __init__(
        self, weights: Weights, shift: Tensor, weight: Tensor | float, bandwidth: float, n: int
    ) -> None:
        assert weights.log_threshold is not None
        self.threshold = (weights.log_threshold.detach() + shift).exp()
        self.norms = weights.W_dec.detach().norm(dim=1)
        self.weight, self.bandwidth, self.n = weight, bandwidth, n
        zeros = torch.zeros_like(self.norms)
        self.window_slopes, self.firings, self.excess = zeros, zeros, zeros
        self.tanh_sum, self.norm_slopes = zeros, zeros

    def matters(self, pre: Tensor) -> Tensor:
        return pre > self.threshold - self.bandwidth / 2

    def codes(self, entries: Entries) -> tuple[Tensor, ...]:
        return (entries.pre * (entries.pre > entries.spread(self.threshold)),)

    def slopes(self, entries: Entries, codes: tuple[Tensor, ...], from_error: list[Tensor]) -> Tensor:
        f = codes[0]
        norms = entries.spread(self.norms)
        over = entries.pre - entries.spread(self.threshold)
        fires = over > 0
        tanh = torch.tanh(f * norms * TANH_SCALE)
        self.tanh_sum = self.tanh_sum + entries.sums(tanh)
        steep = (1 - tanh.square()) * (self.weight * TANH_SCALE / self.n)
        slope = steep * norms + from_error[0]
        self.window_slopes = self.window_slopes + entries.sums(slope * (over.abs() < self.bandwidth / 2))
        self.norm_slopes = self.norm_slopes + entries.sums(steep * f)
        self.firings = self.firings + entries.sums(fires.to(f.dtype))
        self.excess = self.excess + entries.sums(over * fires)
        return (slope + norms * (SILENCE_WEIGHT / self.n)) * fires

    def everywhere(self, pre_sums: Tensor) -> Tensor:
        # relu(θ − z) = θ − z where silent = (θ − z) everywhere + (z − θ) where it fires
        self.short = self.threshold * self.n - pre_sums + self.excess
        return self.norms * (-SILENCE_WEIGHT / self.n)

    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        sparsity = self.tanh_sum.sum() / self.n
        silence = (self.short @ self.norms) / self.n
        return self.weight * sparsity + SILENCE_WEIGHT * silence, {"sparsity": sparsity, "silence": silence}

    def gradients(self) -> dict[str, Tensor]:
        silent = self.norms * (SILENCE_WEIGHT / self.n) * (self.n - self.firings)
        return {
            "log_threshold": self.threshold * (silent - self.window_slopes / self.bandwidth),
            "norms": self.norm_slopes + self.short * (SILENCE_WEIGHT / self.n),
        }


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """A feature fires where its pre-activation exceeds its own threshold."""

    name: ClassVar[str] = "jumprelu"
    paper_unit_decoder: ClassVar[bool] = False

    def initial_weights(self, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        weights = super().initial_weights(d_in, d_out, generator)
        return replace(weights, log_threshold=torch.full((self.config.d_sae,), math.log(INITIAL_THRESHOLD)))

    def initial_state(self) -> dict[str, Tensor]:
        return {
            "shift": torch.zeros(()),
            "log_weight": torch.tensor(self.config.resolved_sparsity_weight()).log(),
        }

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """Follows."""
        state = moment.state
        weight = (
            state["log_weight"].exp()
            if self.config.target_l0
            else self.config.resolved_sparsity_weight() * moment.done
        )
        rule = _JumpRule(weights, state["shift"], weight, self.config.bandwidth, len(x))
        total, terms, firings = paid_loss(self, rule, weights, x, y)
        entries = firings.sum()
        if self.config.target_l0:
            off = ((entries / len(x)).clamp_min(1e-3).log() - math.log(self.config.target_l0)).clamp(-1, 1)
            state = {
                "shift": state["shift"] + GAIN_S * off,
                "log_weight": (state["log_weight"] + GAIN_W * off).clamp(-9, 9),
            }
        return Loss(total, terms, entries, firings > 0, state)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """The pre-activations above 0 and above ``weights.threshold [d_sae]``."""
        assert weights.threshold is not None
        threshold = weights.threshold.clamp_min(0)

        def codes_of(tile: Tensor) -> SparseCodes:
            return SparseCodes.from_dense(tile.mul_(tile > threshold))

        return SparseCodes.concatenate(
            map_tiles(codes_of, self.centred(weights, x), weights.encoder_rows, weights.b_enc)
        )

    def finished(self, weights: Weights, state: dict[str, Tensor]) -> tuple[SAEConfig, Weights]:
        assert weights.log_threshold is not None
        threshold = (weights.log_threshold.detach() + state["shift"]).exp()
        config, weights = super().finished(weights, state)
        return config, replace(weights, threshold=threshold, log_threshold=None)


GAIN_S, GAIN_W = 0.3, 0.03
