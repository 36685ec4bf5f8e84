"""``sae sweep`` as it is typed: many runs, their comparison, the search for an L0, and bad input."""

import json
import re
from pathlib import Path

import pytest
from command import Command, tree

from features.run import open_run

SHORT = ("--tokens", "20000", "--d-sae", "64", "--hook-name", "blocks.1.hook_resid_post")


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = (f"def function_{number}(x):\n    return x + {number}\n" * 2 for number in range(6000))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def test_a_sweep_from_flags(tmp_path: Path, texts: Path, sae: Command) -> None:
    folder = tmp_path / "sweep"
    grids = ("--grid", "k=4,8", "--grid", "architecture=relu", "sparsity-weight=2,")
    words = ("sweep", "--out", folder, "--text", texts, *SHORT, *grids)
    planned = sae(*words, "--dry-run")
    assert "3 SAEs on 20,000 tokens" in planned
    assert "Training would take about" in planned
    assert not folder.exists()

    printed = sae(*words)
    rows = dict(re.findall(r"^(topk-k4|topk-k8|relu-lambda2) +([\d.]+) +[\d.-]+ \(", printed, re.MULTILINE))
    results = json.loads((folder / "sweep.json").read_text())["runs"]
    assert set(rows) == set(results) == {"topk-k4", "topk-k8", "relu-lambda2"}
    assert float(rows["topk-k4"]) == pytest.approx(results["topk-k4"]["evaluation"]["l0"], rel=1e-3)
    assert results["relu-lambda2"]["config"]["sae"]["sparsity_weight"] == 2
    page = (folder / "pareto.html").read_text()
    assert all(name in page for name in rows)
    assert not re.search(r'<script[^>]+src="http', page)  # nothing is fetched

    before = tree(folder)
    again = sae(*words)
    assert "train:" not in again
    assert "evaluate:" not in again
    assert tree(folder) == before

    described = sae("info", folder)
    assert "3 SAEs on 20,000 tokens of builtin" in described
    assert all(re.search(rf"^{name} +{re.escape(l0)} ", described, re.MULTILINE) for name, l0 in rows.items())
    sae("index", folder / "topk-k4")
    assert open_run(folder / "topk-k4").index.d_sae == 64


def test_a_sweep_from_a_file_which_flags_change(tmp_path: Path, texts: Path, sae: Command) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        f'hook_name = "blocks.1.hook_resid_post"\ntokens = 1000000\n[corpus]\ntext = ["{texts}"]\n[sae]\nd_sae = 64\n'
        "[[grid]]\nk = [4, 8]\n"
    )
    printed = sae("sweep", path, "--out", tmp_path / "sweep", "--tokens", "10000", "--dry-run")
    assert "2 SAEs on 10,000 tokens" in printed
    more = sae("sweep", path, "--out", tmp_path / "sweep", "--grid", "k=16", "--dry-run")
    assert "3 SAEs on 1,000,000 tokens" in more


def test_the_folder_alone_goes_on_and_what_diverged_is_said_at_the_end(
    tmp_path: Path, texts: Path, sae: Command
) -> None:
    folder = tmp_path / "sweep"
    words = ("--out", folder, "--text", texts, *SHORT, "--grid", "learning-rate=0.001,1e6")
    said = sae.refused("sweep", *words)
    assert said.startswith(f"The training of {folder / 'lr1000000'} diverged by step")
    assert re.search(r"^lr0.001 +[\d.]+ +[\d.-]+ \(", sae.output, re.MULTILINE)
    assert set(json.loads((folder / "sweep.json").read_text())["runs"]) == {"lr0.001"}
    assert (folder / "pareto.html").is_file()

    assert "2 SAEs on 20,000 tokens" in sae("sweep", "--out", folder, "--dry-run")
    assert sae.refused("sweep", *words[:-1], "learning-rate=0.01") == (
        f"{folder} holds another sweep, and this one lacks its runs lr0.001, lr1000000: give another folder, or what"
        " sweep.toml says and more."
    )


def test_the_weight_for_an_l0_is_found_and_said_with_its_command(tmp_path: Path, sae: Command) -> None:
    words = (*SHORT, "--batch-tokens", "8", "--learning-rate", "0.003", "--architecture", "relu")
    printed = sae("sweep", "--find", "l0=8", "--out", tmp_path / "find", *words)
    command = printed.strip().splitlines()[-1]
    weight = float(re.findall(r"--sparsity-weight ([\d.e-]+)", command)[0])
    assert command.split() == [
        *("sae", "train", "--out", "RUN", "--sparsity-weight", f"{weight:.4g}"),
        *map(str, words),
    ]
    found = json.loads((tmp_path / "find" / "find.json").read_text())
    assert found["sparsity_weight"] == pytest.approx(weight, rel=1e-3)
    assert {trial["part"] for trial in found["trials"]} == {1 / 16, 1 / 4}
    assert not (tmp_path / "find" / "text" / "activations").exists()


def test_bad_input_gets_one_sentence_before_anything_is_loaded(tmp_path: Path, sae: Command) -> None:
    out = tmp_path / "sweep"

    def refused(*words: str) -> str:
        sentence = sae.refused("sweep", "--out", out, *words)
        assert not out.exists()
        return sentence

    assert refused("--grid", "architecture=topk,relu", "k=16") == (
        "Run relu of the sweep: k says nothing to relu, so give each architecture a grid of its own."
    )
    assert refused("--grid", "hook-name=blocks.1.hook_resid_post,blocks.9.hook_resid_post") == (
        "blocks.9.hook_resid_post does not exist: the layers of this model are 0 to 5."
    )
    assert refused("--find", "l1=3") == "--find takes l0=NUMBER, and 'l1=3' is not of that form."
    assert refused("--find", "l0=32") == "The L0 of topk is its k: give --k 32, there is nothing to find."
    assert refused("--find", "l0=32", "--architecture", "jumprelu") == (
        "Short trainings of a jumprelu SAE say little about its L0 after a long one: give --target-l0 32, which reaches"
        " and holds it in one training."
    )
    assert refused("--find", "l0=32", "--architecture", "relu", "--tokens", "20000") == (
        "A training of 20,000 tokens is too short to try 0.0625 of it, which has 19 steps and needs 100: give more"
        " tokens, or fewer --batch-tokens."
    )
    assert refused("--find", "l0=32", "--grid", "k=1,2") == (
        "--find looks for one training's sparsity weight: give its settings as for sae train."
    )
    out.mkdir()
    (out / "diary.txt").write_text("not a sweep")
    assert sae.refused("sweep", "--out", out, "--grid", "k=4,8") == (
        f"{out} holds something that is no sweep: give an empty or new folder."
    )
