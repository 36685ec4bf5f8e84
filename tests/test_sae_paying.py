"""Architectures that pay for firing, against their equations written out densely in float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from sae import paying, sparse
from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.registry import architecture_from
from sae.architectures.relu import ReLU
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.train import Run, train
from sae.trainer import Trainer

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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows, so that most batches are several of them, the last one incomplete."""
    monkeypatch.setattr(sparse, "_ROWS", 1)


@pytest.fixture(params=["sparse", "sparse, dense products", "dense tiles"])
def layout(request: pytest.FixtureRequest, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both layouts, and both ways in which the sparse one takes dot products."""
    if request.param != "dense tiles":
        monkeypatch.setattr(paying, "_GATHER_BELOW", 2.0 if request.param == "sparse" else -1.0)
    monkeypatch.setattr(paying, "SPARSE_BELOW", -1.0 if request.param == "dense tiles" else 2.0)
    return str(request.param)


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
    return error(w, x, y, f) + weight * sparsity + 3e-4 * silence, f


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
    for one, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(one / scale, other / scale, rtol=1e-9, atol=1e-10)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_loss_and_gradients_equal_the_equation(name: str, skip: bool, layout: str) -> None:
    config = SAEConfig(architecture=name, d_sae=40, sparsity_weight=0.7, transcoder=True, skip=skip)
    kind = architecture_from(config)
    w = random_weights(kind, 6, 9, None)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(37, d, dtype=torch.float64, generator=generator) for d in (6, 9))
    same_loss(kind, w, x, y)


def test_narrow_window_far_from_zero(layout: str) -> None:
    """Every threshold above half the window, so that the window's lower end cuts pre-activations off."""
    config = SAEConfig(architecture="jumprelu", d_sae=64, sparsity_weight=0.7, bandwidth=0.3)
    kind = architecture_from(config)
    w = random_weights(kind, 6, 6, lambda w: w.log_threshold.abs_())  # type: ignore[union-attr]
    x = torch.randn(37, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same_loss(kind, w, x, x)


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_weight_warms_up(name: str) -> None:
    """From 0, over the first 5% of the run or (jumprelu) all of it; without a target nothing else moves it."""
    kind = architecture_from(SAEConfig(architecture=name, d_sae=16, sparsity_weight=3.0))
    w = random_weights(kind, 6, 6, None)
    x = torch.randn(9, 6, dtype=torch.float64)

    def total(done: float) -> float:
        return float(kind.loss(w, x, x, Moment(done, NONE_DEAD, kind.initial_state())).total.detach())

    end = 1.0 if name == "jumprelu" else 0.05
    half_way = (total(0) + total(end)) / 2
    assert total(end / 2) == pytest.approx(half_way, rel=1e-9)
    assert total(end) > total(0)
    assert name == "jumprelu" or total(1.0) == total(end)


# ---- p-annealing


def annealed(done: float, state: dict[str, Tensor]) -> tuple[Loss, Weights, Tensor]:
    kind = architecture_from(SAEConfig(architecture="relu", d_sae=64, sparsity_weight=0.7, p_end=0.2))
    w = random_weights(kind, 6, 6, None)
    x = torch.randn(37, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return kind.loss(w, x, x, Moment(done, NONE_DEAD, state)), w, x


def test_p_annealing_equals_the_equation(layout: str) -> None:
    """At three quarters of the run p is 0.6; δ = 1/100."""
    state = {"p": torch.tensor(0.75), "p_factor": torch.tensor(2.0)}
    loss, w, x = annealed(0.75, state)
    f = ((x - w.b_dec) @ w.encoder_rows.T + w.b_enc).relu()
    norms = w.W_dec.norm(dim=1)

    def penalty(p: float) -> Tensor:
        return (((f + 0.01) ** p - 0.01**p) * norms).sum(1).mean()

    expected = error(w, x, x, f) + 0.7 * 2.0 * penalty(0.6)
    torch.testing.assert_close(loss.total, expected, rtol=1e-7, atol=0)  # the state is float32
    tensors = list(w.tensors().values())
    for one, other in zip(
        torch.autograd.grad(loss.total, tensors), torch.autograd.grad(expected, tensors), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert float(loss.state["p"]) == pytest.approx(0.6)
    factor = 2.0 * float((penalty(float(state["p"])) / penalty(0.6)).detach())
    assert float(loss.state["p_factor"]) == pytest.approx(factor, rel=1e-6)


def test_p_annealing_keeps_the_size_of_the_penalty() -> None:
    """With weights that stay, λ times the penalty is the same at the end of the run as before p falls."""
    state = {"p": torch.ones(()), "p_factor": torch.ones(())}
    sizes = []
    for done in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0):
        factor = float(state["p_factor"])
        loss, _, _ = annealed(done, state)
        sizes.append(factor * float(loss.terms["l1"]))
        state = loss.state
    assert float(state["p"]) == pytest.approx(0.2)
    assert sizes[0] == sizes[1]
    assert sizes[-1] == pytest.approx(sizes[0], rel=1e-4)
    assert float(state["p_factor"]) != 1


# ---- inference


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transcoder", [False, True])
def test_codes_equal_the_equation(name: str, transcoder: bool) -> None:
    kind = architecture_from(SAEConfig(architecture=name, d_sae=64, transcoder=transcoder))
    w = random_weights(kind, 6, 6, None)
    x = torch.randn(37, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, f = EXPECTED[name](kind, w, x, x, 0.0)
    config, finished = kind.finished(w, kind.initial_state())
    assert finished.log_threshold is None
    close(architecture_from(config).encode(finished, x).to_dense(), f.detach())


def test_jumprelu_fires_strictly_above_its_threshold_and_above_zero() -> None:
    kind = JumpReLU(SAEConfig(architecture="jumprelu", d_sae=4))
    eye = torch.eye(4)
    threshold = torch.tensor([1.0, 1.0, -3.0, 0.0])
    w = Weights(eye, torch.zeros(4), eye, torch.zeros(4), threshold=threshold)
    x = torch.tensor([[1.0, 1.5, -2.0, 0.0], [2.0, 0.5, 0.0, 0.1]])
    codes = kind.encode(w, x)
    assert codes.to_dense().tolist() == [[0, 1.5, 0, 0], [2, 0, 0, pytest.approx(0.1)]]
    assert codes.nnz == 3


@pytest.mark.parametrize("target", [None, 16.0])
def test_jumprelu_starts_at_the_firing_rate_it_says(target: float | None) -> None:
    """On isotropic inputs of mean squared norm d_in."""
    kind = JumpReLU(SAEConfig(architecture="jumprelu", d_sae=50_000, target_l0=target))
    w = kind.initial_weights(64, 64, torch.Generator().manual_seed(0))
    _, finished = kind.finished(w, kind.initial_state())
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert kind.encode(finished, x).l0() == pytest.approx(10_000 if target is None else target, rel=0.15)


# ---- the L0 target

BATCH, D_IN, DIRECTIONS, D_SAE = 256, 24, 32, 64


class Planted:
    """Sums of three of 32 planted directions on average, off centre."""

    def __init__(self, n_batches: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.directions = torch.nn.functional.normalize(
            torch.randn(DIRECTIONS, D_IN, generator=generator), dim=1
        )
        self.n_batches = n_batches

    def make(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.rand(BATCH, DIRECTIONS, generator=generator) < 3 / DIRECTIONS
        strengths = torch.rand(BATCH, DIRECTIONS, generator=generator) + 0.5
        return (chosen * strengths) @ self.directions + 3.0

    def scaling(self) -> Scaling:
        sample = torch.cat([self.make(number) for number in range(9000, 9020)])
        mean = sample.mean(0)
        return Scaling(mean, float((D_IN / (sample - mean).square().sum(1).mean()).sqrt()))

    def __iter__(self) -> Iterator[Tensor]:
        return (self.make(number) for number in range(self.n_batches))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def planted_config(name: str, steps: int, **sae: Any) -> TrainConfig:
    return TrainConfig(
        tokens=steps * BATCH,
        batch_tokens=BATCH,
        learning_rate=3e-3,
        sae=SAEConfig(architecture=name, d_sae=D_SAE, **sae),
    )


def firings(name: str, steps: int, **sae: Any) -> list[float]:
    """The L0 of every step's batch."""
    data = Planted(steps)
    scaling = data.scaling()
    trainer = Trainer(planted_config(name, steps, **sae), scaling)
    return [float(trainer.step(*scaling.apply(batch)).entries) / BATCH for batch in data]


@pytest.mark.parametrize("weight", [None, 0.01, 3.0])
def test_jumprelu_reaches_its_target_and_keeps_it(weight: float | None) -> None:
    """Within 3% from a fifth of the run on, over any tenth of it, whatever λ it starts from."""
    steps = 300
    found = firings("jumprelu", steps, target_l0=5.0, sparsity_weight=weight)
    windows = [sum(found[i : i + steps // 10]) / (steps // 10) for i in range(steps // 10, steps * 9 // 10)]
    assert min(windows) == pytest.approx(5.0, rel=0.03)
    assert max(windows) == pytest.approx(5.0, rel=0.03)


@pytest.mark.parametrize("name", ["relu", "gated"])
@pytest.mark.parametrize("weight", [None, 0.03, 30.0])
def test_relu_and_gated_reach_their_target(name: str, weight: float | None) -> None:
    """Within 5% over any tenth of the second half of the run, whatever λ it starts from."""
    found = firings(name, 500, target_l0=5.0, sparsity_weight=weight)
    windows = [sum(found[i : i + 50]) / 50 for i in range(250, 450)]
    assert min(windows) == pytest.approx(5.0, rel=0.05)
    assert max(windows) == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("controlled", [False, True])
def test_state_is_all_that_a_resumed_run_needs(name: str, controlled: bool) -> None:
    """Stopped in the middle and taken up by another trainer: the same bits."""
    extra: dict[str, Any] = {"target_l0": 5.0} if controlled else {}
    if name == "relu":
        extra["p_end"] = 0.5
    data = Planted(20)
    scaling = data.scaling()
    config = planted_config(name, 20, **extra)
    whole, first, second = (Trainer(config, scaling) for _ in range(3))
    for number in range(20):
        batch = scaling.apply(data.make(number))
        whole.step(*batch)
        if number == 13:
            tensors, plain = first.state()
            second.load_state({k: v.clone() for k, v in tensors.items()}, plain)
        (first if number < 13 else second).step(*batch)
    for name_, tensor in whole.weights.tensors().items():
        assert torch.equal(tensor, second.weights.tensors()[name_]), name_
    for key, value in whole.architecture_state.items():
        assert torch.equal(value, second.architecture_state[key]), key


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("relu", {"sparsity_weight": 1.0}),
        ("relu", {"target_l0": 4.0}),
        ("relu", {"target_l0": 4.0, "p_end": 0.5}),
        ("gated", {"target_l0": 4.0}),
        ("gated", {"target_l0": 4.0, "sparsity_weight": 30.0}),
        ("jumprelu", {"target_l0": 4.0}),
    ],
)
def test_learns_planted_directions(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    """The finished SAE, in raw units, read back from its files, explains held-out data and fires sparsely."""
    steps = 500
    data = Planted(steps)
    config = replace(planted_config(name, steps, **extra), learning_rate=1e-2)
    train(Run(config, tmp_path), data, data.scaling())
    sae = SparseAutoencoder.load(tmp_path / "sae")
    x = torch.cat([data.make(number) for number in range(9100, 9130)])
    explained = 1 - float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert explained > 0.75  # with its shrinkage, relu stays just above
    assert sae.encode(x).l0() < 9
    cosines = torch.nn.functional.normalize(sae.W_dec, dim=1) @ data.directions.t()
    assert float((cosines.amax(0) > 0.9).float().mean()) > 0.8


# ---- memory and determinism


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [None, few_fire])
def test_no_tensor_is_as_large_as_n_times_d_sae(name: str, change: Change | None, small_tiles: None) -> None:
    """The largest is a tile of 16 rows, or the 64 rows that the layout is chosen from, of 512."""
    kind = architecture_from(SAEConfig(architecture=name, d_sae=512))
    w = random_weights(kind, 6, 6, change)
    x = torch.randn(512, 6, dtype=torch.float64)
    with LargestTensor() as watch:
        kind.loss(w, x, x, Moment(1.0, NONE_DEAD, kind.initial_state())).total.backward()
    assert w.encoder_rows.grad is not None
    assert 16 * 512 <= watch.largest <= 64 * 512


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("below", [2.0, -1.0])
def test_two_runs_give_the_same_bits(
    name: str, below: float, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(paying, "SPARSE_BELOW", below)
    config = TrainConfig(
        tokens=100_000,
        batch_tokens=700,
        learning_rate=1e-2,
        sae=SAEConfig(architecture=name, d_sae=256, target_l0=8.0),
    )

    def weights() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        trainer = Trainer(config, Scaling(torch.zeros(16), 1.0))
        for _ in range(5):
            x = torch.randn(700, 16, generator=generator)
            trainer.step(x, x)
        return [tensor.detach().clone() for tensor in trainer.weights.tensors().values()]

    for one, other in zip(weights(), weights(), strict=True):
        assert torch.equal(one, other)
