"""Labels as a table that spreadsheets open: one row per feature, the label that counts.

The scores are those of :meth:`features.labels.Labels.table`; precision, intervals and judges have no column. A
spreadsheet takes a text that begins with one of :data:`LIVE` for a formula, which may send the table's content
elsewhere: such a text stands behind a quotation mark, which reading takes away.
"""

import csv
import io
import re
from collections.abc import Iterable
from typing import Literal

from activations.errors import InputError
from features.exchange.entries import Entry, count, feature_number, one_of, share
from features.labels import SOURCES, TABLE_COLUMNS, Label, Score, Source

COLUMNS = (*("label" if name == "text" else name for name in TABLE_COLUMNS), "pattern")
LIVE = "=+-@\t\r"
_LIVE_TEXT = re.compile(f"'*[{re.escape(LIVE)}]")
NEEDED = ("feature", "label")
_JUDGED: tuple[Literal["detection", "fuzzing"], ...] = ("detection", "fuzzing")
_DELIMITERS = ",;\t"  # spreadsheets of countries with a decimal comma write semicolons
_YES, _NO = ("1", "true", "yes", "x"), ("", "0", "false", "no")
_LONGEST_CELL = 1 << 24


def csv_text(labels: Iterable[Label], starred: Iterable[int]) -> str:
    """Labels as CSV (RFC 4180, UTF-8); an empty cell is a figure that was not measured."""
    stars = set(starred)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(_cells(label, label.feature in stars) for label in labels)
    return file.getvalue()


def _cells(label: Label, starred: bool) -> dict[str, object]:
    judged = {kind: label.score_of(kind) for kind in _JUDGED}
    return {
        "feature": label.feature,
        "label": _quieted(label.text),
        "source": label.source if label.text else "",
        **{name: _quieted(getattr(label, name)) for name in ("author", "method", "pattern", "note")},
        **{name: getattr(label, name) for name in ("f1", "upper", "control", "n")},
        **{kind: score.value if score else None for kind, score in judged.items()},
        "starred": "true" if starred else "",
    }


def _quieted(text: str) -> str:
    return f"'{text}" if _LIVE_TEXT.match(text) else text


def _as_it_was(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _LIVE_TEXT.match(cell) else cell


def read_csv(content: str, name: str, d_sae: int) -> list[Entry]:
    """The rows of a table with the columns ``feature`` and ``label``, and any of the other :data:`COLUMNS`.

    A row without a source is an imported label. A row with neither label nor note nor star says nothing.

    Raises:
        InputError: a column is missing or not known, or a row is wrong; the sentence names the line.
    """
    delimiter = _delimiter(content)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    entries: list[Entry] = []
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        _check_header(header, name)
        begins = reader.line_num + 1
        for cells in reader:
            where, begins = f"{name}, line {begins}", reader.line_num + 1
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise InputError(f"{where}: {len(cells)} cells stand under {len(header)} columns.")
            entry = _entry(dict(zip(header, cells, strict=True)), where, d_sae)
            if entry.label.text or entry.label.note or entry.starred:
                entries.append(entry)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: this is not valid CSV ({error}).") from None
    return entries


def _delimiter(content: str) -> str:
    header = content.partition("\n")[0]
    return max(_DELIMITERS, key=header.count)


def _check_header(header: list[str], name: str) -> None:
    for needed in NEEDED:
        if needed not in header:
            shown = ", ".join(header)[:80]
            raise InputError(f"{name} has no column {needed!r} (it has {shown}): it needs feature and label.")
    for column in header:
        if column not in COLUMNS:
            raise InputError(
                f"{name} has the column {column!r}, which is not known: the columns are {', '.join(COLUMNS)}."
            )
        if header.count(column) > 1:
            raise InputError(f"{name} has the column {column!r} twice: leave one of them.")


def _entry(row: dict[str, str], where: str, d_sae: int) -> Entry:
    feature = feature_number(row["feature"], where, d_sae)
    starred = one_of(row.get("starred", "").strip().lower(), (*_YES, *_NO), "starred", where) in _YES
    source = one_of(row.get("source", "").strip() or "import", SOURCES, "source", where)
    author, method, pattern = (_as_it_was(row.get(name, "")) for name in ("author", "method", "pattern"))
    label = Label(
        feature,
        _as_it_was(row["label"].strip()).strip(),
        _source(source),
        author,
        method,
        pattern,
        _scores(row, where),
        note=_as_it_was(row.get("note", "").strip()).strip(),
    )
    return Entry(where, label, starred)


def _scores(row: dict[str, str], where: str) -> tuple[Score, ...]:
    f1, upper, control = (share(row.get(name), name, where) for name in ("f1", "upper", "control"))
    n = count(row.get("n"), "n", where)
    if f1 is None and (upper is not None or control is not None):
        raise InputError(f"{where}: upper or control is given without f1.")
    scores = [] if f1 is None else [Score("tokens", f1, n, upper=upper, control=control)]
    for kind in _JUDGED:
        value = share(row.get(kind), kind, where)
        if value is not None:
            scores.append(
                Score(kind, value, 0, judge="")
            )  # the table says neither who judged nor how many cases
    return tuple(scores)


def _source(word: str) -> Source:
    return next(source for source in SOURCES if source == word)
