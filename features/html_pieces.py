"""Pieces of HTML that the explorer's pages and the pages we export are made of, and how they look.

Colours come from the text's own colour wherever they can, so that one sheet serves light and dark. Every function
escapes the text it is given.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from features.tokens_html import printable, tokens_html

if TYPE_CHECKING:
    from features.index import Example

_RULES = """
:root { --heat: 234 124 30; --cold: 58 124 196; }
& p { margin: 0; }
& .faint { color: color-mix(in srgb, currentColor 62%, transparent); }
& .small { font-size: .86rem; }
& .hint { color: color-mix(in srgb, currentColor 62%, transparent); font-size: .86rem; line-height: 1.45; }
& h3.part + .hint { margin-bottom: .35rem; }
& .big { font-size: 1.22rem; font-weight: 600; line-height: 1.35; }
& h1.page { font-size: 1.75rem; font-weight: 650; padding: 0; margin: 0; letter-spacing: -.01em; }
& h3.part { font-size: 1.02rem; font-weight: 640; padding: 0; margin: .35rem 0 .1rem; }
& .pill { display: inline-block; font-size: .78rem; line-height: 1.5; padding: 0 .55em; border-radius: 99px;
  background: color-mix(in srgb, currentColor 8%, transparent); margin-right: .35em; white-space: nowrap; }
& .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.2rem, 1fr)); gap: .7rem; }
& .card { border: 1px solid color-mix(in srgb, currentColor 13%, transparent); border-radius: 10px;
  padding: .6rem .85rem .65rem; background: color-mix(in srgb, currentColor 2.2%, transparent); min-width: 0; }
& .card .name { font-size: .82rem; color: color-mix(in srgb, currentColor 66%, transparent); }
& .card .value { font-size: 1.5rem; font-weight: 630; line-height: 1.3; font-variant-numeric: tabular-nums; }
& .card .note { font-size: .79rem; color: color-mix(in srgb, currentColor 66%, transparent); line-height: 1.4;
  font-variant-numeric: tabular-nums; }
& .tokens.line { white-space: normal; }
& .tokens { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .83rem; line-height: 1.62;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
& .t { background: rgb(var(--heat) / calc(var(--a) * .82)); border-radius: 3px; padding: .08em 0;
  unicode-bidi: isolate; cursor: default; }
& .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.2rem; }
& .t.n { background: rgb(var(--cold) / calc(var(--a) * .82)); }
& .t.p { box-shadow: 0 0 0 1.5px color-mix(in srgb, currentColor 70%, transparent); }
& .example { display: grid; grid-template-columns: 3.4rem minmax(0, 1fr); gap: .1rem .7rem; padding: .42rem 0;
  border-top: 1px solid color-mix(in srgb, currentColor 9%, transparent); }
& .example:first-of-type { border-top: none; }
& .example .strength { font-variant-numeric: tabular-nums; font-weight: 600; font-size: .86rem; line-height: 1.6;
  text-align: right; }
& .example .where { font-size: .76rem; color: color-mix(in srgb, currentColor 52%, transparent); }
& .band { font-weight: 620; font-size: .9rem; margin: .9rem 0 .1rem; }
& code.chip { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .8rem; color: inherit;
  background: color-mix(in srgb, currentColor 7%, transparent); border-radius: 5px; padding: .08em .4em;
  white-space: pre; max-width: 100%; overflow: hidden; text-overflow: ellipsis; display: inline-block;
  vertical-align: bottom; }
& table.bars { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
& table.bars th { font-weight: 500; font-size: .76rem; text-align: right; padding: 0 .1rem .15rem .6rem;
  white-space: nowrap; color: color-mix(in srgb, currentColor 58%, transparent); border: none; }
& table.bars th:first-child { text-align: left; padding-left: 0; }
& .digits { display: inline-block; min-width: 3.3rem; }
& table.bars td { padding: .17rem .1rem .17rem .6rem; border: none; text-align: right; white-space: nowrap; }
& table.bars td:first-child { text-align: left; padding-left: 0; white-space: normal; max-width: 0; width: 99%; }
& .bar { display: inline-block; height: .58rem; width: 4.2rem; border-radius: 3px; vertical-align: middle;
  background: linear-gradient(to right, rgb(var(--heat) / .78) var(--w), transparent var(--w)),
    color-mix(in srgb, currentColor 8%, transparent); }
& .bar.n { background: linear-gradient(to right, rgb(var(--cold) / .72) var(--w), transparent var(--w)),
    color-mix(in srgb, currentColor 8%, transparent); }
& .named { display: flex; gap: .3em; white-space: nowrap; }
& .named > * { flex: none; }
& .named > .words { flex: 0 1 auto; min-width: 0; overflow: hidden; text-overflow: ellipsis; }
@media (max-width: 640px) {
  & h1.page { font-size: 1.45rem; }
  & .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  & .card { padding: .5rem .6rem; }
  & .card:last-child:nth-child(odd) { grid-column: span 2; }
  & .card .value { font-size: 1.25rem; }
  & .example { grid-template-columns: 2.6rem minmax(0, 1fr); gap: .1rem .5rem; }
  & .bar { width: 2.6rem; }
}
"""


def style_rules(scope: str) -> str:
    """The rules of a style sheet, for what lies inside ``scope`` (a selector)."""
    return _RULES.replace("& ", f"{scope} ")


@dataclass(frozen=True)
class Card:
    """One figure.

    Attributes:
        name, value: what it is, and how much.
        notes: lines under it.
        definition: shown on hover.
        track: HTML of a small picture between value and notes.
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


def shown_name(text: str) -> str:
    """The name of a file or document as it can be shown: what is not Unicode in it becomes a replacement character."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", printable(text))


def examples_html(examples: "Sequence[Example]", maximum: float, *, one_line: bool) -> str:
    """Examples as one block: activation, coloured tokens, document."""
    return "".join(
        f'<div class="example"><div class="strength">{escape(number(example.value))}</div><div>'
        + tokens_html(
            example.tokens, example.activations.tolist(), maximum, framed=example.peak, one_line=one_line
        )
        + f'<span class="where">{escape(shown_name(example.document))}</span></div></div>'
        for example in examples
    )
