"""The options of training, each against its definition."""

import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sae_train import D_IN, D_SAE, K, Killed, PlantedBatches, config, explained_variance, moments
from torch import Tensor

from activations.errors import InputError
from sae.architectures.base import Loss
from sae.config import SAEConfig, TrainConfig
from sae.constraints import Constraints
from sae.dead import DeadFeatures
from sae.log import Diverged, MetricsLog
from sae.median import geometric_median
from sae.optimizer import BLOCK, Adam8bit, dequantised, dynamic_code, forget, make_optimizer, quantised
from sae.presets import PRESETS
from sae.resample import resample
from sae.run import RunFolder
from sae.train import Run, train, train_side_by_side
from sae.trainer import Trainer

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainer_after(
    settings: TrainConfig, steps: int, before: Callable[[Trainer], Any] | None = None
) -> Trainer:
    batches = PlantedBatches(steps)
    trainer = Trainer(settings, moments(batches))
    if before:
        before(trainer)
    for batch in batches:
        trainer.step(*trainer.scaling.apply(batch))
    return trainer


# --- 8-bit moments


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_the_paper(signed: bool) -> None:
    """Dynamic tree quantisation: 256 values over seven decades, the gaps in a decade a constant part of it."""
    code = dynamic_code(signed, CPU)
    assert len(code.unique()) == 256
    assert (code.diff() > 0).all()
    assert code[-1] == 1
    assert 0 in code
    assert code[0] == (-code[-2] if signed else 0)
    in_first_decade = code[(code > 0.1) & (code < 1)]
    assert len(in_first_decade) == (64 if signed else 128)
    torch.testing.assert_close(
        in_first_decade.diff(), torch.full((len(in_first_decade) - 1,), 0.9 / len(in_first_decade))
    )
    assert float(code[code > 0].min()) == pytest.approx(0.55e-6 if signed else 0.325e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=2 * BLOCK),
    st.booleans(),
    st.floats(0.01, 0.99),
)
def test_quantising_takes_a_neighbour_in_the_code(values: list[float], signed: bool, rounding: float) -> None:
    """The slow definition: between the value of the code below and the one above, split at ``rounding`` of the gap."""
    code = dynamic_code(signed, CPU)
    flat = torch.tensor(values) if signed else torch.tensor(values).abs()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    indices, scales = quantised(blocks, code, rounding)
    assert indices.dtype == torch.uint8
    assert torch.equal(scales.abs(), blocks.abs().amax(1))
    quotients = (blocks / torch.where(scales == 0, 1, scales)[:, None]).double()
    values_of = code.double()
    below = (values_of <= quotients[..., None]).sum(-1).sub(1).clamp(0, 255)
    above = (below + 1).clamp_max(255)
    gap = values_of[above] - values_of[below]
    edge = values_of[below] + rounding * gap
    clear = (quotients - edge).abs() > 1e-4 * gap
    expected = torch.where((quotients >= edge) & (quotients >= values_of[0]), above, below)
    expected[quotients < values_of[0]] = 0
    assert torch.equal(indices.long()[clear], expected[clear])
    # What was packed is packed again to the same bits.
    whole = scales.abs() > 1e-30
    again, same_scales = quantised(dequantised(indices, scales, code), code)
    assert torch.equal(same_scales[whole], scales[whole])
    assert torch.equal(again[whole], indices[whole])


def quadratic_path(kind: str, steps: int, shape: tuple[int, ...] = (7, 100)) -> tuple[Tensor, Tensor]:
    """Weights after steps of Adam on a noisy, badly scaled quadratic, and its minimum."""
    goal = torch.randn(shape, generator=generator(1))
    scales = torch.logspace(-2, 1, shape[0])[:, None]
    weights = torch.zeros(shape, requires_grad=True)
    optimizer = make_optimizer([weights], 1e-2, kind)  # type: ignore[arg-type]
    noise = generator(2)
    for _ in range(steps):
        weights.grad = scales * (weights.detach() - goal + 0.3 * torch.randn(shape, generator=noise))
        optimizer.step()
    return weights.detach(), goal


def test_8bit_moments_follow_the_path_of_float32() -> None:
    """700 weights, not a multiple of a block. In 30 steps of 0.01 the weights move by up to 0.3, and differ by
    less than 3% of that on average; after 600 both are as near to the minimum."""
    ours, goal = quadratic_path("8bit", 30)
    exact, _ = quadratic_path("float32", 30)
    assert (ours - exact).abs().mean() < 0.03 * exact.abs().mean()
    ours, _ = quadratic_path("8bit", 600)
    exact, _ = quadratic_path("float32", 600)
    assert (ours - goal).norm() < 1.1 * (exact - goal).norm() + 0.01
    assert (exact - goal).norm() < 0.2 * goal.norm()


def test_a_second_moment_that_falls_slowly_does_not_stand_still() -> None:
    """A gradient of 1 and then of 0.1: the second moment falls by a thousandth a step, less than the code resolves."""
    weights = torch.zeros(2, BLOCK, requires_grad=True)
    optimizer = Adam8bit([weights], lr=0.0)
    kept = torch.ones(2, BLOCK)
    kept[:, 0] = 3.0  # holds the block's scale
    for step in range(3000):
        weights.grad = kept if step < 500 else torch.cat([kept[:, :1], 0.1 * kept[:, 1:]], dim=1)
        optimizer.step()
    state = optimizer.state[weights]
    root = dequantised(state["root"], state["root_scales"], dynamic_code(False, CPU))
    exact = torch.zeros(())
    for step in range(3000):
        exact = 0.999 * exact + 0.001 * (1.0 if step < 500 else 0.01)
    torch.testing.assert_close(root[0, 5].square(), exact, rtol=0.15, atol=0.0)


def test_a_root_above_0_is_never_rounded_to_0() -> None:
    """One weight of the block has a gradient ten million times smaller; its step must not be larger than the rate."""
    weights = torch.zeros(1, BLOCK, requires_grad=True)
    optimizer = Adam8bit([weights], lr=1e-3, eps=1e-12)
    for _ in range(20):
        gradient = torch.ones(1, BLOCK)
        gradient[0, 7] = 1e-7
        weights.grad = gradient
        before = weights.detach().clone()
        optimizer.step()
        assert (weights.detach() - before).abs().max() < 2e-3


def test_8bit_moments_take_two_bytes_and_learn(tmp_path: Path) -> None:
    settings = replace(config(), moments="8bit")
    batches = PlantedBatches(400)
    sae = train(Run(settings, tmp_path), batches, moments(batches))
    held_out = torch.cat([batches.make(i) for i in range(9000, 9020)])
    assert explained_variance(sae, held_out) > 0.8
    weights = torch.zeros(1000, 512, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    optimizer = Adam8bit([weights], lr=1e-3)
    optimizer.step()
    assert sum(value.nbytes for value in optimizer.state[weights].values()) < 2.04 * weights.numel()


@pytest.mark.parametrize("kind", ["float32", "8bit"])
def test_forgetting_sets_the_moments_of_exactly_these_rows_to_0(kind: str) -> None:
    """Rows of 100 weights lie across blocks of 256; afterwards they behave as with moments of 0."""
    weights = torch.randn(9, 100, generator=generator(), requires_grad=True)
    optimizer = make_optimizer([weights], 1e-2, kind)  # type: ignore[arg-type]
    for step in range(5):
        weights.grad = torch.randn(9, 100, generator=generator(step))
        optimizer.step()
    rows = torch.tensor([2, 5])
    forget(optimizer, weights, rows)
    before = weights.detach().clone()
    weights.grad = torch.zeros(9, 100)
    optimizer.step()
    moved = (weights.detach() != before).any(1)
    assert not moved[rows].any()
    assert moved.sum() == 7


# --- clipping, mean of the weights, constraints, b_dec


def test_clipping_scales_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def note(trainer: Trainer) -> None:
        step = trainer.optimizer.step

        def noted(*about: Any) -> Any:
            gradients = [w.grad.flatten() for w in trainer.weights.tensors().values() if w.grad is not None]
            seen.append(float(torch.cat(gradients).norm()))
            return step(*about)

        monkeypatch.setattr(trainer.optimizer, "step", noted)

    trainer_after(config(steps=5), 5, note)
    free = list(seen)
    assert min(free) > 1.5
    seen.clear()
    trainer = trainer_after(replace(config(steps=5), clip_norm=1.0), 5, note)
    assert seen == pytest.approx([1.0] * 5, rel=1e-4)
    assert float(trainer.gradient_norm) > 1.5  # what is logged is the norm before clipping


def test_the_mean_of_the_weights_is_that_of_the_definition() -> None:
    settings = replace(config("relu", steps=12), ema=0.8)
    plain = replace(settings, ema=0.0)
    batches = PlantedBatches(12)
    scaling = moments(batches)
    trainer, other = Trainer(settings, scaling), Trainer(plain, scaling)
    seen: list[Tensor] = []
    for batch in batches:
        trainer.step(*scaling.apply(batch))
        other.step(*scaling.apply(batch))
        seen.append(other.weights.W_dec.detach().double().clone())
    factors = torch.tensor([0.2 * 0.8 ** (len(seen) - 1 - i) for i in range(len(seen))], dtype=torch.float64)
    expected = torch.einsum("s,sfd->fd", factors / factors.sum(), torch.stack(seen))
    torch.testing.assert_close(trainer.folded({}).W_dec.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.weights.W_dec, other.weights.W_dec)  # training itself does not see it


def test_the_mean_of_a_unit_decoder_has_unit_rows() -> None:
    sae = trainer_after(replace(config(steps=30), ema=0.9), 30).folded({})
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def random_weights(trainer: Trainer) -> tuple[Tensor, Tensor]:
    return trainer.weights.encoder_rows, trainer.weights.W_dec


def test_the_gradient_is_the_one_through_the_constraint() -> None:
    """Autograd through the map that enforces it, in float64, at weights that fulfil it."""
    trainer = Trainer(config(), moments(PlantedBatches(1)))
    constraints = Constraints(unit_decoder=False, aligned=True)
    encoder, decoder = trainer.weights.encoder_rows, trainer.weights.W_dec
    with torch.no_grad():
        encoder += 0.3 * torch.randn(encoder.shape, generator=generator())
        decoder *= torch.rand(D_SAE, 1, generator=generator(1)) + 0.5
    constraints.enforce(trainer.weights)
    torch.testing.assert_close((encoder * decoder).sum(1), torch.ones(D_SAE))
    goal = torch.randn(encoder.shape, generator=generator(2), dtype=torch.float64)

    def loss(e: Tensor, d: Tensor) -> Tensor:
        return ((e.double() - goal) * d.double()).square().sum() + (e.double() + 2 * d.double()).cos().sum()

    free = [t.detach().double().requires_grad_() for t in (encoder, decoder)]
    e, d = free
    aligned = e + ((1 - (e * d).sum(1)) / d.square().sum(1))[:, None] * d
    expected = torch.autograd.grad(loss(aligned, d), free)
    loss(encoder, decoder).backward()
    constraints.project(trainer.weights)
    for found, wanted in zip((encoder.grad, decoder.grad), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_unit_decoder_receives_no_gradient_along_its_rows() -> None:
    trainer = Trainer(config(), moments(PlantedBatches(1)))
    decoder = trainer.weights.W_dec
    decoder.grad = torch.randn(decoder.shape, generator=generator())
    expected = decoder.grad - (decoder.grad * decoder).sum(1, keepdim=True) * decoder.detach()
    trainer.constraints.project(trainer.weights)
    torch.testing.assert_close(decoder.grad, expected.detach())
    torch.testing.assert_close((decoder.grad * decoder).sum(1), torch.zeros(D_SAE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_aligned_and_unit_decoders_are_kept_through_training(architecture: str, unit: bool) -> None:
    base = config(architecture, steps=40)
    sae = replace(base.sae, aligned=True, unit_decoder=unit)
    trainer = trainer_after(replace(base, sae=sae), 40)
    encoder, decoder = random_weights(trainer)
    torch.testing.assert_close((encoder * decoder).sum(1), torch.ones(D_SAE), rtol=1e-4, atol=1e-4)
    unit_rows = torch.allclose(decoder.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert unit_rows == unit


def test_the_geometric_median_is_the_minimum() -> None:
    """Against a search: no step in any direction, however small, comes nearer to all points together."""
    points = torch.randn(60, 3, generator=generator(), dtype=torch.float64)
    points[:8] += 100.0
    found = geometric_median(points)

    def total(place: Tensor) -> float:
        return float((points - place).norm(dim=1).sum())

    best = total(found)
    place = points.mean(0)
    length = 10.0
    while length > 1e-7:  # pattern search, from the mean
        moves = [
            place + sign * length * axis for axis in torch.eye(3, dtype=torch.float64) for sign in (1, -1)
        ]
        nearest = min(moves, key=total)
        if total(nearest) < total(place):
            place = nearest
        else:
            length /= 2
    assert best == pytest.approx(total(place), rel=1e-9)
    torch.testing.assert_close(found, place, atol=1e-4, rtol=0)
    assert (points.mean(0) - found).norm() > 5  # outliers move the mean, not the median


def test_b_dec_starts_where_it_is_told() -> None:
    settings = replace(config(steps=10), learning_rate=1e-12, init_b_dec="geometric_median")
    trainer = trainer_after(settings, 1)
    y, _ = trainer.scaling.apply(PlantedBatches(1).make(1))
    torch.testing.assert_close(trainer.weights.b_dec.detach(), geometric_median(y), atol=1e-6, rtol=0)
    mean = trainer_after(replace(settings, init_b_dec="mean"), 1)
    assert mean.weights.b_dec.detach().norm() < 1e-9


# --- dead features


@pytest.mark.parametrize("n_steps", [5, 100, 5000])
def test_the_list_of_dead_features_is_that_of_the_refresh_before(n_steps: int) -> None:
    """Against the definition, step by step; and the same after a checkpoint in the middle."""
    every = max(1, min(16, n_steps // 100))
    dead = DeadFeatures(6, 30, n_steps, CPU)
    copy = DeadFeatures(6, 30, n_steps, CPU)
    silent = torch.zeros(6, dtype=torch.int64)
    masks = [silent > 30]
    in_force: list[int] = []
    draw = generator()
    for step in range(80):
        if step % every == 0:
            in_force = masks[-1].nonzero().flatten().tolist()
            masks.append(silent > 30)
        assert dead.at(step).tolist() == in_force
        fired = torch.rand(6, generator=draw) < 0.15
        dead.update(fired, 8)
        silent = torch.where(fired, 0, silent + 8)
        if step == 37:
            copy.load_state({name: value.clone() for name, value in dead.state().items()})
        elif step > 37:
            assert copy.at(step).tolist() == in_force
            copy.update(fired, 8)


def test_resampling_changes_the_dead_and_nothing_else() -> None:
    trainer = trainer_after(config("relu", steps=20), 5)
    weights, dead = trainer.weights, torch.tensor([3, 17, 40])
    before = {name: tensor.detach().clone() for name, tensor in weights.tensors().items()}
    adam = {
        name: trainer.optimizer.state[tensor]["exp_avg"].clone() for name, tensor in weights.tensors().items()
    }
    reads = torch.randn(10, D_IN, generator=generator())
    losses = torch.zeros(10)
    losses[[2, 4, 7]] = 1.0  # the only rows that may be drawn
    initial = {"b_enc": torch.zeros(D_SAE)}
    done = resample(weights, dead, reads, 2 * reads, losses, initial, trainer.optimizer, generator())
    assert torch.equal(done, dead)
    others = torch.tensor([i for i in range(D_SAE) if i not in dead])
    for name, tensor in weights.tensors().items():
        moment = trainer.optimizer.state[tensor]["exp_avg"]
        if name == "b_dec":
            assert torch.equal(tensor, before[name])
            continue
        assert torch.equal(tensor[others], before[name][others])
        assert torch.equal(moment[others], adam[name][others])
        assert not moment[dead].any()
    directions = torch.nn.functional.normalize(reads[[2, 4, 7]], dim=1)
    found = torch.nn.functional.normalize(weights.encoder_rows[dead].detach(), dim=1)
    torch.testing.assert_close((found @ directions.t()).amax(1), torch.ones(3))
    assert len((found @ directions.t()).argmax(1).unique()) == 3
    alive = before["encoder_rows"][others].norm(dim=1).mean()
    torch.testing.assert_close(weights.encoder_rows[dead].norm(dim=1).detach(), (0.2 * alive).expand(3))
    torch.testing.assert_close(
        weights.W_dec[dead].norm(dim=1).detach(), before["W_dec"][others].norm(dim=1).mean().expand(3)
    )
    assert not weights.b_enc[dead].any()


def test_rows_are_drawn_in_proportion_to_the_squared_loss() -> None:
    losses = torch.tensor([1.0, 2.0, 0.0, 3.0])
    reads = torch.eye(4, D_IN)
    counts = torch.zeros(4)
    trainer = trainer_after(config(steps=20), 1)
    for seed in range(600):
        resample(
            trainer.weights, torch.tensor([0]), reads, reads, losses, {}, trainer.optimizer, generator(seed)
        )
        counts[trainer.weights.encoder_rows[0, :4].argmax()] += 1
    expected = losses.square() / losses.square().sum() * 600
    assert counts[2] == 0
    assert (
        (counts - expected).square()[losses > 0] / expected[losses > 0]
    ).sum() < 14  # χ², two degrees: p < 0.001


def test_training_resamples_until_the_rate_falls() -> None:
    """Features with a bias of −30 are dead; they are started anew, and not in the decay phase."""
    base = replace(config(steps=200), sae=SAEConfig(d_sae=D_SAE, k=K, auxk=0.0), decay=0.5)

    def kill(trainer: Trainer) -> None:
        trainer.dead.window = 640
        with torch.no_grad():
            trainer.weights.b_enc[:8] = -30.0

    def revived(every: int | None) -> int:
        trainer = trainer_after(replace(base, resample_every=every), 200, kill)
        return int((trainer.weights.b_enc[:8] > -20).sum())

    assert revived(None) == 0
    assert revived(30 * 64) == 8
    assert revived(150 * 64) == 0  # the first would be after three quarters of the run
    assert trainer_after(replace(base, resample_every=30 * 64, seed=2**32 - 1), 200, kill).steps_done == 200
    replace(base, resample_every=100 * 64).check()
    with pytest.raises(InputError):
        replace(base, resample_every=100 * 64 + 1).check()


# --- presets and settings


def test_presets_choose_what_is_left_open_and_nothing_else() -> None:
    given_ = {"batch_tokens": 77, "learning_rate": 0.5, "warmup": 0.125, "decay": 0.25, "clip_norm": 9.0}
    for name in PRESETS:
        resolved = TrainConfig(preset=name, init_b_dec="mean", **given_).resolved()  # type: ignore[arg-type]
        assert {field: getattr(resolved, field) for field in given_} == given_
        assert resolved.init_b_dec == "mean"
        TrainConfig(preset=name, warmup=0.9).check()  # what the preset adds leaves room for it
    faithful = TrainConfig(preset="faithful", tokens=500_000_000).resolved()
    assert (faithful.batch_tokens, faithful.learning_rate, faithful.decay) == (2048, 3e-4, 0.2)
    assert (faithful.clip_norm, faithful.init_b_dec) == (1.0, "geometric_median")
    assert faithful.warmup is not None
    assert round(faithful.warmup * faithful.n_steps()) == 1000
    fast, default = (TrainConfig(preset=name) for name in ("fast", "default"))  # type: ignore[arg-type]
    assert fast.n_steps() * 2 == pytest.approx(default.n_steps(), abs=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0, and must be above 0."),
        ({"learning_rate": math.nan}, "learning_rate is nan, and must be a finite number."),
        ({"warmup": 0.6, "decay": 0.6}, "warmup is 0.6 and decay 0.6, and they are fractions of the run: neither"),
        ({"warmup": -0.1}, "warmup is -0.1 and decay"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0, and must not be negative."),
        ({"ema": 1.0}, "ema is 1.0, and must be at least 0 and below 1."),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, and must be at least 1."),
        ({"resample_every": 0}, "resample_every is 0, and must be at least 1."),
        ({"resample_every": 1_000_001}, "resample_every is 1000001, and nothing is resampled while the learning rate"),
        ({"order_seed": -1}, "order_seed is -1, and must lie between 0 and 4294967295."),
        ({"seed": 2**32}, "seed is 4294967296, and must lie between 0 and 4294967295."),
        (
            {"sae": SAEConfig(architecture="matryoshka", level_weights=(math.nan, 1.0, 1.0, 1.0, 1.0))},
            "level_weights is nan, 1.0, 1.0, 1.0, 1.0, and must hold finite numbers only.",
        ),
        (
            {"sae": SAEConfig(architecture="matryoshka", d_sae=15, k=2)},
            "d_sae is 15, and the default levels divide it by up to 16: give at least 16 features, or levels of",
        ),
        ({"hook_out": "blocks.3.hook_resid_post"}, "hook_out and hook_name are both blocks.3.hook_resid_post"),
        ({"sae": SAEConfig(transcoder=True)}, "A transcoder writes another hook than it reads: give hook_out."),
        ({"sae": SAEConfig(k=4096)}, "k is 4096, and must be at least 1 and less than the number of features"),
        ({"sae": SAEConfig(skip=True)}, "skip is for a transcoder: give hook_out, or leave it out."),
        ({"sae": SAEConfig(k_anneal=0.5)}, "k_anneal says how long k falls from k_start"),
        (
            {"sae": SAEConfig(architecture="batch_topk", k_start=64, k_anneal=0.9)},
            "k_anneal is 0.9, and batch_topk needs its last fifth at the final k",
        ),
        (
            {"sae": SAEConfig(architecture="batch_topk"), "ema": 0.99},
            "ema averages weights, and the threshold of batch_topk is that of the last ones",
        ),
        (
            {"sae": SAEConfig(architecture="jumprelu", target_l0=32.0), "ema": 0.99},
            "ema averages weights, and the threshold of jumprelu with target_l0 is that of the last ones: leave ema"
            " out, or give sparsity_weight and no target_l0.",
        ),
        (
            {"sae": SAEConfig(architecture="jumprelu"), "ema": 0.99},  # which holds an L0 by default
            "ema averages weights, and the threshold of jumprelu with target_l0 is that of the last ones",
        ),
        (
            {"sae": SAEConfig(architecture="relu"), "product": "bfloat16"},
            "product is bfloat16, which is for topk, batch_topk, matryoshka, and the architecture is relu",
        ),
        ({"hook_out": "blocks.3.hook_mlp_out", "sae": SAEConfig(aligned=True)}, "aligned is for sparse autoencoders"),
        ({"store": "x", "buffer_tokens": 5}, "buffer_tokens is for activations computed as training goes"),
        ({"order": "external"}, "order 'external' is for a store of activations"),
        ({"sae": SAEConfig("relu", sparsity_weight=math.inf)}, "sparsity_weight is inf, and must be a finite number."),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(**changes).check()
    assert str(error.value).startswith(sentence)


# --- what is written while training goes


def test_held_out_metrics_are_those_of_the_finished_sae(tmp_path: Path) -> None:
    batches = PlantedBatches(200)
    held_out = torch.cat([batches.make(i) for i in range(9000, 9040)])
    heard: list[dict[str, float]] = []
    run = Run(config("relu", steps=200), tmp_path)
    sae = train(
        run, batches, moments(batches), held_out=held_out, watch=lambda _, line: heard.append(dict(line))
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert heard == lines
    assert [i for i, line in enumerate(lines) if "held_out_l0" in line] == list(range(9, 100, 10))
    codes = sae.encode(held_out).to_dense().double()
    rebuilt = codes @ sae.W_dec.double() + sae.b_dec.double()
    held = held_out.double()
    spread = (held - held.mean(0)).square().sum()
    assert lines[-1]["held_out_explained_variance"] == pytest.approx(
        float(1 - (rebuilt - held).square().sum() / spread), abs=1e-5
    )
    assert lines[-1]["held_out_l0"] == pytest.approx(int((codes != 0).sum()) / len(held))


class Poisoned(PlantedBatches):
    """One activation is not a number."""

    def make(self, number: int) -> Tensor:
        batch = super().make(number)
        if number == 93:
            batch[3, 2] = math.nan
        return batch


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_a_run_that_diverges_says_so_and_keeps_its_last_checkpoint(tmp_path: Path, architecture: str) -> None:
    run = Run(config(architecture, steps=200), tmp_path)
    with pytest.raises(Diverged) as error:
        train(run, Poisoned(200), moments(PlantedBatches(1)))
    said = str(error.value)
    assert said.startswith(
        f"The training of {tmp_path} diverged by step 94 of 200, where the loss was nan and the norm of the gradient"
    )
    assert "a line before they were" in said
    assert "learning_rate below 0.01" in said
    newest = max((tmp_path / "checkpoints").iterdir())
    assert int(newest.name) == 80 * 64
    assert all("NaN" not in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_run_that_explodes_is_stopped_and_those_beside_it_are_finished(tmp_path: Path) -> None:
    scaling = moments(PlantedBatches(1))
    good = Run(config("relu", steps=200), tmp_path / "good")
    bad = Run(replace(good.config, learning_rate=1e4), tmp_path / "bad")
    with pytest.raises(Diverged) as error:
        train_side_by_side([bad, good], PlantedBatches(200), scaling)
    assert str(error.value).startswith(f"The training of {bad.folder} diverged by step")
    assert "learning_rate below 1e+04" in str(error.value)
    assert error.value.folders == [bad.folder]
    assert good.finished
    assert not bad.finished


def test_several_runs_that_explode_are_named_in_one_sentence(tmp_path: Path) -> None:
    bad = replace(config("relu", steps=200), learning_rate=1e4)
    runs = [Run(replace(bad, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(Diverged) as error:
        train_side_by_side(runs, PlantedBatches(200), moments(PlantedBatches(1)))
    assert str(error.value) == (
        f"2 trainings diverged, {tmp_path / '0'}, {tmp_path / '1'}: train them anew with a lower learning_rate, with"
        " clip_norm 1, or with a longer warmup."
    )
    assert set(error.value.folders) == {run.folder for run in runs}


@pytest.mark.parametrize(
    ("errors", "diverged"),
    [((1.0, 1.0, 1.0), False), ((0.5, 0.3, 3.9), False), ((60.0, 30.0, 5.0), False), ((0.5, 0.3, 4.1), True)],
    ids=["an SAE that is 0", "worse", "a dense beginning", "exploded"],
)
def test_an_error_of_several_times_the_power_that_rises_is_divergence(
    tmp_path: Path, errors: tuple[float, ...], diverged: bool
) -> None:
    """Errors of three lines as parts of the power."""
    trainer = Trainer(config("relu", steps=20), moments(PlantedBatches(1)))
    log = MetricsLog(RunFolder(tmp_path), 0)
    for step, error in enumerate(errors, 10):
        trainer.steps_done = step
        mse = torch.tensor(7 * error)
        log.add(Loss(mse, {"mse": mse}, torch.zeros(()), torch.zeros(D_SAE)), torch.tensor(7.0), 64)
        log.close_line(trainer, {})
    with pytest.raises(Diverged) if diverged else nullcontext():
        log.flush()


def test_ctrl_c_saves_the_others_where_one_has_diverged(tmp_path: Path) -> None:
    """The line that says so is on its way when the interrupt comes."""

    class Interrupted(PlantedBatches):
        def __iter__(self) -> Iterator[Tensor]:
            yield from itertools.islice(super().__iter__(), 3)
            raise KeyboardInterrupt

    good = Run(config("relu", steps=200), tmp_path / "good")
    bad = Run(replace(good.config, learning_rate=1e30), tmp_path / "bad")
    with pytest.raises(KeyboardInterrupt):
        train_side_by_side([bad, good], Interrupted(200), moments(PlantedBatches(1)))
    assert [int(path.name) for path in (good.folder / "checkpoints").iterdir()] == [3 * 64]
    assert not (bad.folder / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["{\n", "[1]\n", "\x00\n"])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, damage: str) -> None:
    run = Run(config(steps=120), tmp_path)
    with pytest.raises(Killed):
        train(run, PlantedBatches(120, dies_after=60), moments(PlantedBatches(1)))
    path = RunFolder(tmp_path).metrics
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(InputError) as error:
        train(run, PlantedBatches(120), moments(PlantedBatches(1)))
    assert str(error.value) == (
        f"{path} is damaged in line 3: delete that line and run the same command again."
    )


def test_wandb_and_tensorboard_hear_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []
    logged: list[tuple[dict[str, float], int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert folder == str(tmp_path / "tensorboard")
            assert purge_step is None

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def flush(self) -> None: ...

    class WandbRun:
        def log(self, line: dict[str, float], step: int) -> None:
            logged.append((line, step))

    def init(**settings: Any) -> WandbRun:
        assert settings["config"]["sae"]["k"] == K
        return WandbRun()

    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    wandb = types.ModuleType("wandb")
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = Run(replace(config(steps=20), log_to=("tensorboard", "wandb")), tmp_path)
    train(run, PlantedBatches(20), moments(PlantedBatches(1)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for line, _ in logged] == lines
    assert [step for _, step in logged] == [line["tokens"] for line in lines]
    assert scalars == [
        (name, value, line["tokens"]) for line in lines for name, value in line.items() if name != "tokens"
    ]


def test_what_metrics_are_sent_to_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Run(replace(config(steps=20), log_to=("wandb",)), tmp_path / "run")
    with pytest.raises(InputError) as error:
        train(run, PlantedBatches(20), moments(PlantedBatches(1)))
    assert str(error.value) == "log_to wandb needs a package that is not installed: pip install wandb"
    assert not (tmp_path / "run").exists()


def test_who_pays_for_firing_holds_an_l0_unless_told_otherwise() -> None:
    """As sparse as TopK by default, so that architectures compare; a weight alone stays what it is."""

    def held(**options: Any) -> float | None:
        return TrainConfig(sae=SAEConfig(**options)).resolved_sae().target_l0

    assert (
        held(architecture="relu")
        == held(architecture="gated")
        == held(architecture="jumprelu")
        == SAEConfig().k
    )
    assert held(architecture="relu", d_sae=64) == 16
    assert held(architecture="relu", target_l0=5.0, sparsity_weight=2.0) == 5
    assert held(architecture="relu", sparsity_weight=2.0) is None
    assert held() is None
