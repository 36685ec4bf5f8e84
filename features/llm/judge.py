"""Who answers the cases: a language model, or the label's own pattern."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from activations.errors import InputError
from features.aspects import Text
from features.index import FeatureIndex
from features.labels import Label
from features.llm import prompts
from features.llm.cases import Case, Task
from features.llm.session import Session
from features.patterns import Pattern

CASES_PER_PROMPT = 5
_REMEMBERED = 8  # patterns: a label and its control are asked about in both tasks


class Judge(Protocol):
    """Answers cases by what a label says and nothing else, from several threads at once."""

    @property
    def name(self) -> str:
        """What scores name as their judge."""

    @property
    def at_once(self) -> int:
        """How many cases it is asked at most in one call."""

    def can_judge(self, label: Label) -> bool:
        """Whether it understands what the label says."""

    def answers(self, task: Task, label: Label, cases: Sequence[Case]) -> list[bool]:
        """The answer to each of some cases of one task.

        Raises:
            NoAnswer: there is no usable answer. BudgetReached, InputError: as for :meth:`Session.ask`.
        """


class LLMJudge:
    """A language model that reads label and texts."""

    at_once = CASES_PER_PROMPT

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def name(self) -> str:
        """The model's name."""
        return self._session.model

    def can_judge(self, label: Label) -> bool:
        """Whether the label says anything."""
        return bool(label.text.strip())

    def answers(self, task: Task, label: Label, cases: Sequence[Case]) -> list[bool]:
        """See :class:`Judge`."""
        if task == "detection":
            messages = prompts.detect(label.text, [prompts.plain(case.tokens) for case in cases])
        else:
            messages = prompts.fuzz(label.text, [prompts.marked(case.tokens, case.marks) for case in cases])
        return self._session.ask(messages, lambda reply: prompts.read_answers(reply, len(cases)))


class PatternJudge:
    """The pattern that says the same as the label, and no language model.

    It detects the label where it holds at some token of the window, and takes marks for right where it holds at half
    of the marked tokens or more. It is held against the whole text, since it may ask for what stands before a window.

    Args:
        index: that the cases are from.
        special_ids: of tokens that are no part of a document's text.
    """

    name = "pattern"
    at_once = 1_000

    def __init__(self, index: FeatureIndex, special_ids: Iterable[int] = ()) -> None:
        self._text = Text.of_blocks([index.blocks], list(index.vocabulary), special_ids)
        self._holds = lru_cache(_REMEMBERED)(lambda pattern: Pattern.from_json(pattern).holds(self._text))

    def can_judge(self, label: Label) -> bool:
        """Whether the label has a pattern."""
        try:
            return bool(label.pattern) and bool(Pattern.from_json(label.pattern))
        except InputError:
            return False

    def answers(self, task: Task, label: Label, cases: Sequence[Case]) -> list[bool]:
        """See :class:`Judge`."""
        holds = self._holds(label.pattern)
        found = [holds[case.start : case.start + len(case.tokens)] for case in cases]
        if task == "detection":
            return [bool(here.any()) for here in found]
        pairs = zip(found, cases, strict=True)
        return [2 * int(here[case.marks].sum()) >= int(case.marks.sum()) for here, case in pairs]
