"""``sae search``: what it prints for each way of asking, and one sentence where it cannot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_run import SmallRun, scored
from tiny_models import one_thread

from activations.errors import InputError
from app.cli.search import main
from app.cli.search_table import lines
from features import run as run_module
from features.labels import Label, Score
from features.search import search
from features.tables import FeatureTable


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    run = SmallRun(tmp_path)
    run.labels.put_automatic([scored(f, f"fires on ‹word{f}›", 0.5) for f in range(40)], {})
    monkeypatch.setattr(run_module, "open_run", lambda path: run)
    monkeypatch.setenv("COLUMNS", "300")
    return run


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_words(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fires on ‹word12›" in printed(capsys, "run", "word12")
    assert "fires on ‹word13›" in printed(capsys, "run", "fires", "word13")
    assert "wodr12 stands nowhere, read as word12" in printed(capsys, "run", "wodr12")
    assert "zzzzzzzz stands nowhere, nor does a word that begins so" in printed(capsys, "run", "zzzzzzzz")
    assert printed(capsys, "run", "/word2[0-3]/").count("fires on ‹word2") == 4
    assert len(printed(capsys, "run", "fires", "--n", "3").splitlines()) == 2 + 3 + 1


def test_a_text(run: SmallRun, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = printed(
        capsys, "run", "--text", "def read(self):", "--by", "share", "--n", "4", "--save", tmp_path / "x.csv"
    )
    assert "Features that fire, by share" in out
    saved = pd.read_csv(tmp_path / "x.csv")
    assert len(saved) == 4
    assert saved.share.is_monotonic_decreasing
    assert "specificity" in printed(
        capsys, "run", "--text", "def read", "--by", "specific", "--tokens", "0", "1"
    )


def test_a_contrast_of_files_of_folders_and_of_a_table(
    run: SmallRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b.txt"
    a.mkdir()
    for number, text in enumerate(["import os", "import sys\nprint(1)", "class Reader:"]):
        (a / f"{number}.py").write_text(text)
    b.write_text("日本語\n\nnaïve café\n")
    out = printed(capsys, "run", "--contrast", a, b)
    assert "Features that tell a (3 texts) from b.txt (2 texts)" in out
    assert "logistic regression" in out
    assert "features that fire, Mann-Whitney test" in out
    table = tmp_path / "t.csv"
    table.write_text("body,kind,pair\none,x,1\ntwo,y,1\nthree four,x,2\nfive,y,2\n")
    words = (
        "run",
        "--csv",
        table,
        "--text-column",
        "body",
        "--class-column",
        "kind",
        "--group-column",
        "pair",
    )
    out = printed(capsys, *words, "--classes", "y", "--value", "fires")
    assert "Features that tell y (2 texts) from x (2 texts)" in out
    assert "signed-rank test" in out


def test_that_nothing_was_found_is_said(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "run", "fires")
    for words, sentence in (
        (("🚀",), "No label, top token or note has it"),
        (("word12", "word13"), "No feature has all 2 parts of this in its label, top tokens and note"),
        (("/qqqqq/",), "No label, top token or note matches it"),
        (("99",), "No label, top token or note has it, and features are numbered from 0 to 47"),
    ):
        out = printed(capsys, "run", *words).splitlines()
        assert out[:2] == [f"Nothing found for {' '.join(words)}", f"  {sentence}"]


def contrasted() -> FeatureTable:
    names = (
        "feature",
        "label",
        "score",
        "score_kind",
        "rate_a",
        "rate_b",
        "auc",
        "effect",
        "q",
        "side",
        "example",
    )
    long = "fires on ‹a rather long token› after a name or an attribute, and on brackets"
    rows = [
        (
            12345,
            long,
            0.875,
            "detection",
            0.25,
            0.5,
            0.99,
            -12.25,
            1.2345e-12,
            "unsafe",
            "x = 日本語 ‹(› " * 9,
        ),
        (7, "short", float("nan"), "", 0.25, 0.5, 0.01, 0.0, 1.0, "safe", "y\n‹z›"),
    ]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return FeatureTable.of(columns, kind="contrast", title="A title", by="auc")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_cuts_no_number(width: int) -> None:
    found = lines(contrasted(), width)
    assert all(len(line) <= width for line in found)
    heading = found[0].split()
    assert heading[:4] == ["feature", "score", "auc", "q"]
    figures = [" ".join(line.split()) for line in (found[1], found[4])]
    assert figures[0].startswith("12345 detection 0.88 0.99 1.2e-12")
    assert figures[1].startswith("7 not scored 0.01 1")
    if width >= 80:
        assert heading == ["feature", "score", "auc", "q", "rate_a", "rate_b", "side", "effect"]
        assert found[2] == f"    {contrasted().label[0][: width - 4]}"
        assert figures[0].endswith("0.25 0.50 unsafe -12.25")
    else:
        assert found[2].endswith("…")
    assert [line.strip() for line in found[5:]] == ["short", "y⏎‹z›"]


def test_in_a_pipe_a_row_is_a_line_and_whole() -> None:
    found = lines(contrasted())
    assert len(found) == 3
    for row, line in zip(contrasted().to_dict("records"), found[1:], strict=True):
        assert row["label"] in line
        assert row["example"].strip().replace("\n", "⏎") in line


def test_what_fits_stays_on_one_line(run: SmallRun) -> None:
    found = search(run, "fires", n=3)  # type: ignore[arg-type]
    assert len(lines(found, 80)) == 4
    assert lines(found, 80)[1].split()[:3] == [str(found.feature[0]), "F1", "0.50"]
    run.labels.set_note(0, "a note " * 9)
    noted = lines(search(run, '"a note"'), 80)  # type: ignore[arg-type]
    assert [line.strip() for line in noted[2:]] == ["fires on ‹word0›", ("a note " * 9).strip()]


def test_every_label_has_its_score_and_the_kind_of_it(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.labels.add(
        [Label(1, "judged", "llm", scores=(Score("detection", 0.75, 9),)), Label(2, "free", "llm")]
    )
    for word, score in (("judged", "detection 0.75"), ("free", "not scored"), ("word3", "F1 0.50")):
        out = printed(capsys, "run", word)
        assert score in out
        assert any(
            f"{word} · {score}" in name or f"‹{word}› · {score}" in name
            for name in search(run, word).figure().data[0].y  # type: ignore[arg-type]
        )


def test_a_file_to_save_to_is_looked_at_first(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*about: Any, **more: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("features.search.search", worked)
    for path, sentence in (
        (tmp_path / "nowhere" / "x.csv", "there is no folder"),
        (tmp_path, "is a folder: give the name of a file in it"),
    ):
        with pytest.raises(InputError, match=sentence):
            main(["run", "fires", "--save", str(path)])
    assert not (tmp_path / "nowhere").exists()


def test_a_table_that_cannot_be_saved_is_one_sentence(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*about: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("activations.files.write_bytes", full)
    with pytest.raises(InputError, match=r"x.csv \(No space left on device\)"):
        main(["run", "fires", "--save", str(tmp_path / "x.csv")])
    assert "fires on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("/\udcff/",), "What is looked for holds half of a character"),
        (("x\udcff",), "What is looked for holds half of a character"),
        (("--text", "x\udcff"), "The text holds half of a character"),
        ((), "sae search was given nothing: give one of a query, --text, --contrast, --csv."),
        (("x", "--text", "y"), "sae search was given a query and --text: give one of"),
        (("x", "--by", "share"), "--by says something about --text, which was not given."),
        (("--text", "x", "--classes", "a"), "--classes says something about --csv, which was not given."),
        (("--contrast", "nowhere", "nothing"), "nowhere does not exist: give a folder of texts, or a file"),
        (("--csv", "t", "--classes", "a", "b", "c"), "--classes names 3 classes: name one or two."),
    ],
)
def test_what_does_not_go_together(run: SmallRun, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        main(["run", *words])
    assert str(caught.value).startswith(sentence)
