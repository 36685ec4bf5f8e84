"""``sae train`` typed as a person would: dry run, resuming, being asked to end, refusals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from command import HEAR_CTRL_C, Command, environment, tree
from rich.console import Console

from app.cli import live as live_module
from app.cli.live import TrainingView
from sae.config import SAEConfig, TrainConfig
from sae.train import Run

WORDS = ("--tokens", "6000", "--d-sae", "64", "--k", "4")


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6000):
        (folder / f"{number}.txt").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 3)
    return folder


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path: Path, texts: Path, sae: Command) -> None:
    printed = sae("train", "--out", tmp_path / "run", "--text", texts, *WORDS, "--dry-run")
    for word in ("time", "steps", "memory", "disk", "MB", "93 of 64 tokens"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_tokens_that_fill_no_batch_are_said(tmp_path: Path, texts: Path, sae: Command) -> None:
    words = ("train", "--text", texts, "--hook-name", "blocks.0.hook_resid_post", "--d-sae", "64")
    printed = sae(*words, "--out", tmp_path / "run", "--tokens", "5000", "--batch-tokens", "2000")
    assert "Steps are whole batches of 2,000 tokens: the last 1,000 are left out." in printed
    printed = sae(*words, "--out", tmp_path / "other", "--tokens", "4040", "--batch-tokens", "2000")
    assert "left out" not in printed


def test_terminated_it_saves_and_the_same_command_continues(
    tmp_path: Path, texts: Path, sae: Command
) -> None:
    """And a command with other settings is refused, before and after the end, with nothing changed."""
    run = tmp_path / "run"
    words = ("train", "--out", run, "--text", texts, *WORDS, "--passes", "5")
    typed = [sys.executable, "-m", "app.cli", *map(str, words)]
    process = subprocess.Popen(
        typed,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=HEAR_CTRL_C,
    )
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert process.stderr is not None
    said = process.stderr.read()
    assert said == "\nTerminated. The same command continues where this one stopped.\n"
    assert list((run / "checkpoints").glob("*/manifest.json"))
    before = tree(run)
    other = (*words[:-4], "--k", "5", "--passes", "5", "--seed", "3")
    assert sae.refused(*other[:5], "--tokens", "6000", "--d-sae", "64", *other[-6:]) == (
        f"{run} holds a training with other settings (sae.k: 4 there, 5 here; seed: 0 there, 3 here): give those to"
        " continue it, give another folder, or delete this one."
    )
    assert tree(run) == before
    printed = sae(*words)
    assert "CE loss recovered" in printed
    assert "explained variance" in printed
    assert not (run / "checkpoints").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["tokens"] for line in lines}) == len(lines) >= 100
    assert "held_out_explained_variance" in lines[-1]
    again = sae(*words)
    assert "train:" not in again


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--hook-out", "blocks.3.hook_resid_post"),
            "hook_out and hook_name are both blocks.3.hook_resid_post",
        ),
        (("--transcoder",), "A transcoder writes another hook than it reads: give hook_out."),
        (("--skip",), "skip is for a transcoder: give hook_out, or leave it out."),
        (("--architecture", "relu", "--k", "8"), "k is a setting of topk, batch_topk, matryoshka, and the"),
        (("--ema", "1.5"), "ema is 1.5, and must be at least 0 and below 1."),
        (
            ("--warmup", "0.8", "--decay", "0.5"),
            "warmup is 0.8 and decay 0.5, and they are fractions of the run",
        ),
        (
            ("--target-l0", "5"),
            "target_l0 is a setting of relu, gated, jumprelu, and the architecture is topk",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(
    tmp_path: Path, sae: Command, words: tuple[str, ...], sentence: str
) -> None:
    said = sae.refused("train", "--out", tmp_path / "run", "--model", "nowhere/at-all", *words)
    assert said.startswith(sentence)
    assert not (tmp_path / "run").exists()


LINE: Mapping[str, float] = {"loss": 12.5, "l0": 31.9, "explained_variance": 0.8123, "dead": 17}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_what_the_last_lines_say(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    console = Console(force_terminal=terminal, width=120, record=True, highlight=False)
    monkeypatch.setattr(live_module, "console", console)
    monkeypatch.setattr("app.cli.terminal.console", console)
    view = TrainingView()
    with view.progress("train", total=1000, unit="tokens") as step:
        step(600)
        view.watch(Run(TrainConfig(sae=SAEConfig()), Path("runs/mine")), LINE)
        view.watch(
            Run(TrainConfig(sae=SAEConfig()), Path("runs/mine")),
            {"held_out_explained_variance": 0.79, "dead": 3},
        )
    shown = console.export_text()
    for word in ("12.5", "31.9", "0.8123", "0.7900", "3"):
        assert word in shown
    assert ("mine" in shown) == terminal
