"""Patterns in words: short, and saying no more than the pattern does.

::

    fires on ‹self› after ‹(›
    fires on ‹Error›, ‹Exception› or 3 others; or on names after ‹raise›
    fires on line breaks in lines that begin with ‹import›
    says ‑ing: ‹ing›, ‹ling›
"""

import re
from collections.abc import Sequence

from features.aspects import Aspect
from features.patterns import Condition, Pattern

MAX_VALUES = 4
"""Values that are listed; of more, the first ones and how many others there are."""
MAX_CASES = 2
"""Likewise, conditions."""

_EDGES_AND_RUNS = re.compile(r"^ +| +$| {2,}")
_MARKS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})
_KINDS = {
    "keyword": "keywords",
    "name": "names",
    "string": "strings",
    "comment": "comments",
    "docstring": "docstrings",
    "operator": "operators",
    "indentation": "indentation",
    "newline": "line breaks",
    "space": "spaces",
    "word": "lower-case words",
    "Word": "capitalised words",
    "WORD": "words in capitals",
    "capital": "single capitals",
    "mixedCase": "mixedCase words",
    "number": "numbers",
    "marks": "marks",
    "line break": "line breaks",
    "white space": "white space",
}
"""Lexical classes and shapes, in the plural."""
_WITHIN = {"string", "comment", "docstring"}
"""Classes that a token is a part of, rather than an instance."""


def visible(text: str) -> str:
    """A token in guillemets with its white space to be seen: ``‹self›``, ``‹ self›``, ``‹⏎␣␣›``, ``‹␣×12›``.

    One space before a word stays a space; other characters that print nothing show as escapes.
    """
    lead = " " if text[:1] == " " and text[1:2].strip() else ""
    body = _EDGES_AND_RUNS.sub(lambda run: _spaces(len(run[0])), text[len(lead) :]).translate(_MARKS)
    body = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in body)
    return f"‹{lead}{body}›"


def sentence(pattern: Pattern) -> str:
    """What a pattern says of a feature that fires where it holds."""
    if pattern.regex:
        return f"fires on what matches /{pattern.regex}/"
    cases = [_case(condition) for condition in pattern.any_of]
    shown, n_others = cases[:MAX_CASES], len(cases) - MAX_CASES
    others = ["in another case" if n_others == 1 else f"in {n_others} other cases"] if n_others > 0 else []
    return "fires " + "; or ".join([*shown, *others])


def says(tokens: Sequence[str]) -> str:
    """What a feature says that fires before these tokens and makes the model write them."""
    stem = _stem(tokens)
    return f"says {stem}: {_listed(tokens)}" if stem else f"says {_listed(tokens)}"


def _stem(tokens: Sequence[str]) -> str:
    """What three or more tokens begin or end with, where it is long enough to mean something; else ""."""
    words = [token.strip() for token in tokens]
    if len(words) < 3:
        return ""
    beginning, end = _common(words), _common([word[::-1] for word in words])[::-1]
    if len(beginning) >= 3 and beginning.isalpha():
        return f"{beginning}‑"
    return f"‑{end}" if len(end) >= 2 and end.isalpha() else ""


def _common(words: Sequence[str]) -> str:
    """The longest common beginning."""
    first, last = min(words), max(words)
    n = next((i for i, c in enumerate(first) if last[i : i + 1] != c), len(first))
    return first[:n]


def _case(condition: Condition) -> str:
    """One condition, from "on" or "after" on."""
    values = dict(condition.values)
    parts = [_subject(values)]
    parts += [_preceding(values), _kind_before(values)]
    if "line" in values:
        parts.append(f"in lines that begin with {_listed(values['line'])}")
    if "inside" in values:
        parts.append(f"inside {_listed(values['inside'])}")
    if "next" in values:
        parts.append(f"before {_listed(values['next'])}")
    return " ".join(part for part in parts if part) or "everywhere"


def _subject(values: dict[Aspect, tuple[str, ...]]) -> str:
    """What the token itself is."""
    exact = _listed(values["token"]) if "token" in values else ""
    if "word" in values:
        exact = f"{_listed(values['word'])} in any case"
    kinds = values.get("class", ())
    within = _either([_KINDS[kind] for kind in kinds if kind in _WITHIN])
    instances = [_KINDS[kind] for kind in kinds if kind not in _WITHIN]
    shapes = [_KINDS[kind] for kind in values.get("shape", ())]
    if exact:
        as_ = [f"as {_either(names)}" for names in (instances, shapes) if names]
        place = [f"in {within}"] if within else []
        return " ".join(["on", exact, *(place if not instances else []), *as_])
    if within and not instances:
        return f"on {_either(shapes)} in {within}" if shapes else f"in {within}"
    names = (
        [*instances, *shapes]
        if not (instances and shapes)
        else [f"{_either(shapes)} that are {_either(instances)}"]
    )
    found = [f"on {_either(names)}"] if names else []
    return " or ".join([*found, *([f"in {within}"] if within else [])])


def _preceding(values: dict[Aspect, tuple[str, ...]]) -> str:
    """The tokens before: one after the other where each is one, else from the nearest to the farthest."""
    places: tuple[Aspect, ...] = ("before", "before2", "before3")
    given = [values[place] for place in places if place in values]
    if "before" not in values:
        found = [f"two tokens after {_listed(values['before2'])}"] if "before2" in values else []
        found += [f"three tokens after {_listed(values['before3'])}"] if "before3" in values else []
        return " ".join(found)
    if all(len(each) == 1 for each in given):
        return f"after {visible(''.join(each[0] for each in reversed(given)))}"
    return "after " + ", after ".join(_listed(each) for each in given)


def _kind_before(values: dict[Aspect, tuple[str, ...]]) -> str:
    kinds = [*values.get("class_before", ()), *values.get("shape_before", ())]
    return f"after {_either([_KINDS[kind] for kind in kinds])}" if kinds else ""


def _listed(values: Sequence[str]) -> str:
    shown = values[:MAX_VALUES] if len(values) > MAX_VALUES + 1 else values
    listed = ", ".join(map(visible, shown))
    return listed if len(shown) == len(values) else f"{listed} or {len(values) - len(shown)} others"


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1] if names else ""


def _spaces(n: int) -> str:
    return "␣" * n if n <= 4 else f"␣×{n}"
