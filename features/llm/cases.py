"""What a label is examined with: windows of text on which its feature fires or does not.

All windows are from the score split, of which no explainer saw a document. A feature's cases are

- windows in which it fires, taken in turn from each tenth of its firings by strength;
- as many for which the answer is no: half at random, half hard.

For **detection** (does it fire in this window?) a random negative is any window in which the feature is silent, and a
hard one a near miss: the feature's usual token, and the feature silent. For **fuzzing** (are the marked tokens those on
which it fires?) a random negative is a window in which it fires with as many of the other tokens marked, and a hard
one a near miss with that token marked. Where one kind of negative is short, the other fills up. Scoring as in
Paulo et al. 2024, 2410.13928, who have no hard negatives.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, zip_longest
from typing import Literal

import numpy as np

from activations.blocks import PADDING
from activations.errors import InputError
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.firings import stream_firings
from features.groups import group_starts
from features.index import Example, FeatureIndex
from features.llm.explain import WIDTH, shown_examples
from sae.model import SparseAutoencoder

Task = Literal["detection", "fuzzing"]
TASKS: tuple[Task, ...] = ("detection", "fuzzing")
Kind = Literal["fires", "random", "hard"]
POOL_WINDOWS = 256
"""Random windows from which every feature takes those where it is silent."""


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
    """

    start: int
    tokens: tuple[str, ...]
    marks: np.ndarray
    answer: bool
    kind: Kind


class Cases:
    """The cases of every feature.

    Args:
        index: over the score split.
        explained: the index over the train split, which explainers see.
        model, sae: to see where a feature is silent.
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
        self._width = min(WIDTH, index.blocks.context_length)
        self._pool = self._random_windows(model, sae, progress)

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

        def unseen(examples: Iterable[Example]) -> list[Example]:
            return [example for example in examples if "".join(example.tokens) not in shown]

        firing = unseen(self._firings(feature, rng))
        near = unseen(self.index.near_misses(feature, WIDTH))
        near = [example for example in near if not example.activations.any()]  # silent in the whole window
        half = self.n_cases // 2
        if task == "detection":
            easy = self._silent_windows(feature, shown, rng)
            hard = [_case(example, example.activations != 0, False, "hard") for example in near]
            n = min(half, len(firing), len(easy) + len(hard))
        else:
            # No window is shown with right marks and with wrong ones.
            n = min(half, len(firing), (len(firing) + len(near)) // 2)
            easy = [case for example in firing[n:] for case in _wrongly_marked(example, rng)]
            hard = [_case(example, _peak(example), False, "hard") for example in near]
        negative = _half_and_half(easy, hard, n)
        positive = [
            _case(example, example.activations != 0, True, "fires") for example in firing[: len(negative)]
        ]
        cases = positive + negative
        return [cases[place] for place in rng.permutation(len(cases))]

    def _firings(self, feature: int, rng: np.random.Generator) -> list[Example]:
        """Windows in which it fires, each once: one of each tenth by strength, then another of each, and so on."""
        bands = [
            [examples[place] for place in rng.permutation(len(examples))]
            for _, examples in self.index.range_examples(feature, WIDTH)
        ]
        by_start: dict[int, Example] = {}
        for example in chain.from_iterable(zip_longest(*bands)):
            if example is not None:
                by_start.setdefault(example.position - example.peak, example)
        return list(by_start.values())

    def _silent_windows(self, feature: int, shown: set[str], rng: np.random.Generator) -> list[Case]:
        """Windows of the pool in which it is silent, in random order."""
        starts, fires_in = self._pool
        # One order of all windows: where rounding decides whether it fires in one of them, the others stay.
        order = rng.permutation(len(starts))
        silent = order[~np.isin(order, fires_in.get(feature, []))]
        cases = []
        for start in starts[silent[: self.n_cases]].tolist():
            tokens = tuple(self.index.pieces(start, start + self._width))
            if "".join(tokens) not in shown:
                cases.append(Case(start, tokens, np.zeros(len(tokens), bool), False, "random"))
        return cases

    def _random_windows(
        self, model: LanguageModel, sae: SparseAutoencoder, progress: Progress
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Where the windows of the pool start, int64 ``[n]``; feature → in which of them it fires.

        One window of each of some blocks, encoded behind all that comes before it in its block.
        """
        blocks, width = self.index.blocks, self._width
        rng = np.random.default_rng([self.seed, POOL_WINDOWS])
        lengths = (blocks.documents != PADDING).sum(axis=1)
        chosen = np.sort(rng.permutation(np.flatnonzero(lengths >= width))[:POOL_WINDOWS])
        begin = rng.integers(0, lengths[chosen] - width + 1)
        part = replace(blocks, ids=blocks.ids[chosen], documents=blocks.documents[chosen])
        found: dict[int, list[np.ndarray]] = {}
        with progress("read text", total=part.n_blocks, unit="blocks") as step:
            for firings, n_blocks in stream_firings(model, sae, part):
                block, place = np.divmod(firings.position, part.context_length)
                inside = (place >= begin[block]) & (place < begin[block] + width)
                feature, window = firings.feature[inside], block[inside]
                starts = group_starts(feature).tolist()
                for start, stop in pairwise([*starts, len(feature)]):
                    found.setdefault(int(feature[start]), []).append(np.unique(window[start:stop]))
                step(n_blocks)
        return chosen * part.context_length + begin, {
            key: np.concatenate(each) for key, each in found.items()
        }


def _case(example: Example, marks: np.ndarray, answer: bool, kind: Kind) -> Case:
    return Case(example.position - example.peak, tuple(example.tokens), marks, answer, kind)


def _peak(example: Example) -> np.ndarray:
    return np.arange(len(example.tokens)) == example.peak


def _wrongly_marked(example: Example, rng: np.random.Generator) -> list[Case]:
    """The window with as many tokens marked as fire in it, but others; no case where there are not as many."""
    fires = example.activations != 0
    others = np.flatnonzero(~fires & np.array([bool(token) for token in example.tokens]))
    if len(others) < fires.sum():
        return []
    marks = np.zeros(len(fires), bool)
    marks[rng.choice(others, int(fires.sum()), replace=False)] = True
    return [_case(example, marks, False, "random")]


def _half_and_half(easy: Sequence[Case], hard: Sequence[Case], n: int) -> list[Case]:
    """``n`` cases, half of each if there are as many; else the other kind fills up."""
    n_hard = min(len(hard), max(n // 2, n - len(easy)))
    return [*hard[:n_hard], *easy[: n - n_hard]]
