"""Overview: how good the SAE is, all its features in one picture, and a table to search them."""

from html import escape
from typing import Any

import numpy as np
import streamlit as st

from activations.errors import InputError
from app.explorer.explorer_charts import density_histogram, feature_scatter
from app.explorer.explorer_links import feature_address, go
from app.explorer.explorer_state import complain, read_as, the_run, worth
from app.explorer.explorer_style import track_html
from features.html_pieces import Card, cards_html, number, part, percent
from features.labels import SCORE_NAMES, Label
from features.run import Run

CONTROL_NAMES = {"principal_components": "PCA", "reduced_rank": "linear map", "random_weights": "random SAE"}
MOST_FOUND = 1000  # features of a search
STRENGTHS = {"largest": "max", "mean": "mean"}


def show() -> None:
    """The page."""
    run = the_run()
    st.html(_heading(run))
    _figures(run)
    labels = run.labels.all()
    chosen = _pictures(run, labels)
    _table(run, labels, chosen)


def _heading(run: Run) -> str:
    sae = run.config.sae
    kind = f"TopK, k = {sae.k}" if sae.architecture == "topk" else sae.architecture
    passes = f" read {run.config.passes} times" if run.config.passes > 1 else ""
    facts = (
        f"{sae.d_sae:,} features ({kind}) of {run.config.model} at {' → '.join(run.config.hook_names)}, trained on"
        f" {run.config.resolved_tokens():,} tokens{passes}, indexed on {run.index.n_tokens:,}"
    )
    return f'<h1 class="page">{escape(run.name)}</h1><p class="faint">{escape(facts)}</p>'


def _figures(run: Run) -> None:
    if not run.folder.evaluation.is_file():
        st.info("This run has not been evaluated yet: the command `sae evaluate` does it.")
        return
    evaluation = run.evaluation
    dead = evaluation["dead_fraction"]
    cards = [
        _card(
            evaluation,
            "explained_variance",
            "Explained variance",
            "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over the test split",
            is_share=True,
        ),
        _card(
            evaluation,
            "ce_loss_recovered",
            "CE loss recovered",
            "(CE with zeros − CE with the SAE) / (CE with zeros − CE of the model)",
            is_share=True,
        ),
        _card(evaluation, "kl", "KL divergence", "of predictions with the SAE from the model's own, in nats"),
        Card(
            "L0",
            number(evaluation["l0"]),
            ["features fire per token,", f"of {run.config.sae.d_sae:,}"],
            "mean number of features that fire",
        ),
        Card(
            "Dead features",
            "–" if dead is None else percent(dead),
            [f"{percent(evaluation['alive_fraction'])} fire at least", "once on the test split"],
            "features that did not fire on the last tokens of training",
        ),
    ]
    st.html(
        cards_html(cards)
        + f'<p class="hint" style="margin-top:.45rem">Measured on {evaluation["tokens"]:,} tokens of'
        f" {evaluation['documents']:,} test documents that neither model nor SAE has read; 95% bootstrap intervals over"
        " documents. Grey: controls with the same L0.</p>"
    )


def _card(
    evaluation: dict[str, Any], key: str, name: str, definition: str, *, is_share: bool = False
) -> Card:
    """One metric with its interval and its controls; a share of 1 gets a picture of them."""

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    low, high = evaluation["intervals"].get(key) or (None, None)
    controls = {
        CONTROL_NAMES.get(n, n): c[key] for n, c in evaluation["controls"].items() if c.get(key) is not None
    }
    notes = [f"95%: {figure(low)} to {figure(high)}"] if low is not None and low != high else []
    notes += [f"{control}: {figure(value)}" for control, value in controls.items()]
    track = track_html(low, high, controls) if is_share and low is not None and high is not None else ""
    return Card(name, figure(evaluation[key]), notes, definition, track)


def _pictures(run: Run, labels: dict[int, Label]) -> np.ndarray | None:
    """The two plots; returns the features that were framed in the scatter plot, None if none were."""
    index = run.index
    firing = np.flatnonzero(index.count)
    silent = index.d_sae - len(firing)
    left, right = st.columns([2.1, 1], gap="medium")
    with left:
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.html(part("Every feature"), width="content")
            strength = st.segmented_control(
                "Activation shown",
                list(STRENGTHS),
                default="largest",
                required=True,
                key="height",
                bind="query-params",
                label_visibility="collapsed",
            )
        st.html(
            '<p class="hint">A click opens a feature; the frame and lasso tools (top right) list what they catch below.'
            + (f" {silent:,} features never fired in the index and are not drawn." if silent else "")
            + "</p>"
        )
        values = index.max if STRENGTHS[strength] == "max" else index.mean
        scores = np.full(index.d_sae, np.nan)
        texts = [""] * index.d_sae
        for label in labels.values():
            texts[label.feature] = label.summary if label.text else ""
            scores[label.feature] = np.nan if label.score is None else label.score.value
        figure = feature_scatter(
            firing,
            index.density[firing],
            values[firing],
            strength,
            scores[firing],
            [texts[i] for i in firing],
        )
        event = st.plotly_chart(figure, key="scatter", on_select="rerun", config={"displaylogo": False})
    with right:
        st.html(
            part(
                "How often features fire",
                "Most features are rare: a density of 10⁻³ is one token in a thousand.",
            )
        )
        st.plotly_chart(
            density_histogram(index.density[firing]), key="density", config={"displayModeBar": False}
        )
    caught = sorted({int(point["customdata"]) for point in event.selection.points})
    if event.selection.box or event.selection.lasso:
        return np.array(caught, dtype=np.int64)
    if caught:
        go(feature_address(caught[0]))
    return None


def _measure(label: Label | None) -> str:
    """What the score of a label is."""
    if label is None or not label.text:
        return ""
    return SCORE_NAMES[label.score.kind] if label.score else "not scored"


def _table(run: Run, labels: dict[int, Label], chosen: np.ndarray | None) -> None:
    index = run.index
    st.html(
        part(
            "Find a feature",
            "Words of labels, top tokens and notes, beginnings (doc*), phrases in quotes, /expressions/, or a feature's"
            " number; a click on a row opens it.",
        )
    )
    wanted = st.text_input(
        "Search",
        key="q",
        bind="query-params",
        placeholder="import, indentation, 1234 …",
        label_visibility="collapsed",
        icon=":material/search:",
        type="search",
    )
    features = np.arange(index.d_sae) if chosen is None else chosen
    wanted = (wanted or "").strip()
    if wanted:
        try:
            found = index.search(wanted, n=MOST_FOUND)
        except InputError as error:
            complain(error)
            return
        st.html(f'<p class="hint">{escape(read_as(found))}</p>')
        matches = found["feature"].to_numpy(dtype=np.int64)
        features = matches[np.isin(matches, features)]
    else:
        # Well-tested labels first, so that the first screen shows features that mean something.
        features = np.array(
            sorted(features.tolist(), key=lambda feature: worth(labels.get(feature))), dtype=np.int64
        )
    what = f"{len(features):,} of {index.d_sae:,} features"
    st.html(f'<p class="hint">{what}{" in the frame above" if chosen is not None else ""}</p>')
    if not len(features):
        return
    rows = [labels.get(int(feature)) for feature in features]
    picked = st.dataframe(
        {
            "feature": features,
            "label": [label.text if label else "" for label in rows],
            "by": [label.source if label and label.text else "" for label in rows],
            "score": [label.score.value if label and label.score else None for label in rows],
            "measure": [_measure(label) for label in rows],
            "density": index.density[features],
            "max": index.max[features],
            "mean": index.mean[features],
        },
        key="table",
        height=460,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "feature": st.column_config.NumberColumn(width=70, format="%d"),
            "label": st.column_config.TextColumn(width="large"),
            "by": st.column_config.TextColumn(width=90, help="who gave the label"),
            "score": st.column_config.ProgressColumn(
                width=110,
                min_value=0,
                max_value=1,
                format="%.2f",
                help="of the label, on documents that it was not made from",
            ),
            "measure": st.column_config.TextColumn(
                width=95,
                help="F1 of the label's pattern, or the balanced accuracy of a judge, whose chance is 0.5",
            ),
            "density": st.column_config.NumberColumn(
                width=90, format="%.2e", help="share of tokens on which it fires"
            ),
            "max": st.column_config.NumberColumn(
                width=75, format="%.2f", help="largest activation in the index"
            ),
            "mean": st.column_config.NumberColumn(
                width=75, format="%.2f", help="mean activation where it fires"
            ),
        },
    )
    if picked.selection.cells:
        row, _ = picked.selection.cells[0]
        go(feature_address(int(features[row])))
