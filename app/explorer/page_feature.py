"""Feature: everything that is known about one feature, and a place to name it."""

from html import escape

import streamlit as st

from activations.errors import InputError
from app.explorer.explorer_charts import activation_histogram
from app.explorer.explorer_links import address, feature_address, link
from app.explorer.explorer_state import (
    LONGEST_TEXT_IN_LINK,
    asked_feature,
    complain,
    listed,
    load_model,
    random_feature,
    the_run,
)
from app.explorer.explorer_style import escape_markdown
from features.html_pieces import (
    Card,
    bar,
    cards_html,
    examples_html,
    number,
    part,
    percent,
    pill,
    table_html,
)
from features.label_html import provenance_html, scores_html
from features.labels import Label
from features.own_label import give_label, score_own_label, write_pattern
from features.run import Feature, Run
from features.tokens_html import chip, tokens_html

VIEWS = {"Snippets": 24, "Passages": 64}  # tokens shown of each example
NEIGHBOURS_SHOWN = 10
SILENT = "This feature never fired on the tokens of the index. What it writes rests on its weights alone."


def show() -> None:
    """The page."""
    run = the_run()
    try:
        feature = asked_feature(run)
    except InputError as error:
        complain(error)
        st.html(link(feature_address(0), "Go to feature 0"))
        return
    _steps(run, feature)
    _name(feature)
    if feature.count:
        st.html(cards_html(_statistics(feature)))
    left, right = st.columns([1.75, 1], gap="large")
    with left:
        _examples(feature)
    with right:
        if feature.count:
            _histogram(feature)
            st.html(_top_tokens(feature))
            st.html(_next_tokens(feature))
        if feature.promoted:
            st.html(_logit_lens(feature))
        st.html(_neighbours(feature))
        if feature.coactive:
            st.html(_coactive(feature))


def _steps(run: Run, feature: Feature) -> None:
    """Previous, next, random, a number; and where to go with this feature."""
    last = run.index.d_sae - 1

    def show_feature(number: int) -> None:
        st.query_params["feature"] = str(number)

    def show_typed() -> None:
        show_feature(st.session_state[key])

    key = f"number of {feature.index}"
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="steps bar"):
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            shortcut="Left",
            on_click=show_feature,
            args=(max(feature.index - 1, 0),),
            disabled=feature.index == 0,
        )
        st.number_input(
            "Feature number",
            0,
            last,
            feature.index,
            step=None,
            key=key,
            on_change=show_typed,
            label_visibility="collapsed",
            width=88,
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            shortcut="Right",
            on_click=show_feature,
            args=(min(feature.index + 1, last),),
            disabled=feature.index == last,
        )
        st.button("Random", icon=":material/casino:", on_click=show_feature, args=(random_feature(run),))
        st.html(
            link(address("steer", features=feature.index), "Steer this feature", classes="button"),
            width="content",
        )


def _name(feature: Feature) -> None:
    """Label, where it comes from and how good it is; a person's own label with its pattern, and the note."""
    labels, index = feature.run.labels, feature.index
    if st.session_state.pop(f"to score {index}", False):
        load_model(feature.run)
        with st.spinner("Scoring your label on text that nobody made it from …"):
            try:
                score_own_label(feature.run, index)
            except InputError as error:
                complain(error)
    label, automatic = labels.get(index), labels.automatic(index)
    shown = label.text if label and label.text else "no label yet"
    st.html(
        f'<h1 class="page">Feature {index}</h1><p class="big" data-testid="label">{escape(shown)}</p>'
        f'<p class="hint">{_provenance(label, automatic)}</p>'
        + "".join(pill(tag.text, tag.tooltip) for tag in feature.tags)
    )

    def save() -> None:
        if not st.session_state[text_key].strip():
            st.session_state[pattern_key] = ""  # it goes with the label
        save_both()

    def save_both() -> None:
        pattern = st.session_state[pattern_key]
        try:
            give_label(feature.run, index, st.session_state[text_key], pattern)
        except InputError as error:
            st.toast(escape_markdown(str(error)), icon=":material/error:", duration="long")
        else:
            st.session_state[f"to score {index}"] = bool(pattern)
            st.toast("Saved.", icon=":material/check:")

    def save_note() -> None:
        labels.set_note(index, st.session_state[note_key])
        st.toast("Saved.", icon=":material/check:")

    text_key, pattern_key, note_key = f"label of {index}", f"pattern of {index}", f"note on {index}"
    own = label if label and label.source == "person" else None
    text_place, pattern_place, note_place = st.columns([1.3, 1, 1.3], gap="small")
    text_place.text_input(
        "Your label",
        own.text if own else "",
        key=text_key,
        on_change=save,
        placeholder="what would you call it? Enter saves",
        help="It stands before every other label. Empty it to have the others back.",
    )
    pattern_place.text_input(
        "Pattern",
        write_pattern(own.pattern) if own else "",
        key=pattern_key,
        on_change=save_both,
        placeholder="␣self   or   /https?:/",
        help="Where your label says that the feature fires, so that it can be scored: a token, up to four tokens in a"
        " row, or a regular expression between slashes. ␣ may stand for a space, ⏎ for a line break, ⇥ for a tab.",
    )
    note_place.text_input(
        "Note",
        label.note if label else "",
        key=note_key,
        on_change=save_note,
        placeholder="anything worth remembering",
    )


def _provenance(label: Label | None, automatic: Label | None) -> str:
    """Who gave the label that is shown and how good it is, and likewise the automatic one behind it, as HTML."""
    if label is None or not label.text:
        return "Nothing has labelled this feature yet."
    behind = ""
    if label.source != "automatic" and automatic is not None:
        behind = f"<br>Automatic: <b>{escape(automatic.text)}</b> {scores_html(automatic)}"
    return provenance_html(label) + behind


def _statistics(feature: Feature) -> list[Card]:
    one_in = f"one token in {number(1 / feature.density)}"
    index = feature.run.index
    return [
        Card(
            "Density", percent(feature.density), [one_in], "share of the index's positions on which it fires"
        ),
        Card(
            "Firings",
            f"{feature.count:,}",
            [f"of {index.n_tokens:,} tokens"],
            "in the index, over the train split",
        ),
        Card("Largest activation", number(feature.max), ["strength 1 when steering"], "over the index"),
        Card("Mean activation", number(feature.mean), ["where it fires"], "over its firings in the index"),
        Card(
            "Median activation",
            number(index.quantile(feature.index, 0.5)),
            ["where it fires"],
            "from the histogram",
        ),
    ]


def _examples(feature: Feature) -> None:
    """Where it fires: the strongest places, a fair sample, and a text of one's own."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.html(part("Where it fires"), width="content")
        view = st.segmented_control(
            "View", list(VIEWS), default="Snippets", required=True, key="view", label_visibility="collapsed"
        )
    width, one_line = VIEWS[view], view == "Snippets"
    strongest, across, silent, own = st.tabs(
        ["Strongest", "Across the range", "Silent at its tokens", "In a text of your own"]
    )
    with strongest:
        if not feature.count:
            st.html(f'<p class="hint">{SILENT}</p>')
        else:
            st.html(
                '<p class="hint">At most one place per document. The deeper the colour, the nearer to the feature\'s'
                " largest activation; hover for values.</p>"
                + examples_html(feature.top_examples(width), feature.max, one_line=one_line)
            )
    with across:
        bands = "".join(
            f'<p class="band">{escape(name)} of its firings by strength</p>'
            + examples_html(examples, feature.max, one_line=one_line)
            for name, examples in feature.range_examples(width)
        )
        st.html(
            '<p class="hint">A fair sample of all its firings, in bands that hold equally many: what the strongest'
            f" alone do not show.</p>{bands}"
        )
    with silent:
        misses = feature.near_misses(width)
        hint = (
            "Tokens of the feature on which it stays silent: what it takes besides the token."
            if misses
            else "No place was found where one of its tokens stands and it is silent."
        )
        st.html(f'<p class="hint">{hint}</p>{examples_html(misses, feature.max, one_line=one_line)}')
    with own:
        _own_text(feature)


def _histogram(feature: Feature) -> None:
    st.html(part("How strongly it fires"))
    figure = activation_histogram(feature.run.index.histogram_edges, feature.histogram)
    st.plotly_chart(figure, key="histogram", config={"displayModeBar": False})


def _top_tokens(feature: Feature) -> str:
    rows = [
        [
            chip(token.token),
            bar(token.share, percent(token.share)),
            f"{number(token.lift)}×",
            escape(number(token.mean)),
        ]
        for token in feature.top_tokens[:12]
    ]
    return part("Tokens it fires on") + table_html(["token", "share of firings", "lift", "mean"], rows)


def _next_tokens(feature: Feature) -> str:
    rows = [
        [chip(token.token), bar(token.share, percent(token.share)), f"{number(token.lift)}×"]
        for token in feature.next_tokens[:8]
    ]
    return part("Tokens that follow") + table_html(["token", "share of firings", "lift"], rows)


def _logit_lens(feature: Feature) -> str:
    hint = "Logit lens: tokens that its direction makes more or less likely next, by its weights alone."
    promoted, suppressed = feature.promoted[:10], feature.suppressed[:10]
    largest = max((abs(logit) for _, _, logit in (*promoted, *suppressed)), default=1.0) or 1.0

    def side(title: str, tokens: list[tuple[str, int, float]], negative: bool) -> str:
        rows = [
            [chip(token), bar(abs(logit) / largest, f"{logit:+.2f}", negative=negative)]
            for token, _, logit in tokens
        ]
        return f"<div>{table_html([title, 'logit'], rows)}</div>"

    return (
        part("What it writes", hint)
        + f'<div class="sides">{side("promoted", promoted, False)}{side("suppressed", suppressed, True)}</div>'
    )


def _neighbours(feature: Feature) -> str:
    run = feature.run
    rows = [
        [
            listed(run, other, link(feature_address(other), str(other))),
            bar(cosine, f"{cosine:.2f}"),
        ]
        for other, cosine in feature.neighbours[:NEIGHBOURS_SHOWN]
    ]
    return part("Nearest features", "By the cosine of their decoder directions.") + table_html(
        ["feature", "cosine"], rows
    )


def _coactive(feature: Feature) -> str:
    run = feature.run
    rows = [
        [
            listed(run, other.feature, link(feature_address(other.feature), str(other.feature))),
            bar(other.jaccard, f"{other.jaccard:.2f}"),
            f"{other.pmi:+.1f}",
        ]
        for other in feature.coactive[:NEIGHBOURS_SHOWN]
    ]
    hint = (
        "Jaccard: positions where both fire, of those where either does. PMI: how far above chance, in bits."
    )
    return part("Fires together with", hint) + table_html(["feature", "Jaccard", "PMI"], rows)


def _own_text(feature: Feature) -> None:
    text = st.text_area(
        "Text",
        key="own text",
        persist_state="session",
        placeholder="paste anything; Ctrl-Enter reads it",
        label_visibility="collapsed",
        height=110,
    )
    if not text:
        return
    load_model(feature.run)
    try:
        trace = feature.run.trace(text)
    except InputError as error:
        complain(error)
        return
    activations = trace.activations(feature.index)
    fired = int((activations != 0).sum())
    short = text if len(text) <= LONGEST_TEXT_IN_LINK else None
    st.html(
        f'<div class="panel">{tokens_html(trace.tokens, activations.tolist(), feature.max)}</div>'
        f'<p class="hint">It fires on {fired:,} of {len(trace.tokens):,} tokens'
        + (f", at most {number(float(activations.max()))}." if fired else ".")
        + f" {link(address('try-text', feature=feature.index, text=short), 'All features of this text')}</p>"
    )
