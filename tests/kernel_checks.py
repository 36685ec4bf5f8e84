"""What ``test_sae_kernels.py`` runs in a process of its own: Triton decides when it is imported how kernels run.

With ``TRITON_INTERPRET=1`` on the CPU, without it on a GPU; compared with dense float64.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import sparse
from sae.architectures.base import Moment, Weights
from sae.architectures.topk import TopK
from sae.codes import Pattern, SparseCodes
from sae.config import SAEConfig, TrainConfig
from sae.kernels import adam_rows, choice, decoding, grouped, selection
from sae.kernels.dense import DenseKernels
from sae.kernels.triton_kernels import TritonKernels
from sae.scaling import Scaling
from sae.trainer import Trainer

DEVICE = "cpu" if choice.interpreted() else "cuda"
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def no_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they would serve all of our tiny shapes."""
    monkeypatch.setattr(choice, "dense_is_faster", lambda *_: False)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def distinct(n: int, k: int, d_sae: int, seed: int = 0) -> Tensor:
    """int32 ``[n, k]``, no feature twice in a row."""
    order = torch.rand(n, d_sae, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :k].int().to(DEVICE)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def dense(values: Tensor, pattern: Pattern) -> Tensor:
    return SparseCodes(pattern, values.double()).to_dense()


SHAPES = [(9, 70, 120, 16), (17, 3, 16, 1), (5, 64, 90, 7), (1, 33, 64, 16), (6, 1, 20, 3)]  # n, d, d_sae, k


# ---- selection


def expected_topk(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a stable sort of the whole row: of equal entries the first come first."""
    order = (tile + 0.0).double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    return tile.gather(1, order), order.int()


def assert_topk(tile: Tensor, k: int) -> None:
    for found, expected in zip(selection.topk(tile, k), expected_topk(tile, k), strict=True):
        assert torch.equal(found, expected)


@few
@given(
    rows=st.integers(0, 5),
    width=st.integers(16, 200),
    k=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rounded=st.booleans(),
)
def test_topk_of_a_short_row(rows: int, width: int, k: int, dtype: torch.dtype, rounded: bool) -> None:
    tile = random(rows, width, seed=width, dtype=dtype)
    assert_topk(tile.round() if rounded else tile, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(4096, 4), (2051, 16), (9001, 1), (5000, 400)])
def test_topk_by_a_tournament(width: int, k: int, dtype: torch.dtype) -> None:
    tile = random(3, width, seed=k, dtype=dtype)
    tile[1] = (2 * tile[1]).round()  # mostly ties, among them 0 and −0
    tile[2] = tile[2].abs().neg()
    assert_topk(tile, k)


def test_topk_of_constant_and_extreme_rows() -> None:
    tile = torch.zeros(4, 3000, device=DEVICE)
    tile[1, 1::2] = -0.0
    tile[2] = -torch.inf
    tile[2, 2999] = -3e38
    tile[3, 7], tile[3, 2500], tile[3, 2501] = torch.inf, torch.finfo(torch.float32).tiny / 2, -torch.inf
    assert_topk(tile, 5)
    assert_topk(tile[:, :100].contiguous(), 100)


def test_a_nan_is_selected_so_that_it_is_seen() -> None:
    for width in (100, 5000):
        tile = random(2, width)
        tile[0, 70], tile[1, 50] = torch.nan, -torch.nan
        values, indices = selection.topk(tile, 2)
        assert bool(values.isnan().any(1).all())
        assert 70 in indices[0].tolist()
        assert 50 in indices[1].tolist()


def test_what_selection_does_not_take_is_left_to_torch() -> None:
    tile = torch.randn(2, 60_000, dtype=torch.float64, device=DEVICE)
    assert not selection.supported(tile, 3)
    assert not selection.supported(tile.float(), 30_000)
    values, _ = TritonKernels().topk(tile, 3, relu=False)
    assert torch.equal(values.sort().values, tile.topk(3).values.sort().values)


# ---- decoding, the gradient of the values, the weight gradients

TABLES = {
    torch.float32: 2e-5,
    torch.bfloat16: 2e-5,
    torch.float64: 1e-10,
}  # bfloat16 rows are exact in float32


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 16, 2)])
@pytest.mark.parametrize("dtype", TABLES)
def test_sums_and_dot_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, d, d_sae, k = shape
    seed = n + d
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    pattern = Pattern(d_sae, distinct(n, k, d_sae, seed))
    values, goal = random(n, k, seed=seed, dtype=kind), random(n, d, seed=seed + 1, dtype=kind)
    values[: n // 2, 0] = 0
    table, bias = random(d_sae, d, seed=seed + 2, dtype=dtype), random(d, seed=seed + 3, dtype=kind)
    codes, tolerance = dense(values, pattern), 20 * TABLES[dtype]
    for kernels in (TritonKernels(), DenseKernels()) if dtype != torch.bfloat16 else (TritonKernels(),):
        close(kernels.gather_sum(values, pattern, table), codes @ table.double(), tolerance)
        error = codes @ table.double() + bias - goal
        dots = (error @ table.double().T).gather(1, pattern.indices.long())
        found = kernels.error_and_dots(values, pattern, table, bias, goal)
        close(found[0], error, tolerance)
        close(found[1], dots, tolerance)
        close(kernels.gathered_dots(error.to(kind), table, pattern), dots, tolerance)
        rows = goal.to(dtype)
        sums = kernels.weighted_sums(pattern.transposed, rows, values)
        assert sums.dtype == kind
        close(sums, codes.T @ rows.double(), tolerance)


def ragged(n: int, d_sae: int) -> SparseCodes:
    """Codes with rows of 0 to 40 entries."""
    counts = torch.randint(0, 41, (n,), generator=torch.Generator().manual_seed(n))
    counts[:2] = torch.tensor([0, 40])
    kept = torch.arange(d_sae) < counts[:, None]
    shuffled = torch.where(kept, random(n, d_sae).cpu(), 0.0)
    return SparseCodes.from_dense(shuffled.gather(1, distinct(n, d_sae, d_sae).cpu().long()).to(DEVICE))


def test_ragged_codes() -> None:
    n, d, d_sae = 9, 21, 60
    codes, table, left = ragged(n, d_sae), random(d_sae, d), random(n, d, seed=1)
    full, pattern = codes.to_dense().double(), codes.pattern
    for kernels in (TritonKernels(), DenseKernels()):
        close(kernels.gather_sum(codes.values, pattern, table), full @ table.double())
        expected = (left.double() @ table.double().T)[full != 0]
        close(kernels.gathered_dots(left, table, pattern), expected)
        close(kernels.weighted_sums(pattern.transposed, left, codes.values), full.T @ left.double())
        error, dots = kernels.error_and_dots(codes.values, pattern, table, table[0], left)
        close(error, full @ table.double() + table[0] - left)
        close(dots, (error.double() @ table.double().T)[full != 0], 1e-4)


def test_more_entries_than_one_pass_takes() -> None:
    n, d, d_sae, k = 2, 5, 400, decoding.FUSED_K + 1
    pattern, values = Pattern(d_sae, distinct(n, k, d_sae)), random(n, k)
    table, goal = random(d_sae, d), random(n, d, seed=1)
    error, dots = decoding.error_and_dots(values, pattern, table, table[0], goal)
    close(error, dense(values, pattern) @ table.double() + table[0] - goal, 1e-4)
    close(dots, (error.double() @ table.double().T).gather(1, pattern.indices.long()), 1e-3)


def test_features_without_entries_get_zeros() -> None:
    pattern = Pattern(50, torch.full((6, 1), 7, dtype=torch.int32, device=DEVICE))
    sums = grouped.weighted_sums(pattern.transposed, random(6, 3), random(6, 1))
    assert sums.nonzero()[:, 0].unique().tolist() == [7]


# ---- the optimiser


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("d", [1, 3, 64, 70])
def test_rows_advance_as_by_projection_adam_and_normalisation(d: int, unit: bool) -> None:
    rows = random(17, d)
    rows /= rows.norm(dim=1, keepdim=True)
    expected, found = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    bias, found_bias = random(17, seed=1).requires_grad_(), random(17, seed=1).requires_grad_()
    theirs = torch.optim.Adam([expected, bias], lr=0.01, fused=True)
    ours = adam_rows.RowAdam([found, found_bias], lr=0.01, unit=found if unit else None)
    for step in range(6):
        gradient = random(17, d, seed=2 + step)
        gradient[3] = 0
        bias.grad = found_bias.grad = gradient[:, 0].clone()
        radial = (gradient * expected.detach()).sum(1, keepdim=True) * expected.detach()
        expected.grad, found.grad = gradient - radial if unit else gradient, gradient.clone()
        for optimizer in (theirs, ours):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.step()
        if unit:
            with torch.no_grad():
                expected /= expected.norm(dim=1, keepdim=True)
        close(found, expected, 1e-6)
        close(found_bias, bias, 1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        close(ours.state[found][name], theirs.state[expected][name], 1e-6)
    assert ours.state[found].keys() == theirs.state[expected].keys()


# ---- together


def dense_loss(w: Weights, x: Tensor, k: int) -> Tensor:
    pre = ((x - w.b_dec) @ w.encoder_rows.T + w.b_enc).relu()
    codes = torch.where(pre >= pre.topk(k).values[:, -1:], pre, 0.0)
    return (codes @ w.W_dec + w.b_dec - x).square().sum(1).mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_topk_loss_and_its_gradients_equal_the_dense_formula(shape: tuple[int, ...]) -> None:
    n, d, d_sae, k = shape
    x = random(n, d, seed=9)
    weights = Weights(
        random(d_sae, d), random(d_sae, seed=1), random(d_sae, d, seed=2) / d**0.5, random(d, seed=3)
    )
    ours = Weights(**{name: tensor.clone().requires_grad_() for name, tensor in weights.tensors().items()})
    exact = Weights(**{name: t.double().requires_grad_() for name, t in weights.tensors().items()})
    moment = Moment(0.5, torch.empty(0, dtype=torch.int64, device=DEVICE))
    with choice.using("triton"):
        loss = TopK(SAEConfig(d_sae=d_sae, k=k)).loss(ours, x, x, moment)
    loss.total.backward()  # outside: the choice was made in the forward pass
    expected = dense_loss(exact, x.double(), k)
    expected.backward()
    close(loss.total.detach(), expected.detach(), 1e-4)
    for name, tensor in ours.tensors().items():
        assert tensor.grad is not None
        reference = getattr(exact, name).grad
        close(tensor.grad / reference.abs().max(), reference / reference.abs().max(), 1e-4)


def test_kernels_serve_only_where_they_were_asked_for() -> None:
    pattern, table = Pattern(20, distinct(3, 2, 20)), random(20, 4)
    assert choice.serving(pattern, table) is None
    assert choice.selecting() is None
    with choice.using("triton"):
        assert isinstance(choice.serving(pattern, table), TritonKernels)
        assert isinstance(choice.selecting(), TritonKernels)
    assert choice.selecting() is None
    assert sparse.TORCH.topk(table, 2, relu=False)[0].shape == (20, 2)


def test_a_run_with_kernels_follows_a_run_without() -> None:
    """Four steps, the last two with dead features; to the precision of float32."""
    x = random(5, 10) * 2
    config = TrainConfig(
        tokens=500,
        batch_tokens=5,
        learning_rate=0.01,
        kernels="triton",
        sae=SAEConfig(d_sae=16, k=3),
    )
    trainers = [
        Trainer(chosen, Scaling(torch.zeros(10, device=DEVICE), 1.0))
        for chosen in (config, replace(config, kernels="torch"))
    ]
    for trainer in trainers:
        for step in range(4):
            if step == 2:
                trainer.dead.silent_tokens[:6] = trainer.dead.window + 1
                trainer.dead.refresh()
            trainer.step(x, x, measure=step % 2 == 1)
    ours, theirs = trainers
    assert isinstance(ours.optimizer, adam_rows.RowAdam)
    for name, tensor in ours.weights.tensors().items():
        close(tensor.detach(), getattr(theirs.weights, name).detach(), 1e-5)
    assert torch.equal(ours.dead.silent_tokens, theirs.dead.silent_tokens)
    tensors, plain = ours.state()
    theirs.load_state(tensors, plain)  # a checkpoint of either serves both
    for trainer in trainers:
        trainer.step(x, x)
    close(ours.weights.W_dec.detach(), theirs.weights.W_dec.detach(), 1e-6)


def test_a_bfloat16_product_rounds_what_is_multiplied_and_gathered() -> None:
    """The selection is that of the product of rounded inputs, and the error that of rounded decoder rows."""
    n, d, d_sae, k = 7, 12, 50, 5
    x, w = random(n, d), Weights(random(d_sae, d), random(d_sae), random(d_sae, d, seed=2), random(d, seed=3))
    pre = torch.addmm(w.b_enc.bfloat16(), (x - w.b_dec).bfloat16(), w.encoder_rows.bfloat16().T)
    expected, places = expected_topk(pre, k)
    for name in ("torch", "triton"):
        with choice.using(name, "bfloat16"):
            codes = sparse.topk_codes(x, w.b_dec, w.encoder_rows, w.b_enc, k)
            mse, error = sparse.squared_error(codes, w.W_dec, w.b_dec, x)
        assert codes.values.dtype == error.dtype == torch.float32
        order = codes.indices.sort(1)
        close(codes.values.gather(1, order.indices), expected.relu())
        if name == "triton":  # torch.topk breaks ties as it likes
            assert torch.equal(order.values, places)
        table = w.W_dec.bfloat16() if name == "triton" else w.W_dec
        close(error, dense(codes.values, codes.pattern) @ table.double() + w.b_dec - x)
        close(mse, error.double().square().sum(1).mean())
