"""How the pages look: one style sheet, and the few pieces of HTML that Streamlit has no widget for.

Colours come from the text's own colour wherever they can, so that one sheet serves the light and the dark theme.
Every function escapes the text it is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE_SHEET = """
<style>
:root { --heat: 234 124 30; --cold: 58 124 196; }
.stMainBlockContainer { max-width: 1360px; }
.stHtml { overflow-wrap: anywhere; }
.stHtml p { margin: 0; }
.stHtml a.go { text-decoration: none; color: color-mix(in srgb, #0d9488 82%, currentColor); }
.stHtml a.go:hover { text-decoration: underline; }
.stHtml .faint { color: color-mix(in srgb, currentColor 62%, transparent); }
.stHtml .small { font-size: .86rem; }
.stHtml .hint { color: color-mix(in srgb, currentColor 62%, transparent); font-size: .86rem; line-height: 1.45; }
.stHtml h3.part + .hint { margin-bottom: .35rem; }
.stTextArea textarea { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .86rem; line-height: 1.5; }
.stHtml .big { font-size: 1.22rem; font-weight: 600; line-height: 1.35; }
.stHtml h1.page { font-size: 1.75rem; font-weight: 650; padding: 0; margin: 0; letter-spacing: -.01em; }
.stHtml h3.part { font-size: 1.02rem; font-weight: 640; padding: 0; margin: .35rem 0 .1rem; }
.stHtml .pill { display: inline-block; font-size: .78rem; line-height: 1.5; padding: 0 .55em; border-radius: 99px;
  background: color-mix(in srgb, currentColor 8%, transparent); margin-right: .35em; white-space: nowrap; }

.stHtml .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.2rem, 1fr)); gap: .7rem; }
.stHtml .card { border: 1px solid color-mix(in srgb, currentColor 13%, transparent); border-radius: 10px;
  padding: .6rem .85rem .65rem; background: color-mix(in srgb, currentColor 2.2%, transparent); min-width: 0; }
.stHtml .card .name { font-size: .82rem; color: color-mix(in srgb, currentColor 66%, transparent); }
.stHtml .card .value { font-size: 1.5rem; font-weight: 630; line-height: 1.3; font-variant-numeric: tabular-nums; }
.stHtml .card .note { font-size: .79rem; color: color-mix(in srgb, currentColor 66%, transparent); line-height: 1.4;
  font-variant-numeric: tabular-nums; }

.stHtml .track { position: relative; height: 10px; margin: .3rem 0 .25rem; }
.stHtml .track i { position: absolute; display: block; }
.stHtml .track .rail { left: 0; right: 0; top: 4px; height: 2px; border-radius: 1px;
  background: color-mix(in srgb, currentColor 14%, transparent); }
.stHtml .track .interval { top: 2px; height: 6px; min-width: 3px; border-radius: 3px; background: #0d9488; }
.stHtml .track .control { top: 1px; width: 8px; height: 8px; margin-left: -4px; border-radius: 50%;
  background: color-mix(in srgb, currentColor 38%, transparent); }

.stHtml .tokens.line { white-space: normal; }
.stHtml .tokens { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .83rem; line-height: 1.62;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.stHtml .t { background: rgb(var(--heat) / calc(var(--a) * .82)); border-radius: 3px; padding: .08em 0;
  unicode-bidi: isolate; cursor: default; }
.stHtml a.go.t { color: inherit; background: rgb(var(--heat) / calc(var(--a, 0) * .82)); cursor: pointer; }
.stHtml a.go.t:hover { text-decoration: none; box-shadow: 0 0 0 1.5px rgb(var(--heat) / .8); }
.stHtml a.go.quiet { color: inherit; }
.stHtml .chosen { font-weight: 650; border-bottom: 2px solid rgb(var(--heat) / .8); }
.stHtml .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.2rem; }
.stHtml a.go.button { display: inline-block; border: 1px solid color-mix(in srgb, currentColor 35%, transparent);
  border-radius: 10px; padding: .38rem .8rem; font-weight: 500; font-size: .93rem; }
.stHtml a.go.button:hover { text-decoration: none; background: color-mix(in srgb, currentColor 8%, transparent); }
.stHtml .t.n { background: rgb(var(--cold) / calc(var(--a) * .82)); }
.stHtml .t.p { box-shadow: 0 0 0 1.5px color-mix(in srgb, currentColor 70%, transparent); }
.stHtml .example { display: grid; grid-template-columns: 3.4rem minmax(0, 1fr); gap: .1rem .7rem; padding: .42rem 0;
  border-top: 1px solid color-mix(in srgb, currentColor 9%, transparent); }
.stHtml .example:first-of-type { border-top: none; }
.stHtml .example .strength { font-variant-numeric: tabular-nums; font-weight: 600; font-size: .86rem; line-height: 1.6;
  text-align: right; }
.stHtml .example .where { font-size: .76rem; color: color-mix(in srgb, currentColor 52%, transparent); }
.stHtml .band { font-weight: 620; font-size: .9rem; margin: .9rem 0 .1rem; }
.stHtml .panel { border: 1px solid color-mix(in srgb, currentColor 13%, transparent); border-radius: 10px;
  padding: .75rem .95rem; min-height: 7rem; }

.stHtml code.chip { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .8rem; color: inherit;
  background: color-mix(in srgb, currentColor 7%, transparent); border-radius: 5px; padding: .08em .4em;
  white-space: pre; max-width: 100%; overflow: hidden; text-overflow: ellipsis; display: inline-block;
  vertical-align: bottom; }
.stHtml table.bars { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
.stHtml table.bars th { font-weight: 500; font-size: .76rem; text-align: right; padding: 0 .1rem .15rem .6rem;
  white-space: nowrap; color: color-mix(in srgb, currentColor 58%, transparent); border: none; }
.stHtml table.bars th:first-child { text-align: left; padding-left: 0; }
.stHtml .digits { display: inline-block; min-width: 3.3rem; }
.stHtml table.bars td { padding: .17rem .1rem .17rem .6rem; border: none; text-align: right; white-space: nowrap; }
.stHtml table.bars td:first-child { text-align: left; padding-left: 0; white-space: normal; max-width: 0; width: 99%; }
.stHtml .bar { display: inline-block; height: .58rem; width: 4.2rem; border-radius: 3px; vertical-align: middle;
  background: linear-gradient(to right, rgb(var(--heat) / .78) var(--w), transparent var(--w)),
    color-mix(in srgb, currentColor 8%, transparent); }
.stHtml .bar.n { background: linear-gradient(to right, rgb(var(--cold) / .72) var(--w), transparent var(--w)),
    color-mix(in srgb, currentColor 8%, transparent); }
.stHtml .ellipsis { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; display: block; }

.st-key-leave, .st-key-links { position: absolute; height: 0; overflow: hidden; }
@media (max-width: 640px) {
  .stMainBlockContainer { padding-left: 1rem; padding-right: 1rem; }
  .stHtml h1.page { font-size: 1.45rem; }
  .stHtml .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .stHtml .card { padding: .5rem .6rem; }
  .stHtml .card:last-child:nth-child(odd) { grid-column: span 2; }
  .stHtml .card .value { font-size: 1.25rem; }
  .stHtml .example { grid-template-columns: 2.6rem minmax(0, 1fr); gap: .1rem .5rem; }
  .stHtml .bar { width: 2.6rem; }
}
</style>
"""


@dataclass(frozen=True)
class Card:
    """One figure.

    Attributes:
        name, value: what it is, and how much.
        notes: lines under it.
        definition: shown on hover.
        track: HTML of a small picture between value and notes, see :func:`track_html`.
    """

    name: str
    value: str
    notes: Sequence[str] = ()
    definition: str = ""
    track: str = ""


def cards_html(cards: Iterable[Card]) -> str:
    """Figures side by side, as many to a row as fit."""
    body = "".join(
        f'<div class="card" title="{escape(card.definition)}"><div class="name">{escape(card.name)}</div>'
        f'<div class="value">{escape(card.value)}</div>{card.track}'
        + "".join(f'<div class="note">{escape(note)}</div>' for note in card.notes)
        + "</div>"
        for card in cards
    )
    return f'<div class="cards">{body}</div>'


def track_html(low: float, high: float, controls: Mapping[str, float]) -> str:
    """An interval and some controls on a line from 0 to 1; what lies outside stands at its end."""

    def place(value: float) -> str:
        return f"{min(max(value, 0.0), 1.0):.2%}"

    dots = "".join(
        f'<i class="control" style="left:{place(value)}" title="{escape(name)}"></i>'
        for name, value in controls.items()
    )
    width = f"calc({place(high)} - {place(low)})"
    return (
        f'<div class="track"><i class="rail"></i>{dots}'
        f'<i class="interval" style="left:{place(low)};width:{width}"></i></div>'
    )


def part(title: str, hint: str = "") -> str:
    """The heading of a part of a page, with a sentence under it."""
    return f'<h3 class="part">{escape(title)}</h3>' + (f'<p class="hint">{escape(hint)}</p>' if hint else "")


def bar(share: float, text: str, *, negative: bool = False) -> str:
    """A small horizontal bar filled to ``share`` (0 to 1), and a figure beside it."""
    kind = "bar n" if negative else "bar"
    filled = f"{min(max(share, 0.0), 1.0):.1%}"
    return f'<span class="{kind}" style="--w:{filled}"></span><span class="digits">{escape(text)}</span>'


def pill(text: str, definition: str) -> str:
    """A small figure in a rounded frame, defined on hover."""
    return f'<span class="pill" title="{escape(definition)}">{escape(text)}</span>'


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A small table; ``columns`` are text, the cells are HTML that their maker has escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="bars"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def percent(share: float) -> str:
    """A share as a percentage with three digits: 12.3%, 0.0123%."""
    return f"{100 * share:.3g}%"


def number(value: float) -> str:
    """A number with about three digits and no exponent where it can be read without."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
