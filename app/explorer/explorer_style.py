"""How the pages look: the style sheet, and the pieces that only the explorer has.

What it shares with exported pages is in :mod:`features.html_pieces`.
"""

from collections.abc import Mapping
from html import escape

from features.html_pieces import style_rules

STYLE_SHEET = (
    "<style>"
    + style_rules(".stHtml")
    + """
.stMainBlockContainer { max-width: 1360px; }
.stHtml { overflow-wrap: anywhere; }
.stHtml a.go { text-decoration: none; color: color-mix(in srgb, #0d9488 82%, currentColor); }
.stHtml a.go:hover { text-decoration: underline; }
.stTextArea textarea { font-family: "Source Code Pro", ui-monospace, monospace; font-size: .86rem; line-height: 1.5; }
.stHtml .track { position: relative; height: 10px; margin: .3rem 0 .25rem; }
.stHtml .track i { position: absolute; display: block; }
.stHtml .track .rail { left: 0; right: 0; top: 4px; height: 2px; border-radius: 1px;
  background: color-mix(in srgb, currentColor 14%, transparent); }
.stHtml .track .interval { top: 2px; height: 6px; min-width: 3px; border-radius: 3px; background: #0d9488; }
.stHtml .track .control { top: 1px; width: 8px; height: 8px; margin-left: -4px; border-radius: 50%;
  background: color-mix(in srgb, currentColor 38%, transparent); }
.stHtml a.go.t { color: inherit; background: rgb(var(--heat) / calc(var(--a, 0) * .82)); cursor: pointer; }
.stHtml a.go.t:hover { text-decoration: none; box-shadow: 0 0 0 1.5px rgb(var(--heat) / .8); }
.stHtml a.go.quiet { color: inherit; }
.stHtml .chosen { font-weight: 650; border-bottom: 2px solid rgb(var(--heat) / .8); }
.stHtml a.go.button { display: inline-block; border: 1px solid color-mix(in srgb, currentColor 35%, transparent);
  border-radius: 10px; padding: .38rem .8rem; font-weight: 500; font-size: .93rem; }
.stHtml a.go.button:hover { text-decoration: none; background: color-mix(in srgb, currentColor 8%, transparent); }
.stHtml .panel { border: 1px solid color-mix(in srgb, currentColor 13%, transparent); border-radius: 10px;
  padding: .75rem .95rem; min-height: 7rem; }
.st-key-leave, .st-key-links { position: absolute; height: 0; overflow: hidden; }
@media (max-width: 640px) {
  .stMainBlockContainer { padding-left: 1rem; padding-right: 1rem; }
}
</style>
"""
)


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


def escape_markdown(text: str) -> str:
    """``text`` as Streamlit's Markdown shows it literally, on one line.

    For what can only be given as Markdown (labels of widgets, messages): HTML and ``st.text`` need none of this.
    """
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c.isascii() and not c.isalnum() and c != " " else c for c in line)
