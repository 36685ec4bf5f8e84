"""The sparse path against the dense formula and its autograd, in float64, to 1e-10."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from sae import codes, paying, sparse
from sae.architectures.base import Loss, Moment, Weights
from sae.architectures.relu import ReLU
from sae.architectures.topk import TopK
from sae.codes import Pattern, SparseCodes
from sae.config import SAEConfig, TrainConfig
from sae.scaling import Scaling
from sae.trainer import Trainer

NAMES = ("encoder_rows", "b_enc", "W_dec", "b_dec")


@dataclass
class Problem:
    """Inputs and weights in float64; the weights want gradients."""

    x: Tensor
    weights: Weights
    k: int

    @property
    def pre(self) -> Tensor:
        """Dense pre-activations ``[n, d_sae]``, differentiable."""
        return (self.x - self.weights.b_dec) @ self.weights.encoder_rows.T + self.weights.b_enc

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, [getattr(self.weights, name) for name in NAMES], allow_unused=True)
        return dict(zip(NAMES, (torch.zeros(()) if g is None else g for g in found), strict=True))


def problem(
    n: int, d_in: int, d_sae: int, k: int, change: Callable[[Tensor, dict[str, Tensor]], None] | None = None
) -> Problem:
    generator = torch.Generator().manual_seed(n + d_sae)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(n, d_in)
    tensors = dict(
        zip(NAMES, (random(d_sae, d_in), random(d_sae), random(d_sae, d_in), random(d_in)), strict=True)
    )
    if change:
        change(x, tensors)
    return Problem(x, Weights(**{name: tensor.requires_grad_() for name, tensor in tensors.items()}), k)


def few_positives(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"] -= 8  # about one feature in a hundred stays positive


def no_positives(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"] -= 1000


def ties(x: Tensor, w: dict[str, Tensor]) -> None:
    """Whole numbers, and every feature twice: the k-th largest value is hardly ever unique."""
    for tensor in (x, *w.values()):
        tensor.round_()
    half = len(w["b_enc"]) // 2
    w["encoder_rows"][half : 2 * half] = w["encoder_rows"][:half]
    w["b_enc"][half : 2 * half] = w["b_enc"][:half]


def zero_row(x: Tensor, w: dict[str, Tensor]) -> None:
    """One row whose pre-activations are all exactly 0, where ReLU has gradient 0."""
    w["b_enc"].zero_()
    x[0] = w["b_dec"]


def zero_input(x: Tensor, w: dict[str, Tensor]) -> None:
    x[0] = 0


def active_everywhere(x: Tensor, w: dict[str, Tensor]) -> None:
    w["b_enc"][3] = 100


CASES: dict[str, Callable[[], Problem]] = {
    "plain": lambda: problem(37, 6, 64, 5),
    "short batch": lambda: problem(7, 6, 64, 5),
    "one row": lambda: problem(1, 6, 64, 5),
    "three rounds of the tournament": lambda: problem(37, 6, 1024, 2),
    "d_sae not divisible by 16": lambda: problem(37, 6, 70, 3),
    "d_sae odd": lambda: problem(37, 6, 67, 3),
    "d_sae divisible by 4 once": lambda: problem(37, 6, 68, 3),
    "k = 1": lambda: problem(37, 6, 64, 1),
    "k = d_sae - 1": lambda: problem(37, 6, 16, 15),
    "fewer than k positives": lambda: problem(37, 6, 64, 5, few_positives),
    "no positives": lambda: problem(37, 6, 64, 5, no_positives),
    "ties": lambda: problem(37, 6, 64, 5, ties),
    "ties in the tournament": lambda: problem(37, 6, 256, 4, ties),
    "all-zero pre-activations": lambda: problem(37, 6, 64, 5, zero_row),
    "all-zero input": lambda: problem(37, 6, 64, 5, zero_input),
    "a feature active in every row": lambda: problem(37, 6, 64, 5, active_everywhere),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Problem:
    return CASES[request.param]()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows (the smallest), so that 37 rows are three of them, the last one incomplete."""
    monkeypatch.setattr(sparse, "_ROWS", 1)
    assert sparse.tile_rows(64) == 16


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in NAMES:
        close(found[name], expected[name])


def support_of(pattern: Pattern) -> Tensor:
    """Bool ``[n, d_sae]``: what the pattern selects."""
    return SparseCodes(pattern, torch.ones(pattern.indices.shape)).to_dense() > 0


# ---- TopK


def test_selection_is_a_top_k(case: Problem, small_tiles: None) -> None:
    """The selected values are torch.topk's (as a multiset: ties may be broken either way), at the places named."""
    w = case.weights
    codes = sparse.topk_codes(case.x, w.b_dec, w.encoder_rows, w.b_enc, case.k)
    assert codes.indices.shape == codes.values.shape == (len(case.x), case.k)
    assert codes.indices.dtype == torch.int32
    assert bool((support_of(codes.pattern).sum(1) == case.k).all())
    clipped = case.pre.detach().relu()
    close(codes.values.detach(), clipped.gather(1, codes.indices.long()))
    close(codes.values.detach().sort(1).values, clipped.topk(case.k).values.sort(1).values)


@pytest.mark.parametrize("relu", [True, False])
def test_topk_values_and_gradients_equal_the_dense_formula(
    case: Problem, small_tiles: None, relu: bool
) -> None:
    w = case.weights
    codes = sparse.topk_codes(case.x, w.b_dec, w.encoder_rows, w.b_enc, case.k, relu=relu)
    output = sparse.decode(codes, w.W_dec, w.b_dec)
    support = support_of(codes.pattern)
    dense = torch.where(support, case.pre.relu() if relu else case.pre, 0.0)
    expected = dense @ w.W_dec + w.b_dec
    close(output, expected)
    # Any function will do that depends on the outputs and, as a sparsity penalty would, on the values themselves.
    towards, slope = torch.randn_like(expected), torch.randn_like(dense)
    slopes = slope.gather(1, codes.indices.long())
    found = case.gradients((output - towards).square().sum() + (codes.values * slopes).sum())
    same_gradients(found, case.gradients((expected - towards).square().sum() + (dense * slope).sum()))


NONE_DEAD = Moment(0.5, torch.tensor([], dtype=torch.int64))


def topk(d_sae: int, k: int) -> TopK:
    return TopK(SAEConfig(d_sae=d_sae, k=k))


def relu(d_sae: int, sparsity_weight: float) -> ReLU:
    return ReLU(SAEConfig(architecture="relu", d_sae=d_sae, sparsity_weight=sparsity_weight))


def test_topk_loss_equals_the_dense_formula(case: Problem) -> None:
    w = case.weights
    loss = topk(len(w.b_enc), case.k).loss(w, case.x, case.x, NONE_DEAD)
    codes = sparse.topk_codes(case.x, w.b_dec, w.encoder_rows, w.b_enc, case.k)
    dense = torch.where(support_of(codes.pattern), case.pre.relu(), 0.0)
    expected = (dense @ w.W_dec + w.b_dec - case.x).square().sum(1).mean()
    close(loss.total, expected)
    close(loss.terms["mse"], expected.detach())
    same_gradients(case.gradients(loss.total), case.gradients(expected))
    assert int(loss.entries) == int((dense != 0).sum())
    assert torch.equal(loss.fired, (dense != 0).any(0))


@pytest.mark.parametrize("n_dead", [1, 3, 20])
def test_auxk_trains_the_dead_features_encoder_too(n_dead: int) -> None:
    """d_in // 2 = 4 dead features at most are used per row: fewer than that, and more, than there are dead."""

    def bury(x: Tensor, w: dict[str, Tensor]) -> None:
        w["b_enc"][:n_dead] = -50

    this = problem(37, 8, 64, 5, bury)
    w, dead = this.weights, torch.arange(n_dead)
    loss = topk(64, 5).loss(w, this.x, this.x, Moment(0.5, dead))
    codes = sparse.topk_codes(this.x, w.b_dec, w.encoder_rows, w.b_enc, 5)
    main = torch.where(support_of(codes.pattern), this.pre.relu(), 0.0) @ w.W_dec + w.b_dec
    mse = (main - this.x).square().sum(1).mean()
    error = (this.x - main).detach()
    # The module's equation, dense: unclipped pre-activations of the dead, b_dec held fixed.
    pre = (this.x - w.b_dec.detach()) @ w.encoder_rows[dead].T + w.b_enc[dead]
    support = torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.topk(min(4, n_dead)).indices, True)
    estimate = torch.where(support, pre, 0.0) @ w.W_dec[dead]
    scale = this.x.square().sum() / error.square().sum() * min(n_dead / 4, 1.0)
    expected = mse + 1 / 32 * scale * (estimate - error).square().sum(1).mean()
    close(loss.total, expected)
    found = this.gradients(loss.total)
    same_gradients(found, this.gradients(expected))
    assert not bool(loss.fired[dead].any())
    chosen = support.any(0)
    assert bool((found["encoder_rows"][dead][chosen].norm(dim=1) > 0).all())
    assert bool((found["b_enc"][dead][chosen] != 0).all())


def test_one_transposed_structure_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    grouped = codes._grouped
    monkeypatch.setattr(codes, "_grouped", lambda *args: built.append(1) or grouped(*args))
    this = CASES["plain"]()
    loss = topk(64, 5).loss(this.weights, this.x, this.x, NONE_DEAD)
    loss.total.backward()
    assert len(built) == 1


# ---- ReLU


def dense_relu(this: Problem, l1: float) -> tuple[Tensor, Tensor]:
    """The loss of ``sae/architectures/relu.py``, written out, and the dense activations."""
    f = this.pre.relu()
    w = this.weights
    mse = (f @ w.W_dec + w.b_dec - this.x).square().sum(1).mean()
    return mse + l1 * (f * w.W_dec.norm(dim=1)).sum(1).mean(), f


@pytest.mark.parametrize("path", ["sparse", "dense tiles"])
def test_relu_loss_equals_the_dense_formula(
    case: Problem, small_tiles: None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying, "SPARSE_BELOW", 2.0 if path == "sparse" else -1.0)
    d_sae = len(case.weights.b_enc)
    loss = relu(d_sae, 3.0).loss(case.weights, case.x, case.x, NONE_DEAD)
    expected, f = dense_relu(case, 3.0)
    close(loss.total, expected)
    same_gradients(case.gradients(loss.total), case.gradients(expected))
    close(loss.terms["mse"] + 3.0 * loss.terms["l1"], expected.detach())
    assert int(loss.entries) == int((f > 0).sum())
    assert torch.equal(loss.fired, (f > 0).any(0))


# ---- the parts


@pytest.mark.parametrize("layout", ["fixed", "ragged"])
def test_gathered_dots(layout: str) -> None:
    """PyTorch's private kernel and the plain fallback both equal the dense product at the selected places."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (11, 30))
    if layout == "fixed":
        pattern = Pattern(
            30, torch.stack([torch.randperm(30, generator=generator)[:4] for _ in range(11)]).int()
        )
    else:
        pattern = SparseCodes.from_dense((torch.rand(11, 30, generator=generator) > 0.8).float()).pattern
    assert hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward")
    rows, features = pattern.rows(), pattern.indices.flatten().long()
    expected = (left @ right.T)[rows, features].view(pattern.indices.shape)
    close(sparse.gathered_dots(left, right, pattern), expected)
    close(sparse._gathered_dots_plain(left, right, pattern, chunk=7), expected)


def test_row_dots() -> None:
    left, right = (torch.randn(7, 5, dtype=torch.float64) for _ in range(2))
    close(sparse.row_dots(left, right), (left * right).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("width", "k"), [(40, 1), (40, 7), (64, 63), (5, 5), (5, 9), (70, 3), (4096, 32), (1024, 1), (3072, 5)]
)
@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
def test_selection_from_a_tile_is_a_top_k(width: int, k: int, kind: str, dtype: torch.dtype) -> None:
    """From one round to three; with infinite entries; where there are fewer than k entries, all of them."""
    generator = torch.Generator().manual_seed(width + k)
    tile = torch.randn(9, width, generator=generator, dtype=dtype)
    if kind == "ties":
        tile.mul_(4).round_()
    if kind == "negative":
        tile.abs_().neg_()
    tile[0] = 0
    tile[1, 0], tile[2, -1], tile[3] = float("inf"), float("-inf"), float("-inf")
    values, places = sparse.topk_of_tile(tile.clone(), k)
    places = places.long()
    assert all(len(set(row)) == min(k, width) for row in places.tolist())
    assert torch.equal(tile.gather(1, places), values)
    assert torch.equal(values.sort(1).values, tile.topk(min(k, width)).values.flip(1))


def test_selection_leaves_the_tile_as_it_is() -> None:
    tile = torch.randn(5, 512)
    before = tile.clone()
    for k in (2, 300):
        first = sparse.topk_of_tile(tile, k)[0].clone()
        assert torch.equal(tile, before)
        assert torch.equal(sparse.topk_of_tile(tile, k)[0], first)


def test_gradients_without_the_private_kernel(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    w = case.weights

    def gradients() -> dict[str, Tensor]:
        codes = sparse.topk_codes(case.x, w.b_dec, w.encoder_rows, w.b_enc, case.k)
        return case.gradients((sparse.decode(codes, w.W_dec, w.b_dec) - case.x).square().sum())

    with_kernel = gradients()
    monkeypatch.setattr(sparse, "gathered_dots", sparse._gathered_dots_plain)
    same_gradients(gradients(), with_kernel)


@pytest.mark.parametrize("n", [0, 1, 20, 301])
def test_tiles_shared_among_threads(n: int, two_threads: None) -> None:
    """The same selection from two threads as from one, in the order of the rows."""
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(m, 16, generator=generator, dtype=torch.float64) for m in (n, 512))
    bias = torch.randn(512, generator=generator, dtype=torch.float64)
    two = sparse.encode_topk(x, rows, bias, 4)
    torch.set_num_threads(1)
    one = sparse.encode_topk(x, rows, bias, 4)
    assert one[0].shape == two[0].shape == (n, 4)
    dense_one, dense_two = (
        SparseCodes(Pattern(512, indices), values).to_dense() for values, indices in (one, two)
    )
    close(dense_two, dense_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("n", "k"), [(0, 4), (1, 1), (301, 4), (37, 100), (20, 600)])
def test_wide_dictionaries_are_encoded_in_blocks_of_features(
    n: int, k: int, relu: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    """In whole numbers, where every order of summing gives the same: the k largest of all entries."""
    monkeypatch.setattr(sparse, "_BLOCK_WIDTH", 128)
    generator = torch.Generator().manual_seed(n)
    x, rows = (torch.randint(-4, 5, (m, 16), generator=generator).to(dtype) for m in (n, 600))
    bias = torch.randint(-9, 10, (600,), generator=generator).to(dtype)
    values, indices = sparse.encode_topk(x, rows, bias, k, relu=relu)
    pre = torch.addmm(bias, x, rows.t())
    expected = pre.topk(k).values
    assert values.dtype == dtype
    assert indices.dtype == torch.int32
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values.sort(1, descending=True).values, expected.relu() if relu else expected)
    chosen = pre.gather(1, indices.long())
    assert torch.equal(chosen.relu() if relu else chosen, values)


def test_scratch_memory_made_in_inference_mode_serves_outside() -> None:
    x, rows, bias = torch.randn(300, 16), torch.randn(512, 16), torch.randn(512)
    sparse._workspace.__dict__.clear()
    with torch.inference_mode():
        inside = sparse.encode_topk(x, rows, bias, 4)
    assert torch.equal(sparse.encode_topk(x, rows, bias, 4)[0], inside[0])


# ---- memory and determinism


@pytest.mark.parametrize("architecture", ["topk", "topk with dead features", "relu", "relu in dense tiles"])
def test_no_tensor_is_as_large_as_n_times_d_sae(architecture: str, small_tiles: None) -> None:
    """The largest is a tile of 16 rows, or the 64 rows from which ReLU judges the density, of 512 in the batch."""
    n, d_in, d_sae = 512, 15, 512
    change = few_positives if architecture == "relu" else None
    this = problem(n, d_in, d_sae, 4, change)
    if architecture == "relu":
        this.weights.b_enc.data -= 4
    dead = torch.arange(3 if architecture == "topk with dead features" else 0)

    def loss() -> Loss:
        kind = topk(d_sae, 4) if architecture.startswith("topk") else relu(d_sae, 1.0)
        return kind.loss(this.weights, this.x, this.x, Moment(1.0, dead))

    with LargestTensor() as watch:
        loss().total.backward()
    if architecture != "relu in dense tiles":  # the backward pass was watched too
        assert "_embedding_bag_per_sample_weights_backward.default" in watch.operators
    assert this.weights.encoder_rows.grad is not None
    assert 16 * d_sae <= watch.largest <= (16 if architecture.startswith("topk") else 64) * d_sae


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_two_runs_give_the_same_bits(architecture: str, two_threads: None) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    kind = SAEConfig(d_sae=256, k=8) if architecture == "topk" else SAEConfig(architecture="relu", d_sae=256)
    config = TrainConfig(tokens=100_000, batch_tokens=700, learning_rate=1e-2, sae=kind)

    def weights() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        trainer = Trainer(config, Scaling(torch.zeros(16), 1.0))
        trainer.dead.window = 1000  # so that the auxiliary loss takes part
        for _ in range(6):
            x = torch.randn(700, 16, generator=generator)
            trainer.step(x, x)
        return {name: tensor.detach().clone() for name, tensor in trainer.weights.tensors().items()}

    first, second = weights(), weights()
    for name in NAMES:
        assert torch.equal(first[name], second[name])
