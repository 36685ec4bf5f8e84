"""Patterns: what they hold on, how they are written down, and what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import InputError
from features.aspects import ASPECTS, Text
from features.patterns import Condition, Pattern, joined
from features.wording import says, sentence, visible

TOKENS = ["a", "b", " a", "B", "(", "\n"]
VALUES = st.lists(
    st.sampled_from(["a", "b", "(", "word", "keyword", "é\n"]), min_size=1, max_size=3, unique=True
)
CONDITIONS = st.dictionaries(st.sampled_from(ASPECTS), VALUES, max_size=3)
PATTERNS = st.one_of(
    st.lists(CONDITIONS, min_size=1, max_size=4).map(lambda each: Pattern(tuple(map(Condition.of, each)))),
    st.sampled_from(["a+", "[0-9]", "é|\n"]).map(Pattern.of_regex),
)


@given(PATTERNS)
def test_a_pattern_survives_json(pattern: Pattern) -> None:
    assert Pattern.from_json(pattern.to_json()) == pattern


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=8), min_size=1, max_size=3),
    st.lists(CONDITIONS, min_size=1, max_size=4),
)
def test_a_pattern_holds_where_one_of_its_conditions_does(windows: list[list[str]], conditions: list) -> None:
    text = Text.of_windows(windows)
    expected = np.zeros(len(text), dtype=bool)
    for n in range(len(text)):
        for condition in conditions:
            found = []
            for aspect, wanted in condition.items():
                number = text.numbers(aspect)[n]
                found.append(number >= 0 and text.values(aspect)[number] in wanted)
            expected[n] |= all(found)
    assert Pattern(tuple(map(Condition.of, conditions))).holds(text).tolist() == expected.tolist()
    assert Pattern(joined(conditions)).holds(text).tolist() == expected.tolist()


def holds_in(pattern: Pattern, windows: list[list[str]]) -> list[np.ndarray]:
    """Where a pattern holds in windows of text, each a text by itself."""
    ends = np.cumsum([len(window) for window in windows])
    return np.split(pattern.holds(Text.of_windows(windows)), ends[:-1])


def test_tokens_and_ngrams_hold_at_the_last_token() -> None:
    windows = [["def", " f", "(", "self"], ["self", "(", "self"]]
    assert [each.tolist() for each in holds_in(Pattern.of_tokens(["self", "x"]), windows)] == [
        [False, False, False, True],
        [True, False, True],
    ]
    held = holds_in(Pattern.of_ngrams([("(", "self"), ("def", " f")]), windows)
    assert [each.tolist() for each in held] == [[False, True, False, True], [False, False, True]]
    held = holds_in(Pattern.of_tokens(["("], "before"), [["(", "a"], ["a", "("], []])
    assert [each.tolist() for each in held] == [[False, True], [False, False], []]
    assert not len(Pattern.of_tokens(["a"]).holds(Text.of_windows([])))


def test_a_regex_holds_at_every_token_that_a_match_overlaps() -> None:
    window = ["x", " = ", "1", "23", "", "4", "a", "1"]
    (held,) = holds_in(Pattern.of_regex("[0-9]{2,}"), [window])
    assert held.tolist() == [False, False, True, True, False, True, False, False]
    (held,) = holds_in(Pattern.of_regex("q*"), [window])
    assert not held.any()


def test_a_pattern_without_conditions_holds_nowhere_and_an_empty_condition_everywhere() -> None:
    text = Text(np.zeros(4, np.int32), np.zeros(4, np.int32), np.array([0, 0, 0, -1], np.int32), ["a"])
    assert Pattern().holds(text).tolist() == [False] * 4
    assert Pattern((Condition(),)).holds(text).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("string", "said"),
    [
        ("", "is no pattern"),
        ("[1]", "is no pattern"),
        ('{"tokens": ["a"]}', "is no pattern"),
        ('{"regex": "a", "any_of": []}', "is no pattern"),
        ('{"regex": 3}', "is a string"),
        ('{"regex": "("}', "is no regular expression"),
        ('{"regex": ""}', "matches nothing"),
        ('{"any_of": []}', "is a list of conditions"),
        ('{"any_of": [3]}', "maps aspects"),
        ('{"any_of": [{"colour": ["red"]}]}', "is nothing that a pattern can ask for"),
        ('{"any_of": [{"token": "red"}]}', "are a list of strings"),
    ],
)
def test_what_is_no_pattern_is_refused_in_a_sentence(string: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Pattern.from_json(string)
    assert said in str(caught.value)


def test_an_ngram_has_one_to_four_tokens() -> None:
    for ngram in ([], ["a"] * 5):
        with pytest.raises(InputError):
            Pattern.of_ngrams([ngram])


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ([{"token": ["self"]}], "fires on ‹self›"),
        ([{"token": ["self"], "before": ["("]}], "fires on ‹self› after ‹(›"),
        ([{"token": ["c"], "before": ["b"], "before2": ["a"]}], "fires on ‹c› after ‹ab›"),
        ([{"token": ["x"], "before": ["a", "b"]}], "fires on ‹x› after ‹a›, ‹b›"),
        ([{"token": [*"abcdef"]}], "fires on ‹a›, ‹b›, ‹c›, ‹d› or 2 others"),
        ([{"token": [*"abcde"]}], "fires on ‹a›, ‹b›, ‹c›, ‹d›, ‹e›"),
        (
            [{"token": ["x"], "shape_before": ["word", "Word"]}],
            "fires on ‹x› after lower-case words or capitalised words",
        ),
        ([{"word": ["error"]}], "fires on ‹error› in any case"),
        ([{"class": ["name"], "before": ["."]}], "fires on names after ‹.›"),
        ([{"class": ["docstring"]}], "fires in docstrings"),
        ([{"class": ["name", "string"]}], "fires on names or in strings"),
        ([{"class": ["docstring"], "token": ["if"]}], "fires on ‹if› in docstrings"),
        ([{"line": ["import"], "token": [","]}], "fires on ‹,› in lines that begin with ‹import›"),
        ([{"line": ["import"]}], "fires in lines that begin with ‹import›"),
        ([{"next": [":"]}], "fires before ‹:›"),
        ([{"next": [":"], "class": ["name"]}], "fires on names before ‹:›"),
        ([{"before": ["raise"]}], "fires after ‹raise›"),
        ([{"inside": ["print("]}], "fires inside ‹print(›"),
        ([{"token": ["a"]}, {"before": ["b"]}], "fires on ‹a›; or after ‹b›"),
        ([{"before": [c], "class": ["name"], "line": [c]} for c in "abcdef"], None),
        ([{}], "fires everywhere"),
    ],
)
def test_a_pattern_in_words(conditions: list, said: str | None) -> None:
    words = sentence(Pattern(tuple(map(Condition.of, conditions))))
    if said is None:
        assert words.endswith("; or in 4 other cases")
    else:
        assert words == said


def test_what_is_said_has_a_stem_where_there_is_one() -> None:
    assert says(["return"]) == "says ‹return›"
    assert says(["ing", "ling", " wing"]) == "says ‑ing: ‹ing›, ‹ling›, ‹ wing›"
    assert says([" error", "errors", "err_or"]) == "says err‑: ‹ error›, ‹errors›, ‹err_or›"
    assert says(["a", "b", "c"]) == "says ‹a›, ‹b›, ‹c›"


def test_a_regex_in_words() -> None:
    assert sentence(Pattern.of_regex("a+")) == "fires on what matches /a+/"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("self", "‹self›"),
        (" self", "‹ self›"),
        (" ", "‹␣›"),
        ("  ", "‹␣␣›"),
        ("\n    ", "‹⏎␣␣␣␣›"),
        ("\n        return", "‹⏎␣×8return›"),
        ("  x", "‹␣␣x›"),
        ("x ", "‹x␣›"),
        ("# type", "‹# type›"),
        ("\t\r", "‹⇥␍›"),
        ("\x00\u200b", "‹\\x00\\u200b›"),
        ("<0xE2>", "‹<0xE2>›"),
        ("", "‹›"),
    ],
)
def test_white_space_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown
