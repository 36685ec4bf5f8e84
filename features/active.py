"""Which features a text calls up, ranked in one of four ways."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from activations.errors import InputError

if TYPE_CHECKING:
    from features.run import Run
    from features.tables import FeatureTable

Ranking = Literal["activation", "share", "rarity", "specific"]
"""What features are ranked by:

activation      the largest activation in the text
share           that as a share of the feature's maximum in the index
rarity          that times −log density, so that features that fire everywhere come late
specific        the activations at chosen tokens as a share of all its activations in the text; of equals (often 1), the
                larger sum at these tokens first
"""


def active_in(
    run: "Run",
    text: str,
    by: Ranking = "activation",
    tokens: Iterable[int] | None = None,
    n: int = 50,
) -> "FeatureTable":
    """The features that fire in a text; BOS, other special tokens and outliers do not count.

    Args:
        by: how they are ranked.
        tokens: for "specific", the positions of the chosen tokens (``run.trace(text).tokens`` has them); negative ones
            count from the end.
        n: at most so many rows.

    Returns:
        columns feature, label, score (of the label), score_kind, activation (the largest), token and position (where),
        share, density, and rarity or specificity where it is ranked by them.

    Raises:
        InputError: the text is empty or not valid Unicode, the ranking is not known, or tokens are missing, not wanted
            or outside the text.
    """
    from features.tables import FeatureTable, with_labels
    from features.terms import is_unicode

    if by not in get_args(Ranking):
        raise InputError(f"Features are ranked by {', '.join(get_args(Ranking))}, not by {by!r}.")
    if n < 1:
        raise InputError(f"A table of {n} rows shows nothing: ask for at least 1.")
    if not is_unicode(text):
        raise InputError("The text holds half of a character: give it in UTF-8.")
    trace = run.trace(text)
    chosen = _chosen(tokens, by, len(trace.tokens))
    rows, features, values = (entry.numpy() for entry in trace.codes.entries())
    order = np.lexsort((rows, -values, features))  # the strongest place of each feature first
    rows, features, values = rows[order], features[order], values[order].astype(np.float64)
    firing, starts = np.unique(features, return_index=True)
    activation, position = values[starts], rows[starts]
    density = run.index.density[firing]
    maximum = run.index.max[firing].astype(np.float64)
    columns: dict[str, Any] = {
        "activation": activation,
        "token": [trace.tokens[place] for place in position],
        "position": position,
        "share": np.divide(activation, maximum, out=np.full(len(firing), np.nan), where=maximum > 0),
        "density": density,
    }
    keys: list[np.ndarray] = []
    if by == "rarity":
        # A feature that never fired in the index is as rare as one that fired once would be, at most.
        floor = 1 / run.index.n_tokens
        columns["rarity"] = activation * -np.log(np.maximum(density, floor))
    elif by == "specific" and len(firing):
        here = np.add.reduceat(values * np.isin(rows, chosen), starts)
        columns["specificity"] = here / np.add.reduceat(values, starts)
        keys.append(-here)
    elif by == "specific":
        columns["specificity"] = np.zeros(0)
    measure = {"specific": "specificity"}.get(by, by)
    ranked = np.lexsort((firing, *keys, -np.nan_to_num(columns[measure], nan=-1.0)))[:n]
    table = with_labels(run, firing[ranked]) | {
        name: _taken(column, ranked) for name, column in columns.items()
    }
    title = f"Features that fire, by {measure}" if len(firing) else "No feature fires in this text"
    return FeatureTable.of(table, kind="active", title=title, by=measure)


def _taken(column: Any, places: np.ndarray) -> Any:
    return column[places] if isinstance(column, np.ndarray) else [column[place] for place in places]


def _chosen(tokens: Iterable[int] | None, by: str, n_tokens: int) -> list[int]:
    if by != "specific":
        if tokens is not None:
            raise InputError(f"Tokens are chosen for the ranking 'specific', and this one is by {by!r}.")
        return []
    chosen = list(tokens or [])
    if not chosen:
        raise InputError("The ranking 'specific' needs tokens: give the positions of one or more.")
    for place in chosen:
        if not -n_tokens <= place < n_tokens:
            raise InputError(f"There is no token {place}: the text has the tokens 0 to {n_tokens - 1}.")
    return [place % n_tokens for place in chosen]
