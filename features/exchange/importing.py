"""Reading labels from a file or folder of any known format, which shows in the content; all of it or nothing."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from activations.errors import InputError
from features.exchange.as_csv import read_csv
from features.exchange.as_json import read_json_labels, read_json_lists
from features.exchange.delphi import EXPLANATIONS, SCORES, is_delphi, read_delphi
from features.exchange.entries import Entry, parsed
from features.exchange.neuronpedia import read_explanations
from features.labels import Label, Labels, Source

Lists = dict[str, dict[int, str]]
"""By name, the features of a list in their order, each with its note there."""
_GZIP = b"\x1f\x8b"


def import_labels(path: str | Path, labels: Labels, d_sae: int) -> int:
    """Add what a file says to the labels of a run.

    Args:
        path: CSV or JSON as :func:`features.exchange.export` writes them (also gzipped), Neuronpedia's explanations (a
            file of JSON lines, or the folder), or a folder of delphi's explanations.
        labels: where they go, lists as well, in one transaction. A label that says who it is from keeps that source;
            others are imported ones, which stand before automatic labels and behind those of people and language
            models.
        d_sae: number of features of the SAE.

    Returns:
        how many labels and notes are new: what is there already is not added again.

    Raises:
        InputError: the file is damaged, of no known format, of another SAE than the labels, or says something wrong;
            nothing has been added.
    """
    path = Path(path)
    entries, lists = _read(path, d_sae, labels.sae_hash)
    if not entries and not lists:
        raise InputError(f"{path} holds no label.")
    fresh = _without_known(entries, labels)
    starred = {entry.label.feature for entry in entries if entry.starred}
    starred.difference_update(labels.starred())
    labels.add(fresh, starred=sorted(starred), lists=_not_listed(lists, labels))
    return len(fresh)


def _read(path: Path, d_sae: int, sae_hash: str | None) -> tuple[list[Entry], Lists]:
    if path.is_dir():
        return _read_folder(path, d_sae), {}
    content = _content(path)
    if not content.strip():
        raise InputError(f"{path} is empty: it must hold labels.")
    if content.lstrip()[0] not in "{[":
        return read_csv(content, str(path), d_sae), {}
    if _is_json_lines(content):
        return read_explanations([(str(path), content)], d_sae), {}
    value, name = parsed(content, str(path)), str(path)
    return read_json_labels(value, name, d_sae, sae_hash), read_json_lists(value, name, d_sae)


def _read_folder(path: Path, d_sae: int) -> list[Entry]:
    folder = path / EXPLANATIONS if (path / EXPLANATIONS).is_dir() else path
    if is_delphi(folder):
        return read_delphi(folder, folder.parent / SCORES, d_sae)
    files = sorted((*folder.glob("*.jsonl.gz"), *folder.glob("*.jsonl")), key=_by_number)
    if not files:
        raise InputError(
            f"{path} holds no labels: a folder must have Neuronpedia's explanations/batch-0.jsonl.gz or delphi's"
            " explanations/MODULE_latent0.txt."
        )
    return read_explanations(((str(file), _content(file)) for file in files), d_sae)


def _by_number(path: Path) -> tuple[int, str]:
    digits = "".join(character for character in path.name if character.isdecimal())
    return int(digits or 0), path.name


def _content(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error):
            raise InputError(f"{path} is a gzip file that is cut short or damaged: get it again.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: this is not UTF-8 text: save the file as UTF-8.") from None


def _is_json_lines(content: str) -> bool:
    """Whether the first line is an object of its own that describes a feature."""
    try:
        first = json.loads(content.lstrip().partition("\n")[0])
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(first, dict) and "labels" not in first


def _not_listed(lists: Lists, labels: Labels) -> Lists:
    """What is new in lists: the list, members, or their notes."""
    known = labels.lists()
    held = {name: labels.list_members(name) if name in known else {} for name in lists}
    fresh = {
        name: {
            f: note for f, note in members.items() if f not in held[name] or note not in ("", held[name][f])
        }
        for name, members in lists.items()
    }
    return {name: members for name, members in fresh.items() if members or name not in known}


def _without_known(entries: Sequence[Entry], labels: Labels) -> list[Label]:
    """What is not in the store yet. The last label of a feature and source in the file becomes the current one."""
    groups: dict[tuple[int, Source], list[Label]] = {}
    for entry in entries:
        groups.setdefault((entry.label.feature, entry.label.source), []).append(entry.label)
    current = {source: labels.all(source) for source in {entry.label.source for entry in entries}}
    has_notes = any(entry.label.note for entry in entries)
    noted = {feature: label.note for feature, label in labels.all().items()} if has_notes else {}
    return [
        label
        for (feature, _), group in groups.items()
        for label in _fresh(group, current, labels, noted.get(feature, ""))
    ]


def _fresh(
    group: Sequence[Label], current: dict[Source, dict[int, Label]], labels: Labels, note: str
) -> Iterator[Label]:
    """The new ones among the labels of one feature and source, the oldest first."""
    *older, last = group
    now = current[last.source].get(last.feature)
    past = labels.history(last.feature) if older and now is not None else []
    yield from (
        label for label in older if label.text and not any(_adds_nothing(label, each) for each in past)
    )
    if last.text and not (now is not None and _adds_nothing(last, now)):
        yield last
    elif last.note not in ("", note):
        yield replace(last, text="")  # only the note is new


def _adds_nothing(label: Label, known: Label) -> bool:
    """Whether a label of a file, which may hold less than the store, is one of the store."""
    is_it = (label.text, label.author, label.method) == (known.text, known.author, known.method)
    values = {score.kind: score.value for score in known.scores}
    return (
        is_it
        and label.pattern in ("", known.pattern)
        and all(values.get(score.kind) == score.value for score in label.scores)
    )
