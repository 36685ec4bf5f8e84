"""Lexical classes: those of Python's own tokeniser, for texts that begin and end anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.aspects import Text, shape, token_characters
from features.lexical import CLASSES, lex

CODE = '''\
"""What it is."""
import os  # the system

class Reader(Base):
    def read(self, n=12):
        """Read
        it."""
        text = f"{n!r} of 3" + 'b'
        return print(self.x[n], "(", n)
'''


def classes_of(text: str, part: str, nth: int = 0) -> set[str]:
    """The classes of the characters of a part of the text."""
    lexed = lex(text)
    assert lexed is not None
    start = -1
    for _ in range(nth + 1):
        start = text.index(part, start + 1)
    return {CLASSES[number] for number in lexed.classes[start : start + len(part)]}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ('"""What it is."""', "docstring"),
        ("import", "keyword"),
        ("os", "name"),
        ("# the system", "comment"),
        ("(", "operator"),
        ("    ", "indentation"),
        ("\n", "newline"),
        ("12", "number"),
        ('"""Read\n        it."""', "docstring"),
        ('f"{n!r} of 3"', "string"),
        ("'b'", "string"),
        ("return", "keyword"),
    ],
)
def test_every_character_has_the_class_that_python_gives_it(part: str, expected: str) -> None:
    assert classes_of(CODE, part) == {expected}


def test_white_space_within_a_line_is_a_space() -> None:
    assert classes_of(CODE, " ", nth=1) == {"docstring"}
    assert classes_of("x = 1\n", " ") == {"space"}


def test_brackets_know_what_is_called() -> None:
    lexed = lex(CODE)
    assert lexed is not None

    def inside(part: str) -> str:
        return lexed.openers[lexed.inside[CODE.index(part)]]

    assert inside("Base") == "Reader("
    assert inside("n=12") == "read("
    assert inside("n], ") == "x["
    assert inside('"(", n)') == "print("
    assert inside("return") == ""


def test_a_text_that_begins_within_a_docstring_is_read_as_its_rest() -> None:
    middle = CODE.index("it.")
    rest = "with some words that are prose, really\n        " + CODE[middle:]
    assert classes_of(rest, "prose") == {"docstring"}
    assert classes_of(rest, "return") == {"keyword"}
    assert classes_of(rest, "text") == {"name"}


def test_reading_goes_on_after_errors() -> None:
    text = "def f():\n        x = 1\n    y = 'open\nreturn z\n" + CODE
    assert classes_of(text, "return z") == {"keyword", "space", "name"}
    assert classes_of(text, "import") == {"keyword"}


def test_a_text_that_ends_within_a_string_or_bracket_has_classes_up_to_there() -> None:
    assert classes_of(CODE + 'x = """never\nended', "never\nended") == {"string"}
    assert classes_of(CODE + '    """never\nended', "never\nended") == {"docstring"}
    assert classes_of(CODE + "call(1,\n  2", "2") >= {"number"}


def test_prose_has_no_classes() -> None:
    prose = "It was the best of times, it was the worst of times; nobody's heard of it since.\n" * 5
    assert lex(prose) is None
    text = Text.of_windows([[prose]])
    assert text.numbers("class").tolist() == [-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, len(CODE)),
    st.integers(0, len(CODE)),
    st.text("\"'\\\n\r\t\f ({[)]}:#x1é\u2028$", max_size=12),
)
def test_any_text_can_be_read(start: int, stop: int, noise: str) -> None:
    for text in (CODE[min(start, stop) : max(start, stop)], CODE[:start] + noise + CODE[start:], noise):
        lexed = lex(text)
        if lexed is not None:
            assert lexed.classes.shape == lexed.inside.shape == (len(text),)
            assert lexed.classes.max(initial=0) < len(CLASSES)
            assert lexed.inside.max(initial=0) < len(lexed.openers)


def test_a_token_is_its_last_character_that_is_no_white_space() -> None:
    tokens = ["def", " f", "(", "", "\n        ", "return", "  "]
    places = token_characters(tokens)
    text = "".join(tokens)
    assert [text[place] for place in places] == ["f", "f", "(", "\n", "\n", "n", " "]
    assert token_characters(["a", ""]).tolist() == [0, -1]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" self", "word"),
        ("_name", "word"),
        ("Error", "Word"),
        ("ERR", "WORD"),
        ("T", "capital"),
        ("camelCase", "mixedCase"),
        (" 12", "number"),
        ("):", "marks"),
        ("a1", "marks"),
        ("\n  ", "line break"),
        ("  ", "white space"),
        ("", ""),
    ],
)
def test_the_shape_of_a_token(token: str, expected: str) -> None:
    assert shape(token) == expected


def test_aspects_equal_looking_at_every_position() -> None:
    """Against a slow look at each position, in two blocks of one document."""
    tokens = ["import", " os", "\n", "x", " =", " Foo", "(", "1", ")", "\n"]
    numbers = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    ids = np.array([numbers[token] for token in tokens], dtype=np.int32)
    block = np.array([0] * 5 + [1] * 5, dtype=np.int32)
    text = Text(ids, block, np.zeros(10, dtype=np.int32), list(numbers))

    def values(aspect: str) -> list[str | None]:
        known = text.values(aspect)  # type: ignore[arg-type]
        return [None if n < 0 else known[n] for n in text.numbers(aspect)]  # type: ignore[arg-type]

    assert values("token") == tokens
    assert values("before") == [None, *tokens[:4], None, *tokens[5:9]]
    assert values("before2") == [None, None, *tokens[:3], None, None, *tokens[5:8]]
    assert values("next") == [*tokens[1:5], None, *tokens[6:], None]
    assert values("word") == ["import", "os", None, "x", "=", "foo", "(", "1", ")", None]
    assert values("class") == [
        *("keyword", "name", "newline", "name", "operator"),
        *("name", "operator", "number", "operator", "newline"),
    ]
    assert values("class_before") == [
        *(None, "keyword", "name", "newline", "name"),
        *(None, "name", "operator", "number", "operator"),
    ]
    assert values("line") == ["import"] * 3 + ["x"] * 7
    assert values("inside") == [None] * 7 + ["Foo("] + [None] * 2
