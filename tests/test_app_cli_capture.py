"""``sae capture``, ``sae store`` and ``sae train --store``, typed as a person would."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import HEAR_CTRL_C, Command, environment, tree
from store_helpers import contents, make_blocks
from tiny_models import tiny_hf_model, tiny_language_model, tiny_tokenizer

from activations.corpus import CorpusConfig
from activations.store import ActivationStore
from activations.writer import write_store
from features.pipeline import Pipeline
from features.run import open_run
from sae.config import SAEConfig, TrainConfig

HOOKS = ("blocks.1.hook_resid_post", "blocks.0.hook_mlp_out")


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a text of one's own: a random GPT-2 in a folder, and a JSONL file."""
    folder = tmp_path_factory.mktemp("own")
    tiny_hf_model("gpt2").save_pretrained(folder / "gpt2")
    tiny_tokenizer().save_pretrained(folder / "gpt2")
    lines = (
        json.dumps({"title": f"n{n}", "body": f"def function_{n}(x):\n    return x + {n}\n" * 3})
        for n in range(6000)
    )
    with gzip.open(folder / "code.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    return folder / "gpt2", folder / "code.jsonl.gz"


def words(own: tuple[Path, Path]) -> list[str | Path]:
    return ["--model", own[0], "--text", own[1], "--column", "body", "--tokens", "5000"]


@pytest.fixture(scope="module")
def store(own: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["sae", "capture", "--out", *map(str, [folder, "--hook-names", *HOOKS, *words(own)])]
        )
        from app.cli import main

        main()
    return folder


def test_capturing_says_what_it_takes_and_what_it_left_out(
    own: tuple[Path, Path], tmp_path: Path, sae: Command
) -> None:
    out = tmp_path / "store"
    asked = ["capture", "--out", out, "--hook-names", HOOKS[0], *words(own)]
    said = sae(*asked, "--dry-run")
    # 79 sequences of 64 tokens; per token 32 numbers of 2 bytes, a norm, 3 integers, and 6 bytes of the blocks
    assert "Capturing 5,056 tokens at blocks.1.hook_resid_post" in said
    assert f"{out} will take 0.4 MB of the" in said
    assert not out.exists()
    said = sae(*asked)
    held = ActivationStore.open(out).at()
    special = int((held.blocks.ids == 0).sum())
    assert f"{HOOKS[0]}: {5056 - special:,} rows of width 32 count; left out: {special} special" in said
    assert f"sae train --out RUN --store {out}" in said
    assert "Every file in" in sae("store", "verify", out)
    described = sae("info", out)
    assert f"{out}: 5,056 tokens of" in described
    assert f"{own[0]} on {own[1]}" in described
    assert "unfinished" not in described
    before = tree(out)
    sae(*asked)
    assert tree(out) == before


def test_training_from_a_store_in_either_order_gives_the_same_sae(
    store: Path, tmp_path: Path, sae: Command
) -> None:
    small = ["--d-sae", "64", "--k", "4", "--hook-name", HOOKS[0]]
    printed = sae("train", "--out", tmp_path / "a", "--store", store, *small)
    assert "CE loss recovered" in printed
    printed = sae("train", "--out", tmp_path / "b", "--store", store, "--order", "external", *small)
    # 5,056 rows of 32 numbers of 2 bytes, and one bucket of the shuffle, here all of it
    assert "A copy in training order takes up to 0.6 MB beside the store." in printed
    weights = Path("sae", "sae_weights.safetensors")
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    run = open_run(tmp_path / "a")
    assert run.config.store == str(store)
    assert run.config.tokens == ActivationStore.open(store).at(HOOKS[0]).n_kept
    assert run.config.corpus.column == "body"
    # The index and the labels come from the store's activations and tokens too.
    sae("index", tmp_path / "a")
    assert open_run(tmp_path / "a").index.n_tokens > 0
    # Another hook is one word away.
    sae(
        "train",
        "--out",
        tmp_path / "c",
        "--store",
        store,
        "--d-sae",
        "64",
        "--k",
        "4",
        "--hook-name",
        HOOKS[1],
    )
    assert open_run(tmp_path / "c").sae.hook_name == HOOKS[1]


def test_model_and_text_or_a_store_are_one_interface(
    own: tuple[Path, Path], store: Path, tmp_path: Path, sae: Command
) -> None:
    """The same command with --model and --text trains on the same activations, in the order of its buffer."""
    small = ["--d-sae", "64", "--k", "4", "--hook-name", HOOKS[0]]
    sae("train", "--out", tmp_path / "live", *words(own), *small)
    sae("train", "--out", tmp_path / "stored", "--store", store, *small)
    live, stored = (open_run(tmp_path / name) for name in ("live", "stored"))
    assert live.sae.metadata["model_hash"] == stored.sae.metadata["model_hash"]
    assert live.sae.metadata["max_norm"] == pytest.approx(stored.sae.metadata["max_norm"], rel=1e-5)
    assert live.evaluation["tokens"] == stored.evaluation["tokens"]
    difference = live.evaluation["explained_variance"] - stored.evaluation["explained_variance"]
    assert abs(difference) < 0.05


def test_a_store_outlives_its_text(own: tuple[Path, Path], tmp_path: Path, sae: Command) -> None:
    text = tmp_path / "text.jsonl.gz"
    text.write_bytes(own[1].read_bytes())
    asked = ["--model", own[0], "--text", text, "--column", "body", "--tokens", "5000"]
    sae("capture", "--out", tmp_path / "store", "--hook-names", HOOKS[0], *asked)
    text.unlink()
    train = ["train", "--out", tmp_path / "run", "--store", tmp_path / "store", "--d-sae", "64", "--k", "4"]
    assert "CE loss recovered" in sae(*train)
    sae("index", tmp_path / "run")
    assert open_run(tmp_path / "run").labels.all()


def test_appending_text(own: tuple[Path, Path], tmp_path: Path, sae: Command) -> None:
    out, more = tmp_path / "store", tmp_path / "more.txt"
    sae("capture", "--out", out, "--hook-names", HOOKS[0], *words(own))
    rows = ActivationStore.open(out).n_rows
    more.write_text("class Reader:\n    pass\n" * 200)
    added = ["--text", more, "--tokens", "1000", "--append"]
    sae("capture", "--out", out, *added)
    grown = ActivationStore.open(out)
    assert grown.n_rows > rows
    assert grown.blocks.names[-1] == "more.txt"
    assert [capture["config"]["corpus"]["text"] for capture in grown.manifest["captures"]] == [
        [str(own[1])],
        [str(more)],
    ]


def test_verify_names_and_repair_mends(store: Path, tmp_path: Path, sae: Command) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("shuffled"))
    whole = contents(copy)
    path = copy / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    (lost,) = copy.glob("tokens/test-*/ids.npy")
    lost.unlink()
    sae("store", "verify", copy, status=1)
    printed = sae.output
    assert "shard-00000.safetensors was changed" in printed
    assert f"{lost.relative_to(copy)} is missing" in printed
    assert "Bit for bit as before." in sae("store", "repair", copy)
    assert contents(copy) == whole
    assert "Nothing to repair" in sae("store", "repair", copy)


def test_bad_input_is_one_sentence_and_leaves_no_trace(
    own: tuple[Path, Path], store: Path, tmp_path: Path, sae: Command
) -> None:
    out = tmp_path / "out"
    plain = tmp_path / "gpt2"
    tiny_hf_model("gpt2").save_pretrained(plain)
    before = tree(store)
    text = ["--text", own[1], "--column", "body", "--hook-names", HOOKS[0]]
    assert sae.refused("capture", "--out", out, "--model", plain, *text) == (
        f"{plain} holds no tokenizer: save tokenizer.json and tokenizer_config.json beside the weights."
    )
    assert "'text'" in sae.refused("capture", "--out", out, "--model", own[0], *text[:2], *text[-2:])
    missing = sae.refused("capture", "--out", out, "--hook-names", "blocks.7.hook_mlp_out", *words(own))
    assert missing == "blocks.7.hook_mlp_out does not exist: the layers of this model are 0 to 2."
    twice = sae.refused("capture", "--out", out, "--hook-names", HOOKS[0], HOOKS[0], *words(own))
    assert twice == "hook_names names a hook twice: name each once."
    other = sae.refused(
        "capture", "--out", store, "--hook-names", HOOKS[0], *words(own), "--stored-as", "int8"
    )
    assert other == (
        f"{store} holds other activations (their hook_names, stored_as differ): give another --out, or --append to"
        " add text to them."
    )
    train = ["train", "--out", out, "--store", store]
    assert sae.refused(*train, "--model", "builtin2", "--hook-name", HOOKS[0]) == (
        f"model is 'builtin2', and {store} was captured with {str(own[0])!r}: leave model out, or capture again."
    )
    assert sae.refused(*train) == (
        f"{store} holds no activations of blocks.3.hook_resid_post: it has {', '.join(HOOKS)}."
    )
    assert sae.refused("train", "--out", out, "--store", tmp_path / "nothing") == (
        f"{tmp_path / 'nothing'} is not a finished store of activations: it has no manifest.json."
    )
    assert sae.refused("train", "--out", out, "--order", "external") == (
        "order 'external' is for a store of activations: give --store, or leave it out."
    )
    assert sae.refused("store", "verify", tmp_path) == (
        f"{tmp_path} is no store of activations: it has no manifest.json."
    )
    assert tree(store) == before
    assert not out.exists()


def test_another_model_in_the_place_of_the_one_captured(
    own: tuple[Path, Path], tmp_path: Path, sae: Command
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(own[0], model)
    asked = ["--model", model, "--text", own[1], "--column", "body", "--tokens", "5000"]
    sae("capture", "--out", tmp_path / "store", "--hook-names", HOOKS[0], *asked)
    tiny_hf_model("gpt2", seed=1).save_pretrained(model)
    refused = sae.refused("train", "--out", tmp_path / "run", "--store", tmp_path / "store", "--d-sae", "64")
    assert refused == f"The weights of {model} are not those that {tmp_path / 'store'} was captured with."
    (tmp_path / "store" / "shard-00000.safetensors").unlink()
    assert sae.refused("store", "repair", tmp_path / "store") == (
        f"{tmp_path / 'store'} was captured with another model than {model}: give that one with --model."
    )
    assert "Bit for bit" in sae("store", "repair", tmp_path / "store", "--model", own[0])


def test_a_run_whose_store_was_captured_anew_is_refused(
    own: tuple[Path, Path], tmp_path: Path, sae: Command
) -> None:
    import shutil

    out = tmp_path / "store"
    sae("capture", "--out", out, "--hook-names", HOOKS[0], *words(own))
    train = ["train", "--out", tmp_path / "run", "--store", out, "--d-sae", "64", "--k", "4"]
    sae(*train)
    shutil.rmtree(out)
    sae("capture", "--out", out, "--hook-names", HOOKS[1], *words(own), "--outlier-factor", "5")
    assert sae.refused("index", tmp_path / "run") == (
        f"{out} holds other activations now than those that this run was trained on: move it away, or train another"
        " run."
    )
    shutil.rmtree(out)
    sae("index", tmp_path / "run")  # from the text and the model again


def test_a_loaded_model_and_a_store_of_ones_own(tmp_path: Path) -> None:
    """From Python: a store written from token blocks, without a word on where they are from."""
    model = tiny_language_model("gpt2")
    write_store(model, make_blocks(60), ["blocks.1.hook_mlp_out"], tmp_path / "store")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"text number {n} " * 9}) for n in range(6000)))
    config = TrainConfig(
        store=str(tmp_path / "store"),
        corpus=CorpusConfig(text=(str(texts),)),
        sae=SAEConfig(d_sae=64, k=4),
    )
    pipeline = Pipeline(tmp_path / "run", config, model=model)
    pipeline.start()
    assert pipeline.train().hook_name == "blocks.1.hook_mlp_out"
    assert pipeline.evaluate(pipeline.sae()).tokens > 0


def test_centred_activations_are_remembered_by_the_sae(
    own: tuple[Path, Path], tmp_path: Path, sae: Command
) -> None:
    asked = [*words(own), "--center-writing-weights"]
    sae("capture", "--out", tmp_path / "store", "--hook-names", HOOKS[0], *asked)
    rows = ActivationStore.open(tmp_path / "store").at().read(0, 8).float()
    assert rows.mean(-1).abs().max() < 2e-3 * rows.abs().max()
    sae("train", "--out", tmp_path / "run", "--store", tmp_path / "store", "--d-sae", "64", "--k", "4")
    run = open_run(tmp_path / "run")
    assert run.sae.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert run.model.center_writing_weights
    x = run.model.capture(torch.ones(1, 5, dtype=torch.int64), [HOOKS[0]])[HOOKS[0]]
    assert x.mean(-1).abs().max() < 1e-6


def test_a_run_is_resumed_from_a_store_in_the_other_order(store: Path, tmp_path: Path) -> None:
    """A checkpoint holds a position, which both orders know."""
    config = TrainConfig(store=str(store), hook_name=HOOKS[0], sae=SAEConfig(d_sae=64, k=4), batch_tokens=64)
    whole = Pipeline(tmp_path / "whole", config)
    whole.start()
    expected = whole.train()

    class Stop(Exception):
        pass

    from collections.abc import Iterator
    from contextlib import contextmanager
    from dataclasses import replace

    @contextmanager
    def stops(description: str, *, total: int, unit: str) -> Iterator:
        done = 0

        def step(n: int) -> None:
            nonlocal done
            done += n
            if description == "train" and done > 3000:
                raise Stop

        yield step

    interrupted = Pipeline(tmp_path / "resumed", config, progress=stops)
    interrupted.start()
    with pytest.raises(Stop):
        interrupted.train()
    assert list((tmp_path / "resumed" / "checkpoints").iterdir())
    resumed = Pipeline(tmp_path / "resumed", replace(config, order="external"))
    resumed.start()
    assert resumed.train().hash == expected.hash


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_a_store_that_can_be_used(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "app.cli", "capture", "--out", "store", "--tokens", "200000"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=HEAR_CTRL_C,
    )
    while not list((tmp_path / "store").glob("shard-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.strip() == "Interrupted. The same command continues where this one stopped."
    store = ActivationStore.open(tmp_path / "store")
    assert not store.complete
    assert store.at().read(0, 1).isfinite().all()
