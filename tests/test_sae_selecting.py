"""TopK, BatchTopK and Matryoshka: selection, losses, gradients and thresholds against dense float64 formulas."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from largest_tensor import LargestTensor
from torch import Tensor

from sae import batch_select, nested, sparse
from sae.architectures.base import Architecture, Loss, Moment, Weights
from sae.architectures.batch_topk import BatchTopK, threshold
from sae.architectures.registry import architecture_from
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.train import Run, train
from sae.trainer import Trainer

NO_FEATURE = torch.tensor([], dtype=torch.int64)


@dataclass
class Problem:
    """A batch and weights in float64 that want gradients; an SAE unless there is a y.

    n·k entries are kept. ``levels`` and ``level_weights`` are Matryoshka's.
    """

    x: Tensor
    weights: Weights
    k: int
    y: Tensor | None = None
    levels: tuple[int, ...] = (1, 9, 20)
    level_weights: tuple[float, ...] = (3, 1, 0, 2)
    dead: Tensor = field(default_factory=lambda: NO_FEATURE)

    @property
    def d_sae(self) -> int:
        return len(self.weights.b_enc)

    @property
    def goal(self) -> Tensor:
        """What features and b_dec have to reconstruct."""
        if self.y is None:
            return self.x
        return self.y if self.weights.W_skip is None else self.y - self.x @ self.weights.W_skip.T

    @property
    def pre(self) -> Tensor:
        """Dense pre-activations ``[n, d_sae]``, differentiable."""
        centred = self.x if self.y is not None else self.x - self.weights.b_dec
        return centred @ self.weights.encoder_rows.T + self.weights.b_enc

    def architecture(self, name: str, **changes: Any) -> Architecture:
        kind: dict[str, Any] = {"architecture": name, "d_sae": self.d_sae, "k": self.k}
        if name == "matryoshka":
            kind |= {"levels": self.levels, "level_weights": self.level_weights}
        transcoder = {"transcoder": self.y is not None, "skip": self.weights.W_skip is not None}
        config = SAEConfig(**{**kind, **transcoder, **changes})
        config.check()
        return architecture_from(config)

    def loss(self, name: str, done: float = 1.0, **changes: Any) -> Loss:
        architecture = self.architecture(name, **changes)
        moment = Moment(done, self.dead, architecture.initial_state())
        return architecture.loss(self.weights, self.x, self.x if self.y is None else self.y, moment)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        tensors = self.weights.tensors()
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return {
            name: torch.zeros_like(tensors[name]) if gradient is None else gradient
            for name, gradient in zip(tensors, found, strict=True)
        }

    def selected(self, k: int | None = None) -> Tensor:
        """Dense activations: the n·k largest of the flattened batch, among equals the first ones."""
        flat = self.pre.relu().flatten()
        order = flat.detach().sort(descending=True, stable=True).indices[: len(self.x) * (k or self.k)]
        mask = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, order, True)
        return torch.where(mask, flat, 0.0).view(len(self.x), -1)

    def row_selected(self, k: int) -> Tensor:
        """Dense activations: the k largest of each row (no two of them may be equal)."""
        mask = torch.zeros(self.pre.shape, dtype=torch.bool).scatter(1, self.pre.topk(k).indices, True)
        return torch.where(mask, self.pre.relu(), 0.0)

    def error(self, f: Tensor, width: int | None = None) -> Tensor:
        """What the first ``width`` features of dense activations ``f`` reconstruct, less the goal."""
        return f[:, :width] @ self.weights.W_dec[:width] + self.weights.b_dec - self.goal

    def mse(self, f: Tensor, width: int | None = None) -> Tensor:
        return self.error(f, width).square().sum(1).mean()

    def auxk(self, f: Tensor) -> Tensor:
        """The equation of sae/auxk.py."""
        if not len(self.dead):
            return torch.zeros((), dtype=torch.float64)
        w, residual, y = self.weights, -self.error(f).detach(), self.x if self.y is None else self.y
        centred = self.x if self.y is not None else self.x - w.b_dec.detach()
        pre = centred @ w.encoder_rows[self.dead].T + w.b_enc[self.dead]
        k_aux = self.x.shape[1] // 2
        chosen = pre.topk(min(k_aux, len(self.dead))).indices
        pre = torch.where(torch.zeros_like(pre, dtype=torch.bool).scatter(1, chosen, True), pre, 0.0)
        scale = y.square().sum() / residual.square().sum() * min(len(self.dead) / k_aux, 1.0)
        return scale * (pre @ w.W_dec[self.dead] - residual).square().sum(1).mean()

    def expected(self, name: str) -> tuple[Tensor, Tensor]:
        """The loss as the architecture's file states it, and the dense activations."""
        f = self.selected()
        if name == "batch_topk":
            main = self.mse(f)
        else:
            widths, total = (*self.levels, self.d_sae), sum(self.level_weights)
            parts = [w / total * self.mse(f, m) for w, m in zip(self.level_weights, widths, strict=True)]
            main = torch.stack(parts).sum()
        return main + 1 / 32 * self.auxk(f), f


def problem(
    n: int,
    d_in: int,
    d_sae: int,
    k: int,
    change: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
    *,
    d_out: int | None = None,
    skip: bool = False,
    **fields: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(n + d_sae)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, width = random(n, d_in), d_out or d_in
    tensors = {
        "encoder_rows": random(d_sae, d_in),
        "b_enc": random(d_sae),
        "W_dec": random(d_sae, width),
        "b_dec": random(width),
    }
    if skip:
        tensors["W_skip"] = random(width, d_in)
    y = random(n, width) if d_out else None
    if change:
        change(x, tensors)
    return Problem(x, Weights(**{k: v.requires_grad_() for k, v in tensors.items()}), k, y, **fields)


def few_positives(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"] -= 8  # fewer than n·k in the whole batch


def no_positives(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"] -= 1000


def ties(x: Tensor, w: dict[str, Tensor]) -> None:
    """Whole numbers, and every feature twice: the n·k-th largest value is not unique."""
    for tensor in (x, *w.values()):
        tensor.round_()
    half = len(w["b_enc"]) // 2
    w["encoder_rows"][half : 2 * half] = w["encoder_rows"][:half]
    w["b_enc"][half : 2 * half] = w["b_enc"][:half]


def all_equal(x: Tensor, w: dict[str, Tensor]) -> None:
    w["encoder_rows"].zero_()
    w["b_enc"].fill_(1)


def all_zero(x: Tensor, w: dict[str, Tensor]) -> None:
    """ReLU has gradient 0 at 0."""
    w["encoder_rows"].zero_()
    w["b_enc"].zero_()


def one_row_wins(x: Tensor, w: dict[str, Tensor]) -> None:
    x[20] *= 1000


def one_tile_wins(x: Tensor, w: dict[str, Tensor]) -> None:
    """No row but those of the last tile keeps anything, and they keep far more than the mean."""
    x[:-16] *= 1e-3
    w["b_dec"].zero_()
    w["b_enc"].zero_()


def everywhere(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"][3] = 100


def bury(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"][:12] = -50


CASES: dict[str, Callable[[], Problem]] = {
    "plain": lambda: problem(37, 6, 64, 5),
    "short batch": lambda: problem(7, 6, 64, 5),
    "one row": lambda: problem(1, 6, 64, 5),
    "d_sae odd": lambda: problem(37, 6, 67, 3),
    "k = 1": lambda: problem(37, 6, 64, 1),
    "k = d_sae - 1": lambda: problem(37, 6, 16, 15, levels=(1, 2, 3)),
    "fewer positives than n·k": lambda: problem(37, 6, 64, 5, few_positives),
    "no positives": lambda: problem(37, 6, 64, 5, no_positives),
    "ties": lambda: problem(37, 6, 64, 5, ties),
    "all equal": lambda: problem(37, 6, 64, 5, all_equal),
    "all zero": lambda: problem(37, 6, 64, 5, all_zero),
    "one row takes most": lambda: problem(37, 6, 64, 5, one_row_wins),
    "one tile takes all": lambda: problem(64, 6, 64, 5, one_tile_wins),
    "a feature active in every row": lambda: problem(37, 6, 64, 5, everywhere),
    "levels of one feature": lambda: problem(
        37, 6, 64, 5, levels=(1, 2, 3, 63), level_weights=(1, 2, 3, 4, 5)
    ),
    "one level": lambda: problem(37, 6, 64, 5, levels=(32,), level_weights=(0, 1)),
    "few dead": lambda: problem(37, 8, 64, 5, bury, dead=torch.arange(2)),
    "many dead": lambda: problem(37, 8, 64, 5, bury, dead=torch.arange(12)),
    "transcoder": lambda: problem(37, 6, 64, 5, d_out=9),
    "transcoder with skip": lambda: problem(37, 6, 64, 5, d_out=9, skip=True),
    "transcoder with skip and dead": lambda: problem(
        37, 6, 64, 5, bury, d_out=5, skip=True, dead=torch.arange(12)
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Problem:
    return CASES[request.param]()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows, so that 37 rows are three of them; bands in chunks of ten rows and of ten features."""
    monkeypatch.setattr(sparse, "_ROWS", 1)
    monkeypatch.setattr(nested, "_CHUNK_ROWS", 10)
    monkeypatch.setattr(nested, "_CHUNK_FEATURES", 10)
    monkeypatch.setattr(batch_select, "_BLOCK", 100)
    assert sparse.tile_rows(64) == 16


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])


# ---- losses and gradients


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_loss_equals_the_dense_formula(case: Problem, name: str, small_tiles: None) -> None:
    loss = case.loss(name)
    expected, f = case.expected(name)
    close(loss.total, expected)
    close(loss.terms["mse"], case.mse(f).detach())
    close(loss.terms.get("auxk", torch.zeros((), dtype=torch.float64)), case.auxk(f).detach())
    same_gradients(case.gradients(loss.total), case.gradients(expected))
    assert int(loss.entries) == int((f != 0).sum())
    assert torch.equal(loss.fired, (f != 0).any(0))


def test_matryoshka_reports_every_level(small_tiles: None) -> None:
    this = CASES["plain"]()
    terms = this.loss("matryoshka").terms
    assert set(terms) == {"mse", "mse_1", "mse_9", "mse_20"}
    for width in this.levels:
        close(terms[f"mse_{width}"], this.mse(this.selected(), width).detach())


def test_levels_weigh_the_same_by_default() -> None:
    this = problem(37, 6, 64, 5, levels=(), level_weights=())
    f = this.selected()
    expected = torch.stack([this.mse(f, width) for width in (4, 8, 16, 32, 64)]).mean()
    loss = this.loss("matryoshka")
    close(loss.total, expected)
    same_gradients(this.gradients(loss.total), this.gradients(expected))


def test_levels_without_knowing_how_many_entries_each_has(case: Problem) -> None:
    """The form for devices on which the host must not wait, here on the CPU."""
    w, widths = case.weights, (*case.levels, case.d_sae)

    def outputs(form: type[torch.autograd.Function]) -> tuple[Tensor, ...]:
        bias = None if case.y is not None else w.b_dec
        codes = batch_select.batch_topk_codes(case.x, bias, w.encoder_rows, w.b_enc, len(case.x) * case.k)
        arguments = (codes.values, w.W_dec, w.b_dec, case.goal, codes.pattern, widths, case.level_weights)
        return form.apply(*arguments)  # type: ignore[no-any-return]

    by_bands, stacked = outputs(nested._ByBands), outputs(nested._Stacked)
    for one, other in zip(by_bands, stacked, strict=True):
        close(one, other)
    same_gradients(case.gradients(3 * by_bands[0]), case.gradients(3 * stacked[0]))


@pytest.mark.parametrize("name", ["plain", "transcoder with skip", "few dead", "many dead"])
def test_multi_topk_adds_the_reconstruction_from_four_times_as_many(name: str, small_tiles: None) -> None:
    this = CASES[name]()
    loss = this.loss("topk", multi_topk=1 / 8)
    narrow, wide = this.row_selected(5), this.row_selected(20)
    expected = this.mse(narrow) + 1 / 8 * this.mse(wide) + 1 / 32 * this.auxk(narrow)
    close(loss.total, expected)
    close(loss.terms["mse"], this.mse(narrow).detach())
    close(loss.terms["multi_topk"], this.mse(wide).detach())
    same_gradients(this.gradients(loss.total), this.gradients(expected))
    assert int(loss.entries) == int((narrow != 0).sum())
    assert torch.equal(loss.fired, (narrow != 0).any(0))


def test_multi_topk_where_there_are_not_four_times_as_many() -> None:
    this = problem(37, 6, 16, 6)
    loss = this.loss("topk", multi_topk=0.5)
    expected = this.mse(this.row_selected(6)) + 0.5 * this.mse(this.pre.relu())
    close(loss.total, expected)
    same_gradients(this.gradients(loss.total), this.gradients(expected))


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize(("done", "k"), [(0.0, 21), (0.05, 19), (0.1, 17), (0.39, 5), (0.4, 5), (0.9, 5)])
def test_k_falls_linearly(name: str, done: float, k: int) -> None:
    """From 21 to 5 over the first 0.4 of the run: 4 every tenth."""
    this = CASES["plain"]()
    loss = this.loss(name, done=done, k_start=21, k_anneal=0.4)
    f = this.row_selected(k) if name == "topk" else this.selected(k)
    close(loss.terms["mse"], this.mse(f).detach())
    assert int(loss.entries) == int((f != 0).sum())


def test_w_skip_receives_its_gradient_through_the_goal(small_tiles: None) -> None:
    this = CASES["transcoder with skip"]()
    for name in ("topk", "batch_topk", "matryoshka"):
        gradient = this.gradients(this.loss(name).total)["W_skip"]
        assert float(gradient.abs().max()) > 1e-3


# ---- selection


VALUES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(2, 24)).flatmap(
        lambda shape: st.tuples(
            arrays(np.float64, shape, elements=VALUES, fill=VALUES), st.integers(1, shape[1] - 1)
        )
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_selection_is_a_top_k_of_the_flattened_batch(
    drawn: tuple[np.ndarray[Any, Any], int], dtype: torch.dtype
) -> None:
    """With the identity as encoder, pre-activations are what hypothesis makes; tiles have 16 rows."""
    pre, k = torch.from_numpy(drawn[0]).to(dtype), drawn[1]
    n, d_sae = pre.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_ROWS", 1)
        codes = batch_select.encode_batch_topk(
            pre, torch.eye(d_sae, dtype=dtype), torch.zeros(d_sae, dtype=dtype), n * k
        )
    top = pre.flatten().topk(n * k).values
    assert torch.equal(codes.values.sort(descending=True).values, top[top > 0])
    order = pre.flatten().sort(descending=True, stable=True).indices[: n * k]
    first = torch.zeros(n * d_sae, dtype=dtype).index_copy(0, order, pre.flatten()[order]).relu()
    assert torch.equal(codes.to_dense(), first.view(n, d_sae))
    rows, features, _ = codes.entries()
    assert bool(((rows * d_sae + features).diff() > 0).all())
    assert codes.indices.dtype == torch.int32


def test_selection_where_the_host_must_not_wait(case: Problem, small_tiles: None) -> None:
    """The form for other devices, here on the CPU: n·k entries whatever happens, the same values."""
    w = case.weights
    arguments = (case.architecture("topk").centred(w, case.x), w.encoder_rows, w.b_enc, len(case.x) * case.k)
    with torch.no_grad():
        places, values = batch_select._topk_of_tiles(*arguments)
    assert len(places) == len(values) == len(case.x) * case.k
    assert bool((places.diff() > 0).all())
    close(values, case.pre.detach().relu().flatten()[places])
    close(values.sort().values, case.selected().detach().flatten().topk(len(values)).values.flip(0))


def passes(this: Problem, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the tiles are computed for one loss."""
    seen = []
    map_tiles = batch_select.map_tiles
    monkeypatch.setattr(batch_select, "map_tiles", lambda *args: seen.append(1) or map_tiles(*args))
    this.loss("batch_topk")
    return len(seen)


def test_ordinary_batches_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(problem(500, 12, 256, 8), monkeypatch) == 1


def test_a_batch_of_very_unequal_rows_takes_two(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(CASES["one tile takes all"](), monkeypatch) == 2


def test_a_broken_encoder_shows_in_the_loss() -> None:
    """NaN counts as large: a diverged run must not go on with features that never fire."""
    for name in ("topk", "batch_topk", "matryoshka"):
        this = problem(37, 6, 64, 5)
        with torch.no_grad():
            this.weights.encoder_rows[7, 2] = torch.nan
        assert bool(this.loss(name).total.isnan())


# ---- the threshold


def test_threshold_is_the_mean_of_smallest_activations_with_bias_correction() -> None:
    architecture = CASES["plain"]().architecture("batch_topk")
    assert isinstance(architecture, BatchTopK)
    state = architecture.initial_state()
    assert float(threshold(state)) == 0
    smallest: list[float] = []
    for number in range(5):
        this = problem(20 + number, 6, 64, 5)
        if number == 2:
            this.weights.b_enc.data -= 1000  # a batch without firings says nothing
        f = this.selected()
        if bool((f > 0).any()):
            smallest.append(float(f[f > 0].detach().min()))
        before = {name: tensor.clone() for name, tensor in state.items()}
        found = architecture.loss(this.weights, this.x, this.x, Moment(0.5, NO_FEATURE, state)).state
        assert all(torch.equal(state[name], before[name]) for name in before)
        state = found
        ages = range(len(smallest) - 1, -1, -1)
        shares = [0.99**age for age in ages]
        expected = sum(s * m for s, m in zip(shares, smallest, strict=True)) / sum(shares)
        assert float(threshold(state)) == pytest.approx(expected, rel=1e-6)
    assert len(smallest) == 4


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_finished_is_a_jumprelu_with_that_threshold(name: str) -> None:
    this = CASES["transcoder with skip"]()
    architecture = this.architecture(name)
    state = this.loss(name).state
    config, weights = architecture.finished(this.weights, state)
    config.check()
    assert config == SAEConfig(architecture="jumprelu", d_sae=64, transcoder=True, skip=True)
    assert weights.threshold is not None
    close(weights.threshold, threshold(state).expand(64).to(torch.float64))
    expected = torch.where(this.pre > threshold(state), this.pre, 0.0).detach()
    for inference in (architecture, architecture_from(config)):
        close(inference.encode(weights, this.x).to_dense(), expected)


# ---- memory and determinism


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("n_dead", [0, 3])
def test_no_tensor_is_as_large_as_n_times_d_sae(
    name: str, n_dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest of PyTorch's is a tile of 16 rows; numpy's memory is traced."""
    monkeypatch.setattr(sparse, "_ROWS", 1)
    n, d_in, d_sae = 512, 12, 2048
    this = problem(n, d_in, d_sae, 2, dead=torch.arange(n_dead))
    tracemalloc.start()
    with LargestTensor() as watch:
        this.loss(name).total.backward()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert this.weights.encoder_rows.grad is not None
    assert watch.largest == 16 * d_sae
    assert traced < n * d_sae


@pytest.mark.parametrize(
    "kind",
    [
        {"architecture": "topk", "multi_topk": 0.125, "k_start": 30},
        {"architecture": "batch_topk", "k_start": 30},
        {"architecture": "matryoshka"},
    ],
    ids=lambda kind: kind["architecture"],
)
def test_two_runs_give_the_same_bits(kind: dict[str, Any], two_threads: None) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    config = TrainConfig(
        tokens=7_000, batch_tokens=700, learning_rate=1e-2, sae=SAEConfig(d_sae=256, k=8, **kind)
    )

    def tensors() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        trainer = Trainer(config, Scaling(torch.zeros(16), 1.0))
        trainer.dead.window = 1000  # so that the auxiliary loss takes part
        for _ in range(6):
            x = torch.randn(700, 16, generator=generator)
            trainer.step(x, x)
        return {name: tensor.detach().clone() for name, tensor in trainer.state()[0].items()}

    first, second = tensors(), tensors()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])


# ---- training

D_IN, D_SAE, K, DIRECTIONS, BATCH = 16, 48, 3, 32, 128


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
        chosen = torch.rand(BATCH, DIRECTIONS, generator=generator) < K / DIRECTIONS
        strengths = torch.rand(BATCH, DIRECTIONS, generator=generator) + 0.5
        return (chosen * strengths) @ self.directions + 3.0

    def held_out(self) -> Tensor:
        return torch.cat([self.make(number) for number in range(9000, 9030)])

    def __iter__(self) -> Iterator[Tensor]:
        return (self.make(number) for number in range(self.n_batches))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


KINDS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 4, "multi_topk": 0.125, "k_start": 12},
    "batch_topk": {"architecture": "batch_topk", "k": K},
    "batch_topk, k falling": {"architecture": "batch_topk", "k": K, "k_start": 12},
    "matryoshka": {"architecture": "matryoshka", "k": K, "levels": (12, 24)},
}


@pytest.mark.parametrize("name", KINDS)
def test_learns_planted_directions(name: str, tmp_path: Path) -> None:
    """And the finished SAE, whose rows no longer share anything, fires as often on held-out data as it was asked to."""
    steps = 400
    batches = Planted(steps)
    sample = torch.cat([batches.make(number) for number in range(20)])
    mean = sample.mean(0)
    scaling = Scaling(mean, float((D_IN / (sample - mean).square().sum(1).mean()).sqrt()))
    config = TrainConfig(
        tokens=steps * BATCH,
        batch_tokens=BATCH,
        learning_rate=1e-2,
        sae=SAEConfig(d_sae=D_SAE, **KINDS[name]),
    )
    sae = train(Run(config, tmp_path), batches, scaling)
    x = batches.held_out()
    explained = 1 - float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert explained > 0.75
    assert sae.encode(x).l0() == pytest.approx(config.sae.k, rel=0.05 if name != "topk" else 0.2)
    again = SparseAutoencoder.load(tmp_path / "sae")
    assert sae.config.architecture == again.config.architecture
    assert again.config.architecture == ("topk" if name == "topk" else "jumprelu")
    if name != "topk":
        told = again.metadata["training_architecture"], again.metadata["k"]
        assert told == (config.sae.architecture, config.sae.k)
    close(again(x), sae(x))


def test_early_levels_reconstruct_by_themselves(tmp_path: Path) -> None:
    """The first quarter of a Matryoshka's features explains more than the same quarter of a BatchTopK's features."""
    batches = Planted(200)
    sample = torch.cat([batches.make(number) for number in range(20)])
    scaling = Scaling(sample.mean(0), 1.0)

    def explained(kind: dict[str, Any]) -> float:
        config = TrainConfig(
            tokens=200 * BATCH, batch_tokens=BATCH, learning_rate=1e-2, sae=SAEConfig(d_sae=D_SAE, **kind)
        )
        trainer = Trainer(config, scaling)
        for batch in batches:
            trainer.step(*scaling.apply(batch))
        x, _ = scaling.apply(batches.held_out())
        f = trainer.architecture.encode(
            trainer.architecture.finished(trainer.weights, trainer.architecture_state)[1], x
        ).to_dense()
        weights = trainer.weights
        error = f[:, :12] @ weights.W_dec[:12].detach() + weights.b_dec.detach() - x
        return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())

    assert explained(KINDS["matryoshka"]) > explained(KINDS["batch_topk"]) + 0.1
