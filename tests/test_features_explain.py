"""Automatic labels: fitted on one split, scored on another, counted exactly, beside a shuffled control."""

from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_language_model
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from features import chains
from features.aspects import Text
from features.build import build_index
from features.chains import Keys, count_hits, describe
from features.explain import Evidence, explain, gather, label_features, label_inputs, make_labels
from features.firing_table import FiringTable
from features.index import FeatureIndex
from features.labels import Labels, Score
from features.patterns import Pattern
from features.score import Counts, counts, score_pattern, wilson
from features.wording import visible
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

HOOK = "blocks.0.hook_resid_pre"  # the embedding: what a feature fires on can be decided by token
D_SAE = 24
A, B, C = 10, 20, 30  # three tokens


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def text(seed: int, n_blocks: int = 12, context: int = 40) -> TokenBlocks:
    """Random tokens, A, B and C among them often; every fifth block ends in padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (n_blocks, context))
    often = rng.random(ids.shape) < 0.3
    ids[often] = rng.choice([A, B, C], often.sum())
    ids[rng.random(ids.shape) < 0.03] = END_OF_TEXT
    documents = np.tile(np.arange(n_blocks, dtype=np.int32)[:, None], (1, context))
    ids[::5, -7:], documents[::5, -7:] = END_OF_TEXT, -1
    names = [f"document {n}" for n in range(n_blocks)]
    return TokenBlocks(ids.astype(np.uint16), documents, names, "train", "isolated", False)


def random_sae(model: LanguageModel) -> SparseAutoencoder:
    """TopK with random weights, except that feature 0 fires on A and B, and feature 1 on nothing."""
    generator = torch.Generator().manual_seed(0)
    embedding = model.capture(torch.arange(VOCABULARY)[None, :60], [HOOK])[HOOK][0]
    rows = torch.randn(D_SAE, 32, generator=generator)
    bias = torch.zeros(D_SAE)
    own = embedding[[A, B]] / embedding[[A, B]].norm(dim=1, keepdim=True)
    rows[0], bias[0] = 100 * own.sum(0), -60 * float((own @ embedding[[A, B]].T).diagonal().min())
    rows[1], bias[1] = 0, -1.0
    weights = Weights(rows, bias, torch.randn(D_SAE, 32, generator=generator), torch.zeros(32))
    return SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=5), weights, {"hook_name": HOOK})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(scope="module")
def sae(model: LanguageModel) -> SparseAutoencoder:
    return random_sae(model)


@pytest.fixture(scope="module")
def index(
    model: LanguageModel, sae: SparseAutoencoder, tmp_path_factory: pytest.TempPathFactory
) -> FeatureIndex:
    return build_index(model, sae, text(seed=1), tmp_path_factory.mktemp("index") / "train")


def firing(model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks) -> tuple[Tensor, np.ndarray]:
    """Dense ``fires [positions, d_sae]`` and which positions count, one block at a time."""
    rows, kept = [], []
    for n in range(blocks.n_blocks):
        ids = blocks.ids_tensor(n, n + 1)
        x = model.capture(ids, [HOOK], attention_mask=blocks.attention_mask(n, n + 1))[HOOK][0]
        rows.append(sae.encode(x).to_dense() > 0)
        kept.append((ids[0].numpy() != END_OF_TEXT) & (blocks.documents[n] >= 0))
    return torch.cat(rows), np.concatenate(kept)


def table(fires: np.ndarray, kept: np.ndarray, value: np.ndarray | None = None) -> FiringTable:
    """The firings of a dense bool ``[n, d_sae]``."""
    position, feature = np.nonzero(fires & kept[:, None])
    order = np.lexsort((position, feature))
    value = np.ones(fires.shape, np.float32) if value is None else value.astype(np.float32)
    return FiringTable(
        feature[order].astype(np.int32),
        position[order],
        value[position, feature][order],
        np.flatnonzero(kept),
        fires.shape[1],
    )


def random_text(seed: int, n: int = 400, tokens: int = 4, blocks: int = 8) -> Text:
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks, dtype=np.int32), n // blocks)
    return Text(rng.integers(0, tokens, n).astype(np.int32), block, block, [*"abcdefgh"[:tokens]])


@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_a_table_holds_the_firings_of_every_feature(
    model: LanguageModel, sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("features.firings.CHUNK_FIRINGS", chunk)
    monkeypatch.setattr("features.firings.FIRINGS_PER_FEATURE", 1)
    blocks = text(seed=2)
    found = FiringTable.of(model, sae, blocks)
    fires, kept = firing(model, sae, blocks)
    expected = table(fires.numpy(), kept)
    for name in ("feature", "position", "kept"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    medians = found.medians()
    for feature in range(D_SAE):
        own = found.value[found.feature == feature]
        assert (len(own) == 0 and np.isnan(medians[feature])) or medians[feature] == pytest.approx(
            np.median(own)
        )


@pytest.mark.parametrize("at_once", [100, 1 << 20])
def test_the_control_fires_as_often_at_positions_that_count(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("features.firing_table._AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    fires = rng.random((300, 4)) < np.array([0.01, 0.3, 0.95, 1.0])
    own = table(fires, kept=rng.random(300) < 0.8, value=rng.random((300, 4)))
    control = own.shuffled(seed=3)
    assert control.count.tolist() == own.count.tolist()
    assert set(control.position) <= set(own.kept)
    pairs = list(zip(control.feature.tolist(), control.position.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert pairs == sorted(pairs)
    assert control.position.tolist() == own.shuffled(seed=3).position.tolist()
    assert control.position.tolist() != own.position.tolist()


def test_thinning_keeps_some_of_each_feature() -> None:
    own = table(np.random.default_rng(0).random((200, 3)) < [0.02, 0.2, 0.9], np.ones(200, bool))
    thinned = own.thinned(10)
    assert thinned.count.tolist() == np.minimum(own.count, 10).tolist()
    kept = set(zip(own.feature.tolist(), own.position.tolist(), strict=True))
    assert set(zip(thinned.feature.tolist(), thinned.position.tolist(), strict=True)) <= kept
    assert (np.diff(thinned.feature) >= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_best_antichain_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all antichains of a small trie, where aspects cost nothing and everything is refined."""
    monkeypatch.setattr(chains, "ASPECT_COST", 0.0)
    monkeypatch.setattr(chains, "REFINED_BELOW", 1.1)
    monkeypatch.setattr(chains, "_ROUNDS", 20)
    rng = np.random.default_rng(seed)
    where = random_text(seed, tokens=2)
    keys = Keys.of(where, ("token", "before"))
    # Fires mostly after one token and on the other, so that nodes of both levels are worth taking.
    clean = (where.tokens == 0) | (where.numbers("before") == 1)
    fires = (rng.random(400) < np.where(clean, 0.8, 0.05))[:, None]
    kept = np.ones(400, dtype=bool)
    own = table(fires, kept)
    nodes = describe(keys, own, np.ones(1))

    places = [(0, key) for key in range(2)] + [(1, key) for key in range(len(keys.parent[1]))]

    def value(chosen: tuple[tuple[int, int], ...], price: float) -> float:
        """Of an antichain: what the search maximises; one firing for every aspect."""
        holds = np.zeros(400, dtype=bool)
        for level, key in chosen:
            holds |= keys.at[level] == key
        return float(
            (fires[:, 0] & holds).sum() - price * holds.sum() - sum(1 + level for level, _ in chosen)
        )

    def is_antichain(chosen: tuple[tuple[int, int], ...]) -> bool:
        return not any((0, keys.parent[1][key]) in chosen for level, key in chosen if level == 1)

    subsets = chain.from_iterable(combinations(places, n) for n in range(1, len(places) + 1))
    antichains = [subset for subset in subsets if is_antichain(subset)]
    mine = tuple(zip(nodes.level.tolist(), nodes.key.tolist(), strict=True))
    hit, predicted = count_hits(keys, nodes, own)
    price = hit.sum() / (predicted[0] + fires.sum())
    assert is_antichain(mine)
    assert value(mine, price) >= max(value(subset, price) for subset in antichains) - 1e-9


def test_counting_equals_looking_at_every_position() -> None:
    rng = np.random.default_rng(1)
    where = random_text(1, tokens=4)
    kept = rng.random(400) < 0.9
    fires = rng.random((400, 5)) < 0.2
    fires[:, 0] |= where.tokens == 1
    fires[:, 1] |= (where.tokens == 2) & (where.numbers("before") == 3)
    own = table(fires, kept)
    keys = Keys.of(where, ("token", "before", "before2"))
    nodes = describe(keys, own, np.ones(5))
    hit, predicted = count_hits(keys, nodes, own)
    assert len(set(nodes.feature.tolist())) == 5
    assert np.bincount(nodes.feature).max() <= chains.MAX_NODES
    for feature in range(5):
        holds = np.zeros(400, dtype=bool)
        for n in np.flatnonzero(nodes.feature == feature):
            holds |= keys.at[nodes.level[n]] == nodes.key[n]
        assert predicted[feature] == (holds & kept).sum()
        mine = own.feature == feature
        assert hit[mine].tolist() == holds[own.position[mine]].tolist()


def test_figures_are_what_they_are_called() -> None:
    """Against sets: firings, predictions, and the upper half without the weak firings."""
    rng = np.random.default_rng(5)
    fires, value = rng.random((200, 6)) < 0.3, rng.random((200, 6))
    fires[:, 5] = False
    kept = rng.random(200) < 0.9
    predicts = rng.random((200, 6)) < 0.4
    predicts[:, 4] = False
    own = table(fires, kept, value)
    median = own.medians()
    hit = predicts[own.position, own.feature]
    found = Counts.of(own, hit, (predicts & kept[:, None]).sum(0), median)
    for feature in range(6):
        firing_at = {n for n in range(200) if kept[n] and fires[n, feature]}
        predicted = {n for n in range(200) if kept[n] and predicts[n, feature]}
        strong = {n for n in firing_at if np.float32(value[n, feature]) > median[feature]}
        score = found.score(feature, control=0.1)
        if not firing_at:
            assert score is None
            continue
        assert score is not None
        both = len(firing_at & predicted)
        assert score.value == pytest.approx(2 * both / (len(firing_at) + len(predicted)))
        assert score.recall == pytest.approx(both / len(firing_at))
        assert score.precision == (pytest.approx(both / len(predicted)) if predicted else None)
        judged = predicted - (firing_at - strong)
        assert score.upper == pytest.approx(2 * len(strong & judged) / (len(strong) + len(judged)))
        assert (score.n, score.control) == (len(firing_at), 0.1)
        low, high = wilson(np.array(both), np.array(len(firing_at | predicted)))
        assert score.low == pytest.approx(2 * low / (1 + low))
        assert score.high == pytest.approx(2 * high / (1 + high))
        assert score.low <= score.value <= score.high


def test_wilson_is_the_textbook_interval() -> None:
    low, high = wilson(np.array([81, 0, 0]), np.array([263, 10, 0]))
    # Newcombe 1998, table I: 81 of 263 and 0 of 10.
    assert low.round(4).tolist()[:2] == [0.2553, 0.0]
    assert high.round(4).tolist()[:2] == [0.3662, 0.2775]
    assert (low[2], high[2]) == (0.0, 1.0)


def test_a_label_counts_only_if_it_beats_its_control() -> None:
    assert counts(Score("tokens", 0.6, 10, control=0.2))
    assert counts(Score("tokens", 0.5, 10))
    assert not counts(Score("tokens", 0.6, 10, control=0.6))
    assert not counts(Score("tokens", 0.4, 10, control=0.2))
    assert counts(Score("tokens", 0.4, 10, control=0.2), threshold=0.4)
    assert not counts(None)


def test_a_token_feature_is_named_by_its_tokens(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    score_blocks = text(seed=3)
    label_features(index, model, sae, score_blocks, labels)
    label = labels.get(0)
    assert label is not None
    names = [visible(index.vocabulary[token]) for token in (A, B)]
    assert label.text in (f"fires on {names[0]}, {names[1]}", f"fires on {names[1]}, {names[0]}")
    fires, kept = firing(model, sae, score_blocks)
    fires, ids = fires[kept, 0].numpy(), score_blocks.ids.reshape(-1)[kept]
    holds = np.isin(ids, [A, B])
    assert label.n == fires.sum() > 50
    assert label.precision == (fires & holds).sum() / holds.sum()
    assert label.recall == (fires & holds).sum() / fires.sum()
    assert label.f1 == pytest.approx(2 / (1 / label.precision + 1 / label.recall))
    assert label.method == "token"
    assert counts(label.score)
    assert labels.inputs == label_inputs(sae, index, score_blocks)


def test_every_score_is_that_of_the_pattern_beside_it(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    """Every pattern is held against every position of the score split, and against score_pattern."""
    labels, blocks = Labels.open(tmp_path / "labels.sqlite"), text(seed=3)
    label_features(index, model, sae, blocks, labels)
    fires, kept = firing(model, sae, blocks)
    where = Text.of_blocks([blocks], model.tokenizer.vocabulary(), model.tokenizer.special_ids)
    scored = 0
    for feature, label in labels.all().items():
        if label.score is None:
            continue
        scored += 1
        pattern = Pattern.from_json(label.pattern)
        holds = pattern.holds(where) & kept
        fired = fires[:, feature].numpy() & kept
        assert label.f1 == pytest.approx(2 * (holds & fired).sum() / (holds.sum() + fired.sum()))
        if feature < 4:
            again = score_pattern(
                model,
                sae,
                blocks,
                feature,
                pattern,
                median=index.quantile(feature, 0.5),
                control=label.control,
            )
            assert again == label.score
    assert scored > D_SAE / 2


def test_every_feature_gets_a_label_and_a_dead_one_says_so(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    label_features(index, model, sae, text(seed=3), labels)
    assert sorted(labels.all()) == list(range(D_SAE))
    dead = labels.get(1)
    assert dead is not None
    assert (dead.text, dead.method, dead.score) == (f"never fired in {index.n_tokens:,} tokens", "dead", None)
    assert all(label.text and label.source == "automatic" for label in labels.all().values())


def test_labelling_again_keeps_what_people_wrote_and_gives_the_same(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    label_features(index, model, sae, text(seed=3), labels)
    first = labels.all()
    labels.set(0, "my two tokens")
    label_features(index, model, sae, text(seed=3), labels)
    label = labels.get(0)
    assert label is not None
    assert (label.text, label.source) == ("my two tokens", "person")
    assert {feature: labels.automatic(feature) for feature in first} == first


def planted(seed: int, n: int = 4000) -> Evidence:
    """Random text of four documents to fit to and one to score on; features that fire by a rule, or at random."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 8, n).astype(np.int32)
    block = np.repeat(np.arange(n // 40, dtype=np.int32), 40)
    document = (np.arange(n) // (n // 10)).astype(np.int32)
    where = Text(tokens, block, document, [" the", "Error", "error", "(", "self", ",", "ing", "7"])
    before, following = where.numbers("before"), where.numbers("next")
    rules = [
        tokens == 4,
        (tokens == 4) & (before == 3),
        (tokens == 1) | (tokens == 2),
        (before == 3) & np.isin(tokens, [0, 2, 4, 6]),
        following == 6,
        rng.random(n) < 0.9,
        rng.random(n) < 0.02,
    ]
    fires = np.stack(rules, axis=1)
    train = np.arange(n) < 8 * n // 10
    promoted = np.full((len(rules), 1), 6)
    return Evidence(where, table(fires, train), table(fires, ~train), np.ones(7), np.full(7, 0.5), promoted)


def test_every_rule_is_found_and_chance_is_not_explained() -> None:
    labels = make_labels(planted(0))
    assert [label.text for label in labels[:3]] == [
        "fires on ‹self›",
        "fires on ‹self› after ‹(›",
        "fires on ‹error› in any case",
    ]
    assert labels[3].text == "fires on lower-case words after ‹(›"
    assert labels[4].text == "says ‹ing›"
    assert all(label.f1 == 1 and counts(label.score) for label in labels[:5])
    assert labels[5].text == f"fires on {labels[5].n / 800:.0%} of all tokens"
    assert not counts(labels[5].score)
    assert labels[6].text.startswith("maybe ") or labels[6].method == "none"
    assert not counts(labels[6].score)


def test_lexical_classes_explain_what_tokens_cannot() -> None:
    """Python with names that hardly ever come twice: features of names after a dot, docstrings, and lines."""
    rng = np.random.default_rng(3)
    numbers: dict[str, int] = {}
    tokens, document = [], []

    def name() -> str:
        return "".join(rng.choice([*"abcdefgh"], 5))

    for n in range(40):
        for _ in range(6):
            written = ["def ", name(), "(", name(), "):\n    ", '"""', name(), " ", name(), '"""', "\n    "]
            written += [
                "return ",
                name(),
                ".",
                name(),
                "\n",
                "import ",
                name(),
                "\n",
                name(),
                " = ",
                name(),
                "\n",
            ]
            tokens += [numbers.setdefault(token, len(numbers)) for token in written]
            document += [n] * len(written)
    documents = np.array(document, dtype=np.int32)
    where = Text(np.array(tokens, dtype=np.int32), documents, documents, list(numbers))
    classes = [where.values("class")[n] if n >= 0 else "" for n in where.numbers("class")]
    lines = [where.values("line")[n] for n in where.numbers("line")]
    is_name = np.array([each == "name" for each in classes])
    fires = np.stack(
        [
            is_name & where.has("before", ["."]),
            np.array([each == "docstring" for each in classes]),
            is_name & np.array([each == "import" for each in lines]),
        ],
        axis=1,
    )
    train = documents < 30
    evidence = Evidence(where, table(fires, train), table(fires, ~train), np.ones(3), np.full(3, 0.5), None)
    labels = make_labels(evidence)
    assert [label.text for label in labels] == [
        "fires on names after ‹.›",
        "fires in docstrings",
        "fires on names after ‹import␣›",
    ]
    assert all(label.f1 == 1 and counts(label.score) for label in labels)


def test_nothing_is_decided_on_the_score_split() -> None:
    evidence = planted(0)
    other = planted(1)
    found = explain(evidence)
    n = len(evidence.text)
    swapped = Evidence(
        evidence.text, evidence.train, other.score, *(np.ones(7), np.full(7, 0.5), evidence.promoted)
    )
    assert n == len(other.text)
    assert explain(swapped).patterns == found.patterns
    assert explain(swapped).kind == found.kind


def test_examples_of_the_index_stand_for_rare_features(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.explain.FIT_TOKENS", 80)
    evidence = gather(index, model, sae, text(seed=3))
    whole = FiringTable.of(model, sae, text(seed=1))
    known = set(zip(whole.feature.tolist(), whole.position.tolist(), strict=True))
    mine = list(zip(evidence.train.feature.tolist(), evidence.train.position.tolist(), strict=True))
    assert set(mine) <= known
    assert mine == sorted(mine)
    few = np.bincount(whole.feature[whole.position < 80], minlength=D_SAE)
    assert (evidence.train.count >= np.minimum(few, 30)).all()
    assert evidence.train.count.sum() > few.sum()
    assert make_labels(evidence)[0].method == "token"
