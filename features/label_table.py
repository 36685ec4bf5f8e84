"""All labels as one table, made column by column: a million features take seconds, not minutes."""

import sqlite3
from typing import TYPE_CHECKING, Any

import numpy as np

from features.labels import SCORE_KINDS, SOURCES, TABLE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 10_000  # rows that stay in the cache while they are turned into columns
_SOURCE = " ".join(f"WHEN '{source}' THEN {place}" for place, source in enumerate(SOURCES))
_KIND = " ".join(f"WHEN '{kind}' THEN {place}" for place, kind in enumerate(SCORE_KINDS))
# Sources and kinds come as small numbers, which cost nothing where a million texts would.
_LABELS = f"""SELECT id, feature, CASE source {_SOURCE} END, text, author, method
    FROM (SELECT MAX(id) AS newest FROM labels GROUP BY feature, source) CROSS JOIN labels ON id = newest
    WHERE text <> ''"""
_SCORES = f"""SELECT label, CASE kind {_KIND} END, value, upper, control, n
    FROM (SELECT MAX(id) AS newest FROM scores GROUP BY label, kind) CROSS JOIN scores ON id = newest"""
_NOTES = """SELECT feature, text
    FROM (SELECT MAX(id) AS newest FROM notes GROUP BY feature) CROSS JOIN notes ON id = newest
    WHERE text <> ''"""


def label_table(connection: sqlite3.Connection | None) -> "pd.DataFrame":
    """See :meth:`features.labels.Labels.table`; ``connection`` is None where nothing was written yet."""
    import pandas as pd

    def columns(query: str, *dtypes: type) -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = [[np.empty(0, dtype)] for dtype in dtypes]
        rows = connection.execute(query) if connection else None
        while batch := rows.fetchmany(_AT_ONCE) if rows else []:
            for part, values, dtype in zip(parts, zip(*batch, strict=True), dtypes, strict=True):
                part.append(np.array(values, dtype))
        return [np.concatenate(part) for part in parts]

    label, feature, source, text, author, method = columns(_LABELS, *[np.int64] * 3, *[object] * 3)
    scored, kind, value, upper, control, n = columns(_SCORES, *[np.int64] * 2, *[np.float64] * 4)
    noted, note = columns(_NOTES, np.int64, object)
    (starred,) = columns("SELECT feature FROM stars", np.int64)

    best = np.lexsort((source, feature))
    best = best[np.diff(feature[best], prepend=-1) != 0]  # the most trusted source of each feature
    every = np.unique(np.concatenate([feature, noted, starred]))

    def column(blank: Any, features: np.ndarray, values: np.ndarray) -> np.ndarray:
        filled = np.full(len(every), blank, dtype=values.dtype)
        filled[np.searchsorted(every, features)] = values
        return filled

    # A score belongs to the feature of its label, if that is one of the best.
    best_by_id = best[np.argsort(label[best])]
    at = np.searchsorted(label[best_by_id], scored)
    at[at == len(best_by_id)] = 0
    is_shown = label[best_by_id[at]] == scored if len(best) else np.zeros(len(scored), dtype=bool)
    owner = feature[best_by_id[at[is_shown]]]

    def figure(of_kind: str, values: np.ndarray) -> np.ndarray:
        chosen = kind[is_shown] == SCORE_KINDS.index(of_kind)
        return column(np.nan, owner[chosen], values[is_shown][chosen])

    found = {
        "feature": every,
        "text": column("", feature[best], text[best]),
        "source": column("", feature[best], np.array(SOURCES, dtype=object)[source[best]]),
        "author": column("", feature[best], author[best]),
        "method": column("", feature[best], method[best]),
        "f1": figure("tokens", value),
        "upper": figure("tokens", upper),
        "control": figure("tokens", control),
        "n": pd.array(figure("tokens", n), dtype="Int64"),
        "detection": figure("detection", value),
        "fuzzing": figure("fuzzing", value),
        "note": column("", noted, note),
        "starred": np.isin(every, starred),
    }
    return pd.DataFrame({name: found[name] for name in TABLE_COLUMNS})
