"""Sweeps: what they train and call it, that every SAE has the bits it would have alone, also after kills."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import tree
from killing import forked

from activations.corpus import CorpusConfig
from activations.errors import InputError
from activations.models import LanguageModel
from features.pipeline import Pipeline
from features.sweep import Sweep
from sae.architectures.registry import ARCHITECTURES
from sae.config import SAEConfig, TrainConfig
from sae.find import find_sparsity_weight
from sae.log import Diverged
from sae.pareto import Measured, pareto_front
from sae.scaling import Scaling
from sae.sweep import SweepConfig, grid_from_words
from sae.train import Run, train

HOOK, OTHER_HOOK = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "matryoshka": {"k": 4, "levels": (16, 32)},
    "relu": {"sparsity_weight": 3.0},
    "gated": {"sparsity_weight": 1.0},
    "jumprelu": {"target_l0": 4.0},
}


def names(config: SweepConfig) -> list[str]:
    return [name for name, _ in config.expand()]


def test_a_grid_is_every_combination_and_names_say_what_differs() -> None:
    config = SweepConfig(
        TrainConfig(sae=SAEConfig(d_sae=64)),
        grids=(
            {"architecture": ("topk", "batch_topk"), "k": (8, 16), "seed": (0, 1)},
            {"architecture": ("relu",), "sparsity_weight": (2, 5.0)},
        ),
        runs=({"architecture": "jumprelu", "target_l0": 8, "learning_rate": 0.001},),
    )
    runs = dict(config.expand())
    assert list(runs) == [
        *(f"{kind}-k{k}-s{seed}" for kind in ("topk", "batch_topk") for k in (8, 16) for seed in (0, 1)),
        "relu-lambda2-s0",
        "relu-lambda5-s0",
        "jumprelu-l0-8-lr0.001-s0",
    ]
    assert runs["batch_topk-k16-s1"] == TrainConfig(
        sae=SAEConfig(architecture="batch_topk", d_sae=64, k=16), seed=1
    )
    assert runs["jumprelu-l0-8-lr0.001-s0"].sae.k == SAEConfig().k
    assert names(SweepConfig(grids=({"k": (8, 16)},))) == ["k8", "k16"]
    assert names(SweepConfig()) == ["topk"]
    assert names(SweepConfig(grids=({"hook_name": (HOOK, OTHER_HOOK)},))) == [HOOK, OTHER_HOOK]
    assert names(SweepConfig(grids=({"tied_init": (True, False)},))) == ["tied_init", "no-tied_init"]


def test_a_sweep_survives_its_file(tmp_path: Path) -> None:
    config = SweepConfig(
        TrainConfig(tokens=1000, corpus=CorpusConfig(text=("a.txt",)), sae=SAEConfig(d_sae=64)),
        grids=({"architecture": ("topk",), "k": (8, 16)}, {"hook_name": (HOOK,), "learning_rate": (0.1,)}),
        runs=({"architecture": "matryoshka", "levels": (8, 16)},),
    )
    config.write(tmp_path / "sweep.toml")
    assert SweepConfig.read(tmp_path / "sweep.toml").expand() == config.expand()


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'tokens = 1000\n[sae]\nd_sae = 64\n[grid]\narchitecture = ["topk", "batch_topk"]\nk = [8, 16]\n'
        '[[run]]\narchitecture = "relu"\n'
    )
    typed = SweepConfig(
        TrainConfig(tokens=1000, sae=SAEConfig(d_sae=64)),
        grids=(
            grid_from_words(["architecture=topk,batch_topk", "k=8,16"]),
            grid_from_words(["architecture=relu"]),
        ),
    )
    assert SweepConfig.read(path).expand() == typed.expand()
    assert grid_from_words(["tied-init=true,false", "levels=[8,16],[4,8]"]) == {
        "tied_init": (True, False),
        "levels": ([8, 16], [4, 8]),
    }
    assert grid_from_words(["k=8,a"]) == {"k": (8, "a")}  # a value that is none is the one to blame


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (
            {"architecture": ("topk", "relu"), "k": (8,)},
            "Run relu of the sweep: k says nothing to relu, so give each architecture a grid of its own.",
        ),
        (
            {"k": (8, 4096)},
            "Run k4096 of the sweep: k is 4096, and must be at least 1 and less than the number of features, 4096.",
        ),
        (
            {"architectur": ("topk",)},
            "A sweep cannot vary 'architectur', which is no field of a run; did you mean architecture?",
        ),
        ({"k": ("many",)}, "The sweep has k = 'many', and it must be a whole number."),
        (
            {"architecture": ("top",)},
            "The sweep has architecture = 'top', and it must be one of topk, batch_topk, matryoshka, jumprelu, gated,"
            " relu.",
        ),
        ({"seed": (1, 1)}, "The sweep has the run topk 2 times: give every run once."),
        (
            {"tokens": (1, 2)},
            "tokens is the same for all runs of a sweep: give it outside the grid.",
        ),
        ({"seed": ()}, "The grid gives seed no value: give one, or leave it out."),
    ],
)
def test_what_cannot_be_swept_gets_one_sentence(grid: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        SweepConfig(grids=(grid,)).expand()
    assert str(refused.value) == sentence


def test_words_and_files_that_are_no_grid(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for words, sentence in (
        (["k"], "--grid takes FIELD=VALUE,VALUE,…, and 'k' is not of that form."),
        (["k=1", "k=2"], "--grid names k twice: give all its values at once."),
    ):
        with pytest.raises(InputError) as refused:
            grid_from_words(words)
        assert str(refused.value) == sentence
    for key, meant in (("grids", "grid"), ("runs", "run"), ("sead", "seed")):
        path.write_text(f"[[{key}]]\nk = [4]\n")
        with pytest.raises(InputError) as refused:
            SweepConfig.read(path)
        assert str(refused.value) == f"{path} has an unknown key {key!r}: did you mean {meant}?"
    path.write_text("grid = 3\n")
    with pytest.raises(InputError) as refused:
        SweepConfig.read(path)
    assert str(refused.value) == f"{path} has grid = 3, and it must be tables: write [[grid]]."
    with pytest.raises(InputError) as refused:
        SweepConfig.read(tmp_path / "none.toml")
    assert str(refused.value).startswith(f"{tmp_path / 'none.toml'} cannot be read")


def measured(name: str, l0: float | None, value: float | None) -> Measured:
    figures = {"l0": l0, "ce_loss_recovered": value, "explained_variance": value}
    return Measured(name, "topk", HOOK, figures, {key: [None, None] for key in figures}, None)


def test_the_front_holds_what_no_other_beats() -> None:
    points = [
        measured("best", 16, 0.9),
        measured("denser and worse", 17, 0.9),
        measured("sparser", 8, 0.8),
        measured("same", 8, 0.8),
        measured("as sparse and worse", 8, 0.7),
        measured("better", 32, 0.95),
        measured("unknown", 1, None),
    ]
    front = pareto_front(points, "ce_loss_recovered")
    assert [point.name for point in front] == ["sparser", "same", "best", "better"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("builtin")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A short run on 8,000 tokens of small texts."""
    texts = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = (f"def function_{number}(x):\n    return x + {number}\n" * 2 for number in range(6000))
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return TrainConfig(
        corpus=CorpusConfig(text=(str(texts),)), hook_name=HOOK, tokens=8_000, sae=SAEConfig(d_sae=64)
    )


def weights(folder: Path) -> dict[str, bytes]:
    """What training made of each run of a sweep, or of one run."""
    return {
        f"{path.parent.parent.name}/{path.name}": path.read_bytes()
        for path in folder.rglob("sae_weights.safetensors")
    }


def all_architectures(base: TrainConfig) -> SweepConfig:
    known = {kind: settings for kind, settings in SETTINGS.items() if kind in ARCHITECTURES}
    return SweepConfig(base, runs=tuple({"architecture": kind, **more} for kind, more in known.items()))


def test_each_sae_has_the_bits_that_it_has_alone(
    model: LanguageModel, base: TrainConfig, tmp_path: Path
) -> None:
    """Live, every architecture beside the others, and not one is like another."""
    sweep = Sweep(tmp_path / "sweep", all_architectures(base), model=model)
    sweep.start()
    sweep.train()
    assert len({sae.hash for sae in sweep.saes().values()}) == len(sweep.runs) >= 2
    for name, run in sweep.runs.items():
        alone = Pipeline(tmp_path / name, run.config, model=model)
        alone.start()
        alone.train()
        for file in ("sae/sae_weights.safetensors", "sae/cfg.json", "metrics.jsonl", "run.toml"):
            assert (tmp_path / name / file).read_bytes() == (run.run.path / file).read_bytes(), (name, file)
    assert not (tmp_path / "sweep" / "activations").exists()


def test_several_hooks_are_read_from_one_store_in_one_pass(
    model: LanguageModel, base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_read: Counter[tuple[str, ...]] = Counter()
    capture = LanguageModel.capture

    def counted(self: LanguageModel, ids: Any, hook_names: Any, **options: Any) -> Any:
        blocks_read[tuple(hook_names)] += len(ids)
        return capture(self, ids, hook_names, **options)

    config = SweepConfig(base, grids=({"hook_name": (HOOK, OTHER_HOOK)},))
    sweep = Sweep(tmp_path / "sweep", config, model=model)
    sweep.start()
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "capture", counted)
        sweep.train()
    n_blocks = sweep.runs[HOOK].train_blocks.n_blocks
    assert blocks_read[HOOK, OTHER_HOOK] == n_blocks
    assert blocks_read[HOOK,] + blocks_read[OTHER_HOOK,] < n_blocks  # the held-out text
    for name, run in sweep.runs.items():
        alone = Pipeline(tmp_path / name, run.config, model=model, store_activations=True)
        alone.start()
        assert alone.train().hash == run.sae().hash
    assert not (tmp_path / "sweep" / "activations").exists()


def test_a_run_of_a_sweep_stands_alone(model: LanguageModel, base: TrainConfig, tmp_path: Path) -> None:
    """Its folder, moved away from the sweep, is a run like any other; what is trained is not trained again."""
    grid = {"k": (4, 8)}
    sweep = Sweep(tmp_path / "sweep", SweepConfig(base, grids=(grid,)), model=model)
    sweep.start()
    sweep.train()
    evaluations = sweep.evaluate()
    assert {name: round(evaluation.l0 or 0) for name, evaluation in evaluations.items()} == {"k4": 4, "k8": 8}
    trained = (tmp_path / "sweep" / "k4" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    (tmp_path / "sweep" / "k4").rename(tmp_path / "k4")
    alone = Pipeline(tmp_path / "k4", model=model)
    sae = alone.train()
    assert alone.evaluate(sae) == evaluations["k4"]
    assert alone.train_blocks.n_tokens >= 8_000
    assert (tmp_path / "k4" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == trained


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("hooks", [(HOOK,), (HOOK, OTHER_HOOK)], ids=["live", "stored"])
def test_killed_sweeps_end_in_the_same_bits(
    model: LanguageModel, base: TrainConfig, tmp_path: Path, hooks: tuple[str, ...]
) -> None:
    """Killed once a run has a checkpoint, and again when one is further on; the same call goes on each time."""
    grid = {"k": (4, 8), "hook_name": hooks}
    config = SweepConfig(base, grids=(grid,))

    def sweep(folder: Path) -> None:
        made = Sweep(folder, config, model=model)
        made.start()
        made.train()

    sweep(tmp_path / "whole")
    folder, kills = tmp_path / "killed", 0
    for tokens in (1, 5_000):
        process = forked(lambda: sweep(folder))
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if any(int(path.name) >= tokens for path in folder.glob("*/checkpoints/0*")):
                os.kill(process, signal.SIGKILL)
                kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
                break
            time.sleep(0.001)
    assert kills >= 1
    sweep(folder)
    assert weights(folder) == weights(tmp_path / "whole")
    assert len(weights(folder)) == 2 * len(hooks)


def test_a_sweep_grows_and_loses_no_run(model: LanguageModel, base: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first = Sweep(folder, SweepConfig(base, grids=({"k": (4, 8)},)), model=model)
    first.start()
    before = tree(folder)
    with pytest.raises(InputError) as refused:
        Sweep(folder, SweepConfig(base, grids=({"k": (8, 16)},)), model=model)
    assert str(refused.value) == (
        f"{folder} holds another sweep, and this one lacks its runs k4: give another folder, or what sweep.toml says"
        " and more."
    )
    assert tree(folder) == before
    Sweep(folder, SweepConfig(base, grids=({"k": (4, 8, 16)},)), model=model).start()
    assert list(Sweep(folder, model=model).runs) == ["k4", "k8", "k16"]


def test_a_run_that_diverges_keeps_no_other_from_being_trained(
    model: LanguageModel, base: TrainConfig, tmp_path: Path
) -> None:
    """Two groups; in each the run at the absurd rate is stopped and the other finished, measured and plotted."""
    grid = {"learning_rate": (0.001, 1e6), "order_seed": (0, 1)}
    sweep = Sweep(tmp_path / "sweep", SweepConfig(base, grids=(grid,)), model=model)
    sweep.start()
    with pytest.raises(Diverged) as error:
        sweep.train()
    healthy = {name for name, run in sweep.runs.items() if run.config.learning_rate == 0.001}
    assert {folder.name for folder in error.value.folders} == set(sweep.runs) - healthy
    assert all(name in str(error.value) for name in set(sweep.runs) - healthy)
    assert set(sweep.saes()) == healthy
    assert len(healthy) == len(sweep.groups) == 2
    assert set(sweep.evaluate()) == healthy
    assert set(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]) == healthy


@pytest.mark.parametrize("exponent", [-0.7, -1.5, -3.0])
@pytest.mark.parametrize("target", [4.0, 32.0, 200.0])
def test_a_power_law_is_found_and_the_change_with_length_is_counted(exponent: float, target: float) -> None:
    """L0 = c · λ^exponent, where both depend on the length of the training as was measured."""
    change = {1 / 16: 1.5, 1 / 4: 1.2, 1.0: 1.2 * (1.2 / 1.5) ** (1 / 3)}
    steeper = {1 / 16: 1.0, 1 / 4: 1.11, 1.0: 1.18}

    def l0(weight: float, part: float) -> float:
        return target * (weight / 3) ** (exponent * steeper[part]) * change[part]

    found = find_sparsity_weight(l0, target, start=5.0)
    assert l0(found.sparsity_weight, 1.0) == pytest.approx(target, rel=0.06)
    assert len(found.trials) <= 10
    assert all(trial.l0 == l0(trial.sparsity_weight, trial.part) for trial in found.trials)


def test_what_no_weight_gives_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        find_sparsity_weight(lambda weight, part: 50.0, 32.0, start=1.0)
    assert str(refused.value) == (
        "8 short trainings found no sparsity weight for an L0 of 32 (4.41e+04 gave 50, 3.53e+05 gave 50): give more"
        " tokens, or another L0."
    )


class Overcomplete:
    """Sparse sums of 512 directions in 32 dimensions, rarer and rarer: no SAE of 64 features explains all of it."""

    def __init__(self, n_batches: int, batch: int = 64) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(512, 32, generator=generator), dim=1)
        self.rates = 0.5 / (1 + torch.arange(512))
        self.n_batches, self.done = n_batches, 0

    def make(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        fires = torch.rand(self.batch, 512, generator=generator) < self.rates
        return (fires * (0.5 + torch.rand(self.batch, 512, generator=generator))) @ self.directions

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.done < self.n_batches:
            self.done += 1
            yield self.make(self.done)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def test_the_weight_that_is_found_gives_the_l0_in_the_whole_training(tmp_path: Path) -> None:
    """To 10%, as the mean over the end of the training."""
    target = 8.0
    base = TrainConfig(tokens=200_000, sae=SAEConfig(architecture="relu", d_sae=64))
    sample = torch.cat([Overcomplete(0).make(number) for number in range(20)])
    mean = sample.mean(0)
    scaling = Scaling(mean, float((32 / (sample - mean).square().sum(1).mean()).sqrt()))

    def measure(weight: float, part: float) -> float:
        sae = replace(base.sae, sparsity_weight=weight)
        config = replace(base, tokens=int(base.resolved_tokens() * part), sae=sae)
        folder = tmp_path / f"{weight}-{part}"
        batches = Overcomplete(config.n_steps(), config.resolved_batch_tokens())
        train(Run(config, folder), batches, scaling)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return float(np.mean([line["l0"] for line in lines[-len(lines) // 10 :]]))

    found = find_sparsity_weight(measure, target, start=2.0)
    assert measure(found.sparsity_weight, 1.0) == pytest.approx(target, rel=0.1)
