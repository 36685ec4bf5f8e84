"""The command line: every verb on a real run, and one sentence for each kind of bad input."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import Command, environment, tree

from app.cli import VERBS
from features.labels import Labels
from features.run import open_run


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """``sae demo --tokens 20000`` as a newcomer types it, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    words = [sys.executable, "-m", "app.cli", "demo", "--tokens", "20000"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done.stdout


def test_demo_says_what_a_newcomer_needs(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert "CE loss recovered" in printed
    assert "default" in printed
    assert "steered" in printed
    assert "Share of its own tokens" in printed
    assert printed.rstrip().endswith("Open the explorer with:  sae explore runs/demo")
    found = {path.name for path in folder.iterdir()}
    assert {"run.toml", "metrics.jsonl", "sae", "evaluation.json", "features", "labels.sqlite"} <= found
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 200e6
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 2 * 20_000 // 128 * 128  # read twice, in whole batches


def test_demo_again_does_nothing_again_and_another_k_does_not_capture(
    demo: tuple[Path, str], tmp_path: Path, sae: Command
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(demo[0], folder)
    before = tree(folder)
    again = sae("demo", "--tokens", "20000", "--out", folder)
    assert "capture:" not in again
    assert "train:" not in again
    assert "index:" not in again
    assert tree(folder) == before
    kept = tmp_path / "kept"
    (folder / "activations").rename(kept)  # as the demo itself deletes them when they are large
    without = sae("demo", "--tokens", "20000", "--out", folder)
    assert not any(
        f"{stage}:" in without for stage in ("capture", "train", "evaluate", "index", "score labels")
    )
    kept.rename(folder / "activations")

    Labels.open(folder / "labels.sqlite").set(3, "mine")
    other = sae("demo", "--tokens", "20000", "--k", "16", "--out", folder)
    assert "capture:" not in other
    assert "train:" in other
    assert "index:" in other
    assert json.loads((folder / "evaluation.json").read_text())["l0"] <= 16
    # A person's label is about a feature of the SAE it was given to, and is kept with that SAE's labels.
    (aside,) = folder.glob("labels-*.sqlite")
    assert Labels.open(aside).all()[3].text == "mine"
    assert Labels.open(folder / "labels.sqlite").all()[3].source == "automatic"


def test_demo_killed_in_training_ends_in_the_same_bits(demo: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL once the first checkpoint is there; the second run must not start training from nothing."""
    words = [sys.executable, "-m", "app.cli", "demo", "--tokens", "20000", "--out", str(tmp_path / "run")]
    checkpoints = tmp_path / "run" / "checkpoints"
    first = subprocess.Popen(words, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/manifest.json")):
        assert first.poll() is None, "the run ended before its first checkpoint was seen"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert not (tmp_path / "run" / "sae").exists()
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "sae/sae_weights.safetensors", "evaluation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (demo[0] / name).read_bytes(), name


def test_steer_prints_default_and_steered_text(demo: tuple[Path, str], sae: Command) -> None:
    feature = int(open_run(demo[0]).index.count.argmax())
    words = ("steer", demo[0], str(feature), "--strength", "2", "--tokens", "8", "def ")
    printed = sae(*words)
    assert printed.count("│ def ") == 2
    assert "clamp 2 × max" in printed
    assert printed == sae(*words)


def test_evaluate_and_index_and_info(demo: tuple[Path, str], tmp_path: Path, sae: Command) -> None:
    folder = tmp_path / "run"
    shutil.copytree(demo[0], folder)
    assert "explained variance" in sae("evaluate", folder)
    (folder / "labels.sqlite").unlink()
    shutil.rmtree(folder / "features")
    sae("index", folder)
    assert (folder / "labels.sqlite").is_file()
    assert "blocks.3.hook_resid_post" in sae("info", folder)
    assert "blocks.L.hook_resid_post" in sae("info", "--model", "builtin")


def test_train_on_text_files(tmp_path: Path, sae: Command) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(6000):
        (texts / f"{number}.txt").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 3)
    words = ("--text", texts, "--tokens", "5000", "--d-sae", "64", "--k", "4")
    printed = sae("train", "--out", tmp_path / "run", *words)
    assert "CE loss recovered" in printed
    relu = (*words[:-2], "--architecture", "relu", "--hook-name", "blocks.1.hook_mlp_out")
    sae("train", "--out", tmp_path / "relu", *relu)
    assert json.loads((tmp_path / "relu" / "sae" / "cfg.json").read_text())["architecture"] == "standard"


def test_help_is_quick_to_import(tmp_path: Path) -> None:
    """``sae --help`` loads nothing heavy; its half second is mostly Python's own start."""
    code = "import sys; sys.argv = ['sae', '--help']; from app.cli import main; main(); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for heavy in ("torch", "numpy", "transformers", "streamlit", "tyro", "rich"):
        assert f"'{heavy}'" not in done.stdout
    for verb in VERBS:
        assert verb in done.stdout


def documents(folder: Path, n: int) -> Path:
    folder.mkdir()
    for number in range(n):
        (folder / f"{number}.txt").write_text(f"text number {number}, " * 40)
    return folder


def held_out(folder: Path) -> int:
    """How many texts the design's rule holds out: sha1 of the text, modulo 50, is 0."""
    hashes = (hashlib.sha1(path.read_bytes()).hexdigest() for path in folder.iterdir())
    return sum(int(digest, 16) % 50 == 0 for digest in hashes)


def test_bad_settings_get_one_sentence_and_leave_no_trace(tmp_path: Path, sae: Command) -> None:
    few = documents(tmp_path / "few", 30)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("not a run")
    out = tmp_path / "run"
    before = tree(tmp_path)

    def refused(*words: str | Path) -> str:
        sentence = sae.refused("train", "--out", out, *words)
        assert not out.exists()
        return sentence

    assert refused("--d-sae", "16", "--k", "16") == (
        "k is 16, and must be at least 1 and less than the number of features, 16."
    )
    assert refused("--text", tmp_path / "missing") == (
        f'Corpus {tmp_path / "missing"} does not exist: give "python", a file, folder or glob of .txt, .md, .py,'
        " .jsonl, .parquet files, or hf: and the name of a Hugging Face dataset."
    )
    assert refused("--text", tmp_path / "empty") == (
        f"Corpus {tmp_path / 'empty'} holds no .txt, .md, .py, .jsonl, .parquet file: give a file, folder or glob that"
        " does."
    )
    assert refused("--text", few) == (
        f"The test split of corpus {str(few)!r} has {held_out(few)} documents, and metrics need at least 100:"
        " give more documents (about one in 50 is held out)."
    )
    assert refused("--packages", "nosuchpackage") == (
        "Package 'nosuchpackage' is not installed here as a folder of Python files: install it, or give the name"
        " that it is imported by."
    )
    assert refused("--hook-name", "blocks.9.hook_resid_post") == (
        "blocks.9.hook_resid_post does not exist: the layers of this model are 0 to 5."
    )
    assert refused("--hook-name", "blocks.3.hook_resid_posst") == (
        "blocks.3.hook_resid_posst does not exist; did you mean blocks.3.hook_resid_post?"
    )
    assert refused("--tokens", "0") == "tokens is 0, and must be at least 1."
    assert (
        refused("--context-length", "512") == "context_length is 512, and builtin reads at most 256 tokens."
    )
    assert sae.refused("demo", "--out", tmp_path / "notes") == (
        f"{tmp_path / 'notes'} holds files that are not a run's: give an empty or new folder."
    )
    assert (
        sae.refused("evaluate", tmp_path / "notes")
        == f"{tmp_path / 'notes'} is not a run: it has no run.toml."
    )
    assert (
        sae.refused("explore", tmp_path / "notes")
        == f"{tmp_path / 'notes'} is not a run: it has no run.toml."
    )
    assert (
        sae.refused("info")
        == "sae info takes the folder of a run, a store or an SAE, or --model NAME, one of the two."
    )
    assert sae.refused("teach") == (
        "sae has no verb 'teach': it knows demo, capture, store, train, sweep, evaluate, index, label, search, export,"
        " steer, explore, convert, push, info."
    )
    assert tree(tmp_path) == before


def test_broken_run_folders(demo: tuple[Path, str], tmp_path: Path, sae: Command) -> None:
    folder = tmp_path / "run"
    shutil.copytree(demo[0], folder)
    weights = folder / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = tree(folder)
    assert (
        sae.refused("steer", folder, "5", "def ")
        == f"{weights} is corrupt: it is not a readable safetensors file."
    )
    assert sae.refused("evaluate", folder) == f"{weights} is corrupt: it is not a readable safetensors file."
    assert tree(folder) == before
    shutil.rmtree(folder / "sae")
    assert sae.refused("steer", folder, "5", "def ") == f"{folder / 'sae'} holds no SAE: it has no cfg.json."
    (folder / "run.toml").write_text('format_version = 99\nmodel = "builtin"\n')
    assert sae.refused("info", folder) == (
        f"{folder / 'run.toml'} was written in format 99, and this saescope reads up to format 1: install a newer"
        " saescope."
    )


def test_feature_out_of_range(demo: tuple[Path, str], sae: Command) -> None:
    assert sae.refused("steer", demo[0], "9999", "def ") == (
        "There is no feature 9999: this SAE has the features 0 to 4095."
    )


def test_a_model_that_is_nowhere_is_refused_within_ten_seconds(tmp_path: Path) -> None:
    """Whatever the network is like, the hub's address leads nowhere here."""
    words = [sys.executable, "-m", "app.cli", "train", "--out", "run", "--model", "nowhere/to-be-found"]
    nowhere = {**environment(), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        words, cwd=tmp_path, env=nowhere, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        "sae: nowhere/to-be-found is no folder, and the Hugging Face hub cannot be reached to look for a model of"
        " that name: give the path of a folder that holds config.json, safetensors weights and a tokenizer.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [1_000, 100_000, 3_000_000])
def test_a_full_disk_is_one_sentence(tmp_path: Path, limit: int) -> None:
    """A limit on file size stands in for a disk that fills up: at the tokens, the activations, or the weights."""
    code = (
        "import resource, sys; from app.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "sys.argv = ['sae', 'demo', '--tokens', '20000', '--out', 'run']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    sentences: Sequence[str] = done.stderr.strip().splitlines()
    assert len(sentences) == 1
    assert "too little room" in sentences[0] or "disk is full" in sentences[0]
