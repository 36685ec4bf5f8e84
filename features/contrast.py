"""Which features tell two sets of texts apart, and whether a plain probe of the activations does it better.

A feature's value in a text is its largest activation by default, 0 where it is silent. That makes rates and AUCs easy
to read ("fires in 80% of these and 10% of those"). It does not make texts of different lengths alike: a long text has
more places to fire at, and a larger maximum. Where the median lengths of the sets are far apart, the table says so.

The p-value is of the Mann-Whitney test, because it tests what the AUC measures and asks nothing of the distribution, of
which most is ties at 0; of matched pairs it is of the signed-rank test, which looks at the differences within them. One
observation is one text, or the mean over the texts of a group (:mod:`features.observations`); equal texts are a group.
Rates, AUC and effect stay those of texts. Features are many, so q, the false-discovery rate, is what to look at.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from activations.errors import InputError
from activations.progress import Progress, silent
from features.observations import Observations, joined
from features.separation import Separation, Values, false_discovery_rate, separation, to_four_digits
from features.texts import MAX_TOKENS, TextFeatures, read_texts

if TYPE_CHECKING:
    from features.run import Run
    from features.tables import FeatureTable

Value = Literal["max", "mean", "fires"]
"""A feature's value in a text: largest activation, mean over all its tokens, or 1 where it fires at all."""

ROWS = 100
"""Rows of the table, unless another number is asked for."""
LENGTHS_APART = 1.3
"""Ratio of the median lengths of the sets from which on the table warns of it."""
_CARRIERS = 3  # texts named for each feature
_AROUND = 8  # tokens on each side of the strongest


def contrast(
    run: "Run",
    a: Sequence[str],
    b: Sequence[str],
    *,
    names: tuple[str, str] = ("a", "b"),
    by: Value = "max",
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
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
        groups: for each set the group of each text (an author, a matched pair). For p a group counts once in a set, by
            its mean, and when probes are judged its texts are never on both sides. Groups with texts in both sets are
            compared within (signed-rank test), if they are as many as the others. Equal texts are always a group.
        n: at most so many rows, None for all.
        max_tokens: of a longer text only the beginning is read.
        probes: whether probes are fitted beside it.
        seed: of the folds of the probes.

    Returns:
        one row per feature that fires in any text, the largest distance of the AUC from 0.5 first: feature, label,
        score (of the label), score_kind, rate_a, rate_b (shares of texts in which it fires), rate_difference, auc
        (above 0.5 where it is stronger in a), effect (Cohen's d), p, q (over all features that fire in any text), side
        (the set it is stronger in), texts (numbers of the strongest texts there) and example (the strongest place, its
        token in guillemets). ``probes`` is the table of :func:`features.probes.probe_table`; ``attrs`` has the numbers
        of texts (``n_a``, ``n_b``), of features that fire (``tested``), of texts of which only the beginning was read
        (``cut``), of texts that repeat another (``repeated``), of observations that p rests on and of groups that it
        leaves out (``observations``, ``left_out``), the ``test``, the median lengths in tokens (``lengths``), and
        ``remarks``: sentences on how to read the table.

    Raises:
        InputError: a set has fewer than two different texts or groups, a text stands in both sets, is empty or has no
            tokens that count.
    """
    from features.tables import FeatureTable, with_labels

    _check(a, b, names, by, n, groups)
    group = joined([*a, *b], None if groups is None else [*groups[0], *groups[1]])
    in_a = np.arange(len(group)) < len(a)
    for name, which in zip(names, (in_a, ~in_a), strict=True):
        if len(np.unique(group[which])) < 2:
            raise InputError(
                f"The texts of {name} are all the same or of one group: a contrast needs 2 groups on each side."
            )
    observations = Observations.of(group, in_a)
    called = [
        f"Text {i} of {name}" for name, texts in zip(names, (a, b), strict=True) for i in range(len(texts))
    ]
    read = read_texts(run.model, run.sae, [*a, *b], names=called, max_tokens=max_tokens, progress=progress)
    values = Values.of(read.feature, read.text, _values(read, by))
    found = separation(values, in_a)
    p = observations.p(values, found.feature)
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

        of = group.tolist() if len(np.unique(group)) < len(group) else None
        beside = probe_table(read.pooled, values, in_a, groups=of, seed=seed, progress=progress)
    title = f"Features that tell {names[0]} ({len(a):,} texts) from {names[1]} ({len(b):,} texts)"
    table = FeatureTable.of(columns, kind="contrast", title=title, by="auc", probes=beside)
    table.attrs |= {
        "n_a": len(a),
        "n_b": len(b),
        "tested": len(found.feature),
        "cut": read.n_cut,
        "repeated": len(group) - len({text.strip() for text in (*a, *b)}),
        "observations": len(observations.in_a),
        "left_out": observations.left_out,
        "test": observations.test,
        "lengths": tuple(float(np.median(read.n_tokens[which])) for which in (in_a, ~in_a)),
    }
    table.attrs["remarks"] = _remarks(table.attrs, names, max_tokens)
    return table


def _remarks(facts: dict[str, Any], names: tuple[str, str], max_tokens: int) -> list[str]:
    """What a person should know who reads the table."""
    is_paired, n = facts["test"] == "signed-rank", facts["observations"]
    what = "texts" if n == facts["n_a"] + facts["n_b"] else "groups"
    counted = f"{n // 2:,} matched pairs" if is_paired else f"{n:,} {what}"
    remarks = [
        f"q: false-discovery rate over the {facts['tested']:,} features that fire, {facts['test']} test of {counted}"
    ]
    if facts["left_out"]:
        where = "one set only" if is_paired else "both sets"
        remarks.append(f"Left out of p and q: {_counted(facts['left_out'], 'group')} with texts in {where}")
    if facts["repeated"]:
        remarks.append(f"Equal texts count once: {_counted(facts['repeated'], 'text')} repeated")
    if facts["cut"]:
        cut = _counted(facts["cut"], "long text")
        remarks.append(f"Read as far as the first {max_tokens:,} tokens: {cut}")
    (short, few), (long, many) = sorted(
        zip(names, facts["lengths"], strict=True), key=lambda named: float(named[1])
    )
    if many > LENGTHS_APART * few:
        remarks.append(
            f"{long} has longer texts (median {many:,.0f} tokens) than {short} ({few:,.0f}): a feature may be stronger"
            " there for that alone"
        )
    return remarks


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _check(
    a: Sequence[str],
    b: Sequence[str],
    names: tuple[str, str],
    by: str,
    n: int | None,
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None,
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
    if names[0] == names[1]:
        raise InputError(f"Both sets are called {names[0]}: give them two names.")
    if sorted(a) == sorted(b):
        raise InputError(f"{names[0]} and {names[1]} hold the same texts: there is nothing to tell apart.")
    place = {text: number for number, text in enumerate(a)}
    shared = [(place[text], number) for number, text in enumerate(b) if text in place]
    if shared:
        more = f", and {len(shared) - 1:,} more stand in both sets" if len(shared) > 1 else ""
        raise InputError(
            f"Text {shared[0][0]} of {names[0]} and text {shared[0][1]} of {names[1]} are the same"
            f" ({b[shared[0][1]][:40]!r}){more}: leave out what tells nothing apart."
        )
    if groups is not None and [len(part) for part in groups] != [len(a), len(b)]:
        raise InputError("There must be one group for each text of both sets.")


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
