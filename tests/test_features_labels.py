"""Labels: whose wins, what a re-run may touch, searching, several writers, and files that are not ours."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from activations.errors import InputError
from features.labels import Label, Labels

SELF = Label(3, "fires on ‹self›", "automatic", "current", f1=0.9, precision=1.0, recall=0.82, n=50)
IMPORT = Label(5, "says ‹import›", "automatic", "says", f1=0.4, precision=0.3, recall=0.6, n=7)


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    labels = Labels.open(tmp_path / "labels.sqlite")
    labels.put_automatic([SELF, IMPORT])
    return labels


def test_an_automatic_label_comes_back_with_its_scores(labels: Labels) -> None:
    assert labels.get(3) == SELF
    assert labels.get(4) is None
    assert labels.all() == {3: SELF, 5: IMPORT}


def test_reading_makes_no_file(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "none" / "labels.sqlite")
    assert (labels.get(0), labels.all(), labels.search("x"), labels.inputs) == (None, {}, [], None)
    assert list(tmp_path.iterdir()) == []


def test_a_persons_label_wins_until_it_is_taken_away(labels: Labels) -> None:
    labels.set(3, " the receiver ")
    assert labels.get(3) == Label(3, "the receiver", "person")
    labels.set(3, "")
    assert labels.get(3) == SELF


def test_labelling_again_touches_no_label_or_note_of_a_person(labels: Labels) -> None:
    labels.set(3, "the receiver", note="see also 5")
    labels.set_note(5, "check")
    labels.put_automatic([Label(3, "fires on ‹cls›", "automatic", "current"), Label(9, "x", "automatic")])
    assert labels.get(3) == Label(3, "the receiver", "person", note="see also 5")
    assert labels.get(5) == Label(5, "", "person", note="check")  # its automatic label is gone, its note not
    assert labels.get(9) == Label(9, "x", "automatic")


def test_a_note_changes_only_when_it_is_given(labels: Labels) -> None:
    labels.set(3, "a", note="first")
    labels.set(3, "b")
    assert labels.get(3) == Label(3, "b", "person", note="first")
    labels.set(3, "b", note="")
    assert labels.get(3) == Label(3, "b", "person")


def test_inputs_say_what_the_automatic_labels_were_made_from(labels: Labels) -> None:
    labels.put_automatic([SELF], {"sae": "abc"})
    assert labels.inputs == {"sae": "abc"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SELF", [3]),
        ("‹", [3, 5]),
        ("%", [7]),
        ("_", [7]),
        ("straße", [8]),
        ("note", [8]),
        ("zzz", []),
        ("", [3, 5, 7, 8]),
    ],
)
def test_search_finds_substrings_literally_in_any_case(labels: Labels, text: str, found: list[int]) -> None:
    labels.set(7, "100 %_d")
    labels.set(8, "STRASSE", note="A Note")
    assert [label.feature for label in labels.search(text)] == found


def test_search_sees_the_label_that_is_shown(labels: Labels) -> None:
    labels.set(3, "the receiver")
    assert labels.search("self") == []


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda feature: labels.set(feature, f"label {feature}"), range(80)))
    assert {f: label.text for f, label in labels.all().items()} == {f: f"label {f}" for f in range(80)}


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    code = """
import sys
from features.labels import Labels
for feature in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    Labels.open(sys.argv[1]).set(feature, "x")
"""
    words = [sys.executable, "-c", code, str(path)]
    root = Path(__file__).parents[1]
    writers = [subprocess.Popen([*words, first], cwd=root) for first in ("0", "100")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(Labels.open(path).all()) == [*range(10), *range(100, 110)]


def test_a_failed_write_changes_nothing(labels: Labels) -> None:
    with pytest.raises(InputError, match="UNIQUE"):
        labels.put_automatic([SELF, SELF])
    assert labels.all() == {3: SELF, 5: IMPORT}


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
    for attempt in (Labels.open, lambda p: Labels(p).set(1, "x")):
        with pytest.raises(InputError) as caught:
            attempt(path)
        assert str(caught.value) == f"{path} is an SQLite file of something else, not of labels."
    assert path.read_bytes() == before


def test_a_newer_file_is_refused(labels: Labels) -> None:
    with sqlite3.connect(labels.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError) as caught:
        Labels.open(labels.path)
    assert str(caught.value) == (
        f"{labels.path} was written in format 99, and this saescope reads up to format 1: install a newer"
        " saescope."
    )


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        Labels.open(tmp_path / "file" / "labels.sqlite").set(1, "x")
