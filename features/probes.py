"""Plain probes beside a contrast: do raw activations tell two sets of texts apart better than features do?

Every figure is cross-validated: a probe is fitted on some folds, the choice of features included, and judged on the
texts of the fold left out. Texts of one group (a matched pair) are never on both sides.

logistic regression     of the mean activation vector of a text, standardised; L2 penalty chosen in the training folds
difference of means     projection of the mean activation vector on the difference of the two class means
best k features         logistic regression of the k features with the AUC farthest from 0.5 in the training folds
best feature            the one of them, and the threshold that is best there
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.errors import InputError
from activations.progress import Progress, silent
from features.score import wilson
from features.separation import Values, separation

if TYPE_CHECKING:
    from features.tables import FeatureTable

FOLDS = 5
"""Parts into which texts are dealt; fewer where a set has fewer texts or groups."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the L2 penalty to choose from."""
_INNER_FOLDS = 3
_Z = 1.959963984540054  # 95%
_MOST_ITERATIONS = 2_000

Folds = list[tuple[np.ndarray, np.ndarray]]


def probe_table(
    pooled: np.ndarray,
    values: Values,
    in_a: np.ndarray,
    *,
    groups: Sequence[Any] | None = None,
    k: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> "FeatureTable":
    """How well probes tell set a from set b on texts left out.

    Args:
        pooled: ``[n, d_in]``, mean activation vector of each text.
        values: of the features, one for each text where they fire.
        in_a: bool ``[n]``.
        groups: ``[n]``, texts with equal ones stay on one side of every split; None if each is on its own.
        k: number of features of the probe of several.
        seed: of the dealing into folds.

    Returns:
        columns probe, dimensions, auc, auc_low, auc_high, accuracy, accuracy_low, accuracy_high, chosen. AUC is over
        the pairs of texts of one fold, with Newcombe's 95% interval (2006, method 5); accuracy is the mean of the
        shares of both sets judged rightly, with the mean of their Wilson intervals. Intervals are as wide as for so
        many texts as there are groups: those of one group may all be alike. ``chosen`` says which features were
        chosen in how many folds.

    Raises:
        InputError: a set has fewer than two texts, or all its texts are of one group.
    """
    from threadpoolctl import threadpool_limits

    from features.tables import FeatureTable

    folds = _folds(in_a, groups, FOLDS, seed)
    picked: dict[str, Counter[int]] = {"best feature": Counter(), f"best {k} features": Counter()}

    def best(train: np.ndarray, n_best: int) -> np.ndarray:
        used = np.zeros(len(in_a), dtype=bool)
        used[train] = True
        found = separation(values, in_a, used)
        order = np.argsort(-np.abs(found.auc - 0.5), kind="stable")[:n_best]
        return found.feature[order]

    def on_vectors(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        return _logistic(pooled, in_a, groups, train, test, seed)

    def on_means(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        a, b = (pooled[train[in_a[train] == which]].mean(0) for which in (True, False))
        return np.asarray((pooled[test] - (a + b) / 2) @ (a - b))

    def on_best(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        features = best(train, k)
        picked[f"best {k} features"].update(features.tolist())
        if not len(features):
            return np.zeros(len(test))
        return _logistic(values.columns(features, len(in_a)), in_a, groups, train, test, seed)

    def on_one(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        features = best(train, 1)
        picked["best feature"].update(features.tolist())
        if not len(features):
            return np.zeros(len(test))
        column = values.columns(features, len(in_a))[:, 0]
        sign, threshold = _threshold(column[train], in_a[train])
        return np.asarray(sign * (column[test] - threshold))

    probes: dict[str, tuple[int, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
        "logistic regression": (pooled.shape[1], on_vectors),
        "difference of means": (1, on_means),
        f"best {k} features": (k, on_best),
        "best feature": (1, on_one),
    }
    n_groups = [len(np.unique(_numbers(groups, len(in_a))[which])) for which in (in_a, ~in_a)]
    rows = []
    # Products this small are slower on several threads, and would have other bits.
    with threadpool_limits(1), progress("probes", total=len(probes) * len(folds), unit="fits") as step:
        for name, (dimensions, fit) in probes.items():
            scores = np.zeros(len(in_a))
            for train, test in folds:
                scores[test] = fit(train, test)
                step(1)
            figures = _figures(scores, in_a, folds, *n_groups)
            chosen = _chosen(picked.get(name, Counter()), len(folds))
            rows.append({"probe": name, "dimensions": dimensions, **figures, "chosen": chosen})
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    title = f"Probes on texts left out ({len(folds)} folds)"
    return FeatureTable.of(columns, kind="probes", title=title, by="auc")


def auc_interval(auc: float, n_a: int, n_b: int) -> tuple[float, float]:
    """95% interval of an AUC of ``n_a`` against ``n_b`` cases (Newcombe 2006, method 5); wide at 0 and 1, too."""
    pairs, mean = n_a * n_b, (n_a + n_b) / 2 - 1

    def outside(theta: float) -> bool:
        variance = theta * (1 - theta) / pairs
        variance *= 1 + mean * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (theta - auc) ** 2 > _Z**2 * variance

    def edge(far: float) -> float:
        low, high = (far, auc) if far < auc else (auc, far)
        if low == high:
            return auc
        for _ in range(60):
            middle = (low + high) / 2
            if outside(middle) == (far < auc):
                low = middle
            else:
                high = middle
        return middle

    return edge(0.0), edge(1.0)


def _folds(in_a: np.ndarray, groups: Sequence[Any] | None, n: int, seed: int) -> Folds:
    """(train, test) of at most n folds, both sets spread evenly over them; every train part has both."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    of = _numbers(groups, len(in_a))
    n = min(n, *(len(np.unique(of[in_a == which])) for which in (True, False)))
    if n < 2:
        raise InputError(
            "Probes are judged on texts that were left out: each set needs at least 2 texts, and of 2 groups if texts"
            " are grouped."
        )
    if groups is None:
        found = list(StratifiedKFold(n, shuffle=True, random_state=seed).split(of, in_a))
    else:
        found = list(StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(of, in_a, of))
    if not all(in_a[train].any() and not in_a[train].all() for train, _ in found):
        raise InputError("The groups leave a fold without texts of one set: give smaller groups, or none.")
    return found


def _numbers(groups: Sequence[Any] | None, n: int) -> np.ndarray:
    """int64 ``[n]``, the group of each text; without groups each is its own."""
    return np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def _logistic(
    x: np.ndarray,
    in_a: np.ndarray,
    groups: Sequence[Any] | None,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Log-odds of set a for the rows ``test`` of ``x [n, d]``, by a logistic regression of the rows ``train``."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = x[train].mean(0), x[train].std(0)
    scaled = (x - mean) / np.where(spread > 0, spread, 1.0)

    def fitted(penalty: float, rows: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=_MOST_ITERATIONS)
        return model.fit(scaled[rows], in_a[rows])

    def inner_auc(penalty: float) -> float:
        scores = np.zeros(len(train))
        for some, rest in inner:
            scores[rest] = fitted(penalty, train[some]).decision_function(scaled[train[rest]])
        return _auc(scores, in_a[train], inner)

    try:
        inner = _folds(
            in_a[train], None if groups is None else np.asarray(groups)[train].tolist(), _INNER_FOLDS, seed
        )
        # Of equals the stronger penalty.
        penalty = max(PENALTIES, key=lambda one: (round(inner_auc(one), 6), -one))
    except InputError:  # too few texts to choose by
        penalty = PENALTIES[-1]
    return np.asarray(fitted(penalty, train).decision_function(scaled[test]))


def _threshold(value: np.ndarray, in_a: np.ndarray) -> tuple[float, float]:
    """(sign, threshold): set a where sign · (value − threshold) > 0; the best mean of both shares judged rightly."""
    levels = np.unique(value)
    if len(levels) == 1:
        return 1.0, float(levels[0])
    thresholds = (levels[1:] + levels[:-1]) / 2
    above = [
        1 - np.searchsorted(np.sort(value[in_a == which]), thresholds) / max((in_a == which).sum(), 1)
        for which in (True, False)
    ]
    gain = above[0] - above[1]
    best = int(np.argmax(np.abs(gain)))
    return (1.0 if gain[best] >= 0 else -1.0), float(thresholds[best])


def _auc(scores: np.ndarray, in_a: np.ndarray, folds: Folds) -> float:
    """Share of the pairs of one text of each set, both in one test part, that the scores order rightly."""
    from scipy.stats import rankdata

    right, pairs = 0.0, 0
    for _, test in folds:
        is_a = in_a[test]
        n_a, n_b = int(is_a.sum()), int((~is_a).sum())
        right += float(rankdata(scores[test])[is_a].sum()) - n_a * (n_a + 1) / 2
        pairs += n_a * n_b
    return right / pairs if pairs else 0.5


def _figures(scores: np.ndarray, in_a: np.ndarray, folds: Folds, n_a: int, n_b: int) -> dict[str, float]:
    """With intervals of ``n_a`` and ``n_b`` independent cases."""
    auc = _auc(scores, in_a, folds)
    auc_low, auc_high = auc_interval(auc, n_a, n_b)
    rates = np.array([(scores[in_a] > 0).mean(), (scores[~in_a] <= 0).mean()])
    low, high = wilson(rates * [n_a, n_b], np.array([n_a, n_b]))
    return {
        "auc": auc,
        "auc_low": auc_low,
        "auc_high": auc_high,
        "accuracy": float(np.mean(rates)),
        "accuracy_low": float(low.mean()),
        "accuracy_high": float(high.mean()),
    }


def _chosen(picked: Counter[int], n_folds: int) -> str:
    return ", ".join(f"{feature} ({times}/{n_folds})" for feature, times in picked.most_common())
