"""Words and symbols of a text, as the search database keeps them, and what a query asks for.

A run of letters and digits is one term, every other visible character a term of its own: ``self.x`` is three terms, and
so a phrase of them finds it, whatever symbols it has. Case and accents make no difference.
"""

import re
import unicodedata
from dataclasses import dataclass

FRAMING = "‹›·…"
"""What labels put around tokens: not part of what a person looks for."""

_TERM = re.compile(r"[^\W_]+|[^\s" + FRAMING + r"]")
_PIECE = re.compile(r'"([^"]+)"(?=\s|$)|(\S+)')
_NUMBER = re.compile(r"[0-9]+")
_REGEX = re.compile(r"/(.+)/(i?)", re.DOTALL)
_SYMBOL = "\ue000"  # a private character, which nobody types: the terms of symbols begin with it


@dataclass(frozen=True)
class Piece:
    """One part of a query, all of which a feature must have.

    Attributes:
        terms: terms that follow each other.
        is_prefix: whether the last term may go on.
    """

    terms: tuple[str, ...]
    is_prefix: bool = False

    @property
    def word(self) -> str | None:
        """The word that it is, if it is a single one."""
        return self.terms[0] if len(self.terms) == 1 and not self.terms[0].startswith(_SYMBOL) else None


def folded(text: str) -> str:
    """Without case and accents; of another length, perhaps."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def terms(text: str) -> list[str]:
    """The terms of a text in their order; neither holds a space or a quote."""
    return [_named(term) for term in _TERM.findall(folded(text))]


def pieces(query: str) -> list[Piece]:
    """The parts of a query: words, ``"quoted phrases"`` and ``prefixes*``, parted by spaces; empty if it has none."""
    found = []
    for quoted, plain in _PIECE.findall(query):
        is_prefix = len(plain) > 1 and plain.endswith("*") and plain[-2].isalnum()
        if parts := terms(quoted or plain.removesuffix("*") if is_prefix or quoted else plain):
            found.append(Piece(tuple(parts), is_prefix))
    return found


def regex_of(query: str) -> tuple[str, bool] | None:
    """(pattern, whether case is ignored) of a query ``/pattern/`` or ``/pattern/i``; None for any other."""
    found = _REGEX.fullmatch(query.strip())
    return (found[1], bool(found[2])) if found else None


def number_of(query: str) -> int | None:
    """The feature that a query of digits names; None for any other query."""
    return int(query) if _NUMBER.fullmatch(query := query.strip()) and len(query) <= 12 else None


def is_unicode(text: str) -> bool:
    """Whether a text holds no half of a character, such as what a terminal makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(term: str) -> str:
    return term if term.isalnum() else f"{_SYMBOL}{ord(term):x}"
