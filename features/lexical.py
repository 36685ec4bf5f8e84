"""What each character of a Python text is to Python: keyword, name, string, comment … and in which bracket it stands.

Python is read by the standard library's :mod:`tokenize`. Texts may begin and end anywhere, so errors are expected:
reading goes on at the line after one, and a text that makes more sense as the rest of a triple-quoted string is
read as that. What makes no sense as Python either way (prose, another language) has no classes.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CLASSES = (
    "",
    "keyword",
    "name",
    "string",
    "comment",
    "docstring",
    "number",
    "operator",
    "indentation",
    "newline",
    "space",
)
"""Lexical classes by number: 0 is none, "indentation" white space at the beginning of a line, "space" within one."""
NOT_PYTHON_ABOVE = 0.06
"""Share of Python's tokens that cannot stand where they do, above which a text is not taken for Python."""
DOUBTFUL_ABOVE = 0.01
"""Likewise, the share above which a text is also tried as one that begins within a string."""

_KEYWORD, _NAME, _STRING, _COMMENT, _DOCSTRING, _NUMBER, _OPERATOR, _INDENTATION, _NEWLINE, _SPACE = range(
    1, len(CLASSES)
)
_WHITE_SPACE = re.compile(r"[\r\n]+|[^\S\r\n]+")
_OPEN, _CLOSE = "([{", ")]}"
_NO_PART_OF_STATEMENTS = {tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT}
_SOFT_KEYWORDS = {"match", "case", "type", "print", "exec"}  # names that another name may follow
# Since Python 3.12 an f-string comes in parts.
_STRING_START, _STRING_END = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)


@dataclass(frozen=True)
class Lexed:
    """A text as Python reads it, character by character.

    Attributes:
        classes: uint8 ``[n_characters]``, numbers of :data:`CLASSES`.
        inside: int32 ``[n_characters]``, which of ``openers`` is the innermost bracket that is open there.
        openers: each the name before a bracket and the bracket, ``"print("`` or ``"["``; the first is "", for none.
        count: number of Python's tokens in it.
        strange: how many of them cannot stand where they do.
        open_string: whether it ends within a triple-quoted string.
    """

    classes: np.ndarray
    inside: np.ndarray
    openers: list[str]
    count: int
    strange: int
    open_string: bool

    @property
    def strangeness(self) -> float:
        """Share of tokens that cannot stand where they do."""
        return self.strange / max(self.count, 1)

    @property
    def doubt(self) -> float:
        """The same with half a strange token added: of two readings without any, the one of more tokens wins."""
        return (self.strange + 0.5) / (self.count + 1)


def lex(text: str) -> Lexed | None:
    """Read a text that may begin and end anywhere; None if it is not Python."""
    best = _lexed(text)
    if best.strangeness > DOUBTFUL_ABOVE or best.open_string:
        others = [_lexed(text, within=quotes) for quotes in ('"""', "'''") if quotes in text]
        best = min([best, *others], key=lambda lexed: lexed.doubt)
    return best if best.strangeness <= NOT_PYTHON_ABOVE else None


@dataclass(frozen=True)
class _Token:
    """A token of Python: its kind in :mod:`tokenize`, and where in the text it is."""

    kind: int
    string: str
    start: int
    end: int


def _lexed(text: str, within: str = "") -> Lexed:
    """Read a text as one that begins in code, or ``within`` a string of these quotes."""
    begun = text.index(within) + len(within) if within else 0
    reading = _Reading(text)
    for token in _tokens(text, begun):
        reading.take(token)
    reading.finish(len(text))
    reading.classes[:begun] = _DOCSTRING
    return Lexed(
        reading.classes, reading.inside, reading.openers, reading.count, reading.strange, reading.open_string
    )


class _Reading:
    """What has been read of a text so far."""

    def __init__(self, text: str) -> None:
        self.classes = _white_space(text)
        self.inside = np.zeros(len(text), dtype=np.int32)
        self.openers = [""]
        self.count = self.strange = 0
        self.open_string = False
        self._numbers = {"": 0}
        self._open: list[int] = []  # numbers of the openers of the brackets that are open
        self._marked = 0  # how far ``inside`` is filled in
        self._before: _Token | None = None  # in the same statement
        self._n_in_statement = 0

    def take(self, token: _Token) -> None:
        """Read on by one token."""
        kind, where = token.kind, slice(token.start, token.end)
        if kind == tokenize.COMMENT:
            self.classes[where] = _COMMENT
        if kind == tokenize.NEWLINE:
            self._end_statement()
        if kind in _NO_PART_OF_STATEMENTS:
            return
        self.count += 1
        if kind == tokenize.STRING:
            self.classes[where] = _STRING
            self.strange += self._follows_a_name()
            self.open_string = not token.string.endswith(("'", '"'))
        elif kind == tokenize.NUMBER:
            self.classes[where] = _NUMBER
            self.strange += self._follows_a_name()
        elif kind == tokenize.NAME:
            is_keyword = keyword.iskeyword(token.string)
            self.classes[where] = _KEYWORD if is_keyword else _NAME
            self.strange += self._follows_a_name() and not is_keyword
        elif kind == tokenize.OP:
            self.classes[where] = _OPERATOR
            self._take_bracket(token)
        else:
            self.strange += 1
        self._before = token
        self._n_in_statement += 1

    def finish(self, end: int) -> None:
        """The text ends here, within a statement or not."""
        self._end_statement()
        self._mark_inside(end)

    def _mark_inside(self, end: int) -> None:
        """Say of the characters up to ``end`` which bracket is open there."""
        self.inside[self._marked : end] = self._open[-1] if self._open else 0
        self._marked = end

    def _follows_a_name(self) -> bool:
        """Whether a name stands just before: only an operator or a keyword may follow it."""
        before = self._before
        if before is None or before.kind != tokenize.NAME:
            return False
        return not keyword.iskeyword(before.string) and before.string not in _SOFT_KEYWORDS

    def _end_statement(self) -> None:
        before = self._before
        if before is not None and before.kind == tokenize.STRING and self._n_in_statement == 1:
            self.classes[before.start : before.end] = _DOCSTRING
        self._before, self._n_in_statement = None, 0

    def _take_bracket(self, token: _Token) -> None:
        if token.string in _OPEN:
            before = self._before
            called = before is not None and before.kind == tokenize.NAME and before.end == token.start
            opener = (before.string if before is not None and called else "") + token.string
            if opener not in self._numbers:
                self._numbers[opener] = len(self.openers)
                self.openers.append(opener)
            self._mark_inside(token.end)
            self._open.append(self._numbers[opener])
        elif token.string in _CLOSE and self._open:
            self._mark_inside(token.start)
            self._open.pop()


def _tokens(text: str, begun: int) -> Iterator[_Token]:
    """The tokens of ``text`` from ``begun`` on, f-strings whole."""
    string_start, depth = 0, 0
    for token in _tokens_and_parts(text, begun):
        if token is None:
            depth = 0
            continue
        if token.kind == _STRING_START:
            string_start = string_start if depth else token.start
            depth += 1
        elif token.kind == _STRING_END:
            depth -= 1
            token = _Token(tokenize.STRING, text[string_start : token.end], string_start, token.end)
        if not depth:
            yield token


def _tokens_and_parts(text: str, begun: int) -> Iterator[_Token | None]:
    """The tokens of ``text`` as :mod:`tokenize` gives them, and None at an error that is read over."""
    lines = list(io.StringIO(text[begun:], newline=""))
    starts = begun + np.cumsum([0, *map(len, lines)])
    first = 0
    while first < len(lines):
        try:
            for token in tokenize.generate_tokens(iter(lines[first:]).__next__):
                line, end_line = token.start[0] + first - 1, token.end[0] + first - 1
                if end_line < len(lines):
                    start, end = int(starts[line]) + token.start[1], int(starts[end_line]) + token.end[1]
                    yield _Token(token.type, token.string, start, end)
            return
        except IndentationError as error:  # a line that fits no line before it: begin with that one
            first += max(1, (error.lineno or 1) - 1)
        except tokenize.TokenError as error:
            message, (line, column) = error.args
            if "statement" in message:
                return  # the text ends within brackets, and all of it has been read
            line += first - 1
            if "string" in message and ("multi-line" in message or "triple-quoted" in message):
                start = min(int(starts[min(line, len(lines))]) + column, len(text))
                yield _Token(tokenize.STRING, text[start:], start, len(text))
                return
            first = max(first, line) + 1
            yield None


def _white_space(text: str) -> np.ndarray:
    """uint8 ``[n_characters]``, the classes of white space; 0 elsewhere."""
    classes = np.zeros(len(text), dtype=np.uint8)
    line_begins = True
    last = 0
    for found in _WHITE_SPACE.finditer(text):
        line_begins = line_begins and found.start() == last
        if found[0][0] in "\r\n":
            classes[found.start() : found.end()], line_begins = _NEWLINE, True
        else:
            classes[found.start() : found.end()] = _INDENTATION if line_begins else _SPACE
        last = found.end()
    return classes
