"""Labels as JSON with everything that is known of them: the label that counts of every feature, one to a line, and
then the lists.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from activations.errors import InputError
from features.exchange.entries import Entry, count, feature_number, keys_of, one_of, share, text
from features.labels import SCORE_KINDS, SOURCES, Label, Score

KIND = "labels"
FORMAT_VERSION = 1
_TEXTS = ("author", "method", "pattern", "made", "prompt_hash", "examples_hash", "note")
_FIGURES = ("low", "high", "precision", "recall", "upper", "control")
_KEYS = ("feature", "label", "source", "scores", "starred", *_TEXTS)


def json_text(
    labels: Iterable[Label],
    starred: Iterable[int],
    lists: Mapping[str, Mapping[int, str]],
    sae_hash: str | None,
) -> str:
    """Labels as a JSON document.

    Args:
        lists: by name, the features of a list in their order, each with its note there.
        sae_hash: to which SAE the features belong.
    """
    stars = set(starred)
    lines = [_line(label, label.feature in stars) for label in labels]
    head = json.dumps({"kind": KIND, "format_version": FORMAT_VERSION, "sae_hash": sae_hash})[:-1]
    tail = {
        name: [{"feature": feature, "note": note} for feature, note in members.items()]
        for name, members in lists.items()
    }
    lines_of_lists = [f"{_json(name)}: {_json(members)}" for name, members in tail.items()]
    return (
        f'{head}, "labels": [\n'
        + ",\n".join(lines)
        + '\n], "lists": {\n'
        + ",\n".join(lines_of_lists)
        + "\n}}\n"
    )


def read_json_labels(value: Any, name: str, d_sae: int, sae_hash: str | None) -> list[Entry]:
    """The labels of such a document; also a bare list of objects with the keys ``feature`` and ``label``.

    Raises:
        InputError: it is not one, is of a newer format or of another SAE, or a label is wrong.
    """
    if isinstance(value, list):
        value = {"kind": KIND, "format_version": FORMAT_VERSION, "labels": value}
    document = keys_of(value, ["labels"], name)
    if document.get("kind") != KIND or not isinstance(document["labels"], list):
        raise InputError(f"{name} is JSON of something else, not of labels.")
    version = document.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{name} was written in format {version}, and this saescope reads up to format {FORMAT_VERSION}:"
            " install a newer saescope."
        )
    its_hash = document.get("sae_hash")
    if None not in (its_hash, sae_hash) and its_hash != sae_hash:
        raise InputError(f"{name} holds labels of another SAE: import it into the run of that one.")
    return [
        _entry(keys_of(each, ["feature", "label"], f"{name}, label {place}"), f"{name}, label {place}", d_sae)
        for place, each in enumerate(document["labels"], start=1)
    ]


def read_json_lists(value: Any, name: str, d_sae: int) -> dict[str, dict[int, str]]:
    """The lists of such a document: by name, the features in their order, each with its note; none in a bare list.

    Raises:
        InputError: one of them is wrong.
    """
    found = value.get("lists", {}) if isinstance(value, dict) else {}
    lists: dict[str, dict[int, str]] = {}
    for list_name, members in keys_of(found, [], f"{name}, lists").items():
        where = f"{name}, list {list_name!r}"
        if not text(list_name, "the name", where).strip() or not isinstance(members, list):
            raise InputError(f"{where}: a list must have a name and a list of members.")
        held = lists.setdefault(list_name.strip(), {})
        for member in members:
            content = keys_of(member, ["feature"], where)
            held[feature_number(content["feature"], where, d_sae)] = text(
                content.get("note"), "note", where
            ).strip()
    return lists


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _line(label: Label, starred: bool) -> str:
    content: dict[str, Any] = {"feature": label.feature, "label": label.text, "source": label.source}
    content |= {name: getattr(label, name) for name in _TEXTS if getattr(label, name)}
    scores = [
        {name: value for name, value in asdict(score).items() if value is not None} for score in label.scores
    ]
    content |= {"scores": scores} if scores else {}
    content |= {"starred": True} if starred else {}
    return _json(content)


def _entry(content: dict[str, Any], where: str, d_sae: int) -> Entry:
    for key in content:
        one_of(key, _KEYS, "a key", where)
    feature = feature_number(content["feature"], where, d_sae)
    wanted = one_of(text(content.get("source"), "source", where) or "import", SOURCES, "source", where)
    scores = content.get("scores", [])
    if not isinstance(scores, list):
        raise InputError(f"{where}: scores must be a list.")
    starred = content.get("starred", False)
    if not isinstance(starred, bool):
        raise InputError(f"{where}: starred must be true or false.")
    texts: dict[str, Any] = {name: text(content.get(name), name, where) for name in _TEXTS}
    label = Label(
        feature,
        text(content["label"], "label", where).strip(),
        next(source for source in SOURCES if source == wanted),
        scores=tuple(_score(score, where) for score in scores),
        **texts,
    )
    if not (label.text or label.note.strip() or starred):
        raise InputError(f"{where}: it has neither a label nor a note.")
    return Entry(where, label, starred)


def _score(value: Any, where: str) -> Score:
    content = keys_of(value, ["kind", "value"], f"{where}, a score")
    for key in content:
        one_of(key, [each.name for each in fields(Score)], "a key of a score", where)
    kind = one_of(text(content["kind"], "kind", where), SCORE_KINDS, "kind", where)
    figure = share(content["value"], "value", where)
    if figure is None:
        raise InputError(f"{where}: a score has no value.")
    return Score(
        next(each for each in SCORE_KINDS if each == kind),
        figure,
        count(content.get("n"), "n", where),
        **{name: share(content.get(name), name, where) for name in _FIGURES},
        judge=text(content.get("judge"), "judge", where),
        made=text(content.get("made"), "made", where),
    )
