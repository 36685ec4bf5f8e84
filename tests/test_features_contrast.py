"""Contrasts: statistics from sparse values against scipy and scikit-learn on dense ones, texts read in batches against
one by one, tables, labelled texts, bad input."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from small_run import CONTEXT, D_SAE, SmallRun, scored
from tiny_models import END_OF_TEXT, TEXT, one_thread

from activations.errors import InputError
from features import texts as texts_module
from features.contrast import contrast
from features.labelled_texts import read_labelled, read_sets
from features.observations import Observations, joined
from features.probes import auc_interval
from features.separation import MOST_EXACT, Values, false_discovery_rate, paired_p, separation, to_four_digits
from features.texts import read_texts
from features.trace import trace_text


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(tmp_path_factory.mktemp("contrast"))
    run.labels.put_automatic([scored(f, f"label {f}", f / D_SAE) for f in range(D_SAE)], {})
    return run


def sparse(dense: np.ndarray) -> Values:
    text, feature = np.nonzero(dense)
    return Values.of(feature, text, dense[text, feature])


def random_dense(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Most values 0, many of the others equal; one feature always silent, one never."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 6, (n, d)) * (random.random((n, d)) < random.random(d))
    dense[:, 0], dense[:, 1] = 0, random.random(n) + 1
    return dense.astype(np.float64)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (3, 40), (60, 25)])
def test_separation_against_scipy_and_sklearn(n_a: int, n_b: int) -> None:
    dense = random_dense(n_a + n_b, 30)
    in_a = np.random.default_rng(1).permutation(n_a + n_b) < n_a
    found = separation(sparse(dense), in_a)
    assert found.feature.tolist() == np.flatnonzero(dense.any(0)).tolist()
    for row, feature in enumerate(found.feature):
        column = dense[:, feature]
        a, b = column[in_a], column[~in_a]
        assert found.auc[row] == pytest.approx(roc_auc_score(in_a, column))
        assert found.rate_a[row] == pytest.approx((a > 0).mean())
        assert found.rate_b[row] == pytest.approx((b > 0).mean())
        expected = (
            1.0 if len(np.unique(column)) == 1 else stats.mannwhitneyu(a, b, method="asymptotic").pvalue
        )
        assert found.p[row] == pytest.approx(max(expected, 2 / math.comb(n_a + n_b, n_a)))
        pooled = np.sqrt((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / (n_a + n_b - 2))
        if pooled > 0:
            assert found.effect[row] == pytest.approx((a.mean() - b.mean()) / pooled)


def test_separation_of_some_texts_is_that_of_those_alone() -> None:
    dense = random_dense(50, 20)
    in_a = np.arange(50) % 3 == 0
    used = np.random.default_rng(2).random(50) < 0.6
    some, alone = separation(sparse(dense), in_a, used), separation(sparse(dense[used]), in_a[used])
    for name in ("feature", "rate_a", "rate_b", "auc", "effect", "p"):
        np.testing.assert_allclose(getattr(some, name), getattr(alone, name))


def test_separation_at_its_ends() -> None:
    dense = np.array([[1.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = separation(sparse(dense), np.array([True, True, False, False]))
    assert found.feature.tolist() == [0, 1]
    assert found.auc.tolist() == [1.0, 1.0]
    assert found.effect[0] == np.inf
    assert len(separation(sparse(np.zeros((4, 3))), np.array([True, True, False, False])).auc) == 0


def exact_signed_rank(difference: np.ndarray) -> float:
    """Of all choices of signs of these differences, ties and all, the share that is as far from the middle."""
    rank = stats.rankdata(np.abs(difference[difference != 0]))
    sums = np.array([0.0])
    for one in rank:
        sums = np.concatenate([sums, sums + one])
    own = rank[difference[difference != 0] > 0].sum()
    return float((np.abs(sums - rank.sum() / 2) >= abs(own - rank.sum() / 2) - 1e-9).mean())


@pytest.mark.parametrize("n", [12, 60])
def test_paired_p_against_slow_computations(n: int) -> None:
    random = np.random.default_rng(0)
    dense = np.concatenate([random_dense(n, 25), random_dense(n, 25, seed=1)])
    dense[n:, 5:15] = dense[:n, 5:15] + (random.random((n, 10)) < 0.2)  # alike within pairs
    dense[n:, 20] = dense[:n, 20]
    order = random.permutation(2 * n)
    in_a, pair = (np.arange(2 * n) < n)[order], np.tile(np.arange(n), 2)[order]
    found = paired_p(sparse(dense[order]), in_a, pair)
    compared = 0
    for p, feature in zip(found, np.flatnonzero(dense.any(0)), strict=True):
        difference = dense[:n, feature] - dense[n:, feature]
        differing = int((difference != 0).sum())
        if not differing:
            assert p == 1
        elif differing > MOST_EXACT:
            expected = stats.wilcoxon(difference, correction=False, method="asymptotic").pvalue
            assert p == pytest.approx(expected)
        elif differing <= 16:
            assert p == pytest.approx(exact_signed_rank(difference))
        compared += differing > MOST_EXACT or differing <= 16
    assert compared > 15
    assert (paired_p(sparse(np.ones((4, 1))), np.arange(4) < 2, np.array([0, 1, 0, 1])) == 1).all()


@pytest.mark.parametrize("n", [2, 5, 25])
def test_few_pairs_have_the_exact_p(n: int) -> None:
    """The approximation says 0.043 for five pairs that all differ in one direction, which happens in 1 of 16."""
    random = np.random.default_rng(n)
    for difference in (np.arange(n) + 1.0, random.normal(size=n)):
        dense = np.concatenate([difference + 10, np.full(n, 10.0)])[:, None]
        (p,) = paired_p(sparse(dense), np.arange(2 * n) < n, np.tile(np.arange(n), 2))
        assert p == pytest.approx(stats.wilcoxon(difference, method="exact").pvalue)


def test_few_texts_never_have_a_smaller_p_than_there_can_be() -> None:
    dense = np.array([[1.0], [2.0], [3.0], [0.0], [0.0], [0.0]])
    assert separation(sparse(dense), np.arange(6) < 3).p[0] == pytest.approx(0.1)


# --- what counts as one observation


def test_equal_texts_join_groups() -> None:
    def parts(*about: Any) -> list[list[int]]:
        group = joined(*about)
        return sorted(np.flatnonzero(group == g).tolist() for g in range(group.max() + 1))

    assert parts(["a", "b", "a\n", "c"]) == [[0, 2], [1], [3]]
    assert parts(["a", "b", "a", "c", "d"], [1, 1, 2, 2, 3]) == [[0, 1, 2, 3], [4]]
    assert parts(["a", "b"], ["x", None]) == [[0], [1]]


def test_authors_that_repeat_themselves_are_no_evidence() -> None:
    """20 authors of 20 near-copies each, dealt to two sets: text by text most features would seem to differ."""
    random = np.random.default_rng(0)
    author, in_a = np.repeat(np.arange(20), 20), np.repeat(np.arange(20) % 2 == 0, 20)
    habit = random.random((20, 300)) * (random.random((20, 300)) < 0.5)
    values = sparse(habit[author] * (1 + 0.01 * random.random((400, 300))))
    found = separation(values, in_a)
    assert (false_discovery_rate(found.p) < 0.05).sum() > 50
    observations = Observations.of(author, in_a)
    assert (observations.test, len(observations.in_a), observations.left_out) == ("Mann-Whitney", 20, 0)
    p = observations.p(values, found.feature)
    assert (false_discovery_rate(p) < 0.05).sum() == 0
    assert 0.01 < (p < 0.05).mean() < 0.1


def test_a_group_counts_by_its_mean_in_each_set() -> None:
    dense = random_dense(30, 12, seed=3)
    group, in_a = np.random.default_rng(4).integers(0, 6, 30), np.arange(30) % 2 == 0
    group[[0, 1]] = [6, 7]  # one of each set alone
    observations = Observations.of(group, in_a)
    assert (observations.test, observations.left_out) == ("signed-rank", 2)
    features = np.flatnonzero(dense.any(0))
    for p, feature in zip(observations.p(sparse(dense), features), features, strict=True):
        column = dense[:, feature]
        difference = np.array(
            [column[(group == g) & in_a].mean() - column[(group == g) & ~in_a].mean() for g in range(6)]
        )
        assert p == pytest.approx(exact_signed_rank(difference))
    alone = Observations.of(np.where(group == 0, 0, 100 + np.arange(30)), in_a)
    assert (alone.test, alone.left_out) == ("Mann-Whitney", 1)
    assert (alone.unit[group == 0] == -1).all()


def test_false_discovery_rate_against_scipy() -> None:
    random = np.random.default_rng(0)
    for p in (random.random(100) ** 3, np.full(5, 0.2), np.array([0.04]), np.zeros(0)):
        expected = stats.false_discovery_control(p) if len(p) else p
        np.testing.assert_allclose(false_discovery_rate(p), expected)


def texts(n: int, seed: int = 0) -> list[str]:
    """Of very different lengths, some longer than the context."""
    random = np.random.default_rng(seed)
    characters = "".join(TEXT)
    found = []
    for _ in range(n):
        start, length = int(random.integers(0, 100)), int(random.integers(1, 60))
        found.append("x" + characters[start : start + length])
    return found


@pytest.mark.parametrize("places", [40, 4096])
def test_texts_read_together_are_as_read_alone(
    run: SmallRun, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "TOKENS_PER_BATCH_CPU", places)
    some = [*texts(25), "a text <|endoftext|> and another"]
    read = read_texts(run.model, run.sae, some)
    assert (np.diff(read.feature * len(some) + read.text) > 0).all()
    exclusion = run.sae.exclusion(run.model.tokenizer)
    longer_than_context = 0
    for number, text in enumerate(some):
        trace = trace_text(run.model, run.sae, text)
        dense = trace.codes.to_dense().numpy()
        mine = read.text == number
        assert read.ids[number] == trace.ids
        assert set(read.feature[mine]) == set(np.flatnonzero(dense.any(0)))
        columns = dense[:, read.feature[mine]]
        np.testing.assert_allclose(read.max[mine], columns.max(0), rtol=1e-4)
        np.testing.assert_allclose(read.sum[mine], columns.sum(0), rtol=1e-4)
        assert read.position[mine].tolist() == columns.argmax(0).tolist()
        kept = np.array(trace.ids) != END_OF_TEXT
        assert read.n_tokens[number] == kept.sum()
        np.testing.assert_allclose(read.mean[mine], columns.sum(0) / kept.sum(), rtol=1e-4)
        parts = []
        for start in range(0, len(trace.ids), CONTEXT):
            ids = torch.tensor([trace.ids[start : start + CONTEXT]])
            x = run.model.capture(ids, [run.sae.hook_name])[run.sae.hook_name]
            parts.append(x[exclusion.kept(ids, x)])
        np.testing.assert_allclose(
            read.pooled[number], torch.cat(parts).double().mean(0), rtol=1e-4, atol=1e-5
        )
        longer_than_context += len(trace.ids) > CONTEXT
    assert longer_than_context > 3


def test_long_texts_are_cut_and_counted(run: SmallRun) -> None:
    read = read_texts(run.model, run.sae, ["short", "long " * 50], max_tokens=20)
    assert read.n_cut == 1
    assert len(read.ids[1]) == read.n_tokens[1] == 20


SAFE = ["import os", "import sys\n", "for name in names:", "print(name, file=sys.stderr)", "import name"]
OTHER = ["# naïve café", "日本語 привет", "# 😀 café", "日本 café — 日本語"]


@pytest.mark.parametrize("by", ["max", "mean", "fires"])
def test_a_contrast_against_dense_traces(run: SmallRun, by: Any) -> None:
    found = contrast(run, SAFE, OTHER, names=("code", "prose"), by=by, n=None, probes=False)  # type: ignore[arg-type]
    dense = []
    for text in (*SAFE, *OTHER):
        a = trace_text(run.model, run.sae, text).codes.to_dense().double().numpy()
        dense.append({"max": a.max(0), "mean": a.mean(0), "fires": a.any(0).astype(float)}[by])
    # Texts that begin alike have activations that differ by rounding only: ties, to four digits.
    values, in_a = (
        np.array([[float(f"{x:.4g}") for x in row] for row in dense]),
        np.arange(len(dense)) < len(SAFE),
    )
    assert set(found.feature) == set(np.flatnonzero(values.any(0)))
    assert (np.diff(np.abs(found.auc - 0.5)) <= 1e-12).all()
    assert found.attrs["test"] == "Mann-Whitney"
    assert [found.attrs[n] for n in ("n_a", "n_b", "observations", "tested")] == [5, 4, 9, len(found)]
    assert [found.attrs[n] for n in ("cut", "repeated", "left_out")] == [0, 0, 0]
    for row in found.to_dict("records"):
        column = values[:, row["feature"]]
        assert row["auc"] == pytest.approx(roc_auc_score(in_a, column))
        assert row["rate_difference"] == pytest.approx((column[in_a] > 0).mean() - (column[~in_a] > 0).mean())
        assert (row["label"], row["score"]) == (f"label {row['feature']}", row["feature"] / D_SAE)
        assert row["side"] == ("code" if row["auc"] >= 0.5 else "prose")
        own = column[in_a] if row["side"] == "code" else column[~in_a]
        carried = own[row["texts"]]
        assert len(carried) == min(3, (own > 0).sum())
        np.testing.assert_allclose(carried, np.sort(own)[::-1][: len(carried)], rtol=1e-3)
        if len(carried):
            text = (SAFE if row["side"] == "code" else OTHER)[row["texts"][0]]
            trace = trace_text(run.model, run.sae, text)
            peak = int(trace.activations(row["feature"]).argmax())
            assert f"‹{trace.tokens[peak]}›" in row["example"]
    np.testing.assert_allclose(found.q, stats.false_discovery_control(found.p))


def test_matched_pairs_are_tested_as_pairs(run: SmallRun) -> None:
    pairs = ["a", "b", "c", "d"]
    found = contrast(run, SAFE[:4], OTHER, groups=(pairs, pairs[::-1]), n=None, probes=False)  # type: ignore[arg-type]
    assert found.attrs["test"] == "signed-rank"
    values = np.array(
        [trace_text(run.model, run.sae, t).codes.to_dense().numpy().max(0) for t in (*SAFE[:4], *OTHER)]
    )
    rounded = to_four_digits(values).astype(np.float64)
    expected = paired_p(sparse(rounded), np.arange(8) < 4, np.array([0, 1, 2, 3, 3, 2, 1, 0]))
    assert found.sort_values("feature").p.tolist() == pytest.approx(expected.tolist())
    assert found.attrs["remarks"][0].endswith("signed-rank test of 4 matched pairs")


def test_one_unmatched_text_does_not_change_the_test(run: SmallRun) -> None:
    pairs = ["a", "b", "c", "d"]
    found = contrast(run, SAFE, OTHER, groups=([*pairs, "e"], pairs), probes=False)  # type: ignore[arg-type]
    assert (found.attrs["test"], found.attrs["observations"], found.attrs["left_out"]) == (
        "signed-rank",
        8,
        1,
    )
    assert "Left out of p and q: 1 group with texts in one set only" in found.attrs["remarks"]
    whole = contrast(run, SAFE[:4], OTHER, groups=(pairs, pairs), n=None, probes=False)  # type: ignore[arg-type]
    p = dict(zip(whole.feature, whole.p, strict=True))
    assert all(row.p == pytest.approx(p.get(row.feature, 1.0)) for row in found.itertuples())


def test_groups_that_are_no_pairs_count_once_each(run: SmallRun) -> None:
    groups = (["k", "k", "l", "l", "m"], ["n", "n", "o", "o"])
    found = contrast(run, SAFE, OTHER, groups=groups, n=None)  # type: ignore[arg-type]
    assert found.attrs["remarks"][0].endswith("Mann-Whitney test of 5 groups")
    assert found.p.min() >= 0.2 - 1e-9  # one of the ten ways to choose two of five, on either side
    assert found.probes is not None
    for row in found.probes.itertuples():
        assert (row.auc_low, row.auc_high) == pytest.approx(auc_interval(row.auc, 3, 2))


def test_copies_count_once_and_stay_on_one_side(run: SmallRun) -> None:
    once = contrast(run, SAFE, OTHER, n=None, probes=False)  # type: ignore[arg-type]
    found = contrast(run, SAFE * 5, OTHER * 5, n=None)  # type: ignore[arg-type]
    assert (found.attrs["repeated"], found.attrs["observations"]) == (36, 9)
    assert "Equal texts count once: 36 texts repeated" in found.attrs["remarks"]
    assert found.attrs["remarks"][0].endswith("Mann-Whitney test of 9 groups")
    assert found.sort_values("feature").p.tolist() == pytest.approx(once.sort_values("feature").p.tolist())
    assert found.probes is not None
    assert "(4 folds)" in found.probes.title  # of four different texts
    assert (found.probes.auc_high - found.probes.auc_low > 0.3).all()


def test_sets_of_different_lengths_are_remarked(run: SmallRun) -> None:
    long = contrast(run, [f"{text} " * 9 for text in SAFE], OTHER, names=("x", "y"), probes=False)  # type: ignore[arg-type]
    a, b = long.attrs["lengths"]
    assert a == np.median([len(run.model.tokenizer.encode(f"{text} " * 9)) for text in SAFE])
    expected = f"x has longer texts (median {a:.0f} tokens) than y ({b:.0f}): a feature may be stronger there"
    assert any(remark.startswith(expected) for remark in long.attrs["remarks"])
    same = contrast(run, ["a b", "c d"], ["e f", "g h"], probes=False)  # type: ignore[arg-type]
    assert len(same.attrs["remarks"]) == 1


def test_a_contrast_with_probes_is_a_table_with_figures(run: SmallRun) -> None:
    found = contrast(run, SAFE, OTHER, n=7)  # type: ignore[arg-type]
    assert len(found) == 7
    assert found.probes is not None
    assert list(found.probes.probe) == [
        "logistic regression",
        "difference of means",
        "best 10 features",
        "best feature",
    ]
    assert found.head(2).probes is found.probes
    assert len(found.figure().data[0].x) == 7
    assert len(found.probes.figure().data[0].x) == 4
    assert "Probes on texts left out" in found._repr_html_()
    assert found.remarks[0] in found.head(2)._repr_html_()
    assert found.remarks[0] in repr(found)


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (["one"], ["two", "three"], "a has 1 texts: a contrast needs at least 2 on each side."),
        (["one", "two"], [], "b has 0 texts: a contrast needs at least 2 on each side."),
        ("one", ["two", "three"], "a is one text: give a list of texts."),
        (["one", "two"], ["two", "one"], "a and b hold the same texts: there is nothing to tell apart."),
        (
            ["one", "two", "three"],
            ["four", "two", "one"],
            "Text 1 of a and text 1 of b are the same ('two'), and 1 more stand in both sets: leave out what tells"
            " nothing apart.",
        ),
        (
            ["one", "one"],
            ["two", "three"],
            "The texts of a are all the same or of one group: a contrast needs 2 groups on each side.",
        ),
        (["one", " \n"], ["two", "x"], "Text 1 of a is empty: leave it out, or give it at least one word."),
        (
            ["one", "two"],
            ["x", "<|endoftext|>"],
            "Text 1 of b has no tokens that count: special tokens and outliers are left out.",
        ),
    ],
)
def test_texts_that_cannot_be_compared(run: SmallRun, a: Any, b: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        contrast(run, a, b)  # type: ignore[arg-type]
    assert str(caught.value) == sentence


def test_options_that_cannot_be(run: SmallRun) -> None:
    for options in ({"by": "median"}, {"n": 0}, {"max_tokens": 0}, {"groups": ([1], [2])}):
        with pytest.raises(InputError):
            contrast(run, SAFE, OTHER, **options)  # type: ignore[arg-type]


# --- labelled texts


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text('text,class,pair\n"a, b\nc",x,1\nd,y,1\ne,x,2\nf,z,2\n', encoding="utf-8")
    return path


def test_one_class_against_another_or_the_rest(table: Path) -> None:
    rest = read_labelled(table, first="x", group_column="pair")
    assert (rest.a, rest.b, rest.names) == (["a, b\nc", "e"], ["d", "f"], ("x", "the rest"))
    assert rest.groups == (["1", "2"], ["1", "2"])
    two = read_labelled(table, first="z", second="x")
    assert (two.a, two.b, two.names, two.groups) == (["f"], ["a, b\nc", "e"], ("z", "x"), None)
    table.write_text("t,c\none,1\ntwo,0\n", encoding="utf-8")
    plain = read_labelled(table, "t", "c")
    assert (plain.a, plain.b, plain.names) == (["one"], ["two"], ("1", "0"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "has 3 classes (x, y, z): choose one, which is then compared with the rest, or two."),
        ({"first": "w"}, "has no texts of class w: its classes are x, y, z."),
        ({"text_column": "body"}, "has no column body: its columns are text, class, pair."),
        ({"group_column": "author"}, "has no column author: its columns are text, class, pair."),
    ],
)
def test_labelled_texts_that_are_none(table: Path, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        read_labelled(table, **options)
    assert str(caught.value) == f"{table} {sentence}"


def test_broken_tables_of_texts(table: Path) -> None:
    for content, sentence in (
        ("text,class\none,x\n", "has 1 class in column class: a contrast needs two."),
        ("text,class\none\n", r"Line 2 of .* has fewer cells \(1\) than there are columns \(2\)"),
        ('text,class\n"a\nb",x\n\none, two,y\n', r"Line 5 of .* has more cells \(3\) than there are columns"),
        ("text,class,class\none,x,y\ntwo,y,x\n", "has 2 columns class: leave one"),
        ("text,class\none,x\ntwo, \nthree,y\n", "Line 3 of .* has no class: fill it in"),
        ("", "its columns are none"),
        ("text,class\n", "has 0 classes in"),
    ):
        table.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=sentence):
            read_labelled(table)
    table.write_bytes(b"text,class\n\xff\xfe,x\n")
    with pytest.raises(InputError, match="is not a CSV file in UTF-8"):
        read_labelled(table)


def test_a_text_may_be_long_and_a_class_may_be_called_the_rest(table: Path) -> None:
    long = "x " * 200_000
    table.write_text(f"text,class\n{long},the rest\ntwo,y\nthree,z\n", encoding="utf-8")
    found = read_labelled(table, first="the rest")
    assert (found.a, found.names) == ([long], ("the rest", "not the rest"))


# --- folders and files of texts


def test_sets_from_folders_and_files(tmp_path: Path) -> None:
    for name, content in (
        ("one/set/1.py", "\ufeffimport os"),
        ("one/set/2", "b"),
        ("one/set/.DS_Store", "\0"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "set").write_text("\ufeffc\n\nd\n", encoding="utf-8")
    found = read_sets(tmp_path / "one" / "set", tmp_path / "two" / "set")
    assert (found.a, found.b, found.names) == (["import os", "b"], ["c", "d"], ("one/set", "two/set"))
    assert read_sets(tmp_path / "one" / "set" / "2", tmp_path / "two" / "set").names == ("2", "set")
    with pytest.raises(InputError, match="cannot be compared with itself"):
        read_sets(tmp_path / "one" / "set", tmp_path / "two" / ".." / "one" / "set")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("one\ntwo\n")
    for content, sentence in ((b" \n", "is empty"), (b"\xff\xfe", "is not text in UTF-8")):
        (tmp_path / "a" / "x.txt").write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_sets(tmp_path / "a", tmp_path / "b")
        assert str(caught.value).startswith(f"{tmp_path / 'a' / 'x.txt'} {sentence}")
