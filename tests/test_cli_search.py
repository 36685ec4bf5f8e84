"""``sae search``: what it prints for each way of asking, and one sentence where it cannot."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from small_run import SmallRun, scored
from tiny_models import one_thread

from activations.errors import InputError
from app.cli.search import main
from features import run as run_module


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
    assert "read as nothing" in printed(capsys, "run", "zzzzzzzz")
    assert printed(capsys, "run", "/word2[0-3]/").count("fires on ‹word2") == 2 * 4  # label and snippet
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
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
