"""Automatic labels: proposed from one split, judged on another, counted exactly."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_language_model
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from features.build import build_index
from features.explain import MAX_TOKENS, label_features, propose, visible
from features.index import FeatureIndex
from features.labels import Label, Labels
from features.score import NO_KEY, Counts, Predicates, count_predictions, position_keys
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


def test_keys_say_what_stands_around_a_position() -> None:
    ids = np.array([[5, 6, 7], [8, 9, 9]], dtype=np.uint16)
    assert position_keys(ids, "current", 100).tolist() == [5, 6, 7, 8, 9, 9]
    assert position_keys(ids, "previous", 100).tolist() == [NO_KEY, 5, 6, NO_KEY, 8, 9]
    assert position_keys(ids, "next", 100).tolist() == [6, 7, NO_KEY, 9, 9, NO_KEY]
    assert position_keys(ids, "pair", 100).tolist() == [NO_KEY, 506, 607, NO_KEY, 809, 909]


def test_counts_equal_looking_at_every_position_and_feature(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    blocks = text(seed=2)
    rng = np.random.default_rng(0)
    tokens = [A, B, C, 40, 41]
    predicates = []
    for place in ("current", "previous", "next", "pair"):
        choices = [a * VOCABULARY + b for a in tokens for b in tokens] if place == "pair" else tokens
        pairs = [(f, key) for f in range(D_SAE) for key in choices if rng.random() < 0.4 and f != 3]
        predicates.append(Predicates(place, np.array([f for f, _ in pairs]), np.array([k for _, k in pairs])))
    nothing = np.zeros(0, dtype=np.int64)
    predicates.append(Predicates("current", nothing, nothing))

    counts = count_predictions(model, sae, blocks, predicates)

    fires, kept = firing(model, sae, blocks)
    context = blocks.context_length
    ids = blocks.ids.reshape(-1).astype(int)
    for number, predicate in enumerate(predicates):
        sets = {f: set(predicate.keys[predicate.features == f].tolist()) for f in range(D_SAE)}
        hits, predicted = np.zeros(D_SAE, int), np.zeros(D_SAE, int)
        for position in np.flatnonzero(kept):
            before = ids[position - 1] if position % context else None
            after = ids[position + 1] if position % context < context - 1 else None
            key = {
                "current": ids[position],
                "previous": before,
                "next": after,
                "pair": None if before is None else before * VOCABULARY + ids[position],
            }[predicate.place]
            for feature in range(D_SAE):
                holds = key is not None and int(key) in sets[feature]
                predicted[feature] += holds
                hits[feature] += holds and bool(fires[position, feature])
        assert counts.hits[number].tolist() == hits.tolist()
        assert counts.predicted[number].tolist() == predicted.tolist()
    assert counts.fired.tolist() == fires[kept].sum(0).tolist()
    assert counts.n_positions == kept.sum()


def test_precision_recall_and_f1_are_what_they_are_called() -> None:
    counts = Counts(np.array([[6, 0]]), np.array([[8, 0]]), np.array([12, 0]), 100)
    assert counts.precision[0, 0] == 6 / 8
    assert counts.recall[0, 0] == 6 / 12
    assert counts.f1[0, 0] == pytest.approx(2 / (8 / 6 + 12 / 6))
    assert np.isnan([counts.precision[0, 1], counts.recall[0, 1], counts.f1[0, 1]]).all()


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


def test_every_feature_gets_a_label_and_a_dead_one_says_so(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    label_features(index, model, sae, text(seed=3), labels)
    assert sorted(labels.all()) == list(range(D_SAE))
    assert labels.get(1) == Label(1, f"never fired in {index.n_tokens:,} tokens", "automatic", "dead", n=0)
    assert all(label.text and label.source == "automatic" for label in labels.all().values())


def test_labelling_again_keeps_what_people_wrote(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    label_features(index, model, sae, text(seed=3), labels)
    first = labels.all()
    labels.set(0, "my two tokens", note="sure")
    label_features(index, model, sae, text(seed=3), labels)
    assert labels.get(0) == Label(0, "my two tokens", "person", note="sure")
    labels.set(0, "", note="")
    assert labels.all() == first


def test_the_set_of_a_feature_is_the_best_prefix_by_precision(index: FeatureIndex) -> None:
    """Against a slow search of the same rule, from the index's own token table."""
    on = propose(index)[0]
    for feature in range(D_SAE):
        count = int(index.count[feature])
        tokens = [t for t in index.top_tokens(feature) if t.count >= min(2, count)]
        base = {t.token_id: round(t.share * index.n_tokens / t.lift) for t in tokens}
        alone = sorted(tokens, key=lambda t: -2 * t.count / (base[t.token_id] + count))[:MAX_TOKENS]
        alone.sort(key=lambda t: -t.count / base[t.token_id])
        best = 0.0
        for n in range(1, len(alone) + 1):
            prefix = alone[:n]
            f1 = 2 * sum(t.count for t in prefix) / (sum(base[t.token_id] for t in prefix) + count)
            best = max(best, f1)
        mine = set(on.predicates.keys[on.predicates.features == feature].tolist())
        hits = sum(t.count for t in tokens if t.token_id in mine)
        if tokens:
            assert 2 * hits / (sum(base[i] for i in mine) + count) == pytest.approx(best)
            assert on.f1[feature] == pytest.approx(best)
        else:
            assert mine == set()
            assert np.isnan(on.f1[feature])


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("self", "‹self›"),
        (" self", "‹ self›"),
        (" ", "‹␣›"),
        ("  ", "‹␣␣›"),
        ("\n    ", "‹⏎␣␣␣␣›"),
        ("\n        return", "‹⏎␣×8return›"),
        ("  x", "‹␣␣x›"),
        ("x ", "‹x␣›"),
        ("# type", "‹# type›"),
        ("\t\r", "‹⇥␍›"),
        ("\x00\u200b", "‹\\x00\\u200b›"),
        ("<0xE2>", "‹<0xE2>›"),
        ("", "‹›"),
    ],
)
def test_white_space_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_says_names_promoted_tokens_only(index: FeatureIndex) -> None:
    says = {proposal.kind: proposal for proposal in propose(index)}["says"]
    for feature, key in zip(says.predicates.features, says.predicates.keys, strict=True):
        assert key in {token for _, token, _ in index.promoted(int(feature))}


def test_the_best_kind_on_the_score_split_wins(
    model: LanguageModel, sae: SparseAutoencoder, index: FeatureIndex, tmp_path: Path
) -> None:
    labels, score_blocks = Labels.open(tmp_path / "labels.sqlite"), text(seed=3)
    label_features(index, model, sae, score_blocks, labels)
    counts = count_predictions(model, sae, score_blocks, [p.predicates for p in propose(index)])
    density = counts.fired / counts.n_positions
    always = 2 * density / (1 + density)
    for feature, label in labels.all().items():
        if label.method == "always":
            assert label.recall == 1.0
            assert label.precision == density[feature]
            assert label.text == f"fires on {index.density[feature]:.0%} of all tokens"
        if label.f1 is not None:
            dense = index.density[feature] > 0.1
            best = max(np.nanmax(counts.f1[:, feature]), always[feature] if dense else 0.0)
            assert label.f1 == pytest.approx(best)
            assert label.text.startswith("maybe ") == (best < 0.3 and label.method != "always")
    assert {"on", "always"} <= {label.method for label in labels.all().values()}
