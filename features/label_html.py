"""Labels as HTML: who gave one, and how good it is. Wherever a label is shown, so is its score."""

from html import escape

from features.html_pieces import pill
from features.labels import SCORE_NAMES, Label, Score

_DEFINITIONS = {
    "tokens": "harmonic mean of precision and recall of the label's pattern, over all firings",
    "detection": "balanced accuracy of a judge who is asked which texts the label is about",
    "fuzzing": "balanced accuracy of a judge who is asked which marked tokens the label is about",
}
_SOURCES = {
    "person": "A person's label",
    "llm": "A language model's label",
    "import": "An imported label",
    "automatic": "Automatic label",
}


def named_html(label: Label | None) -> str:
    """A label on one line with its score, for lists; inside class ``named`` its words are cut off for want of room."""
    if label is None or not label.text:
        return '<span class="faint">no label</span>'
    return f'<span class="words">{escape(label.text)}</span>{figure_html(label)}'


def figure_html(label: Label | None) -> str:
    """The score of a label, as it stands behind its words."""
    if label is None or not label.text:
        return ""
    return f'<span class="faint"> · {escape(label.figure)}</span>'


def provenance_html(label: Label) -> str:
    """Who gave a label, when, and all its scores."""
    by = "".join(f", {each}" for each in (label.author, label.method, label.made[:10]) if each)
    return f"{escape(_SOURCES[label.source] + by)} {scores_html(label)}"


def scores_html(label: Label) -> str:
    """The scores of a label with their controls, each figure defined on hover."""
    if not label.scores:
        return pill("not scored", "nobody has tested this label")
    return "".join(map(_score_html, label.scores))


def _score_html(score: Score) -> str:
    judge = f"; judged by {score.judge}" if score.judge not in ("", "pattern") else ""
    has_interval = score.low is not None and score.high is not None
    interval = f" [{score.low:.2f}, {score.high:.2f}]" if has_interval else ""
    pieces = [
        pill(f"{SCORE_NAMES[score.kind]} {score.value:.2f}{interval}", _DEFINITIONS[score.kind] + judge)
    ]
    for figure, value, meaning in (
        ("control", score.control, "the same figure for a shuffled control: what chance gives"),
        ("upper half", score.upper, "F1 for the upper half of firings by activation"),
        ("precision", score.precision, "where the label says it fires, how often it does"),
        ("recall", score.recall, "where it fires, how often the label says so"),
    ):
        if value is not None:
            pieces.append(pill(f"{figure} {value:.2f}", meaning))
    if score.n:
        is_tokens = score.kind == "tokens"
        cases = "firings on held-out documents that it rests on" if is_tokens else "cases that were judged"
        pieces.append(pill(f"n {score.n:,}", cases))
    return "".join(pieces)
