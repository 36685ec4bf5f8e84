"""Rewriting weights so that another formula, or other units, become ours: the function stays the same.

Sums are taken in float64 and rounded once to float32, so what is folded is right to half a unit in the last place.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae.architectures.base import Weights


def with_input_bias(weights: Weights) -> Weights:
    """From an encoder that reads x to one that reads x − b_dec: ``b_enc + W_enc b_dec`` (gated: both biases)."""
    return _shifted(weights, 1.0)


def without_input_bias(weights: Weights) -> Weights:
    """From an encoder that reads x − b_dec to one that reads x: ``b_enc − W_enc b_dec``; undoes the other.

    Undone, a bias is the same up to one rounding of the larger of itself and the folded one.
    """
    return _shifted(weights, -1.0)


def _shifted(weights: Weights, sign: float) -> Weights:
    shift = sign * (weights.encoder_rows.double() @ weights.b_dec.double())
    shifted = replace(weights, b_enc=(weights.b_enc.double() + shift).float())
    if weights.b_mag is None or weights.r_mag is None:
        return shifted
    return replace(shifted, b_mag=(weights.b_mag.double() + weights.r_mag.double().exp() * shift).float())


def unit_decoder(weights: Weights) -> Weights:
    """The same SAE with decoder rows of norm 1: activations grow by the norms (selection by them does too)."""
    if has_unit_rows(weights.W_dec):
        return weights
    norms = weights.W_dec.norm(dim=1).clamp_min(1e-8)
    return replace(
        weights,
        encoder_rows=weights.encoder_rows * norms[:, None],
        b_enc=weights.b_enc * norms,
        W_dec=weights.W_dec / norms[:, None],
        threshold=None if weights.threshold is None else weights.threshold * norms,
    )


def has_unit_rows(decoder: Tensor) -> bool:
    """Whether all rows have norm 1, to float32's accuracy."""
    return bool(((decoder.norm(dim=1) - 1).abs() < 1e-6).all())


def in_units_of_activations(weights: Weights, scale_in: float, scale_out: float) -> Weights:
    """Weights that worked on ``x · scale_in`` and gave ``y · scale_out``, for x and y themselves.

    Activations come out divided by scale_in, which leaves the encoder's matrix as it is; a threshold follows them.
    """

    def times(tensor: Tensor, factor: float) -> Tensor:
        return (tensor.double() * factor).float()

    return replace(
        weights,
        b_enc=times(weights.b_enc, 1 / scale_in),
        W_dec=times(weights.W_dec, scale_in / scale_out),
        b_dec=times(weights.b_dec, 1 / scale_out),
        threshold=None if weights.threshold is None else times(weights.threshold, 1 / scale_in),
        b_mag=None if weights.b_mag is None else times(weights.b_mag, 1 / scale_in),
    )


def constant(threshold: Tensor) -> float | None:
    """The one value of a threshold, or None where features differ."""
    return float(threshold[0]) if bool(torch.all(threshold == threshold[0])) else None
