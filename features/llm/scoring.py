"""Scores of labels: how well a judge that knows only the label tells where the feature fires.

The score of a task is the balanced accuracy over the cases, the mean of

    true positive rate = "yes" among the cases that are right,   true negative rate = "no" among the others,

so that 0.5 is chance whatever the numbers of both. Its 95% interval is the mean of both rates' Wilson intervals
(Wilson 1927), lower and upper end each: wider than need be, never narrower. The **control** is what the same judge
makes of the same cases by the label of another feature: what a label that says nothing of this feature would get.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from activations.progress import Progress, silent
from features.labels import Label, Labels, Score, ScoreKind
from features.llm.budget import BudgetReached
from features.llm.cases import LEAST_CASES, TASKS, Case, Cases, Task
from features.llm.judge import Judge
from features.llm.session import NoAnswer
from features.llm.threads import in_threads
from features.score import wilson


@dataclass
class Scored:
    """What came of judging labels.

    Attributes:
        scores: id of the label → its new scores.
        hard: id of the label → task → how many of its cases are hard negatives; half of all are negatives.
        failed: id of the label → why it has no score of some task.
        stopped: why the work ended before all were judged; None if it did not.
    """

    scores: dict[int, list[Score]] = field(default_factory=dict)
    hard: dict[int, dict[ScoreKind, int]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    stopped: str | None = None


def balanced_score(
    task: Task, right: Sequence[bool], given: Sequence[bool], *, judge: str, control: float | None = None
) -> Score | None:
    """The score of answers to cases of one task.

    Args:
        right: the right answers. given: the judge's.

    Returns:
        see the module; precision and recall are of "yes". None if not both answers are right somewhere.
    """
    pairs = list(zip(right, given, strict=True))
    n_positive = sum(right)
    n_negative = len(pairs) - n_positive
    if not n_positive or not n_negative:
        return None
    hits = sum(truth and said for truth, said in pairs)
    rejections = sum(not truth and not said for truth, said in pairs)
    low, high = wilson(np.array([hits, rejections]), np.array([n_positive, n_negative]))
    value = (hits / n_positive + rejections / n_negative) / 2
    said_yes = hits + n_negative - rejections
    return Score(
        kind=task,
        value=value,
        n=len(pairs),
        low=min(float(low.mean()), value),
        high=max(float(high.mean()), value),
        precision=hits / said_yes if said_yes else None,
        recall=hits / n_positive,
        control=control,
        judge=judge,
    )


def partners(labels: Sequence[Label], others: Iterable[Label] = (), seed: int = 0) -> list[Label | None]:
    """For each label that of another feature, which says something else: its shuffled control.

    All labels stand in a circle, in an order that is random but the same in every run; the partner is the next one.
    A label more or less changes the partner of one other label, so that little has to be judged again.

    Args:
        others: labels that may be partners too, if the ones to judge are not enough.

    Returns:
        the partner of each; None where every label says the same.
    """

    def place(label: Label) -> bytes:
        return sha256(f"{seed} {label.feature} {label.text}".encode()).digest()

    def after(label: Label, circle: Sequence[Label]) -> Label | None:
        begin = bisect_right(circle, place(label), key=place)
        turned = (circle[(begin + step) % len(circle)] for step in range(len(circle)))
        return next((x for x in turned if x.feature != label.feature and x.text != label.text), None)

    circle, more = sorted(labels, key=place), sorted(others, key=place)
    return [after(label, circle) or after(label, more) for label in labels]


def score_labels(
    labels: Sequence[Label],
    cases: Cases,
    judge: Judge,
    store: Labels,
    *,
    others: Iterable[Label] = (),
    tasks: Sequence[Task] = TASKS,
    seed: int = 0,
    concurrency: int = 8,
    progress: Progress = silent,
) -> Scored:
    """Have labels judged, of whatever source; every score is stored with its label as soon as it is there.

    A score that says the same as the one that the label has is not stored again. Cases that get no usable answer are
    left out; where that is half of them or more there is no score, and :attr:`Scored.failed` says why. When the budget
    is reached, requests on their way are waited for, and :attr:`Scored.stopped` says so.

    Args:
        labels: from ``store``, so each has an id.
        others: labels of other features, for the control, if those to judge are not enough.
        seed: of the shuffled control.
        concurrency: questions at once.

    Raises:
        InputError: no question can be answered; scores made before are kept.
    """
    result = Scored()
    for label in labels:
        if not judge.can_judge(label):
            result.failed[_id(label)] = (
                "it has no pattern, and without a language model nothing else can be judged"
            )
    labels = [label for label in labels if judge.can_judge(label)]
    controls = partners(labels, [label for label in others if judge.can_judge(label)], seed)

    def questions() -> Iterator[_Question]:
        for label, control in zip(labels, controls, strict=True):
            for task in tasks:
                chosen = cases.of(label.feature, task)
                if len(chosen) < LEAST_CASES:
                    result.failed[_id(label)] = (
                        f"too few cases of {task}: the feature fires, or is silent, too rarely"
                    )
                    step(1)
                    continue
                for question in _Examination(label, task, chosen, control).questions(judge.at_once):
                    if result.stopped:
                        return
                    yield question

    def ask(question: _Question) -> list[bool]:
        return judge.answers(question.examination.task, question.label, question.cases)

    with progress("judge", total=len(labels) * len(tasks), unit="scores") as step:
        for question, answers in in_threads(ask, questions(), max(1, concurrency)):
            examination = question.examination
            if isinstance(answers, BudgetReached):
                result.stopped = str(answers)
                continue
            if isinstance(answers, NoAnswer):
                examination.failure, answers = str(answers), []
            elif isinstance(answers, Exception):
                raise answers
            if not examination.take(question, answers):
                continue
            label_id = _id(examination.label)
            score = examination.score(judge.name)
            if score is None:
                result.failed[label_id] = examination.failure
            else:
                if examination.label.score_of(examination.task) != score:
                    store.add_score(label_id, score)
                result.scores.setdefault(label_id, []).append(score)
                result.hard.setdefault(label_id, {})[examination.task] = examination.n_hard
            step(1)
    return result


@dataclass(frozen=True, eq=False)
class _Question:
    """Some cases of an examination, by its label or by the control's."""

    examination: "_Examination"
    label: Label
    cases: Sequence[Case]


class _Examination:
    """The cases of one label and one task, as they are being answered, by the label and by its control."""

    def __init__(self, label: Label, task: Task, cases: Sequence[Case], control: Label | None) -> None:
        self.label, self.task, self.control = label, task, control
        self.failure = "too few cases got a usable answer"
        self._cases = cases
        self._open = 0
        self._answered: dict[Label, list[tuple[bool, bool]]] = {label: []}
        if control:
            self._answered[control] = []

    @property
    def n_hard(self) -> int:
        """How many of the cases are hard negatives."""
        return sum(case.kind == "hard" for case in self._cases)

    def questions(self, at_once: int) -> list[_Question]:
        """All of them, each of at most so many cases."""
        parts = [self._cases[start : start + at_once] for start in range(0, len(self._cases), at_once)]
        asked = [_Question(self, label, part) for label in self._answered for part in parts]
        self._open = len(asked)
        return asked

    def take(self, question: _Question, answers: Sequence[bool]) -> bool:
        """Take down the answers to a question, none if there was no usable one; True if it was the last question."""
        if answers:
            right = (case.answer for case in question.cases)
            self._answered[question.label] += zip(right, answers, strict=True)
        self._open -= 1
        return self._open == 0

    def score(self, judge: str) -> Score | None:
        """The score of the label beside that of the control; None if half of the cases or more have no answer."""
        control = self._score(self.control, judge) if self.control else None
        found = self._score(self.label, judge)
        return found and replace(found, control=control.value if control else None)

    def _score(self, label: Label, judge: str) -> Score | None:
        answered = self._answered[label]
        if 2 * len(answered) <= len(self._cases):
            return None
        return balanced_score(self.task, *zip(*answered, strict=True), judge=judge)


def _id(label: Label) -> int:
    assert label.id is not None, "only labels from the store can be scored"
    return label.id
