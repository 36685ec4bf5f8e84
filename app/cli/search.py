"""``sae search``: features by words, by a text that calls them up, or by what tells two sets of texts apart."""

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

_SHOWN = {
    "search": ("feature", "score", "density", "similarity", "label", "matched", "snippet"),
    "active": (
        *("feature", "score", "activation", "share", "density", "rarity", "specificity"),
        *("position", "token", "label"),
    ),
    "contrast": ("feature", "score", "rate_a", "rate_b", "auc", "effect", "q", "side", "label", "example"),
    "probes": ("probe", "auc", "auc_low", "auc_high", "accuracy", "accuracy_low", "accuracy_high", "chosen"),
}
_TEXTS = ("label", "snippet", "example", "chosen")  # share the room that the others leave
_GAP = 4  # columns between two
_LEAST_ROOM = 16


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
    """With --csv: texts with the same value here (a matched pair) are never on both sides when probes are judged."""
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
    if table.kind == "contrast":
        _explain(table)
    if given.save is not None:
        table.to_csv(given.save, index=False)


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


def _search(run: "Run", given: Arguments) -> "FeatureTable":
    from app.cli.terminal import console, progress
    from features.search import search

    found = search(
        run, " ".join(given.query), n=given.n, meaning=given.meaning, encoder=given.encoder, progress=progress
    )
    for typed, words in found.attrs.get("read_as", {}).items():
        read = ", ".join(words) or "nothing: no label, token or note has such a word"
        console.print(f"  {typed} stands nowhere, read as {read}", style="dim", soft_wrap=True)
    return found


def _contrast(run: "Run", given: Arguments) -> "FeatureTable":
    from app.cli.terminal import progress
    from features.contrast import contrast
    from features.labelled_texts import LabelledTexts, read_labelled

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
        a, b = given.contrast
        sets = LabelledTexts(_texts(a), _texts(b), (a.name, b.name))
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


def _texts(path: Path) -> list[str]:
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        raise InputError(
            f"{path} does not exist: give a folder of texts, or a file with a text in every line."
        )
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise InputError(f"A file of {path} is not text in UTF-8 ({error}).") from None
    return texts if path.is_dir() else [line for line in texts[0].splitlines() if line.strip()]


def _explain(found: "FeatureTable") -> None:
    from app.cli.terminal import console
    from features.texts import MAX_TOKENS

    facts = found.attrs
    console.print(
        f"  q: false-discovery rate over the {facts['tested']:,} features that fire, {facts['test']} test",
        style="dim",
        soft_wrap=True,
    )
    if facts["cut"]:
        console.print(
            f"  Of {facts['cut']:,} texts only the first {MAX_TOKENS:,} tokens were read",
            style="dim",
            soft_wrap=True,
        )


def _show(found: "FeatureTable") -> None:
    """What fits on a line; ``--save`` writes all columns."""
    from app.cli.terminal import console, table
    from features.tables import presentable

    for part in (found, found.probes):
        if part is None:
            continue
        shown = presentable(part)[[name for name in _SHOWN[part.kind] if name in part]].astype(str)
        numbers = [name for name in shown.columns if name not in _TEXTS]
        used = sum(max(len(name), *shown[name].str.len(), 0) + _GAP for name in numbers)
        texts = [name for name in shown.columns if name in _TEXTS]
        room = max((console.width - used) // max(len(texts), 1) - _GAP, _LEAST_ROOM)
        for name in texts:
            shown[name] = [text if len(text) <= room else text[: room - 1] + "…" for text in shown[name]]
        console.print(part.title, style="bold", soft_wrap=True)
        table(list(shown.columns), [list(row) for row in shown.itertuples(index=False)])
        console.print()
