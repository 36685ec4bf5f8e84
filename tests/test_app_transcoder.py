"""A transcoder from the command to the explorer: trained live and from a store, measured, indexed, steered, shown."""

import json
import sys
from pathlib import Path

import pytest
import torch
from command import Command
from streamlit.testing.v1 import AppTest
from tiny_models import tiny_hf_model, tiny_tokenizer

from activations.store import ActivationStore
from features.run import open_run
from sae.scaling import Scaling

READ, WRITTEN = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and text, as words of a command."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_hf_model("llama", seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for number in range(6000):
        (folder / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number * 7}\n")
    words = [
        "--model",
        folder / "model",
        "--text",
        folder / "texts",
        "--tokens",
        "6000",
        "--context-length",
        "32",
    ]
    return list(map(str, words))


HOOKS = ("--hook-name", READ, "--hook-out", WRITTEN)
SHAPE = ("--d-sae", "64", "--k", "4", "--skip")


@pytest.fixture(scope="module")
def run(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``sae train`` and ``sae index``."""
    folder = tmp_path_factory.mktemp("runs") / "transcoder"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        from app.cli import main

        patch.setattr(sys, "argv", ["sae", "train", "--out", str(folder), *source, *HOOKS, *SHAPE])
        main()
        patch.setattr(sys, "argv", ["sae", "index", str(folder)])
        main()
        sys.exit(0)
    assert not stopped.value.code
    return folder


def test_a_transcoder_says_where_it_belongs_and_is_measured(run: Path, sae: Command) -> None:
    opened = open_run(run)
    assert opened.sae.config.transcoder
    assert (opened.sae.hook_name, opened.sae.hook_out) == (READ, WRITTEN)
    assert opened.sae.W_skip is not None
    assert {"max_norm", "max_norm_out"} <= opened.sae.metadata.keys()
    figures = json.loads((run / "evaluation.json").read_text())
    assert set(figures["controls"]) == {"reduced_rank", "random_weights"}
    assert figures["explained_variance"] > figures["controls"]["random_weights"]["explained_variance"]
    assert f"{READ} → {WRITTEN}" in sae("info", run)
    assert "linear map" in sae("evaluate", run)


def test_its_features_are_indexed_where_they_read_and_promote_where_they_write(run: Path) -> None:
    opened = open_run(run)
    feature = int(opened.index.count.argmax())
    assert opened.index.hook_name == READ
    assert opened.feature(feature).promoted
    ids = opened.index.blocks.ids_tensor(0, 4)
    x = opened.model.capture(ids, [READ])[READ]
    text = ids != 0
    fired = opened.sae.encode(x[text]).to_dense()
    assert float(fired[:, feature].max()) <= float(opened.index.max[feature]) * (1 + 1e-5)


def test_it_is_steered_from_the_command_and_from_python(run: Path, sae: Command) -> None:
    opened = open_run(run)
    feature = int(opened.index.count.argmax())
    printed = sae("steer", run, str(feature), "--strength", "3", "--tokens", "4", "def ")
    assert printed.count("│ def ") == 2
    ids = opened.index.blocks.ids_tensor(0, 1)
    before = opened.model.capture(ids, [WRITTEN])[WRITTEN]
    with opened.steered({feature: 1.0}, method="add", unit="residual"):
        change = opened.model.capture(ids, [WRITTEN])[WRITTEN] - before
    lengths = change[ids != 0].norm(dim=-1)
    assert float(lengths.max()) == pytest.approx(opened.residual_norm, rel=1e-3)


@pytest.mark.parametrize("name", ["overview", "feature", "try_text", "steer"])
def test_every_page_of_the_explorer_opens(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = int(open_run(run).index.count.argmax())
    monkeypatch.setattr(sys, "argv", ["explorer_main.py", str(run)])
    page = AppTest.from_string(
        f"from app.explorer import page_{name}\npage_{name}.show()\n", default_timeout=60
    )
    page.query_params["feature"] = str(feature)
    page.run()
    assert not page.exception
    if name == "overview":
        blocks = " ".join(element.proto.body for element in page.get("html"))
        assert f"{READ} → {WRITTEN}" in blocks
        assert "linear map" in blocks


@pytest.mark.parametrize("order", ["exact", "external"])
def test_a_store_of_both_hooks_trains_it_too(
    source: list[str], tmp_path: Path, sae: Command, order: str
) -> None:
    store = tmp_path / "store"
    sae("capture", "--out", store, *source, "--hook-names", READ, WRITTEN)
    scalings = []
    apply = Scaling.apply

    def spy(self: Scaling, activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scalings.append((self, activations.shape[1]))
        return apply(self, activations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scaling, "apply", spy)
        words = ("--store", store, "--order", order, *HOOKS, *SHAPE)
        assert f"{READ} → {WRITTEN}" in sae("train", "--out", tmp_path / "run", *words)
    held = ActivationStore.open(store)
    used, width = scalings[0]
    assert width == 64
    assert torch.equal(used.mean, held.at(READ).mean)
    assert used.mean_out is not None
    assert torch.equal(used.mean_out, held.at(WRITTEN).mean)
    assert (used.scale, used.scale_out) == (held.at(READ).scale, held.at(WRITTEN).scale)
    absent = ("--hook-name", READ, "--hook-out", "blocks.2.hook_mlp_out")
    assert sae.refused("train", "--out", tmp_path / "other", "--store", store, *absent, *SHAPE) == (
        f"{store} holds no activations of blocks.2.hook_mlp_out: it has {READ}, {WRITTEN}."
    )


def test_hooks_that_make_no_transcoder_are_refused(source: list[str], tmp_path: Path, sae: Command) -> None:
    def refused(*words: str) -> str:
        return sae.refused("train", "--out", tmp_path / "run", *source, "--d-sae", "64", "--k", "4", *words)

    sentence = refused("--hook-name", WRITTEN, "--hook-out", READ)
    assert sentence.endswith(
        f"computes {READ} before {WRITTEN}: a transcoder reads at the earlier hook and predicts the later one."
    )
    assert "hook_out and hook_name are both" in refused("--hook-name", READ, "--hook-out", READ)
    assert "blocks.1.hook_mlp_ou does not exist" in refused(
        "--hook-name", READ, "--hook-out", "blocks.1.hook_mlp_ou"
    )
    assert "skip is for a transcoder" in refused("--hook-name", READ, "--skip")
    assert not (tmp_path / "run").exists()
