"""Writing what a run knows of its features to files that others read; each appears as a whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from activations.errors import InputError
from activations.files import new_folder, write_bytes
from activations.progress import Progress, silent
from features.exchange.as_csv import csv_text
from features.exchange.as_json import json_text
from features.exchange.delphi import write_delphi
from features.exchange.neuronpedia import write_explanations, write_upload
from features.html_export import features_html
from features.labels import Label, Labels
from features.run import Run

Target = Literal["csv", "json", "neuronpedia", "neuronpedia-batch", "delphi", "html"]
_NOTHING = "None of these features has a label, a note or a star: there is nothing to export."
_FOLDERS = ("neuronpedia", "neuronpedia-batch", "delphi")


def export(
    run: Run,
    out: str | Path,
    to: Target,
    features: Sequence[int] | None = None,
    *,
    model_id: str = "",
    source_id: str = "",
    progress: Progress = silent,
) -> int:
    """Write labels, or whole features, of a run.

    Args:
        out: the file to write (csv, json, html), or a folder that is new or empty (the others).
        to: csv and json: the labels that count, json with the lists. neuronpedia, delphi: their texts, as explanations.
            neuronpedia-batch: labels, figures and examples, for upload. html: one page that needs nothing else.
        features: which, in this order; None takes all that have a label, or for an upload all there are.
        model_id: what the model is called there; by default the last part of its name here.
        source_id: what the SAE is called there, such as ``"6-res-jb"``; for delphi the name of the module. By default
            the hook's name.

    Returns:
        how many features were written: those without a label, or for an upload without an example, are left out.

    Raises:
        InputError: a feature does not exist, there is nothing to write, ``out`` is in the way, or ``source_id`` cannot
            be part of a file's name where it is to be one.
    """
    out = Path(out)
    chosen = None if features is None else [run.feature(feature).index for feature in dict.fromkeys(features)]
    if to == "html" and not chosen:
        raise InputError("A page of all features would be too long: name some features or a list.")
    _check_free(out, is_folder=to in _FOLDERS)
    model_id = model_id or Path(run.config.model).name
    source_id = source_id or run.config.hook_name
    if to == "html":
        pages = chosen or []
        write_bytes(out, features_html(run, pages, progress=progress).encode())
        return len(pages)
    labels = run.labels.all()
    if to == "neuronpedia-batch":
        every = list(range(run.index.d_sae)) if chosen is None else chosen
        with new_folder(out) as folder:
            n = write_upload(folder, run.index, labels, every, model_id, source_id, progress=progress)
            _check_any(n, "None of these features has an example in the index: there is nothing to upload.")
        return n
    starred = run.labels.starred() if to in ("csv", "json") else []
    labels = {feature: Label(feature, "") for feature in starred} | labels
    named = [
        labels[feature] for feature in (sorted(labels) if chosen is None else chosen) if feature in labels
    ]
    if to == "csv":
        _check_any(named, _NOTHING)
        write_bytes(out, csv_text(named, starred).encode())
        return len(named)
    if to == "json":
        lists = _lists(run.labels, chosen)
        _check_any(named or lists, _NOTHING)
        write_bytes(out, json_text(named, starred, lists, run.labels.sae_hash).encode())
        return len(named)
    with_text: list[Label] = [label for label in named if label.text]
    _check_any(with_text, "None of these features has a label: there is nothing to export.")
    with new_folder(out) as folder:
        if to == "delphi":
            write_delphi(folder, with_text, source_id)
        else:
            write_explanations(folder, with_text, model_id, source_id)
    return len(with_text)


def _lists(labels: Labels, features: Sequence[int] | None) -> dict[str, dict[int, str]]:
    """By name, the members of every list; where features are given, only these, and the lists that hold one of them."""
    lists = {name: labels.list_members(name) for name in labels.lists()}
    if features is None:
        return lists
    chosen = set(features)
    kept = {name: {f: note for f, note in held.items() if f in chosen} for name, held in lists.items()}
    return {name: held for name, held in kept.items() if held}


def _check_free(out: Path, *, is_folder: bool) -> None:
    if is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: name a new or empty folder.")
    if not is_folder and out.is_dir():
        raise InputError(f"{out} is a folder: name a file.")


def _check_any(found: object, sentence: str) -> None:
    if not found:
        raise InputError(sentence)
