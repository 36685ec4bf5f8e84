"""Steer: features and strengths on the left, what the model writes without and with them on the right."""

from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import zip_longest

import streamlit as st

from activations.errors import InputError
from app.explorer.explorer_links import address, feature_address, go, link, pick
from app.explorer.explorer_state import complain, listed, load_model, name_of, parameter, the_run
from features.demonstration import choose_demonstration, own_tokens, promoted_share
from features.html_pieces import bar, number, part, percent, table_html
from features.run import Run
from features.steering import METHODS, Method, output_scores
from features.tokens_html import printable, tokens_html

WEAKEST, STRONGEST, USUAL = -2.0, 4.0, 1.0  # strengths on the sliders, in units of the feature's maximum
MATCHES_SHOWN = 8
EXPLANATIONS = {
    "clamp": "sets each feature's activation to strength × its maximum, whatever it was",
    "add": "adds strength × maximum × the feature's direction to what is there",
    "ablate": "sets each feature's activation to 0; what it stands for may live on in other features",
}
OUTPUT_SCORE = (
    "how far adding the feature raises the tokens that it promotes, in one pass over neutral prompts; near 0: it writes"
    " nothing of its own"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is written."""

    strengths: dict[int, float]
    method: Method
    prompt: str
    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Written:
    """Two continuations, and the settings they were written with."""

    settings: Settings
    default: str
    steered: str


def show() -> None:
    """The page."""
    run = the_run()
    left, right = st.columns([1, 1.55], gap="large")
    with left:
        st.html(
            '<h1 class="page">Steer</h1><p class="hint">Turn features up or down while the model writes. Both texts'
            " start from the same seed, so what differs is the features' doing.</p>"
        )
        load_model(run)
        try:
            settings = _settings(run)
        except InputError as error:
            complain(error)
            return
        wanted = st.button(
            "Write", type="primary", icon=":material/edit_note:", disabled=not settings.strengths
        )
    with right:
        if wanted:
            try:
                _write(run, settings)
            except InputError as error:
                complain(error)
                return
        _result(run, settings)


def _settings(run: Run) -> Settings:
    features = _chosen_features(run)
    method = st.segmented_control(
        "Method", METHODS, default="clamp", required=True, key="method", bind="query-params"
    )
    st.html(f'<p class="hint">{escape(EXPLANATIONS[method])}.</p>')
    strengths = _strengths(run, features, method)
    _adding(run, features)
    prompt = st.text_area("Prompt", "def", key="prompt", bind="query-params", height=80)
    with st.container(horizontal=True, gap="small"):
        temperature = st.number_input(
            "Temperature",
            0.0,
            5.0,
            0.7,
            0.1,
            format="%.1f",
            key="temperature",
            bind="query-params",
            width=106,
            help="0 takes the likeliest token",
        )
        max_new_tokens = st.number_input(
            "Tokens", 1, run.model.context_length, 64, 16, key="tokens", bind="query-params", width=106
        )
        seed = st.number_input("Seed", 0, 2**31, 0, 1, key="seed", bind="query-params", width=106)
    return Settings(strengths, method, prompt or "", float(temperature), int(max_new_tokens), int(seed))


def _chosen_features(run: Run) -> list[int]:
    """The features of the address; without any, those that this session steered last.

    Raises:
        InputError: one of them does not exist.
    """
    listed = parameter("features")
    if listed is None:
        return list(st.session_state.get("steered features", []))
    features = []
    for part_ in filter(None, listed.split(",")):
        if not part_.strip().isdigit():
            raise InputError(
                f"The address says features={listed}, and features must be whole numbers with commas."
            )
        feature = run.feature(int(part_)).index
        if feature not in features:
            features.append(feature)
    st.session_state["steered features"] = features
    return features


def _strengths(run: Run, features: list[int], method: Method) -> dict[int, float]:
    """A slider for each feature, with a link to leave it out."""
    strengths = {}
    for feature in features:
        # A lone comma: an address without the parameter would bring back the features steered last.
        others = ",".join(str(other) for other in features if other != feature) or ","
        remove = pick({"features": others, f"s{feature}": None}, "remove", classes="quiet faint small")
        score = _output_score(run.folder.path.as_posix(), run, feature)
        verdict = "no output score" if score is None else f"output score {score:.3f}"
        if not run.index.count[feature]:
            verdict = "never fired in the index: no maximum to measure strength by"
        st.html(
            f"<p>{link(feature_address(feature), str(feature))} <b>{escape(name_of(run, feature))}</b> {remove}</p>"
            + f'<p class="hint" title="{escape(OUTPUT_SCORE)}">{escape(verdict)}</p>'
        )
        strength = st.slider(
            f"Strength of feature {feature}",
            WEAKEST,
            STRONGEST,
            USUAL,
            0.25,
            key=f"s{feature}",
            bind="query-params",
            label_visibility="collapsed",
            format="%.2f × maximum",
            disabled=method == "ablate",
        )
        strengths[feature] = 0.0 if method == "ablate" else float(strength)
    return strengths


@st.cache_data(show_spinner=False, max_entries=1000)
def _output_score(run_path: str, _run: Run, feature: int) -> float | None:
    if not _run.index.count[feature] or not _run.index.promoted(feature):
        return None
    return float(output_scores(_run.model, _run.sae, _run.index, [feature])[0])


def _adding(run: Run, features: list[int]) -> None:
    """Look for a feature to add; or have one suggested."""
    wanted = st.text_input(
        "Add a feature" if features else "Choose a feature",
        key="wanted feature",
        placeholder="a number, or words of a label",
        icon=":material/add:",
    )
    if wanted and wanted.strip():
        st.html(_matches(run, features, wanted.strip()))
    elif not features and st.button("Suggest one that steers well", icon=":material/lightbulb:"):
        go(_suggestion(run.folder.path.as_posix(), run))


@st.cache_data(show_spinner="Trying some features, ten seconds or more …", max_entries=1)
def _suggestion(run_path: str, _run: Run) -> str:
    """Address of this page with the settings that a demonstration chose."""
    found = choose_demonstration(_run.model, _run.sae, _run.index)
    settings = {
        "features": found.feature,
        f"s{found.feature}": found.strength,
        "method": found.method,
        "prompt": found.prompt,
        "temperature": found.temperature,
        "tokens": found.max_new_tokens,
        "seed": found.seed,
    }
    return address("steer", **settings)


def _matches(run: Run, features: list[int], wanted: str) -> str:
    try:
        table = run.index.search(wanted)
    except InputError as error:
        return f'<p class="hint">{escape(str(error))}</p>'
    found = [feature for feature in table["feature"].tolist() if feature not in features]
    if not found:
        return '<p class="hint">No label or token says so. Try another word, or a feature\'s number.</p>'
    lines = [
        pick(
            {"features": ",".join(map(str, [*features, feature]))},
            listed(run, feature, f"+ {feature}"),
        )
        for feature in found[:MATCHES_SHOWN]
    ]
    more = (
        f'<p class="hint">and {len(found) - MATCHES_SHOWN:,} more</p>' if len(found) > MATCHES_SHOWN else ""
    )
    return f'<div class="small">{"".join(lines)}{more}</div>'


def _write(run: Run, settings: Settings) -> None:
    """Write both texts, a token of each in turn, and show them as they come."""
    stream = partial(
        run.model.generate_stream,
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    default_stream = stream()
    with run.steered(settings.strengths, method=settings.method):
        steered_stream = stream()
    places = _two_panels()
    for place in places:
        place.html(_plain_panel(settings.prompt, ""))
    texts = ["", ""]
    for new in zip_longest(default_stream, steered_stream, fillvalue=[""]):
        for side, (part_,) in enumerate(new):
            texts[side] += part_
            places[side].html(_plain_panel(settings.prompt, texts[side]))
    st.session_state["written"] = Written(settings, *texts)
    st.rerun()


def _two_panels() -> list[st.delta_generator.DeltaGenerator]:
    columns = st.columns(2, gap="small")
    for column, title in zip(columns, ("Default", "Steered"), strict=True):
        column.html(part(title))
    return [column.empty() for column in columns]


def _plain_panel(prompt: str, text: str) -> str:
    return (
        f'<div class="panel"><div class="tokens"><span class="faint">{escape(printable(prompt))}</span>'
        f"{escape(printable(text))}</div></div>"
    )


def _result(run: Run, settings: Settings) -> None:
    written: Written | None = st.session_state.get("written")
    if written is None:
        st.html(
            '<div class="panel"><p class="hint">Choose a feature and press Write: both texts appear here.</p></div>'
        )
        return
    then = written.settings
    features = list(then.strengths)
    coloured = features[0]
    if len(features) > 1:
        coloured = st.pills(
            "Colour by feature", features, default=coloured, required=True, key=f"colour {features}"
        )
    for place, name, text in zip(
        _two_panels(), ("default", "steered"), (written.default, written.steered), strict=True
    ):
        trace = run.trace(then.prompt + text)
        shades = trace.activations(coloured).tolist()
        place.html(
            f'<div class="panel" data-testid="{name} text">'
            f"{tokens_html(trace.tokens, shades, float(run.index.max[coloured]))}</div>"
        )
    rows = []
    for feature in features:
        own = own_tokens(run.index, feature)
        before, after = (promoted_share(run.model, text, own) for text in (written.default, written.steered))
        rows.append(
            [
                listed(run, feature, str(feature)),
                number(then.strengths[feature]),
                bar(before, percent(before)),
                bar(after, percent(after)),
            ]
        )
    stale = "" if then == settings else " The settings have changed since: Write makes new texts."
    st.html(
        part("Share of the features' own tokens")
        + table_html(["feature", "strength", "default", "steered"], rows)
        + '<p class="hint">Its own tokens: those that it promotes by the logit lens and those that it fires on. Colour:'
        f" where feature {coloured} fires when the model, no longer steered, reads the texts.{stale}</p>"
    )
