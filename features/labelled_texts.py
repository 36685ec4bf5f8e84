"""Two sets of texts, from folders, from files with a text in every line, or from one table with a column of classes."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from activations.errors import InputError

REST = "the rest"
_LONGEST_CELL = 1 << 24  # characters; Python's own limit of 131,072 is less than a long text


@dataclass(frozen=True)
class LabelledTexts:
    """Two sets of texts.

    Attributes:
        a, b: the texts.
        names: what the sets are called.
        groups_a, groups_b: the group of each text (a matched pair, an author); None without such a column.
    """

    a: list[str]
    b: list[str]
    names: tuple[str, str]
    groups_a: list[str] | None = None
    groups_b: list[str] | None = None

    @property
    def groups(self) -> tuple[list[str], list[str]] | None:
        """Those of both sets, as a contrast takes them."""
        return None if self.groups_a is None or self.groups_b is None else (self.groups_a, self.groups_b)


def read_labelled(
    path: str | Path,
    text_column: str = "text",
    class_column: str = "class",
    *,
    first: str | None = None,
    second: str | None = None,
    group_column: str | None = None,
) -> LabelledTexts:
    """Read a CSV file, UTF-8 with a line of column names.

    Args:
        first: the class that set a is of; by default the first in the file, which must then have two classes.
        second: the class that set b is of; by default all others together.
        group_column: says which texts belong together.

    Raises:
        InputError: the file is no such table, a column or class is missing, or there are more than two classes and none
            was chosen.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a CSV file with a column of texts and one of classes.")
    wanted = [text_column, class_column, *([group_column] if group_column else [])]
    try:
        rows = list(_rows(path, wanted))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8 ({error}).") from None
    classes = list(dict.fromkeys(row[1] for row in rows))
    for name in (first, second):
        if name is not None and name not in classes:
            raise InputError(f"{path} has no texts of class {name}: its classes are {', '.join(classes)}.")
    if len(classes) < 2:
        number = f"{len(classes)} class{'es' * (len(classes) != 1)}"
        raise InputError(f"{path} has {number} in column {class_column}: a contrast needs two.")
    if first is None and len(classes) > 2:
        raise InputError(
            f"{path} has {len(classes)} classes ({', '.join(classes[:8])}): choose one, which is then compared with"
            " the rest, or two."
        )
    if first is not None and first == second:
        raise InputError(f"Class {first} cannot be compared with itself: choose two classes.")
    first = classes[0] if first is None else first
    other = next(name for name in classes if name != first) if len(classes) == 2 else second
    a = [row for row in rows if row[1] == first]
    b = [row for row in rows if (row[1] != first if other is None else row[1] == other)]
    return LabelledTexts(
        a=[row[0] for row in a],
        b=[row[0] for row in b],
        names=(first, (REST if first != REST else f"not {REST}") if other is None else other),
        groups_a=[row[2] for row in a] if group_column else None,
        groups_b=[row[2] for row in b] if group_column else None,
    )


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[list[str]]:
    """The wanted cells of each row; only the first, the text, may be empty."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns = next(reader, [])
        for column in wanted:
            if column not in columns:
                raise InputError(
                    f"{path} has no column {column}: its columns are {', '.join(columns) or 'none'}."
                )
            if columns.count(column) > 1:
                raise InputError(f"{path} has {columns.count(column)} columns {column}: leave one.")
        places = [columns.index(column) for column in wanted]
        begins = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(columns):
                which = "more" if len(row) > len(columns) else "fewer"
                raise InputError(
                    f"Line {begins} of {path} has {which} cells ({len(row)}) than there are columns ({len(columns)}):"
                    " put a text with commas into double quotes."
                )
            cells = [row[place] for place in places] if row else []
            for column, cell in zip(wanted[1:], cells[1:], strict=False):
                if not cell.strip():
                    raise InputError(
                        f"Line {begins} of {path} has no {column}: fill it in, or delete the row."
                    )
            if cells:
                yield cells
            begins = reader.line_num + 1


def read_sets(a: str | Path, b: str | Path) -> LabelledTexts:
    """Read two sets: each a folder with a text in every file (but hidden ones), or a file with a text in every line.

    Raises:
        InputError: one does not exist, a file is empty or not UTF-8, or both are the same.
    """
    a, b = Path(a), Path(b)
    texts = _texts(a), _texts(b)
    if a.resolve() == b.resolve():
        raise InputError(f"{a} cannot be compared with itself: give two sets of texts.")
    return LabelledTexts(*texts, _told_apart(a, b))


def _texts(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        texts = [_text(file) for file in files]
        for file, text in zip(files, texts, strict=True):
            if not text.strip():
                raise InputError(f"{file} is empty: take it out of the folder, or write a text.")
        return texts
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a folder of texts, or a file with a text in every line."
        )
    return [line for line in _text(path).splitlines() if line.strip()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not text in UTF-8 ({error}).") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from None


def _told_apart(a: Path, b: Path) -> tuple[str, str]:
    """Their names, with as many folders before them as they need to differ."""
    parts = a.resolve().parts, b.resolve().parts
    longest = max(map(len, parts))
    names = [tuple("/".join(each[-n:]) for each in parts) for n in range(1, longest + 1)]
    one, other = next(pair for pair in names if pair[0] != pair[1])
    return one, other
