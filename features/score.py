"""What a score by tokens means: a pattern predicts "fires" at every position of held-out documents.

For each feature, over all positions of the score split that the SAE's exclusion keeps::

    precision = share of the pattern's positions on which the feature fires
    recall    = share of the feature's firings at which the pattern holds
    F1        = 2 · precision · recall / (precision + recall)

"Fires" means an activation above 0, however weak: what every other figure and picture of the toolkit calls firing.
(Many published scores look only at the strongest activations, where every label does better.) Beside it stands F1 for
the *upper half* of firings: those above the feature's median activation on the train split are to be found, and
predicted positions at which it fires more weakly count neither for nor against the pattern.

A pattern of a feature that fires often can have a large F1 by chance. So the same is done with a *shuffled control*: as
many firings at random positions, fitted, chosen and scored in the same way. A label counts only if it beats it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.aspects import Text
from features.firing_table import FiringTable
from features.firings import Encoder
from features.labels import Score
from features.patterns import Pattern

COUNTS_ABOVE = 0.5
"""F1 from which on a label counts as an explanation."""


@dataclass(frozen=True)
class Counts:
    """What precision and recall of one pattern for each feature are made of; int64 ``[d_sae]`` each.

    Attributes:
        predicted: positions at which the pattern holds.
        fired, hits: firings; those at which the pattern holds.
        fired_upper, hits_upper: the same of firings above the median activation.
        n_positions: all positions that count.
    """

    predicted: np.ndarray
    fired: np.ndarray
    hits: np.ndarray
    fired_upper: np.ndarray
    hits_upper: np.ndarray
    n_positions: int

    @classmethod
    def of(cls, firings: FiringTable, hit: np.ndarray, predicted: np.ndarray, median: np.ndarray) -> "Counts":
        """Count.

        Args:
            hit: bool ``[m]``, whether the pattern of the feature holds at each firing. predicted: int64 ``[d_sae]``.
            median: ``[d_sae]``, activations above which a firing is in the upper half.
        """
        upper = firings.value > median[firings.feature]

        def count(chosen: np.ndarray) -> np.ndarray:
            return np.bincount(firings.feature[chosen], minlength=firings.d_sae)

        return cls(predicted, firings.count, count(hit), count(upper), count(hit & upper), len(firings.kept))

    @cached_property
    def precision(self) -> np.ndarray:
        """float64 ``[d_sae]``, nan where the pattern holds nowhere."""
        return _ratio(self.hits, self.predicted)

    @cached_property
    def recall(self) -> np.ndarray:
        """float64 ``[d_sae]``, nan where the feature never fires."""
        return _ratio(self.hits, self.fired)

    @cached_property
    def f1(self) -> np.ndarray:
        """float64 ``[d_sae]``, nan where the feature never fires and is not predicted to."""
        return _ratio(2 * self.hits, self.predicted + self.fired)

    @cached_property
    def upper(self) -> np.ndarray:
        """float64 ``[d_sae]``, F1 for the upper half of firings; nan where there are none and none is predicted."""
        weak_hits = self.hits - self.hits_upper
        return _ratio(2 * self.hits_upper, self.predicted - weak_hits + self.fired_upper)

    @cached_property
    def f1_interval(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 ``[d_sae]`` each, the 95% interval of F1.

        F1 = 2·J / (1 + J), where J = hits / (positions at which the feature fires or is predicted to) is a share and
        has Wilson's interval. It takes positions for independent, which those of one document are not.
        """
        low, high = wilson(self.hits, self.predicted + self.fired - self.hits)
        return 2 * low / (1 + low), 2 * high / (1 + high)

    def score(self, feature: int, control: float | None = None) -> Score | None:
        """The score of a feature's pattern; None where the feature does not fire, so that nothing can be found."""
        if not self.fired[feature]:
            return None

        def figure(values: np.ndarray) -> float | None:
            return None if np.isnan(values[feature]) else float(values[feature])

        return Score(
            "tokens",
            float(self.f1[feature]),
            int(self.fired[feature]),
            low=figure(self.f1_interval[0]),
            high=figure(self.f1_interval[1]),
            precision=figure(self.precision),
            recall=figure(self.recall),
            upper=figure(self.upper),
            control=control,
        )


def score_pattern(
    model: LanguageModel,
    sae: Encoder,
    blocks: TokenBlocks,
    feature: int,
    pattern: Pattern,
    *,
    median: float,
    control: float | None = None,
    progress: Progress = silent,
) -> Score:
    """Score a pattern that somebody attached to a feature, on ``blocks`` (the score split).

    Args:
        median: of the feature's activation: ``index.quantile(feature, 0.5)`` of the train index.
        control: F1 of the feature's shuffled control, as its automatic label has it.

    Returns:
        its score; 0 with n = 0 if the feature does not fire on ``blocks``. ``low`` and ``high`` are those of
        :attr:`Counts.f1_interval`.
    """
    all_firings = FiringTable.of(model, sae, blocks, task="score pattern", progress=progress)
    firings = all_firings.only(all_firings.feature == feature)
    text = Text.of_blocks([blocks], model.tokenizer.vocabulary(), model.tokenizer.special_ids)
    holds = pattern.holds(text)
    predicted = np.where(np.arange(firings.d_sae) == feature, holds[firings.kept].sum(), 0)
    counts = Counts.of(firings, holds[firings.position], predicted, np.full(firings.d_sae, median))
    score = counts.score(feature, control)
    return Score("tokens", 0.0, 0, control=control) if score is None else score


def counts(score: Score | None, threshold: float = COUNTS_ABOVE) -> bool:
    """Whether a score makes a label count as an explanation: it reaches the threshold and beats its control."""
    return score is not None and score.value >= threshold and score.value > (score.control or 0.0)


def wilson(successes: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95% interval of a share (Wilson 1927): the shares of a population that make ``successes`` of n likely.

    Returns:
        lower and upper bound, float64 of the same shape; 0 and 1 for n = 0.
    """
    z2 = 1.959964**2
    tried = np.maximum(n, 1)
    share = np.where(n > 0, successes / tried, 0.5)
    middle = share + z2 / (2 * tried)
    half = np.sqrt(z2 * (share * (1 - share) / tried + z2 / (4 * tried**2)))
    bounds = (middle - half) / (1 + z2 / tried), (middle + half) / (1 + z2 / tried)
    return np.where(n > 0, bounds[0].clip(0), 0.0), np.where(n > 0, bounds[1].clip(max=1), 1.0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
