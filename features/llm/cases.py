"""What a label is examined with: windows of text on which its feature fires or does not.

All windows are from the score split, of which no explainer saw a document. A feature's cases are

- windows in which it fires, taken in turn from each tenth of its firings by strength;
- as many for which the answer is no: half at random, half hard.

For **detection** (does it fire in this window?) a random negative is any window in which the feature is silent, and a
hard one a near miss: a token on which it often fires, and the feature silent in the whole window. For **fuzzing** (are
the marked tokens those on which it fires?) a random negative is a window in which it fires with other tokens marked,
and a hard one a near miss with that token and others marked. Every negative has as many marks as one of the positives,
so that their number says nothing. Where one kind of negative is short, the other fills up: a feature that fires on its
tokens wherever they stand has no near miss. Scoring as in Paulo et al. 2024, 2410.13928, who have no hard negatives.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Literal

import numpy as np

from activations.errors import InputError
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.index import Example, FeatureIndex
from features.llm.explain import WIDTH, shown_examples
from features.llm.windows import SilentWindows
from sae.model import SparseAutoencoder

Task = Literal["detection", "fuzzing"]
TASKS: tuple[Task, ...] = ("detection", "fuzzing")
Kind = Literal["fires", "random", "hard"]
LEAST_CASES = 8
"""A score from fewer is not made."""


def check_n_cases(n_cases: int) -> None:
    """Refuse a number of cases that no score can be made from.

    Raises:
        InputError: it is odd, or below :data:`LEAST_CASES`.
    """
    if n_cases < LEAST_CASES or n_cases % 2:
        raise InputError(
            f"A score from {n_cases} cases cannot be made: give an even number, {LEAST_CASES} or more."
        )


@dataclass(frozen=True)
class Case:
    """One question to a judge.

    Attributes:
        start: where in the text of the index the window begins: block · context_length + place in the block.
        tokens: the text of its tokens.
        marks: bool ``[len(tokens)]``, the marked tokens; for detection, those on which the feature fires.
        answer: what is right.
        kind: a firing, or which kind of negative.
        place: which of the tokens the window is about; 0 where it is about none.
    """

    start: int
    tokens: tuple[str, ...]
    marks: np.ndarray
    answer: bool
    kind: Kind
    place: int = 0


class Cases:
    """The cases of every feature.

    Args:
        index: over the score split.
        explained: the index over the train split, which explainers see.
        model, sae: to see where a feature is silent.
        features: those whose cases will be asked for; all if None.
        n_cases: of one task for one feature, half of them positive; fewer where the score split has fewer.
        seed: of every choice.

    Raises:
        InputError: the two indices share a document, or are of two SAEs; ``n_cases`` cannot be.
    """

    def __init__(
        self,
        index: FeatureIndex,
        explained: FeatureIndex,
        model: LanguageModel,
        sae: SparseAutoencoder,
        *,
        features: Iterable[int] | None = None,
        n_cases: int = 40,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        check_n_cases(n_cases)
        if index.sae_hash != explained.sae_hash:
            raise InputError(
                "The indices over the train and the score split are of two SAEs: build both again."
            )
        shared = sorted(set(index.blocks.names) & set(explained.blocks.names))
        if shared:
            raise InputError(
                f"The score split shares {len(shared):,} documents with the train split, {shared[0]} for one: build"
                " the token blocks again."
            )
        self.index, self.explained = index, explained
        self.n_cases, self.seed = n_cases, seed
        self._silent = SilentWindows(
            index, explained, model, sae, features=features, seed=seed, progress=progress
        )

    def of(self, feature: int, task: Task) -> list[Case]:
        """The cases of a feature for a task, in random order, the same in every run: as many positive as negative.

        None of them has the text of a window that the explainer was shown (licences and the like stand in many
        documents). There are fewer than ``n_cases`` for a feature that fires rarely, or is silent rarely, in the score
        split; none if it does not do both.

        Raises:
            InputError: there is no such feature.
        """
        rng = np.random.default_rng([self.seed, feature, TASKS.index(task)])
        shown = {"".join(example.tokens) for example in shown_examples(self.explained, feature)}
        half = self.n_cases // 2
        firing = [case for case in self._firings(feature, rng) if "".join(case.tokens) not in shown]
        near = self._silent.near_misses(feature, self.n_cases, rng)
        hard = self._cases(near, "hard", shown)
        if task == "detection":
            # One order of all windows: where rounding decides whether it fires in one of them, the others stay.
            order = rng.permutation(self._silent.random(feature))
            easy = self._cases(order[: self.n_cases], "random", shown)
            n = min(half, len(firing), len(easy) + len(hard))
            cases = firing[:n] + _half_and_half(easy, hard, n)
        else:
            # No window is shown with right marks and with wrong ones.
            n = min(half, len(firing), (len(firing) + len(hard)) // 2)
            cases = _marked_alike(firing[:n], _half_and_half(firing[n:], hard, n), rng)
        return [cases[place] for place in rng.permutation(len(cases))]

    def _firings(self, feature: int, rng: np.random.Generator) -> list[Case]:
        """Windows in which it fires, each once: one of each tenth by strength, then another of each, and so on."""
        bands = [
            [examples[place] for place in rng.permutation(len(examples))]
            for _, examples in self.index.range_examples(feature, WIDTH)
        ]
        by_start: dict[int, Case] = {}
        for example in chain.from_iterable(zip_longest(*bands)):
            if example is not None:
                case = _firing(example)
                by_start.setdefault(case.start, case)
        return list(by_start.values())

    def _cases(self, windows: np.ndarray, kind: Kind, shown: set[str]) -> list[Case]:
        """Windows in which the feature is silent, without those that the explainer was shown."""
        cases = []
        for start, stop, position in windows.tolist():
            tokens = tuple(self.index.pieces(start, stop))
            if "".join(tokens) not in shown:
                marks = np.zeros(len(tokens), bool)
                cases.append(Case(start, tokens, marks, False, kind, position - start))
        return cases


def _firing(example: Example) -> Case:
    start = example.position - example.peak
    return Case(start, tuple(example.tokens), example.activations != 0, True, "fires", example.peak)


def _marked_alike(right: Sequence[Case], wrong: Sequence[Case], rng: np.random.Generator) -> list[Case]:
    """Pairs of a window with its own marks and another with as many marks, all of them wrong.

    In a near miss they stand around the place that it is about as the right ones stand around theirs; in a window in
    which the feature fires, on any other tokens. Windows that have not the room for the marks of any are left out.
    """
    cases: list[Case] = []
    left = list(wrong)
    for case in right:
        marked = ((other, _wrong_marks(case, other, rng)) for other in left)
        found = next(((other, marks) for other, marks in marked if marks is not None), None)
        if found is not None:
            other, marks = found
            left = [each for each in left if each is not other]
            kind: Kind = "hard" if other.kind == "hard" else "random"
            cases += [case, replace(other, marks=marks, answer=False, kind=kind)]
    return cases


def _wrong_marks(right: Case, other: Case, rng: np.random.Generator) -> np.ndarray | None:
    """Marks on tokens of another window on which the feature is silent: as many as are right; None without the room."""
    free = ~other.marks & np.array([bool(token) for token in other.tokens])
    if other.kind == "hard":
        places = np.flatnonzero(right.marks) - right.place + other.place
        if places[0] < 0 or places[-1] >= len(free) or not free[places].all():
            return None
    elif free.sum() < right.marks.sum():
        return None
    else:
        places = rng.choice(np.flatnonzero(free), int(right.marks.sum()), replace=False)
    marks = np.zeros(len(free), bool)
    marks[places] = True
    return marks


def _half_and_half(easy: Sequence[Case], hard: Sequence[Case], n: int) -> list[Case]:
    """``n`` cases, half of each if there are as many; else the other kind fills up."""
    n_hard = min(len(hard), max(n // 2, n - len(easy)))
    return [*hard[:n_hard], *easy[: n - n_hard]]
