"""A table of features on lines of any width: numbers are never cut, and texts without room beside them go below."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from features.tables import FeatureTable

_FIGURES = {  # the most important first, which are dropped last
    "search": ("feature", "score", "similarity", "density", "matched"),
    "active": (
        "feature",
        "score",
        "activation",
        "share",
        "rarity",
        "specificity",
        "token",
        "density",
        "position",
    ),
    "contrast": ("feature", "score", "auc", "q", "rate_a", "rate_b", "side", "effect"),
    "probes": ("probe", "auc", "accuracy"),
}
_TEXTS = {
    "search": ("label", "snippet"),
    "active": ("label",),
    "contrast": ("label", "example"),
    "probes": ("chosen",),
}
_LEFT = ("probe", "matched", "token", "side")  # the others are numbers
_GAP, _INDENT = "  ", "    "


def lines(found: "FeatureTable", width: int | None = None) -> list[str]:
    """A heading and the rows.

    Args:
        width: columns there are; None if nobody counts them, as in a pipe: then every row is one line, and whole.
    """
    from features.tables import presentable

    shown = presentable(found).astype(str)
    texts = {name: shown[name].tolist() for name in _TEXTS[found.kind] if name in shown}
    if "snippet" in texts:  # a part of the label, which is shown, unless it was found elsewhere
        texts["snippet"] = [
            snippet if fields.startswith(("tokens", "note")) else ""
            for snippet, fields in zip(texts["snippet"], shown["matched"], strict=True)
        ]
    names = [name for name in _FIGURES[found.kind] if name in shown]
    figures = {name: _padded(name, shown[name].tolist()) for name in names}
    if width is not None:
        while len(figures) > 1 and cell_len(_joined(figures, 0)) > width:
            figures.popitem()
    beside = {name: _padded(name, cells, left=True) for name, cells in texts.items() if any(cells)}
    if width is None or cell_len(_joined(figures | beside, 0)) <= width:
        return [_joined(figures | beside, row).rstrip() for row in range(len(shown) + 1)]
    rows = [_joined(figures, 0).rstrip()]
    for row in range(len(shown)):
        rows.append(_joined(figures, row + 1).rstrip())
        below = [cells[row] for cells in texts.values() if cells[row]]
        rows += [_INDENT + _shortened(text, width - len(_INDENT)) for text in below]
    return rows


def _padded(name: str, cells: Sequence[str], left: bool = False) -> list[str]:
    """A column with its name above, all of one width."""
    column = [name, *cells]
    width = max(map(cell_len, column))
    spaces = [" " * (width - cell_len(cell)) for cell in column]
    return [
        cell + space if left or name in _LEFT else space + cell
        for cell, space in zip(column, spaces, strict=True)
    ]


def _joined(columns: dict[str, list[str]], row: int) -> str:
    return _GAP.join(column[row] for column in columns.values())


def _shortened(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 1)).rstrip() + "…"
