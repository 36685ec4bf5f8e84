"""Search: every way of asking against a slow obvious one, the database kept up to date, texts that call features up."""

import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import D_SAE, N_TOKENS, SmallRun, scored
from tiny_models import one_thread

from activations.errors import InputError
from features import search_file as search_file_module
from features.active import active_in
from features.labels import Label, Score
from features.search import UNSCORED, importance, search, search_file, trust
from features.search_file import FIELDS, Entry, SearchFile
from features.terms import Piece, number_of, pieces, regex_of, terms


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


WORDS = (
    "self",
    "return",
    "docstring",
    "docs",
    "do",
    "naïve",
    "Größe",
    "日本語",
    "привет",
    "x1",
    "__init__",
    "a.b",
    "->",
)


def entry(feature: int, label: str = "", tokens: str = "", note: str = "", weight: float = 0.5) -> Entry:
    return Entry(feature, weight, label, tokens, note, None, "", "automatic", 0.01)


def made(folder: Path, entries: Sequence[Entry], change: int = 0) -> SearchFile:
    file = SearchFile(folder / "search.sqlite")
    with file.writing():
        file.build(entries, {"index": 1}, (change, f"mark {change}"))
    return file


def random_entries(n: int, seed: int = 0) -> list[Entry]:
    random = np.random.default_rng(seed)

    def text(longest: int) -> str:
        return " ".join(random.choice(WORDS, int(random.integers(0, longest))))

    return [
        Entry(
            i,
            float(random.random()),
            f"fires on ‹{text(5)}›",
            text(4).replace(" ", "\n"),
            text(3),
            None,
            "",
            "",
            0.0,
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchFile, list[Entry]]:
    entries = random_entries(300)
    return made(tmp_path_factory.mktemp("search"), entries), entries


def obvious(entries: Sequence[Entry], query: str) -> list[int]:
    """Features in the order of rank with a field, for each piece, that has its terms one after the other."""

    def has(found: list[str], wanted: Sequence[str], is_prefix: bool) -> bool:
        for start in range(len(found)):
            here = found[start : start + len(wanted)]
            if len(here) < len(wanted):
                return False
            same = list(here[:-1]) == list(wanted[:-1])
            if same and (here[-1].startswith(wanted[-1]) if is_prefix else here[-1] == wanted[-1]):
                return True
        return False

    return [
        e.feature
        for e in sorted(entries, key=lambda e: e.rank)
        if all(any(has(terms(getattr(e, f)), p.terms, p.is_prefix) for f in FIELDS) for p in pieces(query))
    ]


@pytest.mark.parametrize(
    "query",
    [
        "self",
        "SELF",
        "naive",
        "grösse",
        "日本語",
        "привет",
        "docs",
        "self return",
        '"self return"',
        '"fires on self"',
        "doc*",
        "d*",
        "docst*",
        "self docst*",
        "__init__",
        "a.b",
        "->",
        ".",
        '"init"',
        "x1 -> ret*",
    ],
)
def test_a_query_finds_what_an_obvious_search_finds(
    corpus: tuple[SearchFile, list[Entry]], query: str
) -> None:
    file, entries = corpus
    expected = obvious(entries, query)
    assert expected
    for n in (3, 1000):
        found, sought = file.with_terms(pieces(query), n)
        assert [e.feature for e in found] == expected[:n]
        assert not any(one.guess for one in sought)


def test_results_come_whole_and_by_importance(corpus: tuple[SearchFile, list[Entry]]) -> None:
    file, entries = corpus
    found, _ = file.with_terms(pieces("fires"), 1000)
    assert len(found) == len(entries)
    assert [e.rank for e in found] == sorted(e.rank for e in entries)
    by_number = {e.feature: e for e in entries}
    for e in found:
        assert (e.label, e.tokens, e.note) == tuple(getattr(by_number[e.feature], f) for f in FIELDS)
        assert e.importance == pytest.approx(by_number[e.feature].importance, abs=1e-3)


@pytest.mark.parametrize("pattern", ["doc", "^self", "on ‹(self|x1)", "x1$", r"\bdo\b", "日本.", "^$|ö"])
@pytest.mark.parametrize("ignore_case", [False, True])
def test_a_regular_expression_finds_what_python_finds(
    corpus: tuple[SearchFile, list[Entry]],
    pattern: str,
    ignore_case: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _, entries = corpus
    monkeypatch.setattr(search_file_module, "_CHUNK_ROWS", 40)
    file = made(tmp_path, entries)
    compiled = re.compile(pattern, re.MULTILINE | re.IGNORECASE * ignore_case)
    expected = [
        (e.feature, fields)
        for e in sorted(entries, key=lambda e: e.rank)
        if (fields := [f for f in FIELDS if getattr(e, f) and compiled.search(getattr(e, f))])
    ]
    for n in (5, 1000):
        found = file.with_pattern(pattern, n, ignore_case=ignore_case)
        assert [(e.feature, fields) for e, fields in found] == expected[:n]


def test_words_that_stand_nowhere_are_read_as_prefixes_then_as_typing_errors(tmp_path: Path) -> None:
    file = made(tmp_path, [entry(1, "docstring of a module"), entry(2, "modules"), entry(3, "modern")])

    def found(query: str) -> tuple[list[int], str]:
        rows, (sought,) = file.with_terms(pieces(query), 10)
        return [e.feature for e in rows], sought.guess

    assert found("module") == ([1], "")
    assert found("docstr") == ([1], "prefix")
    assert found("mod") == ([1, 2, 3], "prefix")
    assert found("docstrnig") == ([1], "typo")  # two letters swapped
    assert found("xodule") == ([1], "typo")  # the nearest only: modules would be two away
    assert found("mxdules") == ([2], "typo")
    assert found("zzzzzzzz") == ([], "typo")
    assert found("qz") == ([], "typo")  # a word of two letters is next to everything


def test_many_words_of_one_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up word by word, or by FTS5 when there are too many: the same."""
    entries = [entry(i, f"word{i:03}", weight=(i * 7 % 100) / 100) for i in range(100)]
    file = made(tmp_path, entries)
    few = file.with_terms(pieces("word0*"), 1000)[0]
    monkeypatch.setattr(search_file_module, "_WORDS_OF_PREFIX", 3)
    assert [e.feature for e in file.with_terms(pieces("word0*"), 1000)[0]] == [e.feature for e in few]
    assert len(few) == 100


@given(query=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_nothing_that_is_typed_breaks_a_search(corpus: tuple[SearchFile, list[Entry]], query: str) -> None:
    file, _ = corpus
    for typed in (query, f'"{query}"', f"{query}*", f"label:{query} AND NEAR(", f"'{query}' OR x NOT"):
        found, sought = file.with_terms(pieces(typed), 5)
        assert len(sought) == len(pieces(typed))
        assert len(found) <= 5


@given(st.lists(st.text(max_size=25), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_every_text_is_found_by_itself(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = made(Path(folder), [entry(i, text) for i, text in enumerate(texts)])
        for i, text in enumerate(texts):
            if '"' not in text and terms(text):
                found = [e.feature for e in file.with_terms(pieces(f'"{text}"'), 10)[0]]
                assert found == obvious([entry(i, t) for i, t in enumerate(texts)], f'"{text}"')
                assert i in found


def test_an_updated_database_answers_as_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_file_module, "_CHUNK_ROWS", 40)
    old, new = random_entries(200), random_entries(200, seed=1)
    changed = [new[i] for i in range(0, 200, 3)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file = made(tmp_path / "a", old, change=4)
    with file.writing():
        file.update(changed, (9, "mark 9"))
    assert file.state({"index": 1}) == (9, "mark 9")
    anew = made(tmp_path / "b", [new[i] if i % 3 == 0 else old[i] for i in range(200)])
    for query in ("self", "doc*", "d*", '"self return"', "->", "docstrnig", "fires on x1"):
        for n in (5, 1000):
            assert file.with_terms(pieces(query), n) == anew.with_terms(pieces(query), n)
    for pattern in ("self", "^x1$", "o.*n"):
        assert file.with_pattern(pattern, 1000) == anew.with_pattern(pattern, 1000)


def test_an_update_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path, random_entries(50), change=1)
    before = file.with_terms(pieces("fires"), 100)

    def fails(*about: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="disk is full"), file.writing():
        patch.setattr(search_file_module, "_repack", fails)
        file.update(random_entries(50, seed=1), (2, "mark 2"))
    assert file.state({"index": 1}) == (1, "mark 1")
    assert file.with_terms(pieces("fires"), 100) == before


def test_a_broken_or_foreign_database_is_made_again(tmp_path: Path) -> None:
    file = made(tmp_path, [entry(1, "one")])
    assert file.state({"index": 1}) == (0, "mark 0")
    assert file.state({"index": 2}) is None
    file.path.write_bytes(b"no database at all" * 100)
    assert file.state({"index": 1}) is None
    made(tmp_path, [entry(1, "two")])
    assert [e.label for e in file.with_terms(pieces("two"), 5)[0]] == ["two"]


def test_queries_are_taken_apart() -> None:
    assert [p.terms for p in pieces('one "two three" FOUR')] == [("one",), ("two", "three"), ("four",)]
    assert pieces("doc* a*b *")[0] == Piece(("doc",), True)
    assert len(pieces("a*b")[0].terms) == 3
    assert pieces("‹self›") == pieces("self")
    assert pieces("") == pieces("  ‹›") == []
    assert regex_of("/a b/") == ("a b", False)
    assert regex_of(" /A/i ") == ("A", True)
    assert regex_of("/usr/bin") is None
    assert regex_of("//") is None
    assert (number_of(" 12 "), number_of("12a"), number_of("-1")) == (12, None, None)


# --- searches of a run


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    run = SmallRun(tmp_path)
    run.labels.put_automatic(
        [
            scored(3, "fires on ‹self›", 0.9),
            scored(4, "fires on ‹self› after ‹(›", 0.4),
            scored(7, "fires on ‹self›", 1.0),
        ],
        {"sae_hash": run.sae.hash},
    )
    return run


def test_a_search_shows_label_score_source_and_density(run: SmallRun) -> None:
    found = search(run, "self after")  # type: ignore[arg-type]
    (row,) = [row for row in found.to_dict("records") if "label" in row["matched"]]
    assert row["feature"] == 4
    assert row["label"] == row["snippet"] == "fires on ‹self› after ‹(›"
    assert (row["score"], row["source"]) == (0.4, "automatic")
    assert row["density"] == run.index.count[4] / N_TOKENS
    assert found.kind == "search"


def test_the_best_label_that_fires_comes_first(run: SmallRun) -> None:
    found = [f for f in search(run, "fires").feature if f in (3, 4, 7)]  # type: ignore[arg-type]
    weights = {f: importance(s, int(run.index.count[f]), N_TOKENS) for f, s in ((3, 0.9), (4, 0.4), (7, 1.0))}
    assert found == sorted(weights, key=lambda f: -weights[f])
    assert found[-1] == 7  # it never fired


def test_labels_notes_and_scores_are_found_as_soon_as_they_are_written(run: SmallRun) -> None:
    assert search(run, '"of a kind"').empty  # type: ignore[arg-type]
    run.labels.set(9, "brackets of a kind", author="me")
    run.labels.set_note(10, "see brackets")
    found = search(run, "brackets")  # type: ignore[arg-type]
    assert {(row["feature"], row["matched"], row["source"]) for row in found.to_dict("records")} == {
        (9, "label", "person"),
        (10, "note", ""),
    }
    run.labels.set(9, "")
    assert list(search(run, "brackets").feature) == [10]  # type: ignore[arg-type]
    run.index.manifest["inputs"]["number"] = 2
    assert list(search(run, "brackets").feature) == [10]  # type: ignore[arg-type]


def test_an_older_file_of_labels_that_was_put_back_is_noticed(run: SmallRun, tmp_path: Path) -> None:
    """Also where as much was written to it since as to the one that it replaced."""
    run.labels.set(8, "before")
    shutil.copy(run.labels.path, tmp_path / "backup")
    run.labels.set(9, "brackets")
    run.labels.set(10, "same")
    assert list(search(run, "brackets").feature) == [9]  # type: ignore[arg-type]
    change = run.labels.change()
    for left_over in tmp_path.glob("labels.sqlite*"):
        left_over.unlink()
    shutil.copy(tmp_path / "backup", run.labels.path)
    run.labels.set(9, "parentheses")
    run.labels.set(10, "same")
    assert run.labels.change() == change
    assert list(search(run, "parentheses").feature) == [9]  # type: ignore[arg-type]
    assert search(run, "/brackets/").empty  # type: ignore[arg-type]


@pytest.fixture
def cannot_be_written(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, whose folder is made so; returns the cache folder of the user."""
    cache = tmp_path / "cache of the user"
    access = os.access
    monkeypatch.setenv("SAESCOPE_CACHE", str(cache))
    monkeypatch.setattr(os, "access", lambda path, mode: cache in Path(path).parents and access(path, mode))
    return cache


def test_a_run_that_cannot_be_written_to_is_searched_from_the_cache(
    run: SmallRun, cannot_be_written: Path
) -> None:
    before = sorted(run.folder.path.iterdir())
    assert search(run, "after").feature.iloc[0] == 4  # type: ignore[arg-type]
    assert cannot_be_written in search_file(run).path.parents  # type: ignore[arg-type]
    run.labels.set(9, "brackets")
    assert list(search(run, "brackets").feature) == [9]  # type: ignore[arg-type]
    assert search(run, "brackets", meaning=True, encoder=Counting()).feature.iloc[0] == 9  # type: ignore[arg-type]
    assert set(run.folder.path.iterdir()) - set(before) <= {cannot_be_written}


def test_a_database_that_is_there_serves_a_run_that_cannot_be_written_to(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(run, "after")  # type: ignore[arg-type]
    monkeypatch.setattr(os, "access", lambda *about: False)
    monkeypatch.setattr(SearchFile, "writing", None)
    assert search(run, "after").feature.iloc[0] == 4  # type: ignore[arg-type]


def test_trust_puts_scores_of_both_kinds_on_one_scale() -> None:
    """Balanced accuracy is a half for a label that says nothing, where F1 is near 0."""
    assert trust("automatic", Score("tokens", 0.7, 9)) == 0.7
    assert trust("llm", Score("detection", 0.75, 9)) == trust("llm", Score("fuzzing", 0.75, 9)) == 0.5
    assert trust("llm", Score("detection", 0.5, 9)) == trust("llm", Score("detection", 0.2, 9)) == 0
    assert trust("llm", Score("detection", 0.8, 9, control=0.8)) == UNSCORED
    assert trust("automatic", Score("tokens", 0.05, 9, control=0.6)) == 0.05
    assert trust("automatic", Score("tokens", 0.6, 9, control=0.5)) == 0.6
    assert (trust("person", None), trust("llm", None)) == (1.0, UNSCORED)


def test_a_judged_label_ranks_by_what_it_is_better_than_chance(run: SmallRun) -> None:
    run.index.count[:] = 100
    judged = {11: (0.95, 0.5), 12: (0.55, 0.5), 13: (0.97, 0.98)}
    run.labels.add(
        Label(f, "judged", "llm", scores=(Score("detection", value, 50, control=control),))
        for f, (value, control) in judged.items()
    )
    run.labels.add([Label(14, "judged", "llm", scores=(Score("tokens", 0.6, 50),))])
    found = search(run, "judged")  # type: ignore[arg-type]
    assert list(found.feature) == [11, 14, 12, 13]
    assert list(found.score_kind) == ["detection", "tokens", "detection", "detection"]
    file = search_file(run)  # type: ignore[arg-type]
    updated = {e.feature: e for e in file.features(range(D_SAE))}
    run.labels.set_note(11, "")
    file.path.unlink()
    anew = {e.feature: e for e in search_file(run).features(range(D_SAE))}  # type: ignore[arg-type]
    assert updated == anew


def test_a_score_shows_as_soon_as_it_is_written(run: SmallRun) -> None:
    (number,) = run.labels.add([Label(9, "brackets", "llm", author="a model")])
    assert np.isnan(search(run, "brackets").score.iloc[0])  # type: ignore[arg-type]
    run.labels.add_score(number, Score("detection", 0.8, 50))
    row = search(run, "brackets").iloc[0]  # type: ignore[arg-type]
    assert (row.score, row.source) == (0.8, "llm")


def test_top_tokens_are_found_each_as_a_line(run: SmallRun) -> None:
    from features.explain import visible

    ids = run.index.array("token_id")[5]
    run.index.array("token_id")[5, 0] = ids[0] = 300
    text = visible(run.index.vocabulary[300])[1:-1]
    found = search(run, f"/^{re.escape(text)}$/", n=D_SAE)  # type: ignore[arg-type]
    expected = {f for f in range(D_SAE) if 300 in run.index.array("token_id")[f, :10]}
    assert set(found[found.matched == "tokens"].feature) >= expected - set(
        found[found.matched != "tokens"].feature
    )
    assert 5 in set(found.feature)
    assert "‹" in found[found.feature == 5].snippet.iloc[0]


def test_a_number_finds_the_feature_first(run: SmallRun) -> None:
    run.labels.set(2, "error 11")
    assert list(search(run, "11").feature)[:2] == [11, 2]  # type: ignore[arg-type]
    assert search(run, "11").matched.iloc[0] == "number"  # type: ignore[arg-type]
    assert search(run, "999999").empty  # type: ignore[arg-type]


def test_many_searches_at_once_make_the_database_once(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    build = SearchFile.build

    def counted(self: SearchFile, *about: Any) -> None:
        builds.append(1)
        build(self, *about)

    monkeypatch.setattr(SearchFile, "build", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(search(run, "after").feature), range(16)))  # type: ignore[arg-type]
    assert all(features == found[0] for features in found)
    assert 4 in found[0]
    assert len(builds) == 1
    assert not list(run.folder.path.glob("features/*.part"))


def test_what_was_left_of_a_killed_process_does_not_matter(run: SmallRun) -> None:
    """A half-written new database, and the journal of a half-done update of the old one."""
    file = search_file(run)  # type: ignore[arg-type]
    expected = list(search(run, "fires").feature)  # type: ignore[arg-type]
    for left_over in (f"{file.path}.part", f"{file.path}-journal"):
        Path(left_over).write_bytes(b"half of something")
    run.index.manifest["inputs"]["number"] = 3  # to be made anew
    assert list(search(run, "fires").feature) == expected  # type: ignore[arg-type]
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["search.sqlite", "search.sqlite.lock"]


def test_what_was_read_otherwise_is_said(run: SmallRun) -> None:
    assert search(run, "aftre").attrs["read_as"] == {"aftre": ["after"]}  # type: ignore[arg-type]
    assert search(run, "after").attrs["read_as"] == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("  ", 'There is nothing to look for: give a word, a "phrase", a prefix*, a /regex/ or a number.'),
        (
            "/(/",
            "/(/ is not a regular expression of RE2 (missing ): (): correct it, or leave the slashes off to look",
        ),
    ],
)
def test_bad_queries_get_a_sentence(run: SmallRun, query: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        search(run, query)  # type: ignore[arg-type]
    assert str(caught.value).startswith(sentence)


def test_a_table_stays_one_and_draws_itself(run: SmallRun) -> None:
    found = search(run, "fires")  # type: ignore[arg-type]
    part = found[found.score > 0.5].sort_values("feature").head(1)
    assert (type(part).__name__, part.kind, part.by) == ("FeatureTable", "search", "score")
    assert len(part.figure().data[0].x) == 1
    assert "fires on" in part._repr_html_()
    assert "Features found" in repr(part)
    search(run, "zzzzzzzzz").figure()  # type: ignore[arg-type]


# --- by meaning


class Counting:
    """Vectors of the letters that a text has."""

    name = "letters"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.seen += texts
        return np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], dtype=np.float32)


def test_meaning_finds_near_labels_and_encodes_each_text_once(run: SmallRun) -> None:
    encoder = Counting()
    run.labels.set(20, "zzz")
    found = search(run, "zz", meaning=True, encoder=encoder)  # type: ignore[arg-type]
    assert found.feature.iloc[0] == 20
    assert found.similarity.iloc[0] == pytest.approx(1, abs=1e-3)
    assert sorted(encoder.seen) == ["fires on ‹self›", "fires on ‹self› after ‹(›", "zz", "zzz"]
    assert set(found.feature) == {3, 4, 7, 20}
    encoder.seen.clear()
    run.labels.set(21, "new")
    assert search(run, "new", meaning=True, encoder=encoder).feature.iloc[0] == 21  # type: ignore[arg-type]
    assert encoder.seen == ["new", "new"]


def test_meaning_without_an_encoder_says_what_to_do(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        search(run, "brackets", meaning=True)  # type: ignore[arg-type]

    def not_here(name: str, local_files_only: bool) -> None:
        assert local_files_only
        raise OSError("no such folder")

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = not_here  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with pytest.raises(
        InputError, match=r"The sentence encoder mine is not on this machine \(no such folder\)"
    ):
        search(run, "brackets", meaning=True, encoder="mine")  # type: ignore[arg-type]


# --- by text

TEXT = "def read(self, path):\n    return self.open(path).read()\n"


@pytest.mark.parametrize("by", ["activation", "share", "rarity", "specific"])
def test_active_features_against_the_dense_trace(run: SmallRun, by: Any) -> None:
    dense = run.trace(TEXT).codes.to_dense().double().numpy()
    tokens = [3, 7, -1] if by == "specific" else None
    found = active_in(run, TEXT, by, tokens, n=D_SAE)  # type: ignore[arg-type]
    assert set(found.feature) == set(np.flatnonzero(dense.any(0)))
    for row in found.to_dict("records"):
        column = dense[:, row["feature"]]
        assert row["activation"] == pytest.approx(column.max())
        assert row["position"] == column.argmax()
        assert row["token"] == run.trace(TEXT).tokens[row["position"]]
        assert row["share"] == pytest.approx(column.max() / run.index.max[row["feature"]])
        density = max(run.index.density[row["feature"]], 1 / N_TOKENS)
        expected = {
            "activation": column.max(),
            "share": row["share"],
            "rarity": -column.max() * np.log(density),
            "specific": column[[3, 7, len(column) - 1]].sum() / column.sum(),
        }
        assert row[found.by] == pytest.approx(expected[by])
    assert list(found[found.by]) == sorted(found[found.by], reverse=True)
    assert len(active_in(run, TEXT, by, tokens, n=3)) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("by", "tokens", "sentence"),
    [
        ("loudness", None, "Features are ranked by activation, share, rarity, specific, not by 'loudness'."),
        ("specific", None, "The ranking 'specific' needs tokens: give the positions of one or more."),
        ("share", [1], "Tokens are chosen for the ranking 'specific', and this one is by 'share'."),
        ("specific", [99], "There is no token 99: the text has the tokens 0 to "),
    ],
)
def test_bad_rankings_get_a_sentence(run: SmallRun, by: Any, tokens: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        active_in(run, TEXT, by, tokens)  # type: ignore[arg-type]
    assert str(caught.value).startswith(sentence)
    assert search_file(run).path.name == "search.sqlite"  # type: ignore[arg-type]
