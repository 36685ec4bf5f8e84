"""Patterns: labels that a machine can check, as predicates over the positions of a text.

A pattern holds at a position where one of its conditions does, and a condition where every aspect it names
(:mod:`features.aspects`) has one of the values it names. As JSON::

    {"any_of": [{"token": ["self", "cls"], "before": ["("]}, {"token": ["this"]}]}
    {"any_of": [{}]}                 no condition: holds everywhere
    {"regex": "https?://\\\\S+"}       at every token that a match overlaps

Automatic labels come with one, and a person may attach one to a label, which makes it a claim that can be scored.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from activations.errors import InputError
from features.aspects import ASPECTS, Aspect, Text

_BEFORE: tuple[Aspect, ...] = ("token", "before", "before2", "before3")
_EXAMPLE = '{"any_of": [{"token": ["self"]}]} or {"regex": "[0-9]+"}'


@dataclass(frozen=True)
class Condition:
    """Aspects and the values that they may have, in the order of :data:`ASPECTS`; without any, it always holds."""

    values: tuple[tuple[Aspect, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, values: Mapping[Aspect, Iterable[str]]) -> "Condition":
        """From a mapping; values that are given twice count once."""
        return cls(
            tuple((aspect, tuple(dict.fromkeys(values[aspect]))) for aspect in ASPECTS if aspect in values)
        )

    def holds(self, text: Text) -> np.ndarray:
        """bool ``[n]``, at every position of a text."""
        holds = np.ones(len(text), dtype=bool)
        for aspect, values in self.values:
            holds &= text.has(aspect, values)
        return holds


@dataclass(frozen=True)
class Pattern:
    """A predicate over positions.

    Attributes:
        any_of: it holds where one of these does.
        regex: if not empty, instead: it holds at every token that a match of this regular expression (Python's) in
            the text of the document overlaps.
    """

    any_of: tuple[Condition, ...] = ()
    regex: str = ""

    @classmethod
    def of_tokens(cls, tokens: Iterable[str], aspect: Aspect = "token") -> "Pattern":
        """At these tokens; or where those, say, before it are (``aspect="before"``)."""
        return cls((Condition.of({aspect: tokens}),))

    @classmethod
    def of_ngrams(cls, ngrams: Iterable[Sequence[str]]) -> "Pattern":
        """At the last token of these sequences of one to four tokens.

        Raises:
            InputError: a sequence is empty or longer.
        """
        conditions = []
        for ngram in ngrams:
            if not 1 <= len(ngram) <= len(_BEFORE):
                raise InputError(
                    f"An n-gram has 1 to {len(_BEFORE)} tokens, not {len(ngram)}: {list(ngram)}."
                )
            places = zip(_BEFORE, reversed(ngram), strict=False)
            conditions.append(Condition.of({aspect: [token] for aspect, token in places}))
        return cls(tuple(conditions))

    @classmethod
    def of_regex(cls, regex: str) -> "Pattern":
        """At every token that a match overlaps.

        Raises:
            InputError: it is no regular expression, or an empty one.
        """
        if not regex:
            raise InputError(
                "An empty regular expression matches nothing: give one with at least one character."
            )
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"/{regex}/ is no regular expression ({error}): correct it.") from None
        return cls(regex=regex)

    def holds(self, text: Text) -> np.ndarray:
        """bool ``[n]``, at every position of a text; False at padding."""
        if self.regex:
            return _overlapped(re.compile(self.regex), text)
        holds = np.zeros(len(text), dtype=bool)
        for condition in self.any_of:
            holds |= condition.holds(text)
        return holds & (text.document >= 0)

    def to_json(self) -> str:
        """As in the module's description, with the values in their order."""
        if self.regex:
            return json.dumps({"regex": self.regex}, ensure_ascii=False)
        return json.dumps(
            {"any_of": [dict(condition.values) for condition in self.any_of]}, ensure_ascii=False
        )

    @classmethod
    def from_json(cls, string: str) -> "Pattern":
        """What :meth:`to_json` wrote, or a person.

        Raises:
            InputError: it is no pattern.
        """
        try:
            content = json.loads(string)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or len(content) != 1 or not {"regex", "any_of"} & content.keys():
            raise InputError(f"{string[:80]!r} is no pattern: write it like {_EXAMPLE}.")
        if "regex" in content:
            if not isinstance(content["regex"], str):
                raise InputError(f"The regex of a pattern is a string: write it like {_EXAMPLE}.")
            return cls.of_regex(content["regex"])
        if not isinstance(content["any_of"], list) or not content["any_of"]:
            raise InputError(f'"any_of" of a pattern is a list of conditions: write it like {_EXAMPLE}.')
        return cls(tuple(_condition(values) for values in content["any_of"]))


def joined(conditions: Sequence[Mapping[Aspect, Sequence[str]]]) -> tuple[Condition, ...]:
    """The same conditions in fewer: those that differ in the values of one aspect alone become one."""
    found = [dict(condition) for condition in conditions]
    for aspect in ASPECTS:
        groups: dict[object, dict[Aspect, Sequence[str]]] = {}
        for condition in found:
            rest = frozenset(
                (other, tuple(sorted(set(values)))) for other, values in condition.items() if other != aspect
            )
            group = groups.setdefault((aspect in condition, rest), condition)
            if group is not condition and aspect in condition:
                group[aspect] = [*group[aspect], *condition[aspect]]
        found = list(groups.values())
    return tuple(map(Condition.of, found))


def _condition(values: object) -> Condition:
    if not isinstance(values, dict):
        raise InputError(
            f"A condition of a pattern maps aspects to lists of values: write it like {_EXAMPLE}."
        )
    for aspect, wanted in values.items():
        if aspect not in ASPECTS:
            raise InputError(f"{aspect!r} is nothing that a pattern can ask for: {', '.join(ASPECTS)} are.")
        if not isinstance(wanted, list) or not all(isinstance(value, str) for value in wanted):
            raise InputError(
                f"The values of {aspect} in a pattern are a list of strings: write it like {_EXAMPLE}."
            )
    return Condition.of(values)


def _overlapped(regex: "re.Pattern[str]", text: Text) -> np.ndarray:
    """The tokens that matches overlap: bool ``[n]``; empty matches overlap nothing."""
    holds = np.zeros(len(text), dtype=bool)
    for positions, tokens in text.documents:
        lengths = np.array([len(token) for token in tokens])
        ends = np.cumsum(lengths)
        covered = np.zeros(ends[-1] + 1, dtype=np.int64)
        for match in regex.finditer("".join(tokens)):
            covered[match.start() : match.end()] = 1
        before = np.concatenate([[0], np.cumsum(covered)])
        holds[positions] = before[ends] > before[ends - lengths]
    return holds
