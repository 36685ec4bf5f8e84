"""Features as one page of HTML that needs nothing else: no server, no network, no script.

Everything is in the file: the style sheet, the histogram as SVG, and the examples with the value of every token on
hover. It follows the reader's choice of light or dark.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from activations.errors import InputError
from activations.progress import Progress, silent
from features.html_pieces import (
    Card,
    bar,
    cards_html,
    examples_html,
    number,
    part,
    percent,
    pill,
    shown_name,
    style_rules,
    table_html,
)
from features.label_html import named_html, provenance_html
from features.labels import Label
from features.tokens_html import chip

if TYPE_CHECKING:
    from features.index import TokenStatistic
    from features.run import Feature, Run

TOKENS_SHOWN = 12
NEIGHBOURS_SHOWN = 10
_PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_MARGIN = 360, 96, 16

_PAGE_STYLE = """:root { color-scheme: light dark; }
body { margin: 0; background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.4rem 1.2rem 4rem; overflow-wrap: anywhere; }
main a { color: color-mix(in srgb, #0d9488 82%, currentColor); text-decoration: none; }
main a:hover { text-decoration: underline; }
section { padding-top: 1.6rem; margin-top: 1.6rem; border-top: 1px solid color-mix(in srgb, currentColor 15%, Canvas); }
.columns { display: grid; grid-template-columns: minmax(0, 1.75fr) minmax(0, 1fr); gap: 0 2.4rem; margin-top: 1rem; }
main .cards { margin-top: .7rem; }
summary { font-weight: 640; font-size: 1.02rem; cursor: pointer; margin-top: .7rem; }
svg.plot { width: 100%; height: auto; display: block; font: 9px system-ui, sans-serif; }
svg.plot rect { fill: rgb(var(--heat)); }
svg.plot text { fill: currentColor; opacity: .62; text-anchor: middle; }
@media (max-width: 860px) { .columns { grid-template-columns: minmax(0, 1fr); } }
""" + style_rules("main")


def features_html(run: "Run", features: Sequence[int], *, progress: Progress = silent) -> str:
    """A page about some features of a run, in the order in which they are given.

    Raises:
        InputError: a feature does not exist.
    """
    shown = [run.feature(feature) for feature in features]
    labels = run.labels.all()
    sections = []
    with progress("export", total=len(shown), unit="features") as step:
        for feature in shown:
            sections.append(_section(feature, labels, set(features)))
            step(1)
    title = f"Feature {shown[0].index}" if len(shown) == 1 else f"{len(shown)} features"
    contents = _contents(shown, labels) if len(shown) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} of {escape(shown_name(run.name))}</title>\n<style>\n{_PAGE_STYLE}</style></head>\n"
        f'<body><main><p class="faint">{escape(_facts(run))}</p>{contents}\n'
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def _facts(run: "Run") -> str:
    return (
        f"{shown_name(run.name)}: {run.index.d_sae:,} features of {run.config.model} at"
        f" {' → '.join(run.config.hook_names)}, indexed on {run.index.n_tokens:,} tokens; SAE {run.index.sae_hash[:12]}"
    )


def _contents(features: "Iterable[Feature]", labels: dict[int, Label]) -> str:
    rows = [
        [
            f'<a href="#feature-{feature.index}">{feature.index}</a> {named_html(labels.get(feature.index))}',
            escape(percent(feature.density)),
        ]
        for feature in features
    ]
    return table_html(["feature", "density"], rows)


def _section(feature: "Feature", labels: dict[int, Label], present: set[int]) -> str:
    """Everything about one feature."""
    index = feature.run.index
    tags = "".join(pill(tag.text, tag.tooltip) for tag in index.tags(feature.index))
    cards = _statistics(feature)
    return (
        f'<section id="feature-{feature.index}"><h1 class="page">Feature {feature.index}</h1>'
        f"{_label_html(labels.get(feature.index))}<p>{tags}</p>"
        f"{cards_html(cards) if cards else ''}"
        f'<div class="columns"><div>{_examples(feature)}</div>'
        f"<div>{_tables(feature, labels, present)}</div></div></section>"
    )


def _label_html(label: Label | None) -> str:
    """The label, who gave it, how good it is, and the note."""
    if label is None or not label.text:
        shown = '<p class="big">no label</p>'
    else:
        shown = f'<p class="big">{escape(label.text)}</p><p class="hint">{provenance_html(label)}</p>'
    note = f'<p class="hint">Note: {escape(label.note)}</p>' if label is not None and label.note else ""
    return shown + note


def _statistics(feature: "Feature") -> list[Card]:
    left_out = _left_out(feature)
    if not feature.count:
        return left_out
    index, one_in = feature.run.index, f"one token in {number(1 / feature.density)}"
    std, entropy = float(index.std[feature.index]), float(index.token_entropy[feature.index])
    documents, first = (index.column(each)[feature.index] for each in ("documents", "first_place"))
    median, high = (number(index.quantile(feature.index, q)) for q in (0.5, 0.9))
    return [
        Card(
            "Density", percent(feature.density), [one_in], "share of the index's positions on which it fires"
        ),
        Card("Firings", f"{feature.count:,}", [f"of {index.n_tokens:,} tokens"], "over the train split"),
        Card(
            *("Documents", f"{documents:,}", [f"first at token {number(float(first))}"]),
            "documents in which it fires, and the mean place of its first firing there, counted from 0",
        ),
        Card("Largest activation", number(feature.max), [], "over the index"),
        Card(
            "Mean activation",
            number(feature.mean),
            [f"± {number(std)}"],
            "over its firings, and their spread",
        ),
        Card("Median activation", median, [f"90% below {high}"], "from the histogram"),
        Card("Token entropy", f"{entropy:.1f} bits", [], "how spread out its firings are over tokens"),
        *left_out,
    ]


def _left_out(feature: "Feature") -> list[Card]:
    """Its firings where training did not look; nothing if there are none."""
    special, outlier = (int(feature.run.index.column(each)[feature.index]) for each in ("special", "outlier"))
    if not special and not outlier:
        return []
    notes = [f"{special:,} at special tokens", f"{outlier:,} at outlier norms"]
    meaning = "firings at positions that training left out, which count nowhere else"
    return [Card("Left out", f"{special + outlier:,}", notes, meaning)]


def _examples(feature: "Feature") -> str:
    if not feature.count:
        return '<p class="hint">It never fired on the tokens of the index.</p>'
    strongest = examples_html(feature.top_examples(), feature.max, one_line=False)
    bands = "".join(
        f'<p class="band">{escape(name)} of its firings by strength</p>'
        + examples_html(examples, feature.max, one_line=False)
        for name, examples in feature.range_examples()
    )
    parts = _folded(
        "Strongest examples", "At most one place per document; hover for values.", strongest, opened=True
    )
    parts += _folded(
        "Across the range", "A fair sample of its firings, in bands that hold equally many.", bands
    )
    misses = feature.run.index.near_misses(feature.index)
    if misses:
        hint = "Places of the tokens it fires on most, where it is silent."
        parts += _folded("Near misses", hint, examples_html(misses, feature.max, one_line=False))
    return parts


def _folded(title: str, hint: str, body: str, *, opened: bool = False) -> str:
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>"
        f'<p class="hint">{escape(hint)}</p>{body}</details>'
    )


def _tables(feature: "Feature", labels: dict[int, Label], present: set[int]) -> str:
    index, pieces = feature.run.index, []
    if feature.count:
        plot = histogram_svg(index.histogram_edges, feature.histogram)
        pieces.append(part("How strongly it fires", "Firings by activation, on a logarithmic scale.") + plot)
        pieces.append(_tokens("Tokens it fires on", index.top_tokens(feature.index)))
        pieces.append(_tokens("Tokens that follow", index.next_tokens(feature.index)))
    if feature.promoted or feature.suppressed:
        pieces.append(_logit_lens(feature))
    try:
        nearest = index.neighbours(feature.index)
    except InputError:  # the SAE is too wide for all of them to be kept
        nearest = []
    if nearest:
        rows = [
            (_linked(other, labels, present), cosine, f"{cosine:.2f}")
            for other, cosine in nearest[:NEIGHBOURS_SHOWN]
        ]
        pieces.append(
            _others("Nearest features", "By the cosine of their decoder directions.", "cosine", rows)
        )
    together = index.coactive(feature.index)[:NEIGHBOURS_SHOWN]
    if together:
        rows = [
            (_linked(each.feature, labels, present), each.jaccard, f"{each.jaccard:.2f}") for each in together
        ]
        hint = "Jaccard: positions at which both fire, of those at which either does."
        pieces.append(_others("Features that fire with it", hint, "Jaccard", rows))
    return "".join(pieces)


def _linked(feature: int, labels: dict[int, Label], present: set[int]) -> str:
    name = f'<a href="#feature-{feature}">{feature}</a>' if feature in present else str(feature)
    return f"{name} {named_html(labels.get(feature))}"


def _others(title: str, hint: str, column: str, rows: Iterable[tuple[str, float, str]]) -> str:
    cells = [[name, bar(share, figure)] for name, share, figure in rows]
    return part(title, hint) + table_html(["feature", column], cells)


def _tokens(title: str, tokens: "Sequence[TokenStatistic]") -> str:
    rows = [
        [chip(each.token), bar(each.share, percent(each.share)), f"{escape(number(each.lift))}×"]
        for each in tokens[:TOKENS_SHOWN]
    ]
    return part(title) + table_html(["token", "share of firings", "lift"], rows) if rows else ""


def _logit_lens(feature: "Feature") -> str:
    promoted, suppressed = feature.promoted[:TOKENS_SHOWN], feature.suppressed[:TOKENS_SHOWN]
    largest = max((abs(logit) for _, _, logit in (*promoted, *suppressed)), default=1.0) or 1.0

    def side(title: str, tokens: list[tuple[str, int, float]], negative: bool) -> str:
        rows = [
            [chip(token), bar(abs(logit) / largest, f"{logit:+.2f}", negative=negative)]
            for token, _, logit in tokens
        ]
        return f"<div>{table_html([title, 'logit'], rows)}</div>"

    hint = "Logit lens: tokens that its direction makes more or less likely next, by its weights alone."
    sides = side("promoted", promoted, False) + side("suppressed", suppressed, True)
    return part("What it writes", hint) + f'<div class="sides">{sides}</div>{_moments(feature)}'


def _moments(feature: "Feature") -> str:
    """How its effects on all logits are spread: a few that stand out show in skewness and kurtosis."""
    mean, std, skewness, kurtosis = feature.run.index.weights.records["moments"][feature.index].tolist()
    figures = (
        (
            "mean",
            mean,
            "of its effects on all logits, per unit of activation; the figures above are less this",
        ),
        ("standard deviation", std, "of these effects"),
        ("skewness", skewness, "0 if as much is promoted as suppressed"),
        ("kurtosis", kurtosis, "3 for a normal distribution; more if a few tokens stand out"),
    )
    return f"<p>{''.join(pill(f'{title} {number(value)}', meaning) for title, value, meaning in figures)}</p>"


def histogram_svg(edges: np.ndarray, counts: np.ndarray) -> str:
    """Firings per bin of activation as an SVG, on a logarithmic scale.

    Args:
        edges: ``[n + 1]``, above 0, ascending. counts: ``[n]``; the empty bins at both ends are not drawn.
    """
    filled = np.flatnonzero(counts)
    if not len(filled):
        return ""
    first, last = int(filled[0]), int(filled[-1])
    places = np.log10(edges[first : last + 2].astype(np.float64))
    span = places[-1] - places[0]
    x = (places - places[0]) / span * _PLOT_WIDTH
    heights = counts[first : last + 1] / counts.max() * _PLOT_HEIGHT
    bars = "".join(
        f'<rect x="{left:.1f}" y="{_PLOT_HEIGHT - height:.1f}" width="{(right - left) * 0.94:.1f}"'
        f' height="{height:.1f}"><title>{low:.3g} to {high:.3g}: {count:,} firings</title></rect>'
        for left, right, height, low, high, count in zip(
            *(x[:-1], x[1:], heights, edges[first:], edges[first + 1 :], counts[first : last + 1].tolist()),
            strict=False,
        )
        if count
    )
    ticks = "".join(
        f'<text x="{(np.log10(tick) - places[0]) / span * _PLOT_WIDTH:.1f}" y="{_PLOT_HEIGHT + 11}">{tick:g}</text>'
        for tick in _ticks(places[0], places[-1])
    )
    return (
        f'<svg class="plot" viewBox="-8 0 {_PLOT_WIDTH + 16} {_PLOT_HEIGHT + _PLOT_MARGIN}" role="img"'
        f' aria-label="histogram of activations">{bars}{ticks}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms; only the powers if that is many."""
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    inside = [step * 10.0**p for p in powers for step in (1, 2, 5) if low <= np.log10(step * 10.0**p) <= high]
    return inside if len(inside) <= 6 else [10.0**p for p in powers if low <= p <= high]
