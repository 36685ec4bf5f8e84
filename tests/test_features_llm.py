"""Labels by a language model, and scores by any judge: what is asked, what is right, and what is kept."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_llm import FakeLLM, completion, error, fake_llm, particular
from killing import ended, forked
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_language_model

from activations.blocks import TokenBlocks
from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.models import LanguageModel
from features.build import build_index
from features.index import FeatureIndex
from features.labels import Label, Labels, Score
from features.llm.budget import Budget
from features.llm.cache import ReplyCache
from features.llm.cases import LEAST_CASES, TASKS, Case, Cases, Task
from features.llm.endpoint import Endpoint
from features.llm.explain import Explained, evidence, explain_features, most_active, shown_examples
from features.llm.judge import LLMJudge, PatternJudge
from features.llm.scoring import balanced_score, partners, score_labels
from features.llm.session import NoAnswer, Session
from features.patterns import Pattern
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

HOOK = "blocks.1.hook_resid_post"  # behind attention: the same token fires here and not there
D_SAE, DEAD = 160, 1
FEATURES = [16, 20, 40, 43, 50, 70, 94, 127, 134, 150]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def text(seed: int, split: str) -> TokenBlocks:
    """Random tokens, three of them often; every fifth block ends in padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (120, 40))
    often = rng.random(ids.shape) < 0.3
    ids[often] = rng.choice([10, 20, 30], often.sum())
    ids[rng.random(ids.shape) < 0.03] = END_OF_TEXT
    documents = np.tile(np.arange(len(ids), dtype=np.int32)[:, None], (1, ids.shape[1]))
    ids[::5, -7:], documents[::5, -7:] = END_OF_TEXT, -1
    names = [f"{split} {n}" for n in range(len(ids))]
    return TokenBlocks(ids.astype(np.uint16), documents, names, split, "isolated", False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(scope="module")
def sae(model: LanguageModel) -> SparseAutoencoder:
    """TopK with random weights that fires rarely enough to be silent in many windows; one feature never does."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(D_SAE, 32, generator=generator)
    rows[DEAD], bias = 0, torch.zeros(D_SAE)
    bias[DEAD] = -1
    weights = Weights(rows, bias, torch.randn(D_SAE, 32, generator=generator), torch.zeros(32))
    return SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=2), weights, {"hook_name": HOOK})


@pytest.fixture(scope="module")
def index(
    model: LanguageModel, sae: SparseAutoencoder, tmp_path_factory: pytest.TempPathFactory
) -> FeatureIndex:
    return build_index(model, sae, text(1, "train"), tmp_path_factory.mktemp("index") / "train")


@pytest.fixture(scope="module")
def score_index(
    model: LanguageModel, sae: SparseAutoencoder, tmp_path_factory: pytest.TempPathFactory
) -> FeatureIndex:
    return build_index(model, sae, text(2, "score"), tmp_path_factory.mktemp("index") / "score")


@pytest.fixture(scope="module")
def cases(
    index: FeatureIndex, score_index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder
) -> Cases:
    return Cases(score_index, index, model, sae, n_cases=20)


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with fake_llm() as running:
        yield running


def talk(server: FakeLLM, folder: Path, budget: Budget | None = None) -> Session:
    chat = Endpoint("fake", server.url, timeout_seconds=10)
    return Session(chat, ReplyCache(folder / "replies.sqlite"), budget, retries=1, back_off_seconds=0.01)


def store(folder: Path) -> Labels:
    return Labels.open(folder / "labels.sqlite")


# The explainer.


def test_the_evidence_is_what_the_index_knows(index: FeatureIndex) -> None:
    for feature in FEATURES:
        found = evidence(index, feature)
        assert [token for token, _ in found.tokens] == [t.token for t in index.top_tokens(feature)[:10]]
        assert [token for token, _ in found.after] == [t.token for t in index.next_tokens(feature)[:10]]
        assert list(found.promoted) == [token for token, _, _ in index.promoted(feature)[:10]]
        values = [example.value for example in shown_examples(index, feature)]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(float(index.max[feature]))
        bands = {round(value, 6) for value in values}
        weakest = index.range_examples(feature, 32)[-1][1][0]
        assert round(weakest.value, 6) in bands  # weak firings too
        assert found == evidence(index, feature)


def test_the_prompt_shows_every_list_and_marks_what_fires(
    server: FakeLLM, index: FeatureIndex, tmp_path: Path
) -> None:
    (feature,) = most_active(index, 1)
    explain_features(index, [feature], talk(server, tmp_path), store(tmp_path))
    (body,) = server.requests
    question = body["messages"][1]["content"]
    lines = question.splitlines()
    examples = shown_examples(index, feature)
    assert len(re.findall(r"^\d+\. ", question, re.MULTILINE)) == len(examples)
    for number, example in enumerate(examples, 1):
        line = next(line for line in lines if line.startswith(f"{number}. ")).removeprefix(f"{number}. ")
        inside = "".join(part for place, part in enumerate(re.split("[«»]", line)) if place % 2)
        fired = [token for token, a in zip(example.tokens, example.activations, strict=True) if a > 0]
        shown = "".join(fired).translate(str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"}))
        assert len(inside) == len(shown)
    assert all(title in question for title in ("Tokens on which", "Tokens right after", "makes more likely"))


def test_labels_say_where_they_come_from(server: FakeLLM, index: FeatureIndex, tmp_path: Path) -> None:
    labels, session = store(tmp_path), talk(server, tmp_path)
    result = explain_features(index, FEATURES, session, labels)
    assert [label.feature for label in result.labels] == FEATURES
    assert (result.failed, result.stopped) == ({}, None)
    for label in result.labels:
        assert labels.get(label.feature) == label
        assert (label.text, label.source, label.author) == ("words about files", "llm", "fake")
        assert len(label.prompt_hash) == len(label.examples_hash) == 64
    assert len({label.examples_hash for label in result.labels}) == len(FEATURES)


def test_a_second_run_asks_nothing_and_stores_nothing(
    server: FakeLLM, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    first = explain_features(index, FEATURES, talk(server, tmp_path), labels)
    asked, change = len(server.requests), labels.change()
    session = talk(server, tmp_path)
    again = explain_features(index, FEATURES, session, labels)
    assert again.labels == first.labels
    assert [label.id for label in again.labels] == [label.id for label in first.labels]
    assert (len(server.requests), labels.change(), session.budget.tokens) == (asked, change, 0)


def test_requests_are_made_at_the_same_time(server: FakeLLM, index: FeatureIndex, tmp_path: Path) -> None:
    server.delay_seconds = 0.1
    explain_features(index, FEATURES, talk(server, tmp_path), store(tmp_path), concurrency=4)
    assert server.most_at_once == 4


def test_a_feature_that_fails_is_told_and_the_others_go_on(
    server: FakeLLM, index: FeatureIndex, tmp_path: Path
) -> None:
    server.script = [completion("dunno")] * 2
    labels = store(tmp_path)
    result = explain_features(index, [DEAD, *FEATURES], talk(server, tmp_path), labels, concurrency=1)
    assert result.failed == {
        DEAD: "it never fires in the index",
        FEATURES[
            0
        ]: "There must be one line that begins with LABEL:, and there is none; the model said 'dunno'",
    }
    assert [label.feature for label in result.labels] == FEATURES[1:] == list(labels.all())
    server.answer = lambda body: "LABEL: unclear"
    result = explain_features(index, FEATURES, talk(server, tmp_path / "b"), store(tmp_path / "b"))
    assert set(result.failed.values()) == {"the model finds nothing in common"}


def test_no_budget_is_exceeded_and_the_next_one_goes_on(
    server: FakeLLM, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    server.usage = (900, 100)
    session = talk(server, tmp_path, Budget(9000))
    first = explain_features(index, FEATURES, session, labels, concurrency=3)
    assert first.stopped == "the next request could exceed the budget of 9,000 tokens"
    assert 0 < len(first.labels) < len(FEATURES)
    assert session.budget.tokens == 1000 * len(server.requests) <= 9000
    assert sorted(labels.all()) == [label.feature for label in first.labels]
    second = explain_features(index, FEATURES, talk(server, tmp_path), labels)
    assert [label.feature for label in second.labels] == FEATURES
    assert len(server.requests) == len(FEATURES)


def test_an_error_for_all_keeps_what_was_done(server: FakeLLM, index: FeatureIndex, tmp_path: Path) -> None:
    server.script = [completion("LABEL: one"), completion("LABEL: two"), error(401, "expired")]
    labels = store(tmp_path)
    result = Explained()
    with pytest.raises(InputError):
        explain_features(index, FEATURES, talk(server, tmp_path), labels, concurrency=1, result=result)
    assert [label.text for label in result.labels] == ["one", "two"]
    assert [label.text for label in labels.all().values()] == ["one", "two"]


def test_killed_and_begun_again(server: FakeLLM, index: FeatureIndex, tmp_path: Path) -> None:
    server.delay_seconds = 0.05

    def work() -> None:
        explain_features(index, FEATURES, talk(server, tmp_path), store(tmp_path), concurrency=2)

    process = forked(work)
    while len(server.requests) < 6:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == signal.SIGKILL
    kept = len(store(tmp_path).all())
    assert 2 <= kept < len(FEATURES)
    time.sleep(0.2)  # the server is done with what it was asked
    before = len(server.requests)
    result = explain_features(index, FEATURES, talk(server, tmp_path), store(tmp_path))
    assert [label.feature for label in result.labels] == FEATURES
    assert len(server.requests) - before <= len(FEATURES) - kept
    assert len(server.requests) <= len(FEATURES) + 2  # only those on their way were made twice
    assert all(len(store(tmp_path).history(feature)) == 1 for feature in FEATURES)


def test_another_models_label_takes_the_place(server: FakeLLM, index: FeatureIndex, tmp_path: Path) -> None:
    labels = store(tmp_path)
    explain_features(index, [16], talk(server, tmp_path), labels)
    other = talk(server, tmp_path)
    other.chat = Endpoint("other", server.url)
    explain_features(index, [16], other, labels)
    assert [label.author for label in labels.history(16)] == ["other", "fake"]
    explain_features(index, [16], talk(server, tmp_path), labels)
    assert [label.author for label in labels.history(16)] == ["fake", "other", "fake"]
    assert len(server.requests) == 2


def test_another_servers_model_of_the_same_name_is_asked(
    server: FakeLLM, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    explain_features(index, [16], talk(server, tmp_path), labels)
    with fake_llm() as other:
        other.answer = lambda body: "LABEL: something else"
        found = explain_features(index, [16], talk(other, tmp_path), labels)
    assert [label.text for label in found.labels] == ["something else"]
    assert len(labels.history(16)) == 2


# The cases.


def windows_of(model: LanguageModel, sae: SparseAutoencoder, score_index: FeatureIndex) -> np.ndarray:
    """Dense ``fires [positions, d_sae]`` over the score split, nothing at excluded positions."""
    blocks, rows = score_index.blocks, []
    for n in range(blocks.n_blocks):
        ids = blocks.ids_tensor(n, n + 1)
        x = model.capture(ids, [HOOK], attention_mask=blocks.attention_mask(n, n + 1))[HOOK][0]
        kept = (ids[0].numpy() != END_OF_TEXT) & (blocks.documents[n] >= 0)
        rows.append((sae.encode(x).to_dense() > 0).numpy() & kept[:, None])
    return np.concatenate(rows)


def test_answers_are_right(
    cases: Cases, model: LanguageModel, sae: SparseAutoencoder, score_index: FeatureIndex
) -> None:
    dense = windows_of(model, sae, score_index)
    for feature in FEATURES:
        for task in TASKS:
            found = cases.of(feature, task)
            assert sum(case.answer for case in found) * 2 == len(found) >= LEAST_CASES
            for case in found:
                stop = case.start + len(case.tokens)
                fires = dense[case.start : stop, feature]
                assert tuple(score_index.pieces(case.start, stop)) == case.tokens
                if task == "detection":
                    assert case.answer == fires.any()
                elif case.answer:
                    assert (case.marks == fires).all()
                else:
                    assert case.marks.any()
                    assert not (case.marks & fires).any()


def test_positives_are_of_all_tenths_and_negatives_half_hard(cases: Cases, score_index: FeatureIndex) -> None:
    for feature in FEATURES:
        bands = [examples for _, examples in score_index.range_examples(feature, 32)]
        for task in TASKS:
            found = cases.of(feature, task)
            positives = [case.start for case in found if case.answer]
            firing = [case.start for case in found if case.kind != "hard"]
            assert len(set(firing)) == len(firing)  # none is there twice, not even with other marks
            covered = sum(any(e.position - e.peak in positives for e in examples) for examples in bands)
            assert covered >= min(len(bands), len(positives))  # one of each tenth before another of any
            kinds = [case.kind for case in found if not case.answer]
            n_hard = kinds.count("hard")
            # Few windows are left in which the feature fires, for wrong marks: near misses fill up.
            assert n_hard == len(kinds) // 2 or (task == "fuzzing" and n_hard > len(kinds) // 2)


def test_hard_negatives_are_tokens_of_the_feature_where_it_is_silent(
    cases: Cases,
    index: FeatureIndex,
    score_index: FeatureIndex,
    model: LanguageModel,
    sae: SparseAutoencoder,
) -> None:
    dense = windows_of(model, sae, score_index)
    ids, documents = (each.reshape(-1) for each in (score_index.blocks.ids, score_index.blocks.documents))
    for feature in FEATURES:
        tokens = {token.token_id for token in index.top_tokens(feature)[:10]}
        for task in TASKS:
            hard = [case for case in cases.of(feature, task) if case.kind == "hard"]
            assert len({case.start // 40 for case in hard}) == len(hard) > 0  # no two of one block
            for case in hard:
                assert ids[case.start + case.place] in tokens
                assert not dense[case.start : case.start + len(case.tokens), feature].any()
                # A window as that of a firing there: as far into the past, and not into padding.
                position = case.start + case.place
                block = position // 40 * 40
                length = int((documents[block : block + 40] >= 0).sum())
                assert case.start == max(position - 19, block)
                assert case.start + len(case.tokens) == min(position - 19 + 32, block + length)


def test_hard_negatives_do_not_depend_on_who_else_is_judged(
    cases: Cases, index: FeatureIndex, score_index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder
) -> None:
    few = Cases(score_index, index, model, sae, features=[40, 94], n_cases=20)
    for feature in (40, 94):
        for task in TASKS:
            a, b = ([(c.start, c.marks.tolist()) for c in some.of(feature, task)] for some in (few, cases))
            assert a == b
    with pytest.raises(AssertionError, match="feature 16 is not among those"):
        few.of(16, "detection")


def test_nothing_can_be_told_from_the_number_of_marks(cases: Cases) -> None:
    seen = []
    for feature in FEATURES:
        found = cases.of(feature, "fuzzing")
        marks = {
            answer: sorted(c.marks.sum() for c in found if c.answer == answer) for answer in (True, False)
        }
        assert marks[True] == marks[False]
        seen += [int(case.marks.sum()) for case in found if case.kind == "hard"]
        assert all(case.marks[case.place] for case in found if case.kind == "hard")
    assert max(seen) > 1


def test_of_a_real_model_nearly_half_of_the_negatives_are_hard(tmp_path: Path) -> None:
    """Random directions in the bundled model, on Python text."""
    builtin = LanguageModel.load("builtin")
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:90]:
        (texts / path.name).write_bytes(path.read_bytes()[:3000])
    corpus = Corpus(CorpusConfig(text=(str(texts),)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, builtin.d_model, generator=generator)
    weights = Weights(rows, torch.zeros(256), rows.clone(), torch.zeros(builtin.d_model))
    random = SparseAutoencoder(SAEConfig(d_sae=256, k=4), weights, {"hook_name": "blocks.3.hook_resid_post"})
    train, score = (
        build_index(builtin, random, corpus.blocks(builtin.tokenizer, split, 12_000, 128), tmp_path / split)
        for split in ("train", "score")
    )
    live = np.flatnonzero((train.count > 0) & (score.count > 0))
    made = Cases(score, train, builtin, random, features=live.tolist())
    for task in TASKS:
        found = [made.of(int(feature), task) for feature in live]
        found = [some for some in found if len(some) >= LEAST_CASES]
        negatives = [[case.kind for case in some if not case.answer] for some in found]
        share = sum(kinds.count("hard") for kinds in negatives) / sum(map(len, negatives))
        without = np.mean([kinds.count("hard") == 0 for kinds in negatives])
        assert len(found) > 20
        assert share > 0.4
        assert without < 0.1


def test_cases_are_the_same_in_every_run_and_shuffled(
    cases: Cases, index: FeatureIndex, score_index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder
) -> None:
    def shown(found: Sequence[Case]) -> list[tuple[int, list[bool], bool]]:
        return [(case.start, case.marks.tolist(), case.answer) for case in found]

    again = Cases(score_index, index, model, sae, n_cases=20)
    other = Cases(score_index, index, model, sae, n_cases=20, seed=1)
    for task in TASKS:
        assert shown(again.of(40, task)) == shown(cases.of(40, task))
        assert shown(other.of(40, task)) != shown(cases.of(40, task))
    answers = [case.answer for case in cases.of(40, "detection")]
    assert answers not in (sorted(answers), sorted(answers, reverse=True))


def test_no_case_was_shown_to_the_explainer(
    index: FeatureIndex, score_index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder
) -> None:
    with pytest.raises(InputError) as caught:
        Cases(index, index, model, sae)
    assert str(caught.value) == (
        "The score split shares 120 documents with the train split, train 0 for one: build the token blocks again."
    )


def test_text_that_stands_in_both_splits_is_no_case(
    index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    """Licences and the like: the same blocks under other names."""
    twin = build_index(model, sae, text(1, "score"), tmp_path / "twin")
    found = Cases(twin, index, model, sae, n_cases=20)
    for feature in FEATURES:
        shown = {"".join(example.tokens) for example in shown_examples(index, feature)}
        for task in TASKS:
            assert not shown & {"".join(case.tokens) for case in found.of(feature, task)}


def test_documents_shorter_than_a_window(
    index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    blocks = text(2, "score")
    ids, documents = blocks.ids.copy(), blocks.documents.copy()
    ids[:, 20:], documents[:, 20:] = END_OF_TEXT, -1
    short = build_index(model, sae, replace(blocks, ids=ids, documents=documents), tmp_path / "short")
    found = Cases(short, index, model, sae, n_cases=20)
    for task in TASKS:
        cases = found.of(FEATURES[3], task)
        assert {case.kind for case in cases if not case.answer} <= {"hard", "random"}
        assert all(len(case.tokens) <= 20 for case in cases)


def test_impossible_numbers_of_cases(
    index: FeatureIndex, score_index: FeatureIndex, model: LanguageModel, sae: SparseAutoencoder
) -> None:
    for n_cases in (0, 6, 9):
        with pytest.raises(InputError) as caught:
            Cases(score_index, index, model, sae, n_cases=n_cases)
        assert "give an even number, 8 or more" in str(caught.value)


# The scores.


def test_balanced_accuracy_is_the_mean_of_both_rates() -> None:
    right = [True] * 4 + [False] * 6
    given = [True, True, True, False, True, False, False, False, False, False]
    score = balanced_score("detection", right, given, judge="me", control=0.4)
    assert score is not None
    assert score.value == pytest.approx((3 / 4 + 5 / 6) / 2)
    assert (score.n, score.judge, score.control, score.kind) == (10, "me", 0.4, "detection")
    assert (score.precision, score.recall) == (3 / 4, 3 / 4)
    # Wilson's intervals of 3 of 4 and of 5 of 6, solved by hand: (rate - p)² = 1.96² p (1 - p) / n.
    assert score.low == pytest.approx((0.30064 + 0.43650) / 2, abs=1e-4)
    assert score.high == pytest.approx((0.95441 + 0.96995) / 2, abs=1e-4)
    always = balanced_score("detection", right, [True] * 10, judge="me")
    assert always is not None
    assert always.value == 0.5
    assert balanced_score("fuzzing", [True], [True], judge="me") is None


def test_partners_say_something_else_and_stay() -> None:
    labels = [Label(feature, f"about {feature % 7}", "llm") for feature in range(40)]
    found = partners(labels)
    for label, partner in zip(labels, found, strict=True):
        assert partner is not None
        assert partner.feature != label.feature
        assert partner.text != label.text
    assert len({partner.feature for partner in found if partner}) > 20
    changed = sum(a != b for a, b in zip(partners(labels[1:]), found[1:], strict=True))
    assert changed <= 3
    assert partners([labels[0]]) == [None]
    assert partners([labels[0]], [labels[0], labels[7], labels[3]]) == [labels[3]]


class Oracle:
    """Knows where every feature fires, and takes a label at its word: "feature 3"."""

    at_once = 5
    name = "oracle"

    def __init__(self, dense: np.ndarray) -> None:
        self.dense = dense
        self.asked: list[tuple[Task, str, int]] = []

    def can_judge(self, label: Label) -> bool:
        return label.text != "mute"

    def answers(self, task: Task, label: Label, cases: Sequence[Case]) -> list[bool]:
        self.asked.append((task, label.text, len(cases)))
        if label.text == "silent":
            raise NoAnswer("it says nothing")
        column = self.dense[:, int(label.text.split()[-1])]
        fires = [column[case.start : case.start + len(case.tokens)] for case in cases]
        if task == "detection":
            return [bool(each.any()) for each in fires]
        return [bool((case.marks == each).all()) for case, each in zip(cases, fires, strict=True)]


def stored(labels: Labels, texts: dict[int, str]) -> list[Label]:
    labels.add([Label(feature, text, "llm", "fake") for feature, text in texts.items()])
    return list(labels.all("llm").values())


def test_a_true_label_scores_one_and_its_control_much_less(
    cases: Cases, model: LanguageModel, sae: SparseAutoencoder, score_index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    judged = stored(labels, {feature: f"feature {feature}" for feature in FEATURES})
    judge = Oracle(windows_of(model, sae, score_index))
    result = score_labels(judged, cases, judge, labels)
    assert (result.failed, result.stopped) == ({}, None)
    for label in labels.all("llm").values():
        assert label.id is not None
        assert list(label.scores) == sorted(result.scores[label.id], key=lambda s: label.scores.index(s))
        for task in TASKS:
            score = label.score_of(task)
            assert score is not None
            assert (score.value, score.high, score.judge) == (1.0, 1.0, "oracle")
            chosen = cases.of(label.feature, task)
            assert score.n == len(chosen)
            assert result.hard[label.id][task] == sum(case.kind == "hard" for case in chosen)
            assert score.low is not None
            assert 0.5 < score.low < 1
            assert score.control is not None
            assert score.control < 1
    controls = [label.score_of("fuzzing").control for label in labels.all("llm").values()]  # type: ignore[union-attr]
    assert np.mean(controls) == pytest.approx(0.5, abs=0.1)
    assert max(n for _, _, n in judge.asked) == 5
    change = labels.change()
    score_labels(list(labels.all("llm").values()), cases, judge, labels)
    assert labels.change() == change  # the same scores are no news


def test_what_cannot_be_judged_is_told(
    cases: Cases, model: LanguageModel, sae: SparseAutoencoder, score_index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    judged = stored(labels, {DEAD: "feature 1", 16: "mute", 20: "silent", 40: "feature 40"})
    judge = Oracle(windows_of(model, sae, score_index))
    result = score_labels(judged, cases, judge, labels)
    reasons = {label.feature: result.failed.get(label.id or 0) for label in judged}
    assert reasons == {
        DEAD: "too few cases of fuzzing: the feature fires, or is silent, too rarely",
        16: "it has no pattern, and without a language model nothing else can be judged",
        20: "it says nothing",
        40: None,
    }
    assert [bool(label.scores) for label in labels.all("llm").values()] == [False, False, False, True]


def test_a_language_model_judges_five_texts_at_once(
    server: FakeLLM, cases: Cases, index: FeatureIndex, tmp_path: Path
) -> None:
    server.answer = particular
    labels = store(tmp_path)
    session = talk(server, tmp_path)
    explained = explain_features(index, FEATURES[:3], session, labels)
    server.requests.clear()
    result = score_labels(explained.labels, cases, LLMJudge(session), labels, concurrency=4)
    assert not result.failed
    assert len(server.requests) == 3 * 2 * 2 * 4  # labels, tasks, control, prompts of 5 of 20 cases
    for label in labels.all("llm").values():
        assert [(s.kind, s.value, s.recall, s.control, s.judge) for s in sorted(label.scores, key=str)] == [
            ("detection", 0.5, 1.0, 0.5, "fake"),
            ("fuzzing", 0.5, 1.0, 0.5, "fake"),
        ]
    texts = [body["messages"][1]["content"] for body in server.requests]
    for task in TASKS:
        some = [text for text in texts if ("«" in text) == (task == "fuzzing")]
        assert len(some) == 24
        assert all(len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 5 for text in some)
        assert all(text.startswith("It is said to fire on this: what ") for text in some)


def test_a_budget_ends_judging_and_the_next_goes_on(
    server: FakeLLM, cases: Cases, index: FeatureIndex, tmp_path: Path
) -> None:
    server.answer = particular
    labels = store(tmp_path)
    explained = explain_features(index, FEATURES, talk(server, tmp_path), labels)
    server.requests.clear()
    session = talk(server, tmp_path, Budget(8000))
    first = score_labels(explained.labels, cases, LLMJudge(session), labels, concurrency=3)
    assert first.stopped
    assert 0 < session.budget.tokens <= 8000
    assert 0 < len(first.scores) < len(FEATURES)
    score_labels(explained.labels, cases, LLMJudge(talk(server, tmp_path)), labels, concurrency=3)
    asked = sum(2 * -(-len(cases.of(feature, task)) // 5) for feature in FEATURES for task in TASKS)
    assert len(server.requests) == asked
    assert all(len(label.scores) == 2 for label in labels.all("llm").values())
    reference = store(tmp_path / "b")
    at_once = explain_features(index, FEATURES, talk(server, tmp_path), reference)
    score_labels(at_once.labels, cases, LLMJudge(talk(server, tmp_path)), reference)
    assert sorted(reference.all("llm")) == sorted(labels.all("llm"))
    for feature, label in reference.all("llm").items():
        assert set(label.scores) == set(labels.all("llm")[feature].scores)
    assert len(server.requests) == asked


def test_judging_that_was_killed_goes_on(
    server: FakeLLM, cases: Cases, index: FeatureIndex, tmp_path: Path
) -> None:
    server.answer, server.delay_seconds = particular, 0.01
    labels = store(tmp_path)
    explained = explain_features(index, FEATURES, talk(server, tmp_path), labels)
    server.requests.clear()

    def work() -> None:
        score_labels(
            explained.labels, cases, LLMJudge(talk(server, tmp_path)), store(tmp_path), concurrency=2
        )

    process = forked(work)
    while len(server.requests) < 60:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == signal.SIGKILL
    assert 0 < sum(len(label.scores) for label in labels.all("llm").values()) < 2 * len(FEATURES)
    time.sleep(0.1)  # the server is done with what it was asked
    work()
    asked = sum(2 * -(-len(cases.of(feature, task)) // 5) for feature in FEATURES for task in TASKS)
    assert asked <= len(server.requests) <= asked + 2  # only those on their way were made twice
    assert all(len(label.scores) == 2 for label in labels.all("llm").values())


def test_a_pattern_judges_its_label_without_a_language_model(cases: Cases, tmp_path: Path) -> None:
    judge = PatternJudge(cases.index)
    everything, nothing = '{"any_of": [{}]}', '{"any_of": [{"token": ["no such token"]}]}'
    some = cases.of(40, "detection")
    assert judge.answers("detection", Label(40, "x", pattern=everything), some) == [True] * len(some)
    assert judge.answers("detection", Label(40, "x", pattern=nothing), some) == [False] * len(some)
    ids = cases.index.blocks.ids.reshape(-1)
    positive = next(case for case in some if case.answer)
    token = ids[positive.start + positive.marks.argmax()]
    label = Label(40, "x", pattern=Pattern.of_tokens([cases.index.vocabulary[token]]).to_json())
    stands = [ids[case.start : case.start + len(case.tokens)] == token for case in some]
    assert judge.answers("detection", label, some) == [bool(here.any()) for here in stands]
    marked = cases.of(40, "fuzzing")
    shares = [
        np.mean(ids[case.start : case.start + len(case.tokens)][case.marks] == token) for case in marked
    ]
    assert judge.answers("fuzzing", label, marked) == [share >= 0.5 for share in shares]

    assert not judge.can_judge(Label(40, "free text"))
    assert not judge.can_judge(Label(40, "broken", pattern="{"))
    labels = store(tmp_path)
    labels.set(40, "everywhere", pattern=everything)
    labels.set(16, "nowhere", pattern=nothing)
    score_labels(list(labels.all("person").values()), cases, judge, labels)
    found = labels.get(40)
    assert found is not None
    assert [(s.value, s.recall, s.control, s.judge) for s in found.scores] == [(0.5, 1.0, 0.5, "pattern")] * 2


def test_a_pattern_sees_what_stands_before_the_window(cases: Cases) -> None:
    judge, index = PatternJudge(cases.index), cases.index
    tokens = [index.vocabulary[token] for token in index.blocks.ids.reshape(-1)]
    inside = [case for case in cases.of(40, "detection") if case.start % 40]
    assert inside
    for case in inside:
        pair = Pattern.of_ngrams([tokens[case.start - 1 : case.start + 1]])
        label, only_first = Label(40, "x", pattern=pair.to_json()), np.arange(len(case.tokens)) == 0
        assert judge.answers("detection", label, [case]) == [True]
        assert judge.answers("fuzzing", label, [replace(case, marks=only_first)]) == [True]


def test_people_are_judged_by_the_same_scorer(
    cases: Cases, model: LanguageModel, sae: SparseAutoencoder, score_index: FeatureIndex, tmp_path: Path
) -> None:
    labels = store(tmp_path)
    labels.set(16, "feature 16")
    labels.set(20, "feature 20")
    judged = list(labels.all("person").values())
    score_labels(judged, cases, Oracle(windows_of(model, sae, score_index)), labels)
    found = labels.get(16)
    assert found is not None
    assert found.source == "person"
    assert isinstance(found.score, Score)
    assert found.score.value == 1.0
