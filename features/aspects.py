"""What can be said of a position of a text: its token, those around it, its lexical class, its line, its bracket.

Every aspect gives each position one value, a string (``"token"``: "self"; ``"class"``: "keyword"; ``"line"``:
"import"), and :class:`Text` holds them as numbers, for many positions at once. Patterns
(:mod:`features.patterns`) are made of nothing else.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from activations.blocks import PADDING, TokenBlocks
from features.lexical import CLASSES, lex

Aspect = Literal[
    "token",
    "before",
    "before2",
    "before3",
    "next",
    "word",
    "shape",
    "shape_before",
    "class",
    "class_before",
    "line",
    "inside",
]
"""What can be asked:

token, next                the token there, and the one behind it in its block
before, before2, before3   the tokens before it, in its block
word                       the token without white space around it, in lower case
shape, shape_before        what kind of characters the token (the one before it) is made of, see :func:`shape`
class, class_before        what the token (the one before it) is to Python, see :mod:`features.lexical`
line                       the first word of its line: "import", "def", "@"
inside                     the innermost bracket that is open there, and what is called by it: "print(", "["
"""
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
NONE = -1
"""The number of a position that has no value: no token there, no bracket open, not Python."""

_OFFSETS: dict[Aspect, int] = {"token": 0, "before": -1, "before2": -2, "before3": -3, "next": 1}
_OF_BEFORE: dict[Aspect, Aspect] = {"shape_before": "shape", "class_before": "class"}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)?")
_FIRST_WORD = re.compile(r"\s*(\w+|\S)")


class Text:
    """Token blocks of which every aspect can be asked.

    Positions are numbered 0 … n − 1: block by block, and text by text where there are several.

    Args:
        tokens: int32 ``[n]``, which of ``vocabulary`` each is.
        block: int32 ``[n]``, ascending: tokens of one block are seen together.
        document: int32 ``[n]``, of which document each is a part, in the order of its text; −1 is padding.
        vocabulary: text of every token.
        silent: numbers of tokens that are no part of the documents' text (end-of-text).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block: np.ndarray,
        document: np.ndarray,
        vocabulary: Sequence[str],
        silent: Iterable[int] = (),
    ) -> None:
        self.tokens = tokens
        self.block = block
        self.document = document
        self.vocabulary = vocabulary
        self._silent = frozenset(silent)

    @classmethod
    def of_blocks(
        cls, parts: Sequence[TokenBlocks], vocabulary: Sequence[str], special_ids: Iterable[int] = ()
    ) -> "Text":
        """The text of token blocks, one after the other."""
        tokens, block, document = [], [], []
        n_blocks = n_documents = 0
        for blocks in parts:
            tokens.append(blocks.ids.reshape(-1).astype(np.int32))
            block.append(
                np.repeat(np.arange(blocks.n_blocks, dtype=np.int32), blocks.context_length) + n_blocks
            )
            owner = blocks.documents.reshape(-1)
            document.append(np.where(owner == PADDING, PADDING, owner + n_documents).astype(np.int32))
            n_blocks, n_documents = n_blocks + blocks.n_blocks, n_documents + len(blocks.names)
        return cls(
            np.concatenate(tokens), np.concatenate(block), np.concatenate(document), vocabulary, special_ids
        )

    @classmethod
    def of_windows(cls, windows: Sequence[Sequence[str]]) -> "Text":
        """The text of some windows, each a document by itself; given the tokens of each as strings."""
        numbers: dict[str, int] = {}
        tokens = np.array([numbers.setdefault(t, len(numbers)) for w in windows for t in w], dtype=np.int32)
        window = np.repeat(np.arange(len(windows), dtype=np.int32), [len(w) for w in windows])
        return cls(tokens, window, window, list(numbers))

    def __len__(self) -> int:
        return len(self.tokens)

    def numbers(self, aspect: Aspect) -> np.ndarray:
        """int32 ``[n]``: which of :meth:`values` each position has; :data:`NONE` where it has none."""
        return self._known(aspect)[0]

    def values(self, aspect: Aspect) -> Sequence[str]:
        """The values that an aspect has in this text, by number."""
        return self._known(aspect)[1]

    def has(self, aspect: Aspect, values: Iterable[str]) -> np.ndarray:
        """bool ``[n]``: whether the aspect has one of some values there."""
        wanted = set(values)
        # NONE, the last place of the table, stays False.
        table = np.array([*(value in wanted for value in self.values(aspect)), False])
        return np.asarray(table[self.numbers(aspect)])

    @cached_property
    def documents(self) -> list[tuple[np.ndarray, list[str]]]:
        """The positions and tokens of each document, in the order of its text."""
        order = np.argsort(self.document, kind="stable")
        order = order[np.searchsorted(self.document[order], 0) :]
        starts = np.flatnonzero(np.diff(self.document[order], prepend=-1))
        pieces = self._pieces
        return [
            (positions, [pieces[t] for t in self.tokens[positions]])
            for positions in np.split(order, starts[1:])
            if len(positions)
        ]

    @cached_property
    def _aspects(self) -> dict[Aspect, tuple[np.ndarray, Sequence[str]]]:
        return {}

    def _known(self, aspect: Aspect) -> tuple[np.ndarray, Sequence[str]]:
        if aspect not in self._aspects:
            if aspect in _OFFSETS:
                self._aspects[aspect] = (self._shifted(self.tokens, _OFFSETS[aspect]), self.vocabulary)
            elif aspect in _OF_BEFORE:
                numbers, values = self._known(_OF_BEFORE[aspect])
                self._aspects[aspect] = (self._shifted(numbers, -1), values)
            elif aspect == "word":
                self._aspects[aspect] = self._of_tokens([text.strip().lower() for text in self.vocabulary])
            elif aspect == "shape":
                self._aspects[aspect] = self._of_tokens([shape(text) for text in self.vocabulary])
            else:
                self._read_documents()
        return self._aspects[aspect]

    def _shifted(self, numbers: np.ndarray, offset: int) -> np.ndarray:
        """The number ``offset`` places on, within the block."""
        if not offset:
            return numbers
        shifted = np.full_like(numbers, NONE)
        here, there = (
            slice(max(-offset, 0), len(self) - max(offset, 0)),
            slice(max(offset, 0), len(self) - max(-offset, 0)),
        )
        same_block = self.block[here] == self.block[there]
        shifted[here] = np.where(same_block, numbers[there], NONE)
        return shifted

    def _of_tokens(self, values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """An aspect that depends on the token alone; "" is none."""
        names = _Names()
        table = np.array([names.number(value) for value in values], dtype=np.int32)
        return table[self.tokens], names.values

    def _read_documents(self) -> None:
        """The aspects that are read off a document: class, line, inside."""
        lines, openers = _Names(), _Names()
        classes = _Names(CLASSES[1:])
        read: tuple[Aspect, ...] = ("class", "line", "inside")
        found = {aspect: np.full(len(self), NONE, dtype=np.int32) for aspect in read}
        for positions, tokens in self.documents:
            text = "".join(tokens)
            characters = token_characters(tokens)
            has_character = characters >= 0
            positions, characters = positions[has_character], characters[has_character]
            number, starts = _lines(text, lines)
            found["line"][positions] = number[np.searchsorted(starts, characters, side="right") - 1]
            lexed = lex(text)
            if lexed is None:
                continue
            found["class"][positions] = lexed.classes[characters].astype(np.int32) - 1
            known = np.array([openers.number(opener) for opener in lexed.openers], dtype=np.int32)
            found["inside"][positions] = known[lexed.inside[characters]]
        for aspect, names in zip(read, (classes, lines, openers), strict=True):
            self._aspects[aspect] = (found[aspect], names.values)

    @cached_property
    def _pieces(self) -> list[str]:
        """What each token is in the text of its document; a part of a character, as good as any letter there."""
        pieces = [_BYTE.sub("x", text) for text in self.vocabulary]
        for number in self._silent:
            pieces[number] = ""
        return pieces


class _Names:
    """Numbers strings in the order in which they come; "" is :data:`NONE`."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._numbers = {value: number for number, value in enumerate(values)}

    def number(self, value: str) -> int:
        return self._numbers.setdefault(value, len(self._numbers)) if value else NONE

    @property
    def values(self) -> list[str]:
        return list(self._numbers)


def shape(token: str) -> str:
    """What kind of characters a token is made of, white space around it aside.

    "word", "Word", "WORD" and "mixedCase" for letters (underscores too), "number" for digits, "line break" and
    "white space", and "marks" for whatever else; "" for an empty token.
    """
    if not token:
        return ""
    core = token.strip()
    if not core:
        return "line break" if "\n" in token or "\r" in token else "white space"
    letters = core.replace("_", "")
    if letters.isalpha():
        if letters.islower():
            return "word"
        if letters.isupper():
            return "WORD" if len(letters) > 1 else "capital"
        return "Word" if letters[0].isupper() and letters[1:].islower() else "mixedCase"
    return "number" if core.isdigit() else "marks"


def token_characters(tokens: Sequence[str]) -> np.ndarray:
    """The character that says what each token is: its last that is no white space, else its first.

    Returns:
        int64 ``[len(tokens)]``, places in the joined text; an empty token has the place of what follows it, −1
        where nothing does.
    """
    places = np.empty(len(tokens), dtype=np.int64)
    start = 0
    for number, token in enumerate(tokens):
        places[number] = start + max(len(token.rstrip()) - 1, 0)
        start += len(token)
    places[places >= start] = NONE
    return places


def _lines(text: str, names: _Names) -> tuple[np.ndarray, np.ndarray]:
    """For each line of a text, the number of its first word (int32) and the place where it begins (int64)."""
    number, starts = [], []
    for line in _LINE.finditer(text):
        first = _FIRST_WORD.match(line[0])
        number.append(names.number(first[1] if first else ""))
        starts.append(line.start())
    return np.array(number, dtype=np.int32), np.array(starts, dtype=np.int64)
