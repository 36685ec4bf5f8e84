"""Tables about features: pandas' own, which also know how they are drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from features.labels import Label, ScoreKind
    from features.run import Run

_SHOWN_ROWS = 50
_ONE_BY_ONE = 500  # labels; more are read all at once
_FORMATS = {
    **dict.fromkeys(("score", "share", "auc", "accuracy", "rate_a", "rate_b", "similarity"), "{:.2f}"),
    **dict.fromkeys(("auc_low", "auc_high", "accuracy_low", "accuracy_high"), "{:.2f}"),
    **dict.fromkeys(("rate_difference", "effect"), "{:+.2f}"),
    **dict.fromkeys(("activation", "specificity", "rarity"), "{:.3g}"),
    **dict.fromkeys(("density", "p", "q"), "{:.2g}"),
}
_SIGNS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})


class FeatureTable(pd.DataFrame):
    """A tidy table, one row per feature (or probe), the most interesting first.

    Everything that pandas does with a table works, and what comes out of it is such a table again.

    Attributes:
        kind: what it holds: "search", "active", "contrast" or "probes".
        title: one line about it.
        by: the column that rows are ordered by.
        probes: beside a contrast, how well plain probes tell the two sets apart; else None.
    """

    _metadata: ClassVar[list[str]] = ["kind", "title", "by", "probes"]
    kind: str = ""
    title: str = ""
    by: str = ""
    probes: "FeatureTable | None" = None

    @classmethod
    def of(
        cls,
        columns: "dict[str, Any] | pd.DataFrame",
        *,
        kind: str,
        title: str,
        by: str,
        probes: "FeatureTable | None" = None,
    ) -> "FeatureTable":
        """A table of equally long columns."""
        table = cls(columns)
        table.kind, table.title, table.by, table.probes = kind, title, by, probes
        return table

    @property
    def _constructor(self) -> type["FeatureTable"]:
        return FeatureTable

    @property
    def remarks(self) -> list[str]:
        """Sentences on how to read the table."""
        return list(self.attrs.get("remarks", []))

    def figure(self) -> "go.Figure":
        """A plotly figure: bars of what rows are ordered by, a volcano plot of a contrast, probes with intervals."""
        draw = {"contrast": _volcano, "probes": _intervals}.get(self.kind, _bars)
        return draw(self)

    def __repr__(self) -> str:
        heading = "".join(f"{line}\n" for line in (self.title, *self.remarks) if line)
        return heading + presentable(self).to_string(max_rows=_SHOWN_ROWS, max_colwidth=60)

    def _repr_html_(self) -> str:
        import html

        heading = [line for line in (self.title, *self.remarks) if line]
        caption = f"<p>{'<br>'.join(map(html.escape, heading))}</p>" if heading else ""
        rows = f"<p>{len(self):,} rows, the first {_SHOWN_ROWS} shown</p>" if len(self) > _SHOWN_ROWS else ""
        body = presentable(self.head(_SHOWN_ROWS)).to_html(border=0, index=False)
        beside = self.probes._repr_html_() if self.probes is not None else ""
        return caption + body + rows + beside


def labels_of(run: "Run", features: Sequence[int]) -> "list[Label | None]":
    """The label of each feature as it stands now."""
    if len(features) <= _ONE_BY_ONE:
        return [run.labels.get(feature) for feature in features]
    labels = run.labels.all()
    return [labels.get(feature) for feature in features]


def with_labels(run: "Run", features: np.ndarray) -> dict[str, Any]:
    """The first columns of a table.

    Returns:
        feature, label, score (of the label, nan where it was not scored), and score_kind ("tokens", "detection" or
        "fuzzing", which are on different scales; "" where it was not scored).
    """
    numbers = features.tolist()
    found = labels_of(run, numbers)
    scores = [None if label is None else label.score for label in found]
    return {
        "feature": numbers,
        "label": ["" if label is None else label.text for label in found],
        "score": [np.nan if score is None else score.value for score in scores],
        "score_kind": ["" if score is None else score.kind for score in scores],
    }


def score_text(label: str, score: float, kind: "ScoreKind") -> str:
    """``F1 0.93`` or ``detection 0.80``; that a label was not scored; nothing where there is no label."""
    from features.labels import SCORE_NAMES

    if pd.isna(score):
        return "not scored" if label else ""
    return f"{SCORE_NAMES[kind]} {score:.2f}"


def presentable(table: pd.DataFrame) -> pd.DataFrame:
    """The same as a person reads it: a score with its kind, an interval in brackets, few digits."""
    shown = pd.DataFrame(table).copy()
    if {"label", "score", "score_kind"} <= set(shown.columns):
        shown["score"] = _scores(shown)
        shown = shown.drop(columns="score_kind")
    for name in shown.columns.intersection(list(_FORMATS)):
        form = _FORMATS[name].format
        shown[name] = [
            value if isinstance(value, str) else form(value) if pd.notna(value) else ""
            for value in shown[name]
        ]
    for name in ("auc", "accuracy"):
        bounds = [f"{name}_low", f"{name}_high"]
        if set(bounds) <= set(shown.columns):
            cells = zip(*(shown[each] for each in (name, *bounds)), strict=True)
            shown[name] = [f"{value} ({low}–{high})" for value, low, high in cells]
            shown = shown.drop(columns=bounds)
    for name in shown.columns.intersection(["label", "token", "example", "snippet"]):
        shown[name] = [value.translate(_SIGNS) for value in shown[name]]
    return shown


def _scores(table: pd.DataFrame) -> list[str]:
    columns = (table["label"], table["score"], table["score_kind"])
    return [score_text(*row) for row in zip(*columns, strict=True)]


def _names(table: pd.DataFrame) -> list[str]:
    """Feature, label and the label's score, for the figures."""
    rows = zip(table["feature"], table["label"], _scores(table), strict=True)
    return [" · ".join(str(part) for part in row if part != "") for row in rows]


def _bars(table: FeatureTable) -> "go.Figure":
    import plotly.graph_objects as go

    first = table.head(_SHOWN_ROWS)
    bars = go.Bar(
        x=first[table.by], y=_names(first), orientation="h", hovertemplate="%{y}<br>%{x}<extra></extra>"
    )
    layout = {
        "title": table.title,
        "xaxis_title": table.by,
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "height": 120 + 20 * len(first),
    }
    return go.Figure(bars, layout=layout)


def _volcano(table: FeatureTable) -> "go.Figure":
    import plotly.graph_objects as go

    tiny = np.finfo(float).tiny
    points = go.Scatter(
        x=table["auc"],
        y=-np.log10(table["q"].clip(lower=tiny)),
        mode="markers",
        marker={
            "color": table["rate_difference"],
            "colorscale": "RdBu",
            "cmid": 0,
            "colorbar_title": "rate difference",
        },
        text=_names(table),
        hovertemplate="%{text}<br>AUC %{x:.2f}, −log₁₀ q %{y:.1f}<extra></extra>",
    )
    layout = {"title": table.title, "xaxis_title": "AUC", "yaxis_title": "−log₁₀ q (false-discovery rate)"}
    return go.Figure(points, layout=layout)


def _intervals(table: FeatureTable) -> "go.Figure":
    import plotly.graph_objects as go

    points = go.Scatter(
        x=table["auc"],
        y=table["probe"],
        mode="markers",
        marker_size=10,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": table["auc_high"] - table["auc"],
            "arrayminus": table["auc"] - table["auc_low"],
        },
    )
    layout = {
        "title": table.title,
        "xaxis_title": "AUC on texts left out, 95% interval",
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return go.Figure(points, layout=layout)
