"""JumpReLU: ``f = z · 1[z > θ]`` with ``z = (x − b_dec) W_enc + b_enc``, ``x̂ = f W_dec + b_dec``; θ is learned.

    L = mean ‖x̂ − x‖² + λ · mean Σ_i tanh(c · f_i ‖W_dec,i‖) + λ_P · mean Σ_i relu(θ_i − z_i) ‖W_dec,i‖
    ∂f_i/∂z_i := 1[z_i > θ_i],   ∂f_i/∂(log θ_i) := −(θ_i / ε) · 1[|z_i − θ_i| < ε/2]
    c = 4, λ_P = 3e-4, ε = ``bandwidth``

Conerly et al. 2025, "Circuits Updates, January 2025"; JumpReLU itself is from Rajamanoharan et al. 2024
(2407.14435), who let the sparsity term reach θ only. Here the gradient of every term flows to all parameters; λ
rises linearly from 0 over the whole run; θ starts at 0.1, and b_enc where, on isotropic inputs, a feature fires on
10,000/d_sae of tokens, at most on half. The encoder starts as the decoder's transpose, rows of norm 1, as in our
other architectures: inputs have mean squared norm d_in, so pre-activations start with variance 1, which the window
of 2 fits.

With ``target_l0``, a controller (:mod:`sae.l0_control`) sets λ and a common factor e^s of the thresholds. Features
then start with the target's firing rate by their threshold, b_enc being 0: values are of the right size at once, and
the sparse path serves from the first step.

λ_P is a hundred times Anthropic's, whose runs are longer by more: Adam needs thousands of steps to forget what a
feature's gradients were before it died. On the bundled model (4,096 features, L0 32, half a million tokens, one seed)
3e-6 left 340 features dead at the end and 3e-4 none, with explained variance 0.868 and 0.873.

``Weights.log_threshold`` holds ``10 · log θ`` (without s), so that Adam moves log θ at a tenth of the learning
rate: at the full rate thresholds wander, and of 1,024 features one to seven died, where none did at a tenth.
Llamascopium advises the same (2509.17196).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.l0_control import ThresholdControl, firing_quantile
from sae.paying import Entries, Rule, above, paid_loss
from sae.sparse import map_tiles

TANH_SCALE = 4.0
SILENCE_WEIGHT = 3e-4
SLOWNESS = 10.0  # of log θ
INITIAL_THRESHOLD = 0.1
INITIAL_L0 = 10_000


class _JumpReLURule(Rule):
    """The module's equation at one entry.

    ``relu(θ − z)`` is ``θ − z`` wherever a feature is silent, so almost everywhere: it is taken as ``θ − z`` on all
    entries, which is linear in them, plus ``z − θ`` on those that fire.
    """

    def __init__(
        self, weights: Weights, threshold: Tensor, weight: Tensor | float, bandwidth: float, n: int
    ) -> None:
        self.threshold, self.weight, self.bandwidth, self.n = threshold, weight, bandwidth, n
        self.norms = weights.W_dec.detach().norm(dim=1)
        self.silence = self.norms * (SILENCE_WEIGHT / n)
        zeros = torch.zeros_like(self.norms)
        self.tanh = self.tanh_slopes = self.window_slopes = self.firings = self.excess = zeros

    def fires(self, pre: Tensor) -> Tensor:
        """Above the threshold."""
        return above(pre, self.threshold)

    def silent(self, pre: Tensor) -> Tensor:
        """The window's lower half."""
        return above(pre, self.threshold - self.bandwidth / 2).logical_xor_(above(pre, self.threshold))

    def at_silent(self, numbers: Tensor, from_error: Tensor) -> None:
        """Of the threshold; tanh has slope 1 there."""
        by_tanh = numbers * self.norms * (self.weight * (TANH_SCALE / self.n))
        self.window_slopes = self.window_slopes + from_error + by_tanh

    def codes(self, entries: Entries) -> tuple[Tensor, ...]:
        """The pre-activations above their thresholds."""
        return (entries.pre * (entries.pre > entries.spread(self.threshold)),)

    def slopes(self, entries: Entries, codes: tuple[Tensor, ...], from_error: list[Tensor]) -> Tensor:
        """Of all terms where a feature fires."""
        f, norms = codes[0], entries.spread(self.norms)
        over = entries.pre - entries.spread(self.threshold)
        fires = (over > 0).to(f.dtype)
        tanh = (f * norms).mul_(TANH_SCALE).tanh_()
        self.tanh = self.tanh + entries.sums(tanh)
        flatness = tanh.square_().neg_().add_(1).mul_(self.weight * (TANH_SCALE / self.n))  # λ c tanh'/n
        self.tanh_slopes = self.tanh_slopes + entries.sums(flatness * f)
        slope = from_error[0].addcmul_(flatness, norms).mul_(fires)
        self.window_slopes = self.window_slopes + entries.sums(slope * (over < self.bandwidth / 2))
        self.firings = self.firings + entries.sums(fires)
        self.excess = self.excess + entries.sums(over.mul_(fires))
        return slope.addcmul_(entries.spread(self.silence), fires)

    def everywhere(self, pre_sums: Tensor) -> Tensor:
        """Of ``θ − z`` on all entries."""
        self.shortage = self.threshold * self.n - pre_sums + self.excess
        return -self.silence

    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        """λ times the tanh term (``sparsity``), and λ_P times the other (``silence``)."""
        sparsity, silence = self.tanh.sum() / self.n, (self.shortage @ self.norms) / self.n
        total = self.weight * sparsity + SILENCE_WEIGHT * silence
        return total, {"sparsity": sparsity, "silence": silence}

    def gradients(self) -> dict[str, Tensor]:
        """Of the stored logarithms and of the decoder's norms. A silent feature's θ has slope λ_P ‖W_dec,i‖."""
        by_threshold = self.silence * (self.n - self.firings) - self.window_slopes / self.bandwidth
        return {
            "log_threshold": by_threshold * self.threshold / SLOWNESS,
            "norms": self.tanh_slopes + self.shortage * (SILENCE_WEIGHT / self.n),
        }


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """A feature fires where its pre-activation exceeds its own threshold."""

    name: ClassVar[str] = "jumprelu"
    paper_unit_decoder: ClassVar[bool] = False

    def initial_weights(self, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        """As in the base class, with θ and b_enc as the module's text says."""
        weights, d_sae = super().initial_weights(d_in, d_out, generator), self.config.d_sae
        l0 = INITIAL_L0 if self.config.target_l0 is None else self.config.target_l0
        quantile = firing_quantile(l0, d_sae) * self.initial_decoder_norm
        threshold, b_enc = INITIAL_THRESHOLD, INITIAL_THRESHOLD - quantile
        if self.config.target_l0 is not None:
            threshold, b_enc = max(quantile, INITIAL_THRESHOLD), 0.0
        stored = torch.full((d_sae,), SLOWNESS * math.log(threshold))
        return replace(weights, b_enc=torch.full((d_sae,), b_enc), log_threshold=stored)

    def initial_state(self) -> dict[str, Tensor]:
        """What the controller of L0 carries, if there is a target."""
        return ThresholdControl(self.config).initial_state()

    def loss(self, weights: Weights, x: Tensor, y: Tensor, moment: Moment) -> Loss:
        """See the module's equation. ``moment.dead`` is not used: the third term reaches every silent feature."""
        control = ThresholdControl(self.config)
        weight, threshold = control.sparsity_weight(moment), _threshold(weights, moment.state)
        rule = _JumpReLURule(weights, threshold, weight, self.config.bandwidth, len(x))
        total, terms, firings = paid_loss(self, rule, weights, x, y)
        entries = firings.sum()
        state = control.next_state(moment, entries / len(x))
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
        """With ``threshold`` in the place of its logarithm."""
        config, finished = super().finished(weights, state)
        return config, replace(finished, threshold=_threshold(weights, state), log_threshold=None)


def _threshold(weights: Weights, state: dict[str, Tensor]) -> Tensor:
    """θ, ``[d_sae]``, from its stored logarithm and the controller's shift."""
    assert weights.log_threshold is not None
    return (weights.log_threshold.detach() / SLOWNESS + state.get("shift", 0.0)).exp()
