"""Architectures that pay for firing, against their equations written out densely in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae import paying, sparse
from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.registry import architecture_from
from sae.architectures.relu import ReLU
from sae.config import SAEConfig

NAMES = ("relu", "gated", "jumprelu")
NONE_DEAD = torch.tensor([], dtype=torch.int64)
Change = Callable[[Weights], None]


def random_weights(kind: Architecture, d_in: int, d_out: int, change: Change | None) -> Weights:
    """Float64 weights that want gradients: every tensor random, so that nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(d_in + kind.config.d_sae)
    weights = kind.initial_weights(d_in, d_out, generator)
    noisy = {
        name: tensor.double() + torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in weights.tensors().items()
    }
    if "log_threshold" in noisy:
        noisy["log_threshold"] = 8 * torch.randn(kind.config.d_sae, generator=generator, dtype=torch.float64)
    found = Weights(**noisy)
    if change:
        change(found)
    return Weights(**{name: tensor.requires_grad_() for name, tensor in found.tensors().items()})


def few_fire(weights: Weights) -> None:
    weights.b_enc.sub_(6)


def none_fire(weights: Weights) -> None:
    weights.b_enc.sub_(1000)


def all_fire(weights: Weights) -> None:
    weights.b_enc.add_(1000)
    if weights.b_mag is not None:
        weights.b_mag.add_(1000)


def dead_row(weights: Weights) -> None:
    """A decoder row of norm 0, where the norm has no derivative."""
    weights.W_dec[3] = 0


CASES: dict[str, tuple[int, int, int, Change | None]] = {
    "plain": (37, 6, 64, None),
    "one row": (1, 6, 64, None),
    "fewer features than inputs": (20, 9, 5, None),
    "few fire": (100, 6, 67, few_fire),
    "none fires": (37, 6, 64, none_fire),
    "all fire": (37, 6, 64, all_fire),
    "a decoder row of zeros": (37, 6, 64, dead_row),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows, so that most batches are several of them, the last one incomplete."""
    monkeypatch.setattr(sparse, "_TILE_ROWS", 1)


@pytest.fixture(params=["sparse", "dense tiles"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(paying, "SPARSE_BELOW", 2.0 if request.param == "sparse" else -1.0)
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- the equations, dense


def expected_relu(kind: ReLU, w: Weights, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    f = pre_activations(kind, w, x).relu()
    penalty = (f * w.W_dec.norm(dim=1)).sum(1).mean()
    return error(w, x, y, f) + weight * penalty, f


def expected_gated(kind: Gated, w: Weights, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    assert w.r_mag is not None
    gate = pre_activations(kind, w, x)
    magnitude = w.r_mag.exp() * (gate - w.b_enc) + w.b_mag
    f = (gate > 0) * magnitude.relu()
    frozen = Weights(**{name: tensor.detach() for name, tensor in w.tensors().items()})
    penalty = (gate.relu() * w.W_dec.norm(dim=1)).sum(1).mean()
    return error(w, x, y, f) + weight * penalty + error(frozen, x, y, gate.relu()), f


def expected_jumprelu(
    kind: JumpReLU, w: Weights, x: Tensor, y: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The activation's derivatives are those of the module's second line, by a term whose value is 0."""
    assert w.log_threshold is not None
    t, width = w.log_threshold / 10, kind.config.bandwidth
    z, threshold = pre_activations(kind, w, x), t.exp()
    window = ((z - threshold).abs() < width / 2).double().detach()
    by_threshold = -(threshold.detach() / width) * window
    f = z * (z > threshold) + by_threshold * (t - t.detach())
    norms = w.W_dec.norm(dim=1)
    sparsity = torch.tanh(4 * f * norms).sum(1).mean()
    silence = ((threshold - z).relu() * norms).sum(1).mean()
    return error(w, x, y, f) + weight * sparsity + 3e-6 * silence, f


def pre_activations(kind: Architecture, w: Weights, x: Tensor) -> Tensor:
    centred = x if kind.config.transcoder else x - w.b_dec
    return centred @ w.encoder_rows.T + w.b_enc


def error(w: Weights, x: Tensor, y: Tensor, f: Tensor) -> Tensor:
    output = f @ w.W_dec + w.b_dec
    if w.W_skip is not None:
        output = output + x @ w.W_skip.T
    return (output - y).square().sum(1).mean()


EXPECTED = {"relu": expected_relu, "gated": expected_gated, "jumprelu": expected_jumprelu}


def same_loss(kind: Architecture, w: Weights, x: Tensor, y: Tensor) -> None:
    """Values and gradients of a loss at the end of the run, where λ is at its full value."""
    weight = kind.config.resolved_sparsity_weight()
    loss = kind.loss(w, x, y, Moment(1.0, NONE_DEAD, kind.initial_state()))
    expected, f = EXPECTED[kind.name](kind, w, x, y, weight)
    close(loss.total, expected)
    close(loss.terms["mse"], error(w, x, y, f).detach())
    tensors = w.tensors()
    found = torch.autograd.grad(loss.total, list(tensors.values()))
    wanted = torch.autograd.grad(expected, list(tensors.values()), allow_unused=True)
    for name, one, other in zip(tensors, found, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            one / scale, other / scale, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}"
        )  # noqa: B023
    assert int(loss.entries) == int((f > 0).sum())
    assert torch.equal(loss.fired, (f > 0).any(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_equation(name: str, case: str, layout: str) -> None:
    n, d_in, d_sae, change = CASES[case]
    kind = architecture_from(SAEConfig(architecture=name, d_sae=d_sae, sparsity_weight=0.7))
    w = random_weights(kind, d_in, d_in, change)
    x = torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    same_loss(kind, w, x, x)
