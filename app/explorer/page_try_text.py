"""Try text: which features fire where in a text that somebody pastes."""

from html import escape

import streamlit as st

from activations.errors import InputError
from app.explorer.explorer_links import address, feature_address, link, pick
from app.explorer.explorer_state import (
    LONGEST_TEXT_IN_LINK,
    complain,
    load_model,
    name_of,
    parameter,
    the_run,
    whole_number,
    words_of,
)
from features.html_pieces import bar, number, part, table_html
from features.label_html import figure_html
from features.run import Run
from features.tokens_html import chip, tokens_html, visible
from features.trace import Trace

SAMPLE = '''import os


def read_lines(path, encoding="utf-8"):
    """Return the lines of a file, without the empty ones."""
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    with open(path, encoding=encoding) as file:
        return [line.strip() for line in file if line.strip()]
'''
RANKINGS = {"share of maximum": True, "activation": False}
SHOWN = 20  # features listed for a token or a text


def show() -> None:
    """The page."""
    run = the_run()
    text = _asked_text()
    left, right = st.columns([1.5, 1], gap="large")
    with left:
        st.html(
            '<h1 class="page">Try text</h1><p class="hint">Paste a text, and see which features fire where. Choose a'
            " feature to colour the text by it; click a token to list what fires there.</p>"
        )
        st.text_area(
            "Text",
            text,
            key=f"typed {hash(text)}",
            on_change=_read,
            args=(f"typed {hash(text)}",),
            height=190,
            label_visibility="collapsed",
            placeholder="Paste a text here",
        )
        st.button("Read", type="primary", icon=":material/play_arrow:")
    if not text:
        return
    load_model(run)
    try:
        trace = _trace(run, text)
        token = _asked_token(trace)
        feature = whole_number("feature")
        if feature is not None:
            run.feature(feature)
    except InputError as error:
        complain(error)
        return
    with right:
        ranking = st.segmented_control(
            "Rank features by",
            list(RANKINGS),
            default="share of maximum",
            required=True,
            key="rank",
            bind="query-params",
            help="Some features have large activations by nature. The share of a feature's largest activation in the"
            " index compares features with each other.",
        )
        by_share = RANKINGS[ranking]
        strongest = trace.strongest(SHOWN, run.index.max if by_share else None)
    if feature is None and token is not None:
        feature = next((found for found, _ in _ranked(run, trace.at(token), by_share)), None)
    if feature is None:
        feature = strongest[0][0] if strongest else None
    with left:
        _text(run, trace, feature, token)
    with right:
        if token is None:
            st.html(_features_of_text(run, trace, strongest, feature))
        else:
            st.html(_features_of_token(run, trace, token, by_share, feature))
    with left:
        _token_table(run, trace, by_share)


def _asked_text() -> str:
    """The text of the address; without one, what this session read last, or the sample."""
    text = parameter("text")
    if text is None:
        text = st.session_state.get("text read", SAMPLE)
    st.session_state["text read"] = text
    return text


def _read(key: str) -> None:
    """Take up what was typed; it goes into the address if it is not too long for one."""
    text = st.session_state[key]
    st.session_state["text read"] = text
    kept = {name: st.query_params[name] for name in ("feature", "rank") if name in st.query_params}
    if text and len(text) <= LONGEST_TEXT_IN_LINK:
        kept["text"] = text
    st.query_params.from_dict(kept)


def _trace(run: Run, text: str) -> Trace:
    """Computed once for a text: every click on the page asks for it again."""
    known: tuple[str, Trace] | None = st.session_state.get("trace")
    if known is None or known[0] != text:
        with st.spinner("Reading …"):
            known = st.session_state["trace"] = (text, run.trace(text))
    return known[1]


def _asked_token(trace: Trace) -> int | None:
    token = whole_number("token")
    if token is not None and not 0 <= token < len(trace.tokens):
        raise InputError(f"There is no token {token}: this text has the tokens 0 to {len(trace.tokens) - 1}.")
    return token


def _text(run: Run, trace: Trace, feature: int | None, token: int | None) -> None:
    if feature is None:
        st.html('<div class="panel">No feature fires in this text.</div>')
        return
    activations = trace.activations(feature)
    tokens = tokens_html(
        trace.tokens, activations.tolist(), float(run.index.max[feature]), framed=token, pick="token"
    )
    st.html(
        f'<p class="coloured">Coloured by {link(feature_address(feature), f"feature {feature}")}'
        f' <b data-testid="coloured label">{escape(name_of(run, feature))}</b>'
        f' <span class="faint">· fires on {int((activations != 0).sum()):,} of {len(trace.tokens):,} tokens ·'
        f" {link(address('steer', features=feature), 'steer')}</span></p>"
        f'<div class="panel">{tokens}</div>'
    )


def _feature_rows(run: Run, found: list[tuple[int, float]], shown: int | None) -> list[list[str]]:
    rows = []
    for feature, activation in found:
        maximum = float(run.index.max[feature])
        share = activation / maximum if maximum else 0.0
        name = escape(name_of(run, feature))
        number_link = link(feature_address(feature), str(feature), title="open this feature")
        label = run.labels.get(feature)
        words = escape(words_of(label))
        label_link = pick(
            {"feature": feature},
            f'<span class="chosen">{words}</span>' if feature == shown else words,
            title="colour the text by this feature",
            classes="quiet words",
        )
        rows.append(
            [
                f'<span class="named" title="{name}">{number_link} {label_link}{figure_html(label)}</span>',
                number(activation),
                bar(share, f"{share:.0%}"),
            ]
        )
    return rows


def _features_of_token(run: Run, trace: Trace, token: int, by_share: bool, shown: int | None) -> str:
    found = _ranked(run, trace.at(token), by_share)
    title = f'<h3 class="part">Token {token} {chip(trace.tokens[token])}</h3>'
    back = pick({"token": None}, "all tokens")
    if not found:
        return f'{title}<p class="hint">Nothing fires here: training left this position out. {back}</p>'
    return f'{title}<p class="hint">{len(found)} features fire here. {back}</p>' + table_html(
        ["feature", "activation", "share of max"], _feature_rows(run, found, shown)
    )


def _features_of_text(
    run: Run, trace: Trace, strongest: list[tuple[int, float, int]], shown: int | None
) -> str:
    found = [(feature, activation) for feature, activation, _ in strongest]
    return part(
        "Strongest anywhere in the text", "A label colours the text, a number opens the feature."
    ) + table_html(["feature", "activation", "share of max"], _feature_rows(run, found, shown))


def _token_table(run: Run, trace: Trace, by_share: bool) -> None:
    """The strongest feature of every token."""
    st.html(
        part(
            "Token by token",
            "The strongest feature at each token; a click on a row lists all that fire there.",
        )
    )
    places, best = [], []
    for place in range(len(trace.tokens)):
        found = _ranked(run, trace.at(place), by_share)
        if found:
            places.append(place)
            best.append(found[0])

    def show_token() -> None:
        if cells := st.session_state[key].selection.cells:
            st.query_params["token"] = str(places[cells[0][0]])

    labels = [run.labels.get(feature) for feature, _ in best]
    key = f"tokens of {hash(tuple(trace.ids))}"
    st.dataframe(
        {
            "#": places,
            "token": [visible(trace.tokens[place]) for place in places],
            "feature": [feature for feature, _ in best],
            "label": [words_of(label) for label in labels],
            "score": [label.figure if label and label.text else "" for label in labels],
            "activation": [activation for _, activation in best],
            "share": [activation / float(run.index.max[feature] or 1) for feature, activation in best],
        },
        key=key,
        hide_index=True,
        height=320,
        on_select=show_token,
        selection_mode="single-cell",
        column_config={
            "#": st.column_config.NumberColumn(width=45),
            "token": st.column_config.TextColumn(width=85),
            "feature": st.column_config.NumberColumn(width=65, format="%d"),
            "label": st.column_config.TextColumn(width=170),
            "score": st.column_config.TextColumn(width=65),
            "activation": st.column_config.NumberColumn(width=80, format="%.2f"),
            "share": st.column_config.ProgressColumn(
                "share of max", width=110, min_value=0, max_value=1, format="%.2f"
            ),
        },
    )


def _ranked(run: Run, found: list[tuple[int, float]], by_share: bool) -> list[tuple[int, float]]:
    """Features of one token in the chosen order; they come ordered by activation."""
    if not by_share:
        return found
    return sorted(found, key=lambda pair: -pair[1] / max(float(run.index.max[pair[0]]), 1e-12))
