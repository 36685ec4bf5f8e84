"""Two sets of texts from one table with a column of texts and a column of classes."""

import csv
from dataclasses import dataclass
from pathlib import Path

from activations.errors import InputError

REST = "the rest"


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
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for column in wanted:
                if column not in columns:
                    raise InputError(
                        f"{path} has no column {column}: its columns are {', '.join(columns) or 'none'}."
                    )
            rows = [[row[column] for column in wanted] for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8 ({error}).") from None
    for number, row in enumerate(rows):
        if any(cell is None for cell in row):
            raise InputError(f"Row {number + 1} of {path} has fewer cells than there are columns.")
    classes = list(dict.fromkeys(row[1] for row in rows))
    for name in (first, second):
        if name is not None and name not in classes:
            raise InputError(f"{path} has no texts of class {name}: its classes are {', '.join(classes)}.")
    if len(classes) < 2:
        raise InputError(f"{path} has {len(classes)} class in column {class_column}: a contrast needs two.")
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
        names=(first, REST if other is None else other),
        groups_a=[row[2] for row in a] if group_column else None,
        groups_b=[row[2] for row in b] if group_column else None,
    )
