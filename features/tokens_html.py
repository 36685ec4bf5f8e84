"""Tokens as HTML: each coloured by an activation, with its value on hover; every character of the text escaped.

One block of HTML for a whole list of examples, because thousands of separate elements make a page slow. The classes
are styled in :mod:`features.html_pieces`.
"""

import unicodedata
from collections.abc import Sequence
from html import escape

FAINTEST = 0.10  # opacity of the weakest activation, so that a token that fires at all can be seen
_WHITESPACE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def visible(token: str) -> str:
    """A token's text on one line with nothing unseen: spaces, line ends, tabs and control characters get a sign."""
    return printable(token).translate(_WHITESPACE)


def printable(text: str) -> str:
    """``text`` with control and formatting characters shown as signs; line ends, tabs and spaces stay."""
    return "".join(_sign(character) for character in text)


def token_html(
    token: str,
    activation: float,
    maximum: float,
    *,
    one_line: bool = False,
    framed: bool = False,
    pick: str = "",
) -> str:
    """One token, coloured by ``activation / maximum`` where it is not 0.

    Args:
        activation: what the feature does at this token. maximum: what full colour stands for.
        one_line: line ends become signs instead of new lines.
        framed: whether to draw a frame around the token.
        pick: what a click on it sets in the address, such as ``"token=5"``; nothing if empty.
    """
    text = printable(token)
    if activation == 0 and not framed and not pick:
        return escape(text.replace("\n", "⏎ ") if one_line else text)
    if one_line:
        text = text.replace("\n", "⏎") if text.strip() else _counted(text)
    elif activation or framed:
        text = text.replace("\n", "⏎\n")  # a line end would otherwise show no colour
    word = text.lstrip(" ") or text
    # A space before a word stays outside, so that a line that breaks there leaves no coloured stub behind.
    margin = text[: len(text) - len(word)]
    end = "\n" * (
        word.endswith("\n") and word != "\n"
    )  # inside, it would draw a stub of the frame on the next line
    shown = escape(word.removesuffix(end) or "‥")  # "": its character stands at another token
    classes = "t" + " n" * (activation < 0) + " p" * framed
    colour = f' style="--a:{_opacity(activation, maximum):.3f}"' if activation else ""
    title = escape(
        f"{visible(token) or 'part of a character'}   {activation:.3g}{_of_maximum(activation, maximum)}"
    )
    if not pick:
        return f'{margin}<span class="{classes}"{colour} title="{title}">{shown}</span>{end}'
    link = f'href="?{escape(pick)}" data-pick="{escape(pick)}" target="_self" tabindex="-1"'
    return f'{margin}<a class="go {classes}" {link}{colour} title="{title}">{shown}</a>{end}'


def tokens_html(
    tokens: Sequence[str],
    activations: Sequence[float],
    maximum: float,
    *,
    framed: int | None = None,
    one_line: bool = False,
    pick: str = "",
) -> str:
    """A run of tokens as one ``<div>``.

    Args:
        tokens: exact text of each token. activations: one value per token.
        maximum: the activation that full colour stands for, most often the feature's maximum in the index.
        framed: index of a token to draw a frame around.
        one_line: show line ends as signs, for compact lists.
        pick: a parameter of the address that a click on a token sets to its index; none if empty.

    Raises:
        ValueError: tokens and activations differ in number.
    """
    body = "".join(
        token_html(
            token,
            float(activation),
            maximum,
            one_line=one_line,
            framed=place == framed,
            pick=f"{pick}={place}" if pick else "",
        )
        for place, (token, activation) in enumerate(zip(tokens, activations, strict=True))
    )
    return f'<div class="tokens{" line" if one_line else ""}" dir="ltr">{body}</div>'


def chip(token: str) -> str:
    """A token as a small framed word, whitespace made visible."""
    return f'<code class="chip">{escape(visible(token)) or "‥"}</code>'


def _counted(whitespace: str) -> str:
    """White space as signs, long runs of spaces as their number: for lists in which every line counts."""
    spaces = len(whitespace) - len(whitespace.rstrip(" "))
    rest = whitespace.rstrip(" ").translate(_WHITESPACE)
    return rest + ("␣" * spaces if spaces <= 3 else f"␣×{spaces}")


def _sign(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf"):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _opacity(activation: float, maximum: float) -> float:
    share = min(abs(activation) / maximum, 1.0) if maximum > 0 else 1.0
    return FAINTEST + (1 - FAINTEST) * share


def _of_maximum(activation: float, maximum: float) -> str:
    return f" · {activation / maximum:.0%} of the maximum" if maximum > 0 else ""
