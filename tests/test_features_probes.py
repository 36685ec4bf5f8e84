"""Probes: they find what is there, are at chance where nothing is, and are judged on what they have not seen."""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from tiny_models import one_thread

from activations.errors import InputError
from features import probes as probes_module
from features.probes import auc_interval, probe_table
from features.separation import Values, separation


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def sparse(dense: np.ndarray) -> Values:
    text, feature = np.nonzero(dense)
    return Values.of(feature, text, dense[text, feature])


def noise(n: int, d: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.random((n, d)) * (random.random((n, d)) < 0.3)


def test_a_signal_is_found_by_the_probe_that_can_see_it() -> None:
    random = np.random.default_rng(0)
    in_a = np.arange(80) % 2 == 0
    pooled = random.normal(size=(80, 20))
    pooled[:, 3] += 2.5 * in_a
    dense = noise(80, 50)
    dense[:, 17] = in_a * (random.random(80) < 0.9)
    found = probe_table(pooled, sparse(dense), in_a).set_index("probe")
    assert found.loc["logistic regression", "auc"] > 0.9
    assert found.loc["difference of means", "auc"] > 0.8
    assert found.loc["best feature", "chosen"] == "17 (5/5)"
    assert found.loc["best feature", "accuracy"] == pytest.approx(np.mean([dense[in_a, 17].mean(), 1.0]))
    assert found.dimensions.tolist() == [20, 1, 10, 1]
    assert ((found.auc_low < found.auc) & (found.auc <= found.auc_high)).all()
    assert ((found.accuracy_low < found.accuracy) & (found.accuracy <= found.accuracy_high)).all()


def test_the_best_of_many_noisy_features_is_at_chance_on_texts_left_out() -> None:
    """On the texts that it was chosen by it would look good."""
    in_a = np.arange(60) % 2 == 0
    dense, pooled = noise(60, 3000), np.random.default_rng(1).normal(size=(60, 30))
    assert np.abs(separation(sparse(dense), in_a).auc - 0.5).max() > 0.19
    found = probe_table(pooled, sparse(dense), in_a)
    assert (np.abs(found.auc - 0.5) < 0.19).all()
    assert ((found.auc_low < 0.5) & (found.auc_high > 0.5)).all()


def test_difference_of_means_against_an_obvious_computation() -> None:
    random = np.random.default_rng(3)
    in_a = random.random(40) < 0.4
    pooled = random.normal(size=(40, 5)) + in_a[:, None] * 0.7
    found = probe_table(pooled, sparse(noise(40, 5)), in_a, seed=4).set_index("probe")
    folds = probes_module._folds(in_a, None, 5, 4)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(40))
    right, pairs, hits = 0.0, 0, np.zeros(40, dtype=bool)
    for train, test in folds:
        a, b = pooled[train][in_a[train]].mean(0), pooled[train][~in_a[train]].mean(0)
        scores = ((pooled[test] - (a + b) / 2) * (a - b)).sum(1)
        weight = int(in_a[test].sum() * (~in_a[test]).sum())
        right, pairs = right + weight * roc_auc_score(in_a[test], scores), pairs + weight
        hits[test] = (scores > 0) == in_a[test]
    assert found.loc["difference of means", "auc"] == pytest.approx(right / pairs)
    expected = (hits[in_a].mean() + hits[~in_a].mean()) / 2
    assert found.loc["difference of means", "accuracy"] == pytest.approx(expected)


def test_texts_of_one_group_are_never_on_both_sides() -> None:
    """Each pair has a secret in common: with pairs split, a probe could know it."""
    in_a = np.arange(60) % 2 == 0
    groups = np.arange(60) // 2
    for train, test in probes_module._folds(in_a, groups.tolist(), 5, 0):
        assert not set(groups[train]) & set(groups[test])
        assert in_a[test].sum() == (~in_a[test]).sum()
    random = np.random.default_rng(5)
    author = np.repeat(
        random.normal(size=(6, 40)), 10, axis=0
    )  # six authors of ten texts, three write one class
    of, in_a = np.repeat(np.arange(6), 10), np.repeat(np.arange(6) % 2 == 0, 10)
    values = sparse(noise(60, 5))
    split = probe_table(author + random.normal(size=(60, 40)) * 0.1, values, in_a)
    whole = probe_table(author + random.normal(size=(60, 40)) * 0.1, values, in_a, groups=of.tolist())
    assert split.auc[0] > 0.99
    assert whole.auc[0] < 0.9


def test_intervals_rest_on_groups() -> None:
    """Ten copies of every text are not ten times as many texts."""
    random = np.random.default_rng(6)
    in_a, pooled, dense = np.arange(24) % 2 == 0, random.normal(size=(24, 5)), noise(24, 8)
    copies = np.repeat(np.arange(24), 10)
    one = probe_table(pooled, sparse(dense), in_a)
    ten = probe_table(pooled[copies], sparse(dense[copies]), in_a[copies], groups=copies.tolist())
    for table in (one, ten):
        for row in table.itertuples():
            assert (row.auc_low, row.auc_high) == pytest.approx(auc_interval(row.auc, 12, 12))
        wide = table.accuracy_high - table.accuracy_low
        assert ((wide > 0.3) & (wide < 0.6)).all()


def test_same_seed_same_figures() -> None:
    in_a = np.arange(30) % 3 == 0
    pooled, values = np.random.default_rng(0).normal(size=(30, 8)), sparse(noise(30, 40))
    first, second = (probe_table(pooled, values, in_a, seed=1) for _ in range(2))
    assert first.equals(second)


def test_few_texts_still_have_probes() -> None:
    in_a = np.array([True, True, False, False])
    found = probe_table(np.eye(4), sparse(np.eye(4)), in_a)
    assert len(found) == 4
    nothing = probe_table(np.eye(4), sparse(np.zeros((4, 2))), in_a)
    assert nothing.set_index("probe").loc["best feature", "auc"] == 0.5


def test_sets_that_cannot_be_left_out() -> None:
    values = sparse(np.eye(4))
    with pytest.raises(InputError, match="each set needs at least 2 texts"):
        probe_table(np.eye(4), values, np.array([True, False, False, False]))
    with pytest.raises(InputError, match="of 2 groups"):
        probe_table(np.eye(4), values, np.array([True, True, False, False]), groups=[1, 1, 2, 3])


def test_intervals() -> None:
    for auc, n_a, n_b in ((0.5, 10, 30), (0.83, 50, 50), (0.02, 5, 9)):
        for edge in auc_interval(auc, n_a, n_b):
            mean = (n_a + n_b) / 2 - 1
            variance = edge * (1 - edge) / (n_a * n_b)
            variance *= 1 + mean * ((1 - edge) / (2 - edge) + edge / (1 + edge))
            assert abs(edge - auc) == pytest.approx(1.959964 * np.sqrt(variance), abs=1e-6)
    assert auc_interval(1.0, 20, 20)[1] == 1.0
    assert 0.7 < auc_interval(1.0, 20, 20)[0] < 0.95
    assert auc_interval(0.3, 20, 20) == pytest.approx(tuple(1 - x for x in auc_interval(0.7, 20, 20)[::-1]))
