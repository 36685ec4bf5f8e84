"""Which features tell two sets of texts apart, and whether a plain probe of the activations does it better.

Each text is one observation, whatever its length: a feature's value there is its largest activation by default, 0 where
it is silent. That makes rates and AUCs easy to read ("fires in 80% of these and 10% of those"), and lets no long text
count for many. The p-value is of the Mann-Whitney test, because it tests what the AUC measures and asks nothing of the
distribution, of which most is ties at 0; of matched pairs it is of the signed-rank test, which looks at the differences
within them. Features are many, so q, the false-discovery rate, is what to look at.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from activations.errors import InputError
from activations.progress import Progress, silent
from features.separation import Separation, Values, false_discovery_rate, paired_p, separation, to_four_digits
from features.texts import MAX_TOKENS, TextFeatures, read_texts

if TYPE_CHECKING:
    from features.run import Run
    from features.tables import FeatureTable

Value = Literal["max", "mean", "fires"]
"""A feature's value in a text: largest activation, mean over all its tokens, or 1 where it fires at all."""

ROWS = 100
"""Rows of the table, unless another number is asked for."""
_CARRIERS = 3  # texts named for each feature
_AROUND = 8  # tokens on each side of the strongest


def contrast(
    run: "Run",
    a: Sequence[str],
    b: Sequence[str],
    *,
    names: tuple[str, str] = ("a", "b"),
    by: Value = "max",
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
    n: int | None = ROWS,
    max_tokens: int = MAX_TOKENS,
    probes: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> "FeatureTable":
    """Compare what features do in two sets of texts, of any two sizes from 2 on.

    Args:
        names: what the sets are called.
        by: what a feature's value in a text is.
        groups: for each set the group of each text: those of one group (a matched pair, an author) are never on both
            sides when probes are judged. Where each has one text of each set, p is of the signed-rank test.
        n: at most so many rows, None for all.
        max_tokens: of a longer text only the beginning is read.
        probes: whether probes are fitted beside it.
        seed: of the folds of the probes.

    Returns:
        one row per feature that fires in any text, the largest distance of the AUC from 0.5 first: feature, label,
        score (of the label), rate_a, rate_b (shares of texts in which it fires), rate_difference, auc (above 0.5 where
        it is stronger in a), effect (Cohen's d), p, q (over all features that fire in any text), side (the set it is
        stronger in), texts (numbers of the strongest texts there) and example (the strongest place, its token in
        guillemets). ``probes`` is the table of :func:`features.probes.probe_table`; ``attrs`` has the numbers of texts,
        of features that fire (``tested``), of texts of which only the beginning was read (``cut``), and the
        ``test`` that p is of.

    Raises:
        InputError: a set has fewer than two texts, both hold the same, a text is empty or has no tokens that count.
    """
    from features.tables import FeatureTable, with_labels

    _check(a, b, names, by, n, groups)
    called = [
        f"Text {i} of {name}" for name, texts in zip(names, (a, b), strict=True) for i in range(len(texts))
    ]
    read = read_texts(run.model, run.sae, [*a, *b], names=called, max_tokens=max_tokens, progress=progress)
    in_a = np.arange(read.n_texts) < len(a)
    values = Values.of(read.feature, read.text, _values(read, by))
    found = separation(values, in_a)
    pair = None if groups is None else _pairs([*groups[0], *groups[1]], in_a)
    p = found.p if pair is None else paired_p(values, in_a, pair)
    q = false_discovery_rate(p)
    order = np.argsort(-np.abs(found.auc - 0.5), kind="stable")[:n]
    carriers = [_carriers(values, in_a, found, row) for row in order]
    columns = {
        **with_labels(run, found.feature[order]),
        "rate_a": found.rate_a[order],
        "rate_b": found.rate_b[order],
        "rate_difference": (found.rate_a - found.rate_b)[order],
        "auc": found.auc[order],
        "effect": found.effect[order],
        "p": p[order],
        "q": q[order],
        "side": [names[0] if found.auc[row] >= 0.5 else names[1] for row in order],
        "texts": [[int(text - (0 if in_a[text] else len(a))) for text in texts] for texts in carriers],
        "example": [
            _example(run, read, int(found.feature[row]), int(texts[0])) if len(texts) else ""
            for row, texts in zip(order, carriers, strict=True)
        ],
    }
    beside = None
    if probes:
        from features.probes import probe_table

        of = None if groups is None else [*groups[0], *groups[1]]
        beside = probe_table(read.pooled, values, in_a, groups=of, seed=seed, progress=progress)
    title = f"Features that tell {names[0]} ({len(a):,} texts) from {names[1]} ({len(b):,} texts)"
    table = FeatureTable.of(columns, kind="contrast", title=title, by="auc", probes=beside)
    table.attrs |= {"n_a": len(a), "n_b": len(b), "tested": len(found.feature), "cut": read.n_cut}
    table.attrs["test"] = "Mann-Whitney" if pair is None else "signed-rank"
    return table


def _check(
    a: Sequence[str],
    b: Sequence[str],
    names: tuple[str, str],
    by: str,
    n: int | None,
    groups: tuple[Sequence[Any], Sequence[Any]] | None,
) -> None:
    if by not in get_args(Value):
        raise InputError(f"A feature's value in a text is one of {', '.join(get_args(Value))}, not {by!r}.")
    if n is not None and n < 1:
        raise InputError(f"A table of {n} rows shows nothing: ask for at least 1.")
    for name, texts in zip(names, (a, b), strict=True):
        if isinstance(texts, str):
            raise InputError(f"{name} is one text: give a list of texts.")
        if len(texts) < 2:
            raise InputError(f"{name} has {len(texts)} texts: a contrast needs at least 2 on each side.")
    if sorted(a) == sorted(b):
        raise InputError(f"{names[0]} and {names[1]} hold the same texts: there is nothing to tell apart.")
    if groups is not None and [len(part) for part in groups] != [len(a), len(b)]:
        raise InputError("There must be one group for each text of both sets.")


def _pairs(groups: Sequence[Any], in_a: np.ndarray) -> np.ndarray | None:
    """The number of each text's group, if every group is one text of each set."""
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    matched = all(
        (np.bincount(number[which], minlength=number.max() + 1) == 1).all() for which in (in_a, ~in_a)
    )
    return number if matched else None


def _values(read: TextFeatures, by: Value) -> np.ndarray:
    """Rounded, so that texts that begin alike are ties, however they were batched."""
    return to_four_digits({"max": read.max, "mean": read.mean, "fires": np.ones(len(read.feature))}[by])


def _carriers(values: Values, in_a: np.ndarray, found: Separation, row: int) -> np.ndarray:
    """The texts with the largest values on the side where the feature is stronger, largest first."""
    feature = found.feature[row]
    texts = values.text[slice(*np.searchsorted(values.feature, [feature, feature + 1]))]
    mine = texts[in_a[texts] == (found.auc[row] >= 0.5)]
    return mine[::-1][:_CARRIERS]


def _example(run: "Run", read: TextFeatures, feature: int, text: int) -> str:
    """The tokens around the feature's strongest one in a text, that one in guillemets."""
    start = np.searchsorted(read.feature, feature)
    stop = np.searchsorted(read.feature, feature, side="right")
    entry = start + np.searchsorted(read.text[start:stop], text)
    place = int(read.position[entry])
    pieces = run.model.tokenizer.pieces(read.ids[text])
    before, after = pieces[max(place - _AROUND, 0) : place], pieces[place + 1 : place + 1 + _AROUND]
    return f"{''.join(before).lstrip()}‹{pieces[place]}›{''.join(after).rstrip()}"
