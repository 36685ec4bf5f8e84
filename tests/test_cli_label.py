"""``sae label``: every way to name features, what is printed, and one sentence for words that do not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command import HEAR_CTRL_C, Command, environment
from fake_llm import FakeLLM, completion, error, fake_llm, particular
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_hf_model, tiny_tokenizer

from activations.blocks import TokenBlocks
from activations.files import write_manifest
from activations.models import LanguageModel
from app.cli import VERBS
from features.build import build_index
from features.labels import Labels
from features.patterns import Pattern
from sae.architectures.base import Weights
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.run import RunFolder, write_run_config

HOOK = "blocks.1.hook_resid_post"
D_SAE, CONTEXT = 160, 40
FEATURES = ["16", "20", "40", "43"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setitem(VERBS, "label", "give features names, and say how good the names are")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return Command(monkeypatch, capsys)


def text(seed: int, split: str) -> TokenBlocks:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (120, CONTEXT))
    often = rng.random(ids.shape) < 0.3
    ids[often] = rng.choice([10, 20, 30], often.sum())
    ids[rng.random(ids.shape) < 0.03] = END_OF_TEXT
    documents = np.tile(np.arange(len(ids), dtype=np.int32)[:, None], (1, CONTEXT))
    names = [f"{split} {n}" for n in range(len(ids))]
    return TokenBlocks(ids.astype(np.uint16), documents, names, split, "isolated", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny random model and a random SAE, with its index and the tokens of the score split."""
    root = tmp_path_factory.mktemp("label")
    tiny_hf_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    model = LanguageModel.load(str(root / "model"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(D_SAE, 32, generator=generator)
    written = torch.randn(D_SAE, 32, generator=generator)
    weights = Weights(rows, torch.zeros(D_SAE), written, torch.zeros(32))
    metadata = {"hook_name": HOOK, "model_hash": model.hash, "context_size": CONTEXT, "prepend_bos": False}
    trained = SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=2), weights, metadata)
    run = RunFolder(root / "tiny")
    config = TrainConfig(
        model=str(root / "model"), hook_name=HOOK, sae=trained.config, tokens=1000, context_length=CONTEXT
    )
    write_run_config(run.path, config)
    trained.save(run.sae)
    write_manifest(run.sae, "sae", {}, sae_hash=trained.hash)
    build_index(model, trained, text(1, "train"), run.index)
    inputs = {"tokenizer": model.tokenizer.hash, "tokens": 1000, "context": CONTEXT}
    text(2, "score").save(run.tokens / "score", inputs)
    return run.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with fake_llm() as running:
        yield running


def labels(run: Path) -> Labels:
    return Labels.open(run / "labels.sqlite")


def test_without_a_model_every_feature_gets_a_pattern(sae: Command, run: Path) -> None:
    printed = sae("label", run)
    assert len(labels(run).all("automatic")) == D_SAE
    n = sum(
        label.f1 is not None and label.f1 >= 0.5 > (label.control or 0)
        for label in labels(run).all().values()
    )
    assert f"F1 ≥ 0.5, and above the shuffled control: {n}" in printed
    assert len([line for line in printed.splitlines() if line.startswith("      F1 ")]) == 5


def test_a_model_labels_and_judges(sae: Command, run: Path, server: FakeLLM) -> None:
    words = (
        "label",
        run,
        "--model",
        "fake",
        "--endpoint",
        server.url,
        "--features",
        *FEATURES,
        "--cases",
        "20",
    )
    server.answer = particular
    printed = sae(*words)
    asked = len(server.requests)
    assert asked == 4 + 4 * 2 * 2 * 4  # labels; tasks, controls, prompts of 5 of 20 cases
    assert "4 features labelled." in printed
    assert "  detection  0.50, shuffled control 0.50; 50% of negatives hard" in printed
    assert "of 20 cases (5 hard), control 0.50; " in printed
    assert f"Spent: {asked} requests, {110 * asked:,} tokens." in printed
    found = labels(run).all("llm")
    assert [str(feature) for feature in found] == FEATURES
    assert all({score.kind for score in label.scores} == {"detection", "fuzzing"} for label in found.values())
    assert not (run / "unlabelled.json").exists()
    change = labels(run).change()
    assert "Spent: 0 requests, 0 tokens." in sae(*words)
    assert (len(server.requests), labels(run).change()) == (asked, change)


def test_what_it_would_take_is_told_without_asking(sae: Command, run: Path, server: FakeLLM) -> None:
    prices = ("--price-in", "1000", "--price-out", "2000")
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--top", "10", "--cases", "20")
    printed = sae(*words, *prices, "--dry-run")
    assert printed.startswith(
        "10 features: 170 prompts of about "
    )  # 10 labels; 2 tasks, control, 4 prompts of 5 each
    assert "cost about" in printed
    assert server.requests == []
    assert not (run / "replies.sqlite").exists()
    estimated = int(printed.split("prompts of about ")[1].split(" tokens")[0].replace(",", ""))
    server.answer = particular
    sae(*words)
    sent = sum(len(m["content"].encode()) for body in server.requests for m in body["messages"])
    assert estimated == pytest.approx(sent / 3.5, rel=0.15)


def test_a_budget_ends_it_and_the_same_command_goes_on(sae: Command, run: Path, server: FakeLLM) -> None:
    server.usage = (1000, 100)
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--features", *FEATURES, "--no-score")
    prices = ("--price-in", "10", "--price-out", "40", "--max-cost", "0.08", "--concurrency", "1")
    printed = sae(*words, *prices)
    assert "Stopped: the next request could exceed the budget of a cost of 0.08." in printed
    assert "the same command goes on from here" in printed
    done = len(labels(run).all("llm"))
    assert 0 < done < 4
    assert f"cost {done * 0.014:.4f}" in printed
    sae(*words)
    assert len(labels(run).all("llm")) == len(server.requests) == 4


def test_features_that_fail_are_noted_and_the_others_go_on(sae: Command, run: Path, server: FakeLLM) -> None:
    server.script = [completion("I would rather not.")] * 2
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--features", *FEATURES, "--no-score")
    printed = sae(*words, "--concurrency", "1")
    assert "3 features labelled." in printed
    assert f"1 feature got none (each is in {run / 'unlabelled.json'})" in printed.replace("\n", "")
    noted = json.loads((run / "unlabelled.json").read_text())["features"]
    assert list(noted) == [FEATURES[0]]
    assert noted[FEATURES[0]]["model"] == "fake"
    assert "the model said 'I would rather not.'" in noted[FEATURES[0]]["reason"]


def test_notes_of_failures_outlive_other_commands(sae: Command, run: Path, server: FakeLLM) -> None:
    def noted() -> dict[str, str]:
        found = json.loads((run / "unlabelled.json").read_text())["features"]
        return {feature: each["reason"] for feature, each in found.items()}

    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--no-score", "--concurrency", "1")
    server.script = [completion("hm")] * 2
    sae(*words, "--features", "16", "20")
    # Another command, which ends by an error that is about all features.
    server.script = [completion("dunno")] * 2 + [completion("LABEL: x"), error(401, "expired")]
    sae.refused(*words, "--features", "40", "43", "50", "70")
    assert list(noted()) == ["16", "40"]
    assert "'hm'" in noted()["16"]
    assert "'dunno'" in noted()["40"]
    sae(*words, "--features", "16", "70", "--seed", "1")
    assert list(noted()) == ["40"]  # what has a label now is struck off
    (run / "unlabelled.json").write_text("{")  # only notes: no reason to do nothing
    server.script = [completion("hm")] * 2
    sae(*words, "--features", "16", "20", "--seed", "2")
    assert list(noted()) == ["16"]


def test_no_label_at_all_is_an_error(sae: Command, run: Path, server: FakeLLM) -> None:
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--concurrency", "1")
    server.answer = lambda body: "LABEL: unclear"
    said = sae.refused(*words, "--features", *FEATURES)
    assert said == "The 4 features got no label: the model finds nothing in common."
    server.script = [error(403, "content moderated")] * 2
    assert sae.refused(*words, "--features", "50") == (
        "Feature 50 got no label: the server answered 403: content moderated."
    )
    assert list(json.loads((run / "unlabelled.json").read_text())["features"]) == [*FEATURES, "50"]
    assert sae.refused(*words, "--features", "70", "--max-tokens-total", "9") == (
        "Feature 70 got no label: the next request could exceed the budget of 9 tokens."
    )


def test_labels_are_shown_with_their_score_or_that_they_have_none(
    sae: Command, run: Path, server: FakeLLM
) -> None:
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--features", "16")
    printed = sae(*words, "--no-score")
    assert "1 feature labelled." in printed
    assert "    16: words about files · not scored" in printed
    sae(*words, "--cases", "20")
    assert "    16: words about files · detection 0.50" in sae(*words, "--no-score")


def test_a_label_of_ones_own_with_a_pattern_is_scored_at_once(sae: Command, run: Path) -> None:
    store = labels(run)
    printed = sae("label", run, "--feature", "16", "--text", "a thought")
    assert "16: a thought · not scored" in printed
    assert "It is not scored: it has no pattern." in printed
    assert store.all("person")[16].scores == ()
    printed = sae("label", run, "--feature", "16", "--text", "anything", "--pattern", "/(?s)./")
    (score,) = store.all("person")[16].scores
    assert (score.kind, score.recall, score.judge) == ("tokens", 1.0, "pattern")
    assert f"16: anything · F1 {score.value:.2f}" in printed
    assert "precision " in printed
    assert sae("label", run, "--feature", "16", "--text", "") == "Your label of feature 16 is taken away.\n"
    assert 16 not in store.all("person")
    assert sae.refused("label", run, "--feature", "999", "--text", "x") == (
        "There is no feature 999: tiny has the features 0 to 159."
    )
    assert "is no regular expression" in sae.refused(
        "label", run, "--feature", "16", "--text", "x", "--pattern", "/(/"
    )
    assert 16 not in store.all("person")


def test_lists_and_the_most_active(sae: Command, run: Path, server: FakeLLM) -> None:
    labels(run).add_to_list("mine", [43, 20])
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--no-score")
    sae(*words, "--list", "mine")
    assert sorted(labels(run).all("llm")) == [20, 43]
    sae(*words, "--top", "5")
    assert len(labels(run).all("llm")) in (5, 6, 7)
    assert sae.refused(*words, "--list", "yours") == "There is no list 'yours': the lists are 'mine'."
    assert (
        sae.refused(*words, "--features", "3", "160")
        == "There is no feature 160: tiny has the features 0 to 159."
    )


def test_labels_that_are_there_are_judged(sae: Command, run: Path, server: FakeLLM) -> None:
    store = labels(run)
    store.set(16, "everything", pattern='{"any_of": [{}]}')
    store.set(20, "something else", pattern=Pattern.of_tokens(["self"]).to_json())
    store.set(40, "words in my head")
    printed = sae("label", run, "--score-only", "--cases", "20")
    assert "2 person labels judged by their own patterns" in printed
    assert "1 × it has no pattern" in printed
    assert [score.judge for score in store.all("person")[16].scores] == ["pattern"] * 2
    assert store.all("person")[40].scores == ()
    words = ("label", run, "--score-only", "--which", "person", "--cases", "20")
    printed = sae(*words, "--model", "fake", "--endpoint", server.url, "--all")
    assert "3 person labels judged by fake" in printed
    assert [score.judge for score in store.all("person")[40].scores] == ["fake"] * 2
    assert store.all("llm") == {}
    assert sae.refused("label", run, "--score-only", "--which", "llm") == (
        "None of these features has a label by a language model to judge: choose others, or leave --which out."
    )
    assert sae.refused("label", run, "--score-only", "--features", "5") == (
        f"None of these features has a label to judge: make some with sae label {run}."
    )


def test_labels_are_imported(sae: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("feature,label\n3,three\n5,five\n")
    assert (
        sae("label", run, "--from", tmp_path / "mine.csv")
        == f"2 labels imported from {tmp_path / 'mine.csv'}.\n"
    )
    assert [label.text for label in labels(run).all("import").values()] == ["three", "five"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "m"], "Say which features the language model gets: --features, --list, --top or --all."),
        (["--model", "", "--all"], "--model is empty: give the name of a language model."),
        (["--local", "", "--all"], "--local is empty: give the name of a language model."),
        (["--feature", "3"], "A label of your own needs both: --feature and --text."),
        (["--pattern", "x"], "A label of your own needs both: --feature and --text."),
        (
            ["--feature", "3", "--text", "x", "--top", "3"],
            "--top has no effect on a label of your own: leave it out.",
        ),
        (
            ["--feature", "3", "--text", "", "--pattern", "x"],
            "A pattern belongs to a label: give the label as well.",
        ),
        (["--model", "m", "--local", "x"], "--model and --local exclude each other: give one of them."),
        (["--endpoint", "u", "--local", "x"], "--endpoint and --local exclude each other: give one of them."),
        (["--local", "x", "--timeout", "5"], "--timeout and --local exclude each other: give one of them."),
        (
            ["--model", "m", "--all", "--no-score", "--cases", "8"],
            "--no-score and --cases exclude each other: give one of them.",
        ),
        (["--model", "m", "--top", "3", "--all"], "--top and --all exclude each other: give one of them."),
        (
            ["--top", "3"],
            "--top goes with a language model or --score-only: give --model, --local or --score-only.",
        ),
        (["--max-cost", "3"], "--max-cost is about a language model: give --model or --local."),
        (["--dry-run"], "--dry-run is about a language model: give --model or --local."),
        (["--from", "x.csv", "--all"], "--all has no effect on --from: leave it out."),
        (["--which", "llm"], "--which says whose labels --score-only judges: give both."),
        (
            ["--score-only", "--no-score", "--model", "m", "--all"],
            "--no-score and --score-only exclude each other: give one of them.",
        ),
        (
            ["--model", "m", "--all", "--price-in", "1"],
            "A price is missing: give both --price-in and --price-out.",
        ),
        (
            ["--model", "m", "--all", "--cases", "7"],
            "A score from 7 cases cannot be made: give an even number, 8 or more.",
        ),
        (
            ["--model", "m", "--endpoint", "http://x/v1", "--all", "--retries", "-1"],
            "-1 retries are impossible: give 0 or more.",
        ),
        (
            ["--model", "m", "--endpoint", "http://x/v1", "--all", "--timeout", "0"],
            "A timeout of 0 seconds is none: give more than 0.",
        ),
        (["--model", "m", "--top", "0"], "--top 0 chooses no feature: give 1 or more."),
        (
            ["--model", "m", "--all", "--concurrency", "0"],
            "--concurrency 0 makes no request: give 1 or more.",
        ),
        (
            ["--model", "m", "--all", "--max-cost", "1"],
            "A limit in money needs prices: give what a million tokens cost, in and out.",
        ),
        (
            ["--model", "m", "--all"],
            "OPENAI_API_KEY is not set: set it to your key, or give the URL of a local server with --endpoint.",
        ),
    ],
)
def test_words_that_do_not_fit(sae: Command, finished: Path, words: list[str], sentence: str) -> None:
    assert sae.refused("label", finished, *words) == sentence


def test_servers_that_do_not_work_are_one_sentence(sae: Command, run: Path, server: FakeLLM) -> None:
    words = ("label", run, "--model", "fake", "--endpoint", server.url, "--features", *FEATURES, "--no-score")
    server.script = [completion("LABEL: one"), error(401, "expired key")]
    assert sae.refused(*words, "--concurrency", "1") == (
        f"{server.url} does not accept the key in OPENAI_API_KEY (401: expired key)."
    )
    assert [label.text for label in labels(run).all("llm").values()] == ["one"]
    server.script = [error(404, "unknown model")] * 8
    assert "has no model 'fake' (404: unknown model)" in sae.refused(*words)
    with fake_llm() as gone:
        pass
    nobody = sae.refused("label", run, "--model", "m", "--endpoint", gone.url, "--top", "1", "--no-score")
    assert nobody.startswith(f"Nobody answers at {gone.url} (")


def test_ctrl_c_keeps_what_was_done(finished: Path, run: Path, server: FakeLLM) -> None:
    server.delay_seconds = 0.3
    words = [
        "label",
        str(run),
        "--model",
        "fake",
        "--endpoint",
        server.url,
        "--features",
        *FEATURES,
        "--no-score",
    ]
    code = "from app.cli import VERBS, main; VERBS['label'] = ''; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--concurrency", "1"],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=HEAR_CTRL_C,
    )
    while len(server.requests) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    begun = time.monotonic()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command continues where this one stopped." in printed
    assert time.monotonic() - begun < 10  # nobody waits for the request on its way
    assert len(labels(run).all("llm")) == 2
