"""Finding features by their labels, top tokens and notes: words, phrases, prefixes, regular expressions, typing errors.

Everything is offline. The database (:mod:`features.search_file`) is made at the first search, and brought up to date at
the next one when labels have changed. Results come in the order of a stored importance::

    importance = trust · log(1 + firings) / log(1 + positions)

where trust is the score of the label, 1 for a person's label that was not scored, and :data:`UNSCORED` for others:
what is well labelled and fires often enough to matter comes first.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import log1p
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.errors import InputError
from activations.files import hash_json
from activations.progress import Progress, silent
from features.search_file import FIELDS, Entry, SearchFile, Sought
from features.terms import folded, number_of, pieces, regex_of, terms

if TYPE_CHECKING:
    from features.meaning import Encoder
    from features.run import Run
    from features.tables import FeatureTable

RESULTS = 50
"""Rows of a result, unless another number is asked for."""
UNSCORED = 0.1
"""Trust in a label that nobody scored."""
TOP_TOKENS = 10
"""Top tokens of a feature that can be searched for."""

_SNIPPET = 80  # characters
_BEFORE = 25  # of them before what was found
_AT_ONCE, _SHARE_AT_ONCE = 1_000, 0.05  # more changed labels than both make the whole database anew


def search(
    run: "Run",
    query: str,
    *,
    n: int = RESULTS,
    meaning: bool = False,
    encoder: "str | Encoder | None" = None,
    progress: Progress = silent,
) -> "FeatureTable":
    """The features whose label, top tokens or note have what is looked for, the most important first.

    A query is words, all of which a feature must have, in any order and in whatever case; ``"a phrase"`` stands as it
    is quoted; ``doc*`` is the beginning of a word; symbols count (``self.``, ``->``). A word that stands nowhere is
    read as the beginning of one, and if there is none, as a typing error. ``/regex/`` is a regular expression of RE2,
    ``/regex/i`` one without regard to case; ``^`` and ``$`` match at lines, and each token is one. A number finds the
    feature of that number, and texts with it.

    Args:
        n: at most so many rows.
        meaning: order all labels by their nearness to the query instead (:mod:`features.meaning`).
        encoder: the sentence encoder for it, or its name.

    Returns:
        columns feature, label, score, source, density, matched (the texts in which it was found) and snippet; with
        ``meaning`` also similarity. ``attrs["read_as"]`` says how words were read that stand nowhere as typed.

    Raises:
        InputError: the query is empty or no regular expression; or, for meaning, there is no sentence encoder.
    """
    if not query.strip():
        raise InputError(
            'There is nothing to look for: give a word, a "phrase", a prefix*, a /regex/ or a number.'
        )
    if n < 1:
        raise InputError(f"A search for {n} results finds nothing: ask for at least 1.")
    file = search_file(run, progress=progress)
    if meaning:
        return _by_meaning(run, file, query, n, encoder, progress)
    if regex := regex_of(query):
        pattern, ignore_case = regex
        found = file.with_pattern(pattern, n, ignore_case=ignore_case)
        rows = [_row(entry, fields, _around(_text(entry, fields[0]), 0)) for entry, fields in found]
        return _table(rows, query)
    number = number_of(query)
    rows = (
        [] if number is None else [_row(entry, ["number"], entry.label) for entry in file.features([number])]
    )
    entries, sought = file.with_terms(pieces(query), n)
    rows += [_found(entry, sought) for entry in entries if entry.feature != number]
    table = _table(rows[:n], query)
    table.attrs["read_as"] = {
        piece: [" ".join(option) for option in one.alternatives] + ["…"] * one.is_prefix
        for piece, one in zip((" ".join(piece.terms) for piece in pieces(query)), sought, strict=True)
        if one.guess
    }
    return table


def search_file(run: "Run", *, progress: Progress = silent) -> SearchFile:
    """The search database of a run, up to date: made anew where it is missing or belongs to another index."""
    file = SearchFile(run.folder.path / "features" / "search.sqlite")
    inputs = {"index": hash_json(run.index.manifest["inputs"]), "labels": hash_json(run.labels.inputs)}
    if file.change(inputs) == run.labels.change():
        return file
    with file.writing():
        known, change = file.change(inputs), run.labels.change()  # another process may have been quicker
        features = range(run.index.d_sae)
        changed = None
        if known is not None and known <= change:
            changed = sorted(feature for feature in run.labels.changed_since(known) if feature in features)
        if changed is None or len(changed) > max(_AT_ONCE, len(features) * _SHARE_AT_ONCE):
            with progress("search", total=len(features), unit="features") as step:
                file.build(_all_entries(run), inputs, change, step)
        elif known != change:
            file.update(list(_changed_entries(run, changed)), change)
    return file


def importance(trust: float, firings: int, positions: int) -> float:
    """0 to 1: trust in the label (0 to 1), times the logarithm of how often the feature fires among ``positions``."""
    return trust * log1p(firings) / log1p(max(positions, 1))


def _all_entries(run: "Run") -> Iterator[Entry]:
    """Of every feature of the index, from one table of all labels."""
    table = run.labels.table()
    scores = table["f1"].fillna(table["detection"]).fillna(table["fuzzing"])
    columns = (table["feature"], table["text"], table["note"], table["source"], scores)
    labels = {
        int(feature): (text, note, source, None if np.isnan(score) else float(score))
        for feature, text, note, source, score in zip(*(c.tolist() for c in columns), strict=True)
    }
    for feature, tokens in enumerate(_top_tokens(run, range(run.index.d_sae))):
        yield _made(run, feature, tokens, *labels.get(feature, ("", "", "", None)))


def _changed_entries(run: "Run", features: Sequence[int]) -> Iterator[Entry]:
    from features.tables import labels_of

    for feature, tokens, label in zip(
        features, _top_tokens(run, features), labels_of(run, features), strict=True
    ):
        if label is None:
            yield _made(run, feature, tokens, "", "", "", None)
        else:
            score = None if label.score is None else label.score.value
            yield _made(run, feature, tokens, label.text, label.note, label.source, score)


def _made(
    run: "Run", feature: int, tokens: str, text: str, note: str, source: str, score: float | None
) -> Entry:
    trust = score if score is not None else 1.0 if source == "person" and text else UNSCORED
    weight = importance(trust, int(run.index.count[feature]), run.index.n_tokens)
    density = float(run.index.density[feature])
    return Entry(feature, weight, text or "", tokens, note or "", score, source if text else "", density)


def _top_tokens(run: "Run", features: Iterable[int]) -> Iterator[str]:
    """The texts of the top tokens of each feature, a line each."""
    from features.explain import visible

    ids = run.index.array("token_id")
    shown = [visible(token)[1:-1] for token in run.index.vocabulary]
    for feature in features:
        yield "\n".join(shown[token] for token in ids[feature, :TOP_TOKENS].tolist() if token >= 0)


def _found(entry: Entry, sought: Sequence[Sought]) -> dict[str, Any]:
    """A row: the fields in which pieces of the query stand, and the first of them around what was found."""
    inside = {
        field: [one for one in sought if one.stands_in(terms(getattr(entry, field)))] for field in FIELDS
    }
    fields = [field for field, found in inside.items() if found]
    text = _text(entry, fields[0])
    options = {term for one in inside[fields[0]] for option in one.alternatives for term in option[:1]}
    places = [place for term in options if (place := folded(text).find(term)) >= 0]
    return _row(entry, fields, _around(text, min(places, default=0)))


def _text(entry: Entry, field: str) -> str:
    """As it is shown: tokens in guillemets beside each other."""
    text: str = getattr(entry, field)
    return " ".join(f"‹{token}›" for token in text.split("\n")) if field == "tokens" else text


def _around(text: str, place: int) -> str:
    start = max(min(place - _BEFORE, len(text) - _SNIPPET), 0)
    stop = start + _SNIPPET
    return ("…" if start else "") + text[start:stop] + ("…" if stop < len(text) else "")


def _row(entry: Entry, fields: Sequence[str], snippet: str) -> dict[str, Any]:
    return {
        "feature": entry.feature,
        "label": entry.label,
        "score": np.nan if entry.score is None else entry.score,
        "source": entry.source,
        "density": entry.density,
        "matched": ", ".join(fields),
        "snippet": snippet,
    }


_COLUMNS = ("feature", "label", "score", "source", "density", "matched", "snippet")


def _table(rows: Sequence[dict[str, Any]], query: str) -> "FeatureTable":
    from features.tables import FeatureTable

    columns = {name: [row[name] for row in rows] for name in _COLUMNS}
    return FeatureTable.of(columns, kind="search", title=f"Features found for {query}", by="score")


def _by_meaning(
    run: "Run",
    file: SearchFile,
    query: str,
    n: int,
    encoder: "str | Encoder | None",
    progress: Progress,
) -> "FeatureTable":
    from features.meaning import nearest_labels
    from features.tables import FeatureTable

    found = nearest_labels(run, query, n, encoder, progress)
    rows = [_row(entry, ["label"], entry.label) for entry in file.features(feature for feature, _ in found)]
    columns = {name: [row[name] for row in rows] for name in _COLUMNS}
    columns["similarity"] = [similarity for _, similarity in found]
    title = f"Labels whose meaning is nearest to: {query}"
    return FeatureTable.of(columns, kind="search", title=title, by="similarity")
