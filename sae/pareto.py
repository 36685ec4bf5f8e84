"""Sparsity against faithfulness: where each SAE of a sweep lies, and which of them no other beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.files import write_bytes
from sae.bootstrap import Figure
from sae.config import TrainConfig
from sae.evaluate import Evaluation

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRICS = {"ce_loss_recovered": "CE loss recovered", "explained_variance": "explained variance"}
COLOURS = {  # of Okabe and Ito, told apart by people with any colour vision
    "topk": "#0072b2",
    "batch_topk": "#e69f00",
    "matryoshka": "#009e73",
    "jumprelu": "#d55e00",
    "gated": "#cc79a7",
    "relu": "#767069",
}
_FRONT = "#b5aea2"
_INK = "#2b2926"


@dataclass(frozen=True)
class Measured:
    """One SAE of a sweep and its figures on the test split.

    Attributes:
        architecture: that it was trained as. hook: where it reads, and where it writes if that is elsewhere.
        figures, intervals: by name: ``l0`` and the keys of :data:`METRICS`; an interval is ``[low, high]``.
        dead: fraction of features, None where the SAE does not say.
    """

    name: str
    architecture: str
    hook: str
    figures: dict[str, Figure]
    intervals: dict[str, list[Figure]]
    dead: float | None

    @classmethod
    def of(cls, name: str, config: TrainConfig, evaluation: Evaluation) -> "Measured":
        """What an evaluation says about the SAE of a run."""
        keys = ("l0", *METRICS)
        return cls(
            name,
            config.sae.architecture,
            config.hook_name if config.hook_out is None else f"{config.hook_name} → {config.hook_out}",
            {key: getattr(evaluation, key) for key in keys},
            {key: evaluation.intervals[key] for key in keys},
            evaluation.dead_fraction,
        )


def pareto_front(points: Sequence[Measured], metric: str) -> list[Measured]:
    """The SAEs that no other beats, by ascending L0: none is at most as sparse in L0 and at least as good.

    Of SAEs with the same L0 and figure all are kept; those without a figure are left out.
    """
    known = [(_number(p, "l0"), _number(p, metric), p) for p in points if _plottable(p, metric)]
    front = [
        (l0, value, point)
        for l0, value, point in known
        if not any(
            other_l0 <= l0 and other >= value and (other_l0, other) != (l0, value)
            for other_l0, other, _ in known
        )
    ]
    return [point for _, _, point in sorted(front, key=lambda item: item[:2])]


def pareto_figure(points: Sequence[Measured], title: str) -> "go.Figure":
    """L0 (logarithmic) against both metrics: a row of panels for each hook, a colour for each architecture.

    Bars are 95% intervals; the line joins the front.
    """
    from plotly.subplots import make_subplots

    hooks = list(dict.fromkeys(point.hook for point in points))
    titles = [f"{hook}" if column == 0 else "" for hook in hooks for column in range(len(METRICS))]
    figure = make_subplots(
        rows=len(hooks),
        cols=len(METRICS),
        subplot_titles=titles,
        horizontal_spacing=0.09,
        vertical_spacing=0.18 / len(hooks),
    )
    shown: set[str] = set()
    for row, hook in enumerate(hooks, 1):
        here = [point for point in points if point.hook == hook]
        for column, (metric, name) in enumerate(METRICS.items(), 1):
            _draw_front(figure, pareto_front(here, metric), metric, row, column)
            for architecture in dict.fromkeys(point.architecture for point in here):
                mine = [p for p in here if p.architecture == architecture and _plottable(p, metric)]
                _draw_points(figure, mine, metric, row, column, in_legend=architecture not in shown)
                shown.add(architecture)
            figure.update_yaxes(title_text=name, row=row, col=column)
            figure.update_xaxes(title_text="L0", row=row, col=column)
            low, high = _l0_range(here)
            figure.update_xaxes(tickvals=_ticks(low, high), row=row, col=column)
    grid = {"gridcolor": "#ece8e1", "zeroline": False, "linecolor": "#d8d2c8", "showline": True}
    figure.update_xaxes(type="log", **grid)
    figure.update_yaxes(**grid)
    figure.update_annotations(font={"size": 14}, x=0, xanchor="left")
    figure.update_layout(
        title={"text": title, "x": 0.02},
        template="plotly_white",
        height=90 + 430 * len(hooks),
        font={"family": "system-ui, sans-serif", "color": _INK},
        legend={
            "orientation": "h",
            "y": 1 + 0.1 / len(hooks),
            "x": 1,
            "xanchor": "right",
            "yanchor": "bottom",
        },
        hoverlabel={"align": "left"},
    )
    return figure


def write_pareto(path: Path, points: Sequence[Measured], title: str) -> None:
    """Write :func:`pareto_figure` as one HTML file that needs no network."""
    figure = pareto_figure(points, title)
    html = figure.to_html(include_plotlyjs=True, config={"displaylogo": False}, div_id="pareto")
    write_bytes(path, html.encode())


def _number(point: Measured, key: str) -> float:
    value = point.figures[key]
    assert value is not None
    return float(value)


def _plottable(point: Measured, metric: str) -> bool:
    """Whether both figures are there, and L0 has a place on a logarithmic axis."""
    l0 = point.figures["l0"]
    return point.figures[metric] is not None and l0 is not None and l0 > 0


def _draw_front(figure: "go.Figure", front: Sequence[Measured], metric: str, row: int, column: int) -> None:
    figure.add_scatter(
        x=[_number(point, "l0") for point in front],
        y=[_number(point, metric) for point in front],
        mode="lines",
        line={"color": _FRONT, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
        name="Pareto front",
        legendgroup="front",
        showlegend=row == column == 1,
        row=row,
        col=column,
    )


def _draw_points(
    figure: "go.Figure", points: Sequence[Measured], metric: str, row: int, column: int, *, in_legend: bool
) -> None:
    if not points:
        return
    colour = COLOURS[points[0].architecture]
    figure.add_scatter(
        x=[_number(point, "l0") for point in points],
        y=[_number(point, metric) for point in points],
        error_x=_bars(points, "l0", colour),
        error_y=_bars(points, metric, colour),
        mode="markers",
        marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1}},
        text=[_hover(point) for point in points],
        hovertemplate="%{text}<extra></extra>",
        name=points[0].architecture,
        legendgroup=points[0].architecture,
        showlegend=in_legend,
        row=row,
        col=column,
    )


def _bars(points: Sequence[Measured], key: str, colour: str) -> dict[str, Any]:
    """Error bars from intervals; none where a bound is not known."""
    above, below = [], []
    for point in points:
        value, (low, high) = _number(point, key), point.intervals[key]
        below.append(0.0 if low is None else max(value - low, 0.0))
        above.append(0.0 if high is None else max(high - value, 0.0))
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {**bars, "color": colour, "thickness": 1, "width": 0}


def _hover(point: Measured) -> str:
    lines = [f"<b>{point.name}</b>"]
    for key, name in {"l0": "L0", **METRICS}.items():
        low, high = point.intervals[key]
        bounds = "" if low is None or high is None else f" ({low:.4g} – {high:.4g})"
        value = point.figures[key]
        lines.append(f"{name} {'–' if value is None else f'{value:.4g}'}{bounds}")
    if point.dead is not None:
        lines.append(f"dead {point.dead:.1%}")
    return "<br>".join(lines)


def _l0_range(points: Sequence[Measured]) -> tuple[float, float]:
    found = [l0 for point in points if (l0 := point.figures["l0"]) is not None and l0 > 0]
    return (min(found), max(found)) if found else (1.0, 1.0)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range: enough of them to read a logarithmic axis that spans less than a decade."""
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5)
    steps = [digit * 10.0**power for power in range(-3, 7) for digit in digits]
    return [
        step
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)
        if after > low and before < high
    ]
