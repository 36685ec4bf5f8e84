"""Labels as a table that spreadsheets open: one row per feature, the label that counts.

The scores are those of :meth:`features.labels.Labels.table`; precision, intervals and judges have no column.
"""

import csv
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from activations.errors import InputError
from features.exchange.entries import Entry, count, feature_number, one_of, share
from features.labels import SOURCES, TABLE_COLUMNS, Label, Score, Source

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = tuple("label" if name == "text" else name for name in TABLE_COLUMNS)
NEEDED = ("feature", "label")
_DELIMITERS = ",;\t"  # spreadsheets of countries with a decimal comma write semicolons
_YES, _NO = ("1", "true", "yes", "x"), ("", "0", "false", "no")
_LONGEST_CELL = 1 << 24


def csv_text(table: "pd.DataFrame") -> str:
    """The table of labels as CSV (RFC 4180, UTF-8); an empty cell is a figure that was not measured."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    cells = table.astype(object).assign(starred=table["starred"].map({True: "true", False: ""}))
    writer.writerows(cells.where(cells.notna(), None).itertuples(index=False))
    return file.getvalue()


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
    label = Label(
        feature,
        row["label"].strip(),
        _source(source),
        row.get("author", ""),
        row.get("method", ""),
        scores=_scores(row, where),
        note=row.get("note", "").strip(),
    )
    return Entry(where, label, starred)


def _scores(row: dict[str, str], where: str) -> tuple[Score, ...]:
    f1, upper, control = (share(row.get(name), name, where) for name in ("f1", "upper", "control"))
    n = count(row.get("n"), "n", where)
    if f1 is None and (upper is not None or control is not None):
        raise InputError(f"{where}: upper or control is given without f1.")
    scores = [] if f1 is None else [Score("tokens", f1, n, upper=upper, control=control)]
    judged: tuple[Literal["detection", "fuzzing"], ...] = ("detection", "fuzzing")
    for kind in judged:
        value = share(row.get(kind), kind, where)
        if value is not None:
            scores.append(
                Score(kind, value, 0, judge="")
            )  # the table says neither who judged nor how many cases
    return tuple(scores)


def _source(word: str) -> Source:
    return next(source for source in SOURCES if source == word)


def rows_of(table: "pd.DataFrame", features: Iterable[int]) -> "pd.DataFrame":
    """The rows of these features, in the order in which they are given; those without a row are left out."""
    by_feature = table.set_index("feature", drop=False)
    return by_feature.loc[[feature for feature in features if feature in by_feature.index]]
