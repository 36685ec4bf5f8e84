"""Finding features by their labels, top tokens and notes: words, phrases, prefixes, regular expressions, typing errors.

Everything is offline. The database (:mod:`features.search_file`) is made at the first search, and brought up to date at
the next one when labels have changed. Results come in the order of a stored importance::

    importance = trust · log(1 + firings) / log(1 + positions)

where trust is the F1 of the label; 2 · BA − 1 if it was judged by balanced accuracy, which is ½ for an empty phrase; 1
for a person's label that was not scored, and :data:`UNSCORED` for others, and at most for a label that is no better
than its shuffled control. What is well labelled and fires often enough to matter comes first.

The database is kept in the run; for a run that cannot be written to, in the user's cache folder.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.cache import Cache
from activations.errors import InputError
from activations.files import hash_json
from activations.progress import Progress, silent
from features.search_file import FIELDS, Entry, SearchFile, Sought
from features.terms import folded, is_unicode, number_of, pieces, regex_of, terms

if TYPE_CHECKING:
    from features.labels import Score
    from features.meaning import Encoder
    from features.run import Run
    from features.tables import FeatureTable

RESULTS = 50
"""Rows of a result, unless another number is asked for."""
UNSCORED = 0.1
"""Trust in a label that nobody scored."""
TOP_TOKENS = 10
"""Top tokens of a feature that can be searched for."""

CACHE_BYTES = 4 << 30
"""Databases of runs that cannot be written to take at most so much room."""

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
        columns feature, label, score, score_kind, source, density, matched (the texts in which it was found) and
        snippet; with ``meaning`` also similarity. ``attrs["read_as"]`` says how words were read that stand nowhere as
        typed; ``attrs["remarks"]`` the same in sentences, or that nothing was found.

    Raises:
        InputError: the query is empty, not valid Unicode or no regular expression; or, for meaning, there is no
            sentence encoder.
    """
    if not query.strip():
        raise InputError(
            'There is nothing to look for: give a word, a "phrase", a prefix*, a /regex/ or a number.'
        )
    if not is_unicode(query):
        raise InputError("What is looked for holds half of a character: type it in UTF-8.")
    if n < 1:
        raise InputError(f"A search for {n} results finds nothing: ask for at least 1.")
    file = search_file(run, progress=progress)
    if meaning:
        return _by_meaning(run, file, query, n, encoder, progress)
    if regex := regex_of(query):
        pattern, ignore_case = regex
        found = file.with_pattern(pattern, n, ignore_case=ignore_case)
        rows = [_row(entry, fields, _around(_text(entry, fields[0]), 0)) for entry, fields in found]
        return _table(rows, query, "No label, top token or note matches it")
    number = number_of(query)
    rows = (
        [] if number is None else [_row(entry, ["number"], entry.label) for entry in file.features([number])]
    )
    asked = pieces(query)
    entries, sought = file.with_terms(asked, n)
    rows += [_found(entry, sought) for entry in entries if entry.feature != number]
    read_as = {
        one.terms[0]: [" ".join(option) for option in found.alternatives] + ["…"] * found.is_prefix
        for one, found in zip(asked, sought, strict=True)
        if found.guess
    }
    if len(asked) > 1:
        nothing = f"No feature has all {len(asked)} parts of this in its label, top tokens and note"
    else:
        nothing = "No label, top token or note has it"
    if number is not None:
        nothing += f", and features are numbered from 0 to {run.index.d_sae - 1:,}"
    table = _table(rows[:n], query, nothing)
    table.attrs["read_as"] = read_as
    table.attrs["remarks"] += [
        f"{typed} stands nowhere, read as {', '.join(words)}"
        if words
        else f"{typed} stands nowhere, nor does a word that begins so or is spelt nearly so"
        for typed, words in read_as.items()
    ]
    return table


def search_file(run: "Run", *, progress: Progress = silent) -> SearchFile:
    """The search database of a run, up to date: made anew where it is missing or belongs to another index or past."""
    inputs = {"index": hash_json(run.index.manifest["inputs"]), "labels": hash_json(run.labels.inputs)}
    for folder in (run.folder.path / "features", _home(run)):
        file = SearchFile(folder / "search.sqlite")
        if file.state(inputs) == _state_of(run):
            return file
    with file.writing():
        known, state = file.state(inputs), _state_of(run)  # another process may have been quicker
        features = range(run.index.d_sae)
        changed = None
        if known is not None and run.labels.mark(known[0]) == known[1]:
            changed = sorted(feature for feature in run.labels.changed_since(known[0]) if feature in features)
        if changed is None or len(changed) > max(_AT_ONCE, len(features) * _SHARE_AT_ONCE):
            with progress("search", total=len(features), unit="features") as step:
                file.build(_all_entries(run), inputs, state, step)
        elif known != state:
            file.update(list(_changed_entries(run, changed)), state)
    return file


def _state_of(run: "Run") -> tuple[int, str]:
    """Number and mark of the last change of the labels."""
    change = run.labels.change()
    return change, run.labels.mark(change)


def _home(run: "Run") -> Path:
    """The folder for what is derived from labels: in the run, or in the user's cache if that cannot be written to."""
    folder: Path = run.folder.path / "features"
    if os.access(folder if folder.exists() else folder.parent, os.W_OK):
        return folder
    cache, key = Cache("search", CACHE_BYTES), hash_json(str(folder.resolve()))
    home = cache.find(key)
    if home is None:
        with cache.new(key) as new:
            new.mkdir()
        home = cache.find(key)
    assert home is not None
    return home


def trust(source: str, score: "Score | None") -> float:
    """How far a label is believed, 0 to 1, by who gave it and how it was scored; see the head of this module."""
    if score is None:
        return 1.0 if source == "person" else UNSCORED
    value = score.value if score.kind == "tokens" else max(2 * score.value - 1, 0.0)
    is_better = score.control is None or score.value > score.control
    return value if is_better else min(value, UNSCORED)


def importance(trust: float, firings: int, positions: int) -> float:
    """0 to 1: trust in the label (0 to 1), times the logarithm of how often the feature fires among ``positions``."""
    return trust * log1p(firings) / log1p(max(positions, 1))


def _all_entries(run: "Run") -> Iterator[Entry]:
    """Of every feature of the index, from one table of all labels."""
    from features.labels import Score
    from features.tables import labels_of

    table = run.labels.table()
    is_judged = table["f1"].isna() & (table["detection"].notna() | table["fuzzing"].notna())
    judged = table["feature"][
        is_judged
    ].tolist()  # few, as judging costs money: the table lacks their controls
    scores = {
        feature: label.score
        for feature, label in zip(judged, labels_of(run, judged), strict=True)
        if label is not None
    }
    columns = [table[name].tolist() for name in ("feature", "text", "note", "source", "f1", "control")]
    labels = {}
    for feature, text, note, source, f1, control in zip(*columns, strict=True):
        score = scores.get(feature)
        if not np.isnan(f1):
            score = Score("tokens", f1, 0, control=None if np.isnan(control) else control)
        labels[feature] = (text, note, source, score)
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
            yield _made(run, feature, tokens, label.text, label.note, label.source, label.score)


def _made(
    run: "Run", feature: int, tokens: str, text: str, note: str, source: str, score: "Score | None"
) -> Entry:
    believed = trust(source, score) if text else UNSCORED
    return Entry(
        feature,
        importance(believed, int(run.index.count[feature]), run.index.n_tokens),
        label=text or "",
        tokens=tokens,
        note=note or "",
        score=None if score is None else score.value,
        score_kind="" if score is None else score.kind,
        source=source if text else "",
        density=float(run.index.density[feature]),
    )


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
        "score_kind": entry.score_kind,
        "source": entry.source,
        "density": entry.density,
        "matched": ", ".join(fields),
        "snippet": snippet,
    }


_COLUMNS = ("feature", "label", "score", "score_kind", "source", "density", "matched", "snippet")


def _table(rows: Sequence[dict[str, Any]], query: str, nothing: str) -> "FeatureTable":
    """Args: nothing: what is said if there is no row."""
    from features.tables import FeatureTable

    columns = {name: [row[name] for row in rows] for name in _COLUMNS}
    title = f"{'Features' if rows else 'Nothing'} found for {query}"
    table = FeatureTable.of(columns, kind="search", title=title, by="score")
    table.attrs["remarks"] = [] if rows else [nothing]
    return table


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

    found = nearest_labels(run, query, n, _home(run) / "meaning", encoder, progress)
    rows = [_row(entry, ["label"], entry.label) for entry in file.features(feature for feature, _ in found)]
    columns = {name: [row[name] for row in rows] for name in _COLUMNS}
    columns["similarity"] = [similarity for _, similarity in found]
    title = f"Labels whose meaning is nearest to: {query}"
    return FeatureTable.of(columns, kind="search", title=title, by="similarity")
