"""``sae search``: features by words, by a text that calls them up, or by what tells two sets of texts apart."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from activations.errors import InputError
from app.cli.arguments import parse

if TYPE_CHECKING:
    from features.run import Run
    from features.tables import FeatureTable


@dataclass(frozen=True)
class Arguments:
    """Find features: by words in labels, top tokens and notes; by a text; or by a contrast of two sets of texts."""

    run: Positional[Path]
    """The run folder."""
    query: Positional[tuple[str, ...]] = ()
    """Words, all of them; '"a phrase"', prefix*, '/regex/', or a feature's number."""
    meaning: bool = False
    """Look for labels of like meaning, with a sentence encoder that is on this machine."""
    encoder: str | None = None
    """The sentence encoder for that, by name or folder; all-MiniLM-L6-v2 by default."""
    text: str | None = None
    """Rank the features that fire in this text."""
    by: Literal["activation", "share", "rarity", "specific"] = "activation"
    """With --text: by activation, its share of the feature's maximum, weighted by rarity, or specific to --tokens."""
    tokens: tuple[int, ...] = ()
    """With --by specific: positions of the tokens in the text."""
    contrast: tuple[Path, Path] | None = None
    """Two sets of texts: each a folder with a text in every file, or a file with a text in every line."""
    csv: Path | None = None
    """A table with a column of texts and a column of classes, to contrast one class with another or with the rest."""
    text_column: str = "text"
    """With --csv: the column of texts."""
    class_column: str = "class"
    """With --csv: the column of classes."""
    classes: tuple[str, ...] = ()
    """With --csv: one class, to be compared with all others, or two."""
    group_column: str | None = None
    """With --csv: texts with the same value here (a matched pair, an author) count as one for p and when probes are
    judged."""
    value: Literal["max", "mean", "fires"] = "max"
    """With a contrast: what counts in a text, the feature's largest or mean activation or whether it fires at all."""
    n: int = 20
    """Rows to show."""
    save: Path | None = None
    """Write the table to this CSV file as well."""


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    given = parse(Arguments, "search", arguments)
    ways = {
        "a query": bool(given.query),
        "--text": given.text is not None,
        "--contrast": given.contrast is not None,
        "--csv": given.csv is not None,
    }
    if sum(ways.values()) != 1:
        asked = " and ".join(name for name, is_asked in ways.items() if is_asked) or "nothing"
        raise InputError(f"sae search was given {asked}: give one of {', '.join(ways)}.")
    _check(given)
    from features.run import open_run

    run = open_run(given.run)
    if given.query:
        table = _search(run, given)
    elif given.text is not None:
        from features.active import active_in

        table = active_in(run, given.text, given.by, given.tokens or None, given.n)
    else:
        table = _contrast(run, given)
    _show(table)
    if given.save is not None:
        _save(table, given.save)


def _check(given: Arguments) -> None:
    """Nothing that is typed is ignored."""
    needs = {
        "--by": (given.by != "activation", given.text is not None, "--text"),
        "--tokens": (bool(given.tokens), given.text is not None, "--text"),
        "--meaning": (given.meaning, bool(given.query), "a query"),
        "--encoder": (given.encoder is not None, given.meaning, "--meaning"),
        "--text-column": (given.text_column != "text", given.csv is not None, "--csv"),
        "--class-column": (given.class_column != "class", given.csv is not None, "--csv"),
        "--classes": (bool(given.classes), given.csv is not None, "--csv"),
        "--group-column": (given.group_column is not None, given.csv is not None, "--csv"),
        "--value": (given.value != "max", bool(given.csv or given.contrast), "--contrast or --csv"),
    }
    for name, (is_given, is_meant, what) in needs.items():
        if is_given and not is_meant:
            raise InputError(f"{name} says something about {what}, which was not given.")
    if len(given.classes) > 2:
        raise InputError(f"--classes names {len(given.classes)} classes: name one or two.")
    if given.save is not None:
        _check_file(given.save)


def _check_file(path: Path) -> None:
    """Before the work, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"--save {path}: there is no folder {folder}; make it, or choose another.")
    if path.is_dir():
        raise InputError(f"--save {path} is a folder: give the name of a file in it.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"--save {path}: nothing can be written to {folder}; choose another folder.")


def _save(table: "FeatureTable", path: Path) -> None:
    from activations.files import write_bytes

    try:
        write_bytes(path, table.to_csv(index=False).encode())
    except OSError as error:
        raise InputError(f"The table cannot be written to {path} ({error.strerror}).") from None


def _search(run: "Run", given: Arguments) -> "FeatureTable":
    from app.cli.terminal import progress
    from features.search import search

    return search(
        run, " ".join(given.query), n=given.n, meaning=given.meaning, encoder=given.encoder, progress=progress
    )


def _contrast(run: "Run", given: Arguments) -> "FeatureTable":
    from app.cli.terminal import progress
    from features.contrast import contrast
    from features.labelled_texts import read_labelled, read_sets

    if given.csv is not None:
        first, second = (*given.classes, None, None)[:2]
        sets = read_labelled(
            given.csv,
            given.text_column,
            given.class_column,
            first=first,
            second=second,
            group_column=given.group_column,
        )
    else:
        assert given.contrast is not None
        sets = read_sets(*given.contrast)
    return contrast(
        run,
        sets.a,
        sets.b,
        names=sets.names,
        by=given.value,
        groups=sets.groups,
        n=given.n,
        progress=progress,
    )


def _show(found: "FeatureTable") -> None:
    """As many columns as have room on a terminal, more elsewhere, and all in the file that ``--save`` names."""
    from rich.text import Text

    from app.cli.search_table import lines
    from app.cli.terminal import console

    for part in (found, found.probes):
        if part is None:
            continue
        console.print(Text(part.title, style="bold"), soft_wrap=True)
        for remark in part.remarks:
            console.print(Text(f"  {remark}", style="dim"), soft_wrap=True)
        if not part.empty:
            heading, *rows = lines(part, console.width if console.is_terminal else None)
            console.print(Text(heading, style="dim"), soft_wrap=True)
            for row in rows:
                console.print(Text(row), soft_wrap=True)
        console.print()
