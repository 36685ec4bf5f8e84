"""Which sparsity weight gives a wanted L0, from short trainings.

log L0 falls almost linearly with log λ, so straight lines between trials soon lead to the λ whose training ends with
the wanted L0. A short training ends with another L0 than a long one, though. Measured on the bundled model (relu, d_sae
1,024, 400,000 tokens), L0 at the end of

====  ==============  =============  ==========
λ     1/16 of tokens  1/4 of tokens  all tokens
====  ==============  =============  ==========
1     57.5            52.9           53.3
2     23.3            18.2           17.4
4     9.2             7.0            6.2
====  ==============  =============  ==========

So trials of 1/16 find about where to look, and trials of 1/4 where it is. How far log L0 changes from the former to the
latter says what to expect of the whole training: about a third as much again (0 to 0.4 in the table). The L0 of a gated
SAE goes on falling as it did (λ = 2.7: about 59, 43, 30).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import linear_regression

from activations.errors import InputError

SHORT, LONG = 1 / 16, 1 / 4
# Of the change of log L0 from SHORT to LONG, this is still to come from LONG to the end.
REMAINING = {"relu": 1 / 3, "gated": 1.0}  # jumprelu: no such law (40 was sought, 60 came of it)
SLOPE = -1.5  # of log L0 over log λ, until two trials say more
LARGEST_STEP = 8.0  # factor on λ from one trial to the next
LEAST_STEP = 0.02  # in log λ
NEAR_ENOUGH = {
    SHORT: 0.05,
    LONG: 0.15,
}  # of the target, in log L0: from there the line leads on without a trial
MAX_TRIALS = {SHORT: 8, LONG: 4}
LEAST_L0 = 1e-4  # an SAE that never fires counts as one that fires on one token in ten thousand

Point = tuple[float, float]
"""log λ, log L0."""


@dataclass(frozen=True)
class Trial:
    """One short training: its λ, the part of the whole training that it was, and the L0 that it ended with."""

    sparsity_weight: float
    part: float
    l0: float


@dataclass(frozen=True)
class Found:
    """The λ that a whole training should be given, and the trials that say so."""

    sparsity_weight: float
    trials: tuple[Trial, ...]


def find_sparsity_weight(
    measure: Callable[[float, float], float], target_l0: float, start: float, remaining: float = 1 / 3
) -> Found:
    """Search the λ whose whole training ends with ``target_l0``.

    Args:
        measure: trains with a λ for a part of the whole training, and gives the L0 at its end.
        start: the λ to try first.
        remaining: see :data:`REMAINING`.

    Raises:
        InputError: no λ within :data:`MAX_TRIALS` comes near.
    """
    trials: list[Trial] = []
    goal = math.log(target_l0)

    def tried(log_weight: float, part: float) -> float:
        weight = math.exp(log_weight)
        trials.append(Trial(weight, part, measure(weight, part)))
        return math.log(max(trials[-1].l0, LEAST_L0))

    def in_the_end(log_weight: float) -> float:
        """log L0 to expect of the whole training, from a long trial and the line through the short ones."""
        long = tried(log_weight, LONG)
        return long + remaining * (long - (intercept + slope * log_weight))

    try:
        short = _search(lambda x: tried(x, SHORT), math.log(start), goal, SHORT, SLOPE)
        if len(short) == 1:
            x = _next(short, goal, SLOPE)
            short.append((x, tried(x, SHORT)))
        slope, intercept = linear_regression(*zip(*short, strict=True))
        nearest = _nearest(short, goal)[0]
        long = _search(in_the_end, nearest, goal, LONG, min(slope, SLOPE / 4))
    except _NotFoundError:
        shown = ", ".join(f"{trial.sparsity_weight:.3g} gave {trial.l0:.3g}" for trial in trials[-2:])
        raise InputError(
            f"{len(trials)} short trainings found no sparsity weight for an L0 of {target_l0:g} ({shown}): give more"
            " tokens, or another L0."
        ) from None
    return Found(math.exp(_next(long, goal, min(slope, SLOPE / 4))), tuple(trials))


class _NotFoundError(Exception):
    pass


def _search(
    log_l0: Callable[[float], float], start: float, goal: float, part: float, slope: float
) -> list[Point]:
    """Points on the curve of log L0 over log λ, of which one at least is near enough to the goal."""
    points = [(start, log_l0(start))]
    while abs(_nearest(points, goal)[1] - goal) > NEAR_ENOUGH[part]:
        if len(points) == MAX_TRIALS[part]:
            raise _NotFoundError
        x = _next(points, goal, slope)
        across = [point for point in points if (point[1] > goal) != (_nearest(points, goal)[1] > goal)]
        if across and min(abs(x - point[0]) for point in points) < LEAST_STEP:
            # The curve bends: a line alone would stay where it is.
            x = (_nearest(points, goal)[0] + _nearest(across, goal)[0]) / 2
        points.append((x, log_l0(x)))
    return points


def _next(points: list[Point], goal: float, slope: float) -> float:
    """Where a line meets the goal: through the points on both sides of it, or else through the two nearest.

    Args:
        slope: of the line where there is one point only.
    """
    nearest = _nearest(points, goal)
    above = nearest[1] > goal
    others = [point for point in points if point != nearest]
    across = [point for point in others if (point[1] > goal) != above]
    if others:
        other = _nearest(across or others, goal)
        slope = (other[1] - nearest[1]) / (other[0] - nearest[0])
    limit = math.log(LARGEST_STEP)
    if slope >= 0:  # no line leads there: look further out
        return max(points)[0] + limit if above else min(points)[0] - limit
    return nearest[0] + min(max((goal - nearest[1]) / slope, -limit), limit)


def _nearest(points: list[Point], goal: float) -> Point:
    return min(points, key=lambda point: abs(point[1] - goal))
