"""Labels: whose counts, what history keeps, several writers, a kill, old files, and files that are not ours."""

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import InputError
from features.label_file import APPLICATION_ID
from features.labels import SOURCES, TABLE_COLUMNS, Label, Labels, Score, Source

ROOT = Path(__file__).parents[1]


def tokens(f1: float, n: int = 50, **more: Any) -> tuple[Score, ...]:
    return (Score("tokens", f1, n, **more),)


SELF = Label(3, "fires on ‹self›", "automatic", method="on", scores=tokens(0.9, precision=1.0, recall=0.82))
IMPORT = Label(5, "says ‹import›", "automatic", method="says", scores=tokens(0.4, 7))


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    labels = Labels.open(tmp_path / "labels.sqlite")
    labels.put_automatic([SELF, IMPORT])
    return labels


def named(feature: int, text: str, source: Source = "person", **more: Any) -> Label:
    return Label(feature, text, source, **more)


def test_an_automatic_label_comes_back_with_its_scores(labels: Labels) -> None:
    found = labels.get(3)
    assert found == SELF
    assert (found.f1, found.precision, found.recall, found.n) == (0.9, 1.0, 0.82, 50)
    assert (found.upper, found.control) == (None, None)
    assert labels.get(4) is None
    assert labels.all() == {3: SELF, 5: IMPORT}


def test_the_store_says_when_and_numbers_its_rows(labels: Labels) -> None:
    found = [labels.get(3), labels.get(5)]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", label.made) for label in found)
    assert all(label.scores[0].made == label.made for label in found)
    assert len({label.id for label in found}) == 2
    labels.add([named(3, "x", "llm", made="2001-02-03T04:05:06Z")])
    assert labels.get(3).made == "2001-02-03T04:05:06Z"


def test_every_field_comes_back(tmp_path: Path) -> None:
    score = Score("detection", 0.75, 40, 0.6, 0.86, 0.7, 0.8, 0.9, 0.5, "a judge", "2020-01-01T00:00:00Z")
    label = Label(
        *(7, "words\nof two lines", "llm", "a model", "explainer", '{"kind": "token"}', (score,)),
        *("2020-01-02T00:00:00Z", "prompt", "examples", "see 8"),
    )
    labels = Labels.open(tmp_path / "labels.sqlite")
    (number,) = labels.add([label])
    found = labels.get(7)
    assert replace(found, id=None) == label
    assert (found.id, found.made, found.scores[0].made) == (number, label.made, score.made)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    score = Score("tokens", np.float32(0.5), np.int64(3), recall=np.float64("nan"))  # type: ignore[arg-type]
    labels.put_automatic([named(np.int64(2), "x", "automatic", scores=(score,))])  # type: ignore[arg-type]
    labels.set(np.int32(2), "y")  # type: ignore[arg-type]
    labels.star(np.int64(2))  # type: ignore[arg-type]
    found = labels.automatic(np.int64(2))  # type: ignore[arg-type]
    assert (found.feature, found.f1, found.n, found.recall) == (2, 0.5, 3, None)
    assert labels.get(2).text == "y"
    assert labels.starred() == [2]


def test_reading_makes_no_file(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "none" / "labels.sqlite")
    assert (labels.get(0), labels.automatic(0), labels.all()) == (None, None, {})
    assert (labels.inputs, labels.history(0), labels.notes(0), labels.starred()) == (None, [], [], [])
    assert (labels.lists(), labels.change(), labels.changed_since(0)) == ({}, 0, set())
    assert (list(labels.table().columns), len(labels.table())) == (list(TABLE_COLUMNS), 0)
    assert list(tmp_path.iterdir()) == []


def test_a_persons_label_counts_until_it_is_taken_away(labels: Labels) -> None:
    labels.set(3, " the receiver ")
    assert labels.get(3) == named(3, "the receiver")
    assert labels.automatic(3) == SELF
    labels.set(3, "")
    assert labels.get(3) == SELF


def test_sources_count_in_the_order_of_trust_and_the_newest_of_each(labels: Labels) -> None:
    labels.add([named(3, "imported", "import"), named(3, "first", "llm"), named(3, "second", "llm")])
    assert labels.get(3).text == "second"
    assert labels.all("import") == {3: named(3, "imported", "import")}
    assert labels.all("llm") == {3: named(3, "second", "llm")}
    labels.set(3, "mine")
    assert labels.get(3).text == "mine"
    labels.set(3, "")
    assert labels.get(3).text == "second"
    assert [label.text for label in labels.history(3)] == [
        *("mine", "second", "first", "imported", "fires on ‹self›")
    ]


def test_labelling_again_touches_no_label_or_note_of_a_person(labels: Labels) -> None:
    labels.set(3, "the receiver", note="see also 5")
    labels.set_note(5, "check")
    labels.put_automatic([named(3, "fires on ‹cls›", "automatic"), named(9, "x", "automatic")])
    assert labels.get(3) == named(3, "the receiver", note="see also 5")
    assert labels.get(5) == named(5, "", note="check")  # its automatic label is gone, its note not
    assert labels.get(9) == named(9, "x", "automatic")
    assert [label.text for label in labels.history(3)] == [
        "fires on ‹cls›",
        "the receiver",
        "fires on ‹self›",
    ]
    assert labels.history(5) == [IMPORT]
    assert labels.automatic(5) is None


def test_saving_a_label_as_it_was_is_no_news(labels: Labels) -> None:
    first = labels.set(3, "mine", author="me", note="n")
    change = labels.change()
    assert labels.set(3, "mine", author="me", note="n") == first
    assert labels.set(4, "") is None
    labels.set_note(3, "n")
    assert labels.change() == change
    labels.add_score(first, Score("detection", 0.5, 2))
    assert labels.set(3, "mine", author="me") == first
    assert labels.set(3, "mine", author="you") != first


def test_a_note_changes_only_when_it_is_given_and_keeps_its_history(labels: Labels) -> None:
    labels.set(3, "a", note="first", author="me")
    labels.set(3, "b")
    assert labels.get(3) == named(3, "b", note="first")
    labels.set(3, "b", note="")
    assert labels.get(3) == named(3, "b")
    assert [(note.text, note.author) for note in labels.notes(3)] == [("", ""), ("first", "me")]


def test_the_newest_score_of_a_kind_counts(labels: Labels) -> None:
    number = labels.get(3).id
    detection, fuzzing = Score("detection", 0.6, 20, judge="j"), Score("fuzzing", 0.7, 20, judge="j")
    labels.add_score(number, fuzzing)
    labels.add_score(number, replace(detection, value=0.1))
    labels.add_score(number, detection)
    assert set(labels.get(3).scores) == {*SELF.scores, detection, fuzzing}
    assert labels.get(3).score == SELF.scores[0]
    (other,) = labels.add([named(8, "x", "llm", scores=(fuzzing,))])
    assert labels.get(8).score == fuzzing
    labels.add_score(other, detection)
    assert labels.get(8).score == detection
    assert labels.get(8).f1 is None
    with pytest.raises(InputError, match=r"holds no label of the id 999\.$"):
        labels.add_score(999, detection)


def test_a_summary_is_the_text_with_the_score_that_is_shown() -> None:
    assert SELF.summary == "fires on ‹self› · F1 0.90"
    assert named(3, "x", scores=(Score("detection", 0.6, 20),)).summary == "x · detection 0.60"
    assert named(3, "x").summary == "x · not scored"


def test_inputs_say_what_the_automatic_labels_were_made_from(labels: Labels) -> None:
    assert labels.inputs == {}
    labels.put_automatic([SELF], {"sae": "abc"})
    assert labels.inputs == {"sae": "abc"}


def test_stars(labels: Labels) -> None:
    for feature in (9, 3, 3):
        labels.star(feature)
    assert labels.starred() == [3, 9]
    labels.star(3, False)
    assert labels.starred() == [9]


def test_lists_keep_features_in_the_order_in_which_they_came(labels: Labels) -> None:
    labels.add_to_list("brackets", [9, 3], note="open")
    labels.add_to_list(" brackets ", [5, 9])
    labels.add_to_list("empty", [])
    assert labels.lists() == {"brackets": 3, "empty": 0}
    assert list(labels.list_members("brackets").items()) == [(9, "open"), (3, "open"), (5, "")]
    labels.add_to_list("brackets", [5], note="closed")
    labels.remove_from_list("brackets", [3, 77])
    labels.rename_list("brackets", "parentheses")
    assert labels.list_members("parentheses") == {9: "open", 5: "closed"}
    labels.delete_list("empty")
    assert labels.lists() == {"parentheses": 2}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: x.list_members("b"), "There is no list 'b': the lists are 'a', 'c'."),
        (lambda x: x.delete_list("b"), "There is no list 'b': the lists are 'a', 'c'."),
        (lambda x: x.rename_list("a", "c"), "There is a list 'c' already: give another name."),
        (lambda x: x.add_to_list(" ", [1]), "A list needs a name that is not empty."),
        (lambda x: x.add_to_list("a", [-1]), "There is no feature -1: features are numbered from 0."),
        (lambda x: x.set(-1, "x"), "There is no feature -1: features are numbered from 0."),
        (lambda x: x.add([Label(-1, "x")]), "There is no feature -1: features are numbered from 0."),
        (lambda x: x.add([Label(1, " ")]), "The new label of feature 1 is empty: give it a text."),
        (
            lambda x: x.put_automatic([Label(1, "x")]),
            "The label of feature 1 is not an automatic one with a text.",
        ),
        (
            lambda x: x.put_automatic([SELF, IMPORT, SELF]),
            "Feature 3 has two automatic labels: give it one.",
        ),
    ],
)
def test_what_cannot_be_written_is_one_sentence_and_changes_nothing(
    labels: Labels, call: Callable[[Labels], object], sentence: str
) -> None:
    labels.add_to_list("a", [1])
    labels.add_to_list("c", [])
    change = labels.change()
    with pytest.raises(InputError) as caught:
        call(labels)
    assert str(caught.value) == sentence
    assert (labels.change(), labels.all()) == (change, {3: SELF, 5: IMPORT})


def test_half_a_character_is_one_sentence(labels: Labels) -> None:
    with pytest.raises(InputError) as caught:
        labels.add([Label(1, "x"), Label(2, "\ud800")])
    assert str(caught.value) == (
        f"A text for {labels.path} holds half of a character: labels and notes must be valid Unicode."
    )
    assert labels.all() == {3: SELF, 5: IMPORT}


def scored(**score: Any) -> Callable[[Labels], object]:
    label = named(1, "x", scores=(Score(**{"kind": "tokens", "value": 0.5, "n": 1} | score),))
    return lambda labels: labels.add([SELF, label])


UNFIT: list[tuple[Callable[[Labels], object], str]] = [
    (lambda x: x.set(1, None), "The text is None, and must be a text."),
    (lambda x: x.set(1, "x", author=None), "The author is None, and must be a text."),
    (lambda x: x.set(1, "x", pattern=None), "The pattern is None, and must be a text."),
    (lambda x: x.set(1.5, "x"), "There is no feature 1.5: features are numbered from 0."),
    (lambda x: x.set("1", "x"), "There is no feature 1: features are numbered from 0."),
    (lambda x: x.set_note(1, None), "The note is None, and must be a text."),
    (lambda x: x.set_note(1, "x", author=3), "The author is 3, and must be a text."),
    (lambda x: x.add([Label(-5, "", note="n")]), "There is no feature -5: features are numbered from 0."),
    (lambda x: x.add([Label(1, "x"), Label(-5, "", note="n")]), "There is no feature -5: features are"),
    (
        lambda x: x.add([Label(1, "x", "human")]),
        "The source of a label is 'human', and must be one of person, llm, import, automatic.",
    ),
    (lambda x: x.put_automatic([replace(SELF, method=None)]), "The method is None, and must be a text."),
    (lambda x: x.add_to_list("a", [1], note=None), "The note of a list is None, and must be a text."),
    (lambda x: x.add_to_list(None, [1]), "The name of a list is None, and must be a text."),
    (
        scored(kind="guess"),
        "The kind of a score is 'guess', and must be one of tokens, detection, fuzzing.",
    ),
    (scored(value=float("nan")), "The value of a score is nan, and must be a number."),
    (scored(value=None), "The value of a score is None, and must be a number."),
    (scored(low=float("inf")), "The low of a score is inf, and must be a number."),
    (scored(upper="0.5"), "The upper of a score is '0.5', and must be a number."),
    (scored(n=2**63), "The n of a score is 9223372036854775808, and must be a whole number from 0 on."),
    (scored(n=2.5), "The n of a score is 2.5, and must be a whole number from 0 on."),
    (scored(n=-1), "The n of a score is -1, and must be a whole number from 0 on."),
    (scored(judge=None), "The judge is None, and must be a text."),
    (
        lambda x: x.add_score(1, Score("tokens", float("nan"), 1)),
        "The value of a score is nan, and must be a number.",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), UNFIT)
def test_what_is_no_text_or_figure_is_one_sentence_that_leaves_good_labels_alone(
    labels: Labels, call: Callable[[Labels], object], sentence: str
) -> None:
    change = labels.change()
    with pytest.raises(InputError) as caught:
        call(labels)
    assert str(caught.value).startswith(sentence)
    assert "move it away" not in str(caught.value)
    assert (labels.change(), labels.all()) == (change, {3: SELF, 5: IMPORT})


def test_only_a_damaged_file_is_to_be_moved_away(labels: Labels) -> None:
    """A row that the file itself refuses is no reason to throw its labels away."""
    with pytest.raises(InputError) as caught, labels._file.writing() as connection:
        connection.execute("DELETE FROM labels")
    assert str(caught.value) == (
        f"The labels in {labels.path} cannot be written (the history of labels is never changed)."
    )


def test_a_note_of_a_numpy_feature_is_a_note_of_that_feature(labels: Labels) -> None:
    labels.add([Label(np.int64(9), "", note=" n ")])  # type: ignore[arg-type]
    assert labels.get(9) == named(9, "", note="n")
    assert labels.table().feature.tolist() == [3, 5, 9]


def test_every_write_shows_in_the_change_and_says_which_features(labels: Labels) -> None:
    assert labels.changed_since(0) == {3, 5}
    writes: list[tuple[Callable[[], object], set[int]]] = [
        (lambda: labels.set(9, "nine"), {9}),
        (lambda: labels.set(9, ""), {9}),
        (lambda: labels.set_note(4, "n"), {4}),
        (lambda: labels.add([named(1, "x", "llm"), named(2, "y", "import")]), {1, 2}),
        (lambda: labels.add([named(6, "", note="only a note")], starred=[5]), {6}),
        (lambda: labels.add_score(labels.get(5).id, Score("detection", 0.5, 2)), {5}),
        (lambda: labels.put_automatic([SELF]), {3, 5}),  # 5 has none any more
        (lambda: labels.star(3), set()),
        (lambda: labels.add_to_list("l", [3]), set()),
        (lambda: labels.remove_from_list("l", [3]), set()),
    ]
    for write, features in writes:
        before = labels.change()
        write()
        assert labels.change() > before
        assert labels.changed_since(before) == features
        assert labels.changed_since(labels.change()) == set()


def label_strategy() -> st.SearchStrategy[Label]:
    text = st.text(st.characters(codec="utf-8"), max_size=8)
    share = st.floats(0, 1)
    maybe = st.none() | share
    score = st.builds(
        *(Score, st.sampled_from(["tokens", "detection", "fuzzing"]), share, st.integers(0, 99)),
        *(maybe, maybe, maybe, maybe, maybe, maybe, text),
    )
    scores = st.lists(score, max_size=3, unique_by=lambda x: x.kind).map(tuple)
    name = text.filter(lambda x: x.strip() == x and x)
    return st.builds(
        Label,
        st.integers(0, 3),
        name,
        st.sampled_from(SOURCES),
        text,
        text,
        text,
        scores,
        st.just(""),
        text,
        text,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(label_strategy(), max_size=8))
def test_the_table_and_all_agree_with_a_plain_replay(
    tmp_path_factory: pytest.TempPathFactory, added: list[Label]
) -> None:
    labels = Labels.open(tmp_path_factory.mktemp("labels") / "labels.sqlite")
    labels.add(added)
    labels.star(2)
    labels.set_note(1, "n")
    newest = {(label.feature, label.source): label for label in added}
    expected = {}
    for feature in range(4):
        mine = [newest[feature, source] for source in SOURCES if (feature, source) in newest]
        if mine or feature == 1:
            expected[feature] = replace(mine[0] if mine else Label(1, ""), note="n" if feature == 1 else "")
    assert labels.all() == expected
    assert {feature: labels.get(feature) for feature in expected} == expected
    assert labels.history(0) == [label for label in reversed(added) if label.feature == 0]
    table = labels.table()
    assert list(table.columns) == list(TABLE_COLUMNS)
    assert table.feature.tolist() == sorted({*expected, 2})
    for row in table.itertuples():
        label = expected.get(row.feature, Label(2, ""))
        assert (row.text, row.author, row.method, row.note) == (
            *(label.text, label.author, label.method, label.note),
        )
        assert row.source == (label.source if label.text else "")
        assert row.starred == (row.feature == 2)
        figures = [label.f1, label.upper, label.control, label.n]
        figures += [x and x.value for x in (label.score_of("detection"), label.score_of("fuzzing"))]
        found = [row.f1, row.upper, row.control, float(row.n) if label.n is not None else None]
        for figure, shown in zip(figures, [*found, row.detection, row.fuzzing], strict=True):
            assert figure == shown or (figure is None and (shown is None or np.isnan(shown)))


def test_history_cannot_be_rewritten(labels: Labels) -> None:
    for statement in ("UPDATE labels SET text = 'x'", "DELETE FROM scores", "DELETE FROM labels"):
        with sqlite3.connect(labels.path) as connection, pytest.raises(sqlite3.IntegrityError, match="never"):
            connection.execute(statement)


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda feature: labels.set(feature, f"label {feature}"), range(80)))
    assert {f: label.text for f, label in labels.all().items()} == {f: f"label {f}" for f in range(80)}


WRITER = """
import sys
from features.labels import Label, Labels, Score
path, first = sys.argv[1], int(sys.argv[2])
labels = Labels.open(path)
for feature in range(first, first + 20):
    labels.set(feature, f"label {feature}", author=str(first), note=f"note {feature}")
    (number,) = labels.add([Label(0, f"shared {feature}", "llm")])
    labels.add_score(number, Score("detection", 0.5, feature))
    labels.add_to_list("all", [feature])
"""


def writer(path: Path, code: str, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, str(path), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_eight_processes_write_at_the_same_time_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    writers = [writer(path, WRITER, str(100 * n)) for n in range(1, 9)]
    assert [each.wait() for each in writers] == [0] * 8
    labels = Labels.open(path)
    expected = [100 * n + place for n in range(1, 9) for place in range(20)]
    found = labels.all()
    assert [(f, x.text, x.note) for f, x in found.items() if f] == [
        (f, f"label {f}", f"note {f}") for f in expected
    ]
    shared = {label.text: label.score.n for label in labels.history(0)}
    assert shared == {f"shared {f}": f for f in expected}
    assert sorted(labels.list_members("all")) == expected
    ids = [label.id for f in (0, *expected) for label in labels.history(f)]
    assert len(set(ids)) == len(ids) == 320


def test_a_kill_while_writing_leaves_what_was_committed(tmp_path: Path) -> None:
    code = """
import sys
from features.labels import Label, Labels
labels, feature = Labels.open(sys.argv[1]), 0
while True:
    labels.set(feature, f"label {feature}", note="n")
    labels.add([Label(feature, f"word {place}", "llm") for place in range(50)])
    print(feature, flush=True)
    feature += 1
"""
    path = tmp_path / "labels.sqlite"
    killed = writer(path, code)
    assert killed.stdout is not None
    said = [int(killed.stdout.readline()) for _ in range(5)]
    time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    said += [int(line) for line in killed.stdout.read().splitlines()]
    killed.wait()
    labels = Labels.open(path)
    for feature in said:
        assert labels.get(feature) == named(feature, f"label {feature}", note="n")
        assert len(labels.history(feature)) == 51
    for feature in (said[-1] + 1, said[-1] + 2):
        # The transaction that the kill came upon is there as a whole or not at all.
        assert len(labels.history(feature)) in (0, 1, 51)
    labels.set(10**6, "still writable")
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


VERSION_1 = f"""
CREATE TABLE automatic (feature INTEGER PRIMARY KEY, text TEXT NOT NULL, method TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n INTEGER);
CREATE TABLE person (feature INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE note (feature INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE provenance (inputs TEXT NOT NULL);
INSERT INTO automatic VALUES (3, 'fires on ‹self›', 'on', 0.9, 1.0, 0.82, 50), (5, 'never fired', 'dead', NULL, NULL,
    NULL, 0);
INSERT INTO person VALUES (3, 'the receiver'), (9, 'nine');
INSERT INTO note VALUES (3, 'see 5'), (4, 'only a note');
INSERT INTO provenance VALUES ('{{"sae_hash": "abc"}}');
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = 1;
"""


def version_1(path: Path) -> Path:
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
    return path


def test_a_file_of_version_1_is_converted_and_loses_nothing(tmp_path: Path) -> None:
    labels = Labels.open(version_1(tmp_path / "labels.sqlite"))
    assert labels.all() == {
        3: named(3, "the receiver", note="see 5"),
        4: named(4, "", note="only a note"),
        5: named(5, "never fired", "automatic", method="dead"),
        9: named(9, "nine"),
    }
    assert labels.automatic(3) == SELF
    assert labels.automatic(3).made == ""
    assert labels.inputs == {"sae_hash": "abc"}
    labels.set(3, "")
    assert labels.get(3) == replace(SELF, note="see 5")
    with sqlite3.connect(labels.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)


def test_processes_that_meet_a_file_of_version_1_convert_it_once(tmp_path: Path) -> None:
    path = version_1(tmp_path / "labels.sqlite")
    writers = [writer(path, WRITER, str(100 * n)) for n in range(1, 4)]
    assert [each.wait() for each in writers] == [0] * 3
    labels = Labels.open(path)
    assert len(labels.history(3)) == 2
    assert len(labels.all()) == 4 + 1 + 60


def test_a_file_of_version_2_gets_marks(labels: Labels) -> None:
    with sqlite3.connect(labels.path) as connection:
        connection.execute("DROP TABLE writes")
        connection.execute("PRAGMA user_version = 2")
    before, again = labels.all(), Labels.open(labels.path)
    assert again.all() == before
    assert again.mark(again.change()) != ""
    again.set(3, "the receiver")
    assert again.get(3) == named(3, "the receiver")


def test_marks_tell_one_past_from_another(tmp_path: Path) -> None:
    one, other = (Labels.open(tmp_path / name) for name in ("one.sqlite", "other.sqlite"))
    assert one.mark(0) == ""
    one.set(1, "same")
    shutil.copy(one.path, other.path)
    shared = one.change()
    assert one.mark(shared) == other.mark(shared) != ""
    for labels in (one, other):
        labels.set(2, "same")
    assert one.change() == other.change()
    assert one.mark(one.change()) != other.mark(one.change())
    assert one.mark(shared) == other.mark(shared)


def test_a_conversion_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = version_1(tmp_path / "labels.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO provenance VALUES ('broken')")
        connection.execute("DROP TABLE note")
    with pytest.raises(InputError) as caught:
        Labels.open(path)
    assert str(caught.value) == (
        f"The labels in {path} cannot be converted to format 3 (no such table: note)."
    )
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM automatic").fetchone() == (2,)
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(InputError) as caught:
        Labels.open(path)
    assert str(caught.value) == (
        f"{path} is not a readable file of labels (file is not a database): move it away to start a new one."
    )
    assert path.read_bytes() == b"not a database" * 100


def test_somebody_elses_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    attempts: tuple[Callable[[Path], object], ...] = (Labels.open, lambda p: Labels(p).set(1, "x"))
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt(path)
        assert str(caught.value) == f"{path} is an SQLite file of something else, not of labels."
    assert path.read_bytes() == before


def test_a_newer_file_is_refused(labels: Labels) -> None:
    with sqlite3.connect(labels.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    for attempt in (lambda: Labels.open(labels.path), lambda: labels.set(1, "x")):
        with pytest.raises(InputError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{labels.path} was written in format 99, and this saescope reads up to format 3: install a newer"
            " saescope."
        )


def test_an_empty_file_is_one_that_nothing_was_written_to(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    path.touch()
    labels = Labels.open(path)
    assert labels.all() == {}
    labels.set(1, "one")
    assert labels.get(1) == named(1, "one")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        Labels.open(tmp_path / "file" / "labels.sqlite").set(1, "x")


def test_labels_in_a_folder_that_cannot_be_written_are_read(
    labels: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert labels.all() == {3: SELF, 5: IMPORT}
    assert sorted(path.name for path in labels.path.parent.iterdir()) == ["labels.sqlite"]


def test_a_full_disk_is_one_sentence_and_changes_nothing(
    labels: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def small(*words: Any, **more: Any) -> sqlite3.Connection:
        connection = real(*words, **more)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(InputError) as caught:
        labels.put_automatic([named(f, "x" * 100, "automatic") for f in range(5000)], {"a": 1})
    assert str(caught.value) == (f"The labels in {labels.path} cannot be written (database or disk is full).")
    monkeypatch.undo()
    assert labels.all() == {3: SELF, 5: IMPORT}
    assert json.dumps(labels.inputs) == "{}"
