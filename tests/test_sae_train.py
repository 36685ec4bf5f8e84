"""Training: it learns, it keeps its invariants, and an interrupted run ends in the same bits."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import tree
from torch import Tensor

from activations.errors import InputError
from sae.config import SAEConfig, TrainConfig
from sae.differences import differences
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.train import Run, train, train_side_by_side
from sae.trainer import Trainer

D_IN, D_SAE, K = 16, 48, 3


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


class PlantedBatches:
    """Sums of three of 32 planted directions, off centre: data a TopK SAE can explain. Killed on request."""

    def __init__(self, n_batches: int, batch: int = 64, dies_after: int | None = None) -> None:
        self.n_batches, self.batch, self.dies_after = n_batches, batch, dies_after
        generator = torch.Generator().manual_seed(1)
        self.directions = torch.nn.functional.normalize(torch.randn(32, D_IN, generator=generator), dim=1)
        self.done = 0

    def make(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.rand(self.batch, 32, generator=generator).topk(K).indices
        strengths = torch.rand(self.batch, K, generator=generator) + 0.5
        return torch.zeros(self.batch, 32).scatter(1, chosen, strengths) @ self.directions + 3.0

    def __iter__(self) -> Iterator[Tensor]:
        while self.done < self.n_batches:
            if self.done == self.dies_after:
                raise Killed
            self.done += 1
            yield self.make(self.done)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def config(architecture: str = "topk", steps: int = 400) -> TrainConfig:
    kind: dict[str, Any] = {"k": K} if architecture == "topk" else {"sparsity_weight": 0.5}
    sae = SAEConfig(architecture=architecture, d_sae=D_SAE, **kind)  # type: ignore[arg-type]
    return TrainConfig(tokens=steps * 64, batch_tokens=64, learning_rate=1e-2, sae=sae)


def moments(batches: PlantedBatches) -> Scaling:
    sample = torch.cat([batches.make(i) for i in range(20)])
    mean = sample.mean(0)
    return Scaling(mean, float((D_IN / (sample - mean).square().sum(1).mean()).sqrt()))


def explained_variance(sae: SparseAutoencoder, x: Tensor) -> float:
    return 1 - float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(("architecture", "floor"), [("topk", 0.8), ("relu", 0.8)])
def test_learns_planted_directions(tmp_path: Path, architecture: str, floor: float) -> None:
    batches = PlantedBatches(400)
    sae = train(Run(config(architecture), tmp_path), batches, moments(batches))
    held_out = torch.cat([batches.make(i) for i in range(9000, 9020)])
    assert explained_variance(sae, held_out) > floor
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 100
    assert lines[-1]["tokens"] == 400 * 64
    assert lines[-1]["explained_variance"] > lines[0]["explained_variance"]


def test_decoder_rows_stay_unit_and_inputs_are_folded(tmp_path: Path) -> None:
    batches = PlantedBatches(30)
    scaling = moments(batches)
    trainer = Trainer(config(steps=30), scaling)
    for batch in batches:
        trainer.step(*scaling.apply(batch))
    torch.testing.assert_close(trainer.weights.W_dec.norm(dim=1), torch.ones(D_SAE))
    x = batches.make(77)
    normalised, _ = scaling.apply(x)
    inside = trainer.architecture.encode(trainer.weights, normalised)
    sae = trainer.folded({})
    torch.testing.assert_close(
        sae.encode(x).to_dense() * scaling.scale, inside.to_dense(), rtol=1e-4, atol=1e-4
    )
    from sae.sparse import decode

    with torch.no_grad():
        expected = decode(inside, trainer.weights.W_dec, trainer.weights.b_dec)
        expected = expected / scaling.scale + scaling.mean
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dies_after", [37, 60, 111])
@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_interrupted_run_ends_in_the_same_bits(tmp_path: Path, architecture: str, dies_after: int) -> None:
    settings = config(architecture, steps=120)
    whole = PlantedBatches(120)
    scaling = moments(whole)
    expected = train(Run(settings, tmp_path / "whole", inputs={"a": 1}), whole, scaling)
    with pytest.raises(Killed):
        train(
            Run(settings, tmp_path / "cut", inputs={"a": 1}),
            PlantedBatches(120, dies_after=dies_after),
            scaling,
        )
    assert (tmp_path / "cut" / "checkpoints").is_dir()
    resumed = PlantedBatches(120)
    sae = train(Run(settings, tmp_path / "cut", inputs={"a": 1}), resumed, scaling)
    assert sae.hash == expected.hash
    for name in ("metrics.jsonl", "sae/sae_weights.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_equal_settings_are_not_trained_again(tmp_path: Path) -> None:
    scaling = moments(PlantedBatches(1))
    run = Run(config(steps=20), tmp_path, inputs={"tokens": "a"})
    first = train(run, PlantedBatches(20), scaling)
    assert train(run, PlantedBatches(20, dies_after=0), scaling).hash == first.hash
    # Where metrics are logged, and defaults given as numbers, change nothing.
    same = replace(run, config=replace(run.config, warmup=0.05, decay=0.5, clip_norm=0.0, preset="default"))
    assert train(same, PlantedBatches(20, dies_after=0), scaling).hash == first.hash


def test_checkpoints_are_as_many_tokens_apart_as_asked_for(tmp_path: Path) -> None:
    """Also between two lines of the log; and that changes nothing in what comes out."""
    scaling = moments(PlantedBatches(1))
    settings = config(steps=400)
    expected = train(Run(settings, tmp_path / "whole"), PlantedBatches(400), scaling)
    often = replace(settings, checkpoint_every=7 * 64)
    with pytest.raises(Killed):
        train(Run(often, tmp_path / "cut"), PlantedBatches(400, dies_after=51), scaling)
    found = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert [int(name) for name in found] == [42 * 64, 49 * 64]
    assert train(Run(settings, tmp_path / "cut"), PlantedBatches(400), scaling).hash == expected.hash
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_what_differs(tmp_path: Path, finished: bool) -> None:
    scaling = moments(PlantedBatches(1))
    run = Run(config(steps=120), tmp_path, inputs={"tokens": "a"})
    if finished:
        train(run, PlantedBatches(120), scaling)
    else:
        with pytest.raises(Killed):
            train(run, PlantedBatches(120, dies_after=60), scaling)
    other = Run(
        replace(config(steps=120), sae=SAEConfig(d_sae=D_SAE, k=K + 1), seed=5),
        tmp_path,
        inputs={"tokens": "b"},
    )
    before = tree(tmp_path)
    with pytest.raises(InputError) as error:
        train(other, PlantedBatches(120), scaling)
    assert str(error.value) == (
        f'{tmp_path} holds a training with other settings (sae.k: 3 there, 4 here; seed: 0 there, 5 here; tokens: "a"'
        ' there, "b" here): give those to continue it, give another folder, or delete this one.'
    )
    assert tree(tmp_path) == before
    alone = train(replace(other, folder=tmp_path / "alone"), PlantedBatches(120), scaling)
    assert train(other, PlantedBatches(120), scaling, replace_other=True).hash == alone.hash


def test_two_settings_of_one_name_are_told_apart() -> None:
    """The number of tokens in the configuration, and the hash of the tokens themselves."""
    found = {"config": {"tokens": 1, "seed": 0}, "tokens": "a"}
    wanted = {"config": {"tokens": 2, "seed": 1}, "tokens": "b"}
    assert differences(found, wanted) == [
        "config.tokens: 1 there, 2 here",
        "seed: 0 there, 1 here",
        'tokens: "a" there, "b" here',
    ]


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    settings = config(steps=120)
    scaling = moments(PlantedBatches(1))
    expected = train(Run(settings, tmp_path / "whole"), PlantedBatches(120), scaling)
    with pytest.raises(Killed):
        train(Run(settings, tmp_path / "cut"), PlantedBatches(120, dies_after=60), scaling)
    newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"torn")
    resumed = PlantedBatches(120)
    assert train(Run(settings, tmp_path / "cut"), resumed, scaling).hash == expected.hash


def test_dead_features_are_revived_by_the_auxiliary_loss() -> None:
    """A feature whose encoder points away from the data never fires by itself, and AuxK turns it round."""
    batches = PlantedBatches(200)
    scaling = moments(batches)

    def firings_of_dead_feature(auxk: float) -> int:
        settings = TrainConfig(
            tokens=200 * 64,
            batch_tokens=64,
            learning_rate=1e-2,
            sae=SAEConfig(d_sae=D_SAE, k=K, auxk=auxk),
        )
        trainer = Trainer(settings, scaling)
        trainer.dead.window = 640
        with torch.no_grad():
            trainer.weights.b_enc[:8] = -30.0
        for number in range(200):
            trainer.step(*scaling.apply(batches.make(number)))
        x, _ = scaling.apply(batches.make(9999))
        fired = trainer.architecture.encode(trainer.weights, x).indices
        return int((fired < 8).sum())

    assert firings_of_dead_feature(0.0) == 0
    # The bias alone moves by at most 200 · 1e-2 = 2: to fire, the encoder must have turned too.
    trainer = Trainer(config(), scaling)
    trainer.dead.window = 640
    with torch.no_grad():
        trainer.weights.b_enc[:8] = -30.0
    before = trainer.weights.encoder_rows[:8].detach().clone()
    for number in range(50):
        trainer.step(*scaling.apply(batches.make(number)))
    assert (trainer.weights.encoder_rows[:8] - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("sae", "sentence"),
    [
        (SAEConfig(d_sae=8, k=8), "k is 8, and must be at least 1 and less than the number of features, 8."),
        (SAEConfig(d_sae=8, k=9), "k is 9, and must be at least 1 and less than the number of features, 8."),
        (SAEConfig(d_sae=0), "d_sae is 0, and an SAE needs at least one feature."),
        (
            SAEConfig(architecture="relu", sparsity_weight=-1.0),
            "sparsity_weight is -1.0, and must not be negative.",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, sae: SAEConfig, sentence: str
) -> None:
    batches = PlantedBatches(1)
    with pytest.raises(InputError) as error:
        train(Run(TrainConfig(sae=sae), tmp_path / "run"), batches, moments(batches))
    assert str(error.value) == sentence
    assert not (tmp_path / "run").exists()


def test_defaults_follow_the_length_of_the_run() -> None:
    short, usual, long = (TrainConfig(tokens=n) for n in (20_000, 2_000_000, 500_000_000))
    twice = TrainConfig(tokens=2_000_000, passes=2)
    assert [c.resolved_batch_tokens() for c in (short, usual, twice, long)] == [64, 1024, 1024, 4096]
    assert short.n_steps() > 100
    assert twice.n_steps() == 4_000_000 // 1024
    # SAEBench's recipe, 3e-4 for 244,000 steps (2503.09532), lies on the same curve.
    steps = TrainConfig(tokens=244_000 * 2048, batch_tokens=2048)
    assert steps.resolved_learning_rate() == pytest.approx(3e-4, rel=0.1)
    assert long.resolved_learning_rate() < usual.resolved_learning_rate() <= short.resolved_learning_rate()


def test_side_by_side_ends_in_the_bits_of_training_alone(tmp_path: Path) -> None:
    """Different widths, architectures, seeds and rates; one is interrupted at another place than the others."""
    scaling = moments(PlantedBatches(1))
    base = config(steps=120)
    settings = {
        "topk": base,
        "wide": replace(base, sae=SAEConfig(d_sae=2 * D_SAE, k=K), learning_rate=3e-3),
        "seed": replace(base, seed=1),
        "relu": config("relu", steps=120),
    }
    alone = {
        name: train(Run(each, tmp_path / "alone" / name), PlantedBatches(120), scaling).hash
        for name, each in settings.items()
    }
    together = [Run(each, tmp_path / name) for name, each in settings.items()]
    train(together[2], PlantedBatches(120), scaling)
    with pytest.raises(Killed):
        train_side_by_side(together[:2], PlantedBatches(120, dies_after=105), scaling)
    with pytest.raises(Killed):  # the fourth starts, and the first two wait for it
        train_side_by_side(together, PlantedBatches(120, dies_after=47), scaling)
    saes = train_side_by_side(together, PlantedBatches(120), scaling)
    assert [sae.hash for sae in saes] == list(alone.values())
    for name in settings:
        lines = (tmp_path / name / "metrics.jsonl").read_bytes()
        assert lines == (tmp_path / "alone" / name / "metrics.jsonl").read_bytes(), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_tokens": 32}, "Runs side by side must have the same batch_tokens, and these have 64, 32"),
        ({"tokens": 128}, "Runs side by side must have the same number of steps, and these have 20, 2"),
        ({"order_seed": 3}, "Runs side by side must have the same order_seed, and these have 0, 3"),
        (
            {"passes": 2, "tokens": 640},
            "Runs side by side must have the same passes, and these have 1, 2: train",
        ),
        (
            {"buffer_tokens": 640},
            "Runs side by side must have the same buffer_tokens, and these have None, 640: train",
        ),
        ({"hook_name": "x"}, "Runs side by side must have the same hook_name, and these have"),
        ({}, "Two runs side by side have the same folder"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    first = Run(config(steps=20), tmp_path / "a")
    other = Run(replace(config(steps=20), **change), tmp_path / ("b" if change else "a"))
    with pytest.raises(InputError) as error:
        train_side_by_side([first, other], PlantedBatches(20), moments(PlantedBatches(1)))
    assert str(error.value).startswith(sentence)
    assert not list(tmp_path.iterdir())
