"""A file of labels belongs to one SAE: others' are refused, put aside whole, and come back with their SAE."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activations.errors import InputError
from features.labels import Label, Labels
from features.pipeline import Pipeline
from sae.run import RunFolder

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def trained(folder: Path, sae_hash: str) -> Labels:
    """The run's labels as they are once the pipeline has come to labelling an SAE."""
    pipeline: Any = SimpleNamespace(run=RunFolder(folder))
    sae: Any = SimpleNamespace(hash=sae_hash)
    Pipeline._retire_labels(pipeline, sae)
    labels = Labels.open(folder / "labels.sqlite", sae_hash=sae_hash)
    labels.put_automatic([Label(0, f"automatic {sae_hash[:2]}", "automatic")], {"sae_hash": sae_hash})
    return labels


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_labels_come_back_with_their_sae_however_often_it_is_changed(tmp_path: Path) -> None:
    trained(tmp_path, A).set(1, "a person's of a")
    trained(tmp_path, B).set(1, "a person's of b")
    for _ in range(2):
        assert trained(tmp_path, A).get(1).text == "a person's of a"
        assert "labels-aaaaaaaa.sqlite" not in files(tmp_path)
        assert trained(tmp_path, B).get(1).text == "a person's of b"
        assert trained(tmp_path, C).get(1) is None
    assert files(tmp_path) == ["labels-aaaaaaaa.sqlite", "labels-bbbbbbbb.sqlite", "labels.sqlite"]


def test_what_was_put_aside_is_never_written_over(tmp_path: Path) -> None:
    """Of two files of one SAE, such as one that was copied there, the one put aside last comes back."""
    Labels.open(tmp_path / "labels-aaaaaaaa.sqlite", sae_hash=A).set(1, "older")
    Labels.open(tmp_path / "labels.sqlite", sae_hash=A).set(1, "newer")
    trained(tmp_path, B)
    assert Labels.open(tmp_path / "labels-aaaaaaaa.sqlite").get(1).text == "older"
    assert Labels.open(tmp_path / "labels-aaaaaaaa-2.sqlite").get(1).text == "newer"
    assert trained(tmp_path, A).get(1).text == "newer"
    assert Labels.open(tmp_path / "labels-aaaaaaaa.sqlite").get(1).text == "older"


def test_an_sae_whose_hash_begins_alike_gets_nobody_elses_labels(tmp_path: Path) -> None:
    trained(tmp_path, A).set(1, "of a")
    trained(tmp_path, B)
    assert trained(tmp_path, A[:8] + C[8:]).get(1) is None


def test_labels_that_only_people_gave_are_put_aside_as_well(tmp_path: Path) -> None:
    Labels.open(tmp_path / "labels.sqlite", sae_hash=A).set(1, "mine")
    assert trained(tmp_path, B).get(1) is None
    assert trained(tmp_path, A).get(1).text == "mine"


WRITER = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("INSERT INTO notes VALUES (99, 7, 'in the log alone', '', '')")
connection.commit()
os._exit(0)
"""


def test_what_a_killed_process_left_in_the_log_is_moved_along(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    Labels.open(path, sae_hash=A).set(1, "mine")
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)
    assert path.with_name("labels.sqlite-wal").stat().st_size > 0
    Labels.open(path).move_to(tmp_path / "aside.sqlite")
    assert files(tmp_path) == ["aside.sqlite"]
    assert Labels.open(tmp_path / "aside.sqlite").get(7).note == "in the log alone"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_the_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    rename = Path.rename

    def killed(path: Path, target: Path) -> None:
        if when == "after":
            rename(path, target)
        raise KeyboardInterrupt

    for begun in range(2):  # putting A's aside, and bringing them back
        if begun == 0:
            trained(tmp_path, A).set(1, "of a")
        monkeypatch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, A if begun else B)
        monkeypatch.undo()
        assert trained(tmp_path, A if begun else B).get(1) == (Label(1, "of a") if begun else None)
    assert trained(tmp_path, A).get(1).text == "of a"


def test_labels_move_onto_nothing(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    labels.set(1, "one")
    for name in ("other.sqlite", "other.sqlite-wal"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError) as caught:
            labels.move_to(tmp_path / "other.sqlite")
        assert str(caught.value) == f"{tmp_path / name} is there already: move it away first."
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert labels.get(1).text == "one"


def test_labels_that_another_process_has_open_stay_where_they_are(tmp_path: Path) -> None:
    """Its log would be left behind, or what it writes there would be lost."""
    labels = Labels.open(tmp_path / "labels.sqlite")
    labels.set(1, "one")
    with closing(sqlite3.connect(labels.path)) as connection:
        connection.execute("SELECT * FROM labels").fetchall()
        with pytest.raises(InputError) as caught:
            labels.move_to(tmp_path / "other.sqlite")
    assert str(caught.value) == f"The labels in {labels.path} cannot be moved (database is locked)."
    assert labels.get(1).text == "one"
    labels.move_to(tmp_path / "other.sqlite")
    assert files(tmp_path) == ["other.sqlite"]


def test_labels_that_have_been_moved_are_written_beside_readers_again(tmp_path: Path) -> None:
    labels = Labels.open(tmp_path / "labels.sqlite")
    labels.set(1, "one")
    labels.move_to(tmp_path / "other.sqlite")
    Labels.open(tmp_path / "other.sqlite").set(2, "two")
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


WRITES: list[Callable[[Labels], object]] = [
    lambda labels: labels.set(1, "one"),
    lambda labels: labels.set_note(1, "a note"),
    lambda labels: labels.add([Label(1, "one", "llm")]),
    lambda labels: labels.star(1),
    lambda labels: labels.add_to_list("a", [1]),
    lambda labels: labels.put_automatic([]),
]


@pytest.mark.parametrize("write", WRITES)
def test_the_first_write_of_a_run_says_whose_labels_they_are(
    tmp_path: Path, write: Callable[[Labels], object]
) -> None:
    path = tmp_path / "labels.sqlite"
    ours = Labels.open(path, sae_hash=A)
    assert (ours.sae_hash, Labels.open(path).sae_hash, files(tmp_path)) == (A, None, [])
    write(ours)
    assert Labels.open(path).sae_hash == Labels.open(path, sae_hash=A).sae_hash == A
    with pytest.raises(InputError) as caught:
        Labels.open(path, sae_hash=B)
    assert str(caught.value) == f"{path} holds labels of another SAE: run sae index {tmp_path}."


def test_labels_that_nobody_claimed_are_claimed_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    Labels.open(path).set(1, "one")
    assert Labels.open(path, sae_hash=A).get(1).text == "one"
    assert Labels.open(path).sae_hash is None
    Labels.open(path, sae_hash=A).set(2, "two")
    Labels.open(path).put_automatic([], {"method": 3})
    assert Labels.open(path).inputs == {"method": 3, "sae_hash": A}


def test_labels_whose_file_became_another_saes_are_neither_read_nor_written(tmp_path: Path) -> None:
    """As in an explorer that was left open while the SAE was trained again."""
    labels = trained(tmp_path, A)
    trained(tmp_path, B)
    uses: list[Callable[[], object]] = [
        *(lambda: labels.get(0), lambda: labels.set(0, "x"), lambda: labels.table(), labels.change),
        lambda: Labels.open(labels.path).put_automatic([], {"sae_hash": A}),
    ]
    for use in uses:
        with pytest.raises(InputError, match="holds labels of another SAE"):
            use()
    assert Labels.open(labels.path).get(0).text == "automatic bb"
