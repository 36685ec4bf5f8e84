"""The plotly figures of the pages: arrays in, figure out."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

ACCENT = "#0f766e"
HEAT = "#ea7c1e"
GREY = "#a8a296"
SCORE_COLOURS = [[0.0, "#cfc7b4"], [0.5, "#6fb3a8"], [1.0, "#0b5f58"]]
POWERS = range(-9, 1)  # of ten, that densities are marked at
HOVER_TEXTS_UP_TO = 20_000  # more labels than this make the figure heavy; then hovering shows numbers only

_LAYOUT = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "hoverlabel": {"align": "left"},
    "showlegend": False,
    "uirevision": "kept",
}


def plot_text(text: str) -> str:
    """``text`` as plotly shows it literally: its titles and hover texts understand a few HTML tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def feature_scatter(
    features: np.ndarray,
    density: np.ndarray,
    strength: np.ndarray,
    strength_name: str,
    scores: np.ndarray,
    labels: Sequence[str],
) -> go.Figure:
    """Every feature as a point: how often it fires, how strongly, and how well its label predicts it.

    Args:
        features: ``[n]`` numbers. density, strength: ``[n]``, above 0. scores: ``[n]``, nan where not measured.
        labels: n texts for hovering.

    Returns:
        a figure whose points carry the feature as ``customdata``.
    """
    with_labels = len(features) <= HOVER_TEXTS_UP_TO
    text = [plot_text(_shortened(label)) for label in labels] if with_labels else None
    figure = go.Figure()
    measured = ~np.isnan(scores)
    for chosen, marker in (
        (~measured, {"color": GREY}),
        (
            measured,
            {
                "color": scores[measured].astype(np.float32),
                "colorscale": SCORE_COLOURS,
                "cmin": 0,
                "cmax": 1,
                "colorbar": {
                    "title": {"text": "label score", "side": "right"},
                    "thickness": 8,
                    "outlinewidth": 0,
                    "tickvals": [0, 0.5, 1],
                    "len": 0.85,
                },
            },
        ),
    ):
        figure.add_scattergl(
            x=density[chosen].astype(np.float32),
            y=strength[chosen].astype(np.float32),
            customdata=features[chosen].astype(np.int32),
            text=[text[i] for i in np.flatnonzero(chosen)] if text else None,
            mode="markers",
            marker={"size": 6, "opacity": 0.75, **marker},
            hovertemplate="<b>feature %{customdata}</b>"
            + ("<br>%{text}" if text else "")
            + f"<br>fires on %{{x:.2%}} of tokens<br>{strength_name} activation %{{y:.3r}}<extra></extra>",
        )
    figure.update_layout(**_LAYOUT, height=400, dragmode="pan", clickmode="event+select")
    figure.update_xaxes(
        title="density (share of tokens on which it fires)",
        type="log",
        tickvals=[10.0**power for power in POWERS],
        ticktext=[f"10<sup>{power}</sup>" for power in POWERS],
        zeroline=False,
    )
    ticks = _decade_ticks(float(strength.min()), float(strength.max())) if len(strength) else []
    figure.update_yaxes(
        title=f"{strength_name} activation",
        type="log",
        zeroline=False,
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    return figure


def density_histogram(density: np.ndarray) -> go.Figure:
    """How many features fire how often; ``density [n]`` above 0. The browser counts them into bins of log10."""
    figure = go.Figure(
        go.Histogram(
            x=np.log10(density).astype(np.float32),
            nbinsx=50,
            marker={"color": ACCENT, "line": {"width": 0}},
            hovertemplate="log₁₀ density %{x}<br>%{y} features<extra></extra>",
        )
    )
    figure.update_layout(**_LAYOUT, height=400, bargap=0.04)
    powers = list(range(-9, 1))
    figure.update_xaxes(
        title="density", tickvals=powers, ticktext=[f"10<sup>{power}</sup>" for power in powers]
    )
    figure.update_yaxes(title="features")
    return figure


def activation_histogram(edges: np.ndarray, counts: np.ndarray) -> go.Figure:
    """Firings per bin of activation, on log-spaced bins.

    Args:
        edges: ``[n + 1]``, above 0, ascending. counts: ``[n]``; the empty bins at both ends are not drawn.
    """
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, len(counts) - 1)
    edges, counts = edges[first : last + 2], counts[first : last + 1]
    places = np.log10(edges)
    ticks = _decade_ticks(float(edges[0]), float(edges[-1]))
    figure = go.Figure(
        go.Bar(
            x=(places[:-1] + places[1:]) / 2,
            y=counts,
            width=np.diff(places) * 0.94,
            customdata=np.stack([edges[:-1], edges[1:]], axis=1),
            marker={"color": HEAT, "line": {"width": 0}},
            hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y} firings<extra></extra>",
        )
    )
    figure.update_layout(**_LAYOUT, height=190)
    figure.update_xaxes(
        title="activation", tickvals=np.log10(ticks), ticktext=[f"{tick:g}" for tick in ticks]
    )
    figure.update_yaxes(title="firings", nticks=4)
    return figure


def _decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in [low, high]; only the powers if that is many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 8 else [10.0**power for power in powers if low <= 10.0**power <= high]


def _shortened(text: str, longest: int = 70) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
