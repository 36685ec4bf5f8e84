"""Explanations and scores in delphi's folders: one small file per feature.

``explanations/<module>_latent<i>.txt`` is a JSON text. ``scores/<scorer>/<module>_latent<i>.txt`` is a JSON list of
the cases that were judged, each with ``activating`` (the truth) and ``prediction``; from these the balanced accuracy
and its interval are worked out as for our own judges. Our own cases are not kept, so scores are read, not written.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from activations.errors import InputError
from features.exchange.entries import Entry, feature_number, keys_of, parsed, text
from features.labels import Label, Score

EXPLANATIONS, SCORES = "explanations", "scores"
_FILE = re.compile(r"(?P<module>.*)_latent(?P<feature>\d+)\.txt")
_SCORERS: dict[str, Literal["detection", "fuzzing"]] = {
    "detection": "detection",
    "fuzz": "fuzzing",
    "fuzzing": "fuzzing",
}


def is_delphi(folder: Path) -> bool:
    """Whether a folder of explanations is delphi's."""
    return any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_delphi(folder: Path, scores: Path, d_sae: int) -> list[Entry]:
    """The explanations in ``folder``, with what is in the folder ``scores``, which may be missing.

    Raises:
        InputError: the files are of several modules, or one of them is wrong.
    """
    found = [(path, match) for path in sorted(folder.iterdir()) if (match := _FILE.fullmatch(path.name))]
    modules = sorted({match["module"] for _, match in found})
    if len(modules) > 1:
        raise InputError(
            f"{folder} holds explanations of {len(modules)} modules ({', '.join(modules)[:80]}): leave the files of"
            " one of them."
        )
    entries = []
    for path, match in found:
        feature = feature_number(match["feature"], str(path), d_sae)
        words = text(parsed(path.read_bytes(), str(path)), "the explanation", str(path)).strip()
        if words:
            judged = tuple(_scores(scores, path.name))
            entries.append(Entry(str(path), Label(feature, words, "import", "delphi", scores=judged)))
    return entries


def write_delphi(folder: Path, labels: Iterable[Label], module: str) -> None:
    """Write the texts of labels as explanations of ``module``, into an empty folder.

    Raises:
        InputError: the name of the module cannot be part of a file's.
    """
    if "/" in module or "\\" in module or ".." in module:
        raise InputError(
            f"The module {module!r} is part of the names of files: it must hold no /, no \\ and no two dots."
        )
    (folder / EXPLANATIONS).mkdir()
    for label in labels:
        path = folder / EXPLANATIONS / f"{module}_latent{label.feature}.txt"
        path.write_text(json.dumps(label.text, ensure_ascii=False), encoding="utf-8")


def _scores(folder: Path, name: str) -> Iterable[Score]:
    from features.llm.scoring import balanced_score  # with torch, which most formats do without

    for scorer, kind in _SCORERS.items():
        path = folder / scorer / name
        if path.is_file():
            cases = parsed(path.read_bytes(), str(path))
            if not isinstance(cases, list):
                raise InputError(f"{path}: this must be a list of the cases that were judged.")
            truths, answers = zip(*_answers(cases, path), strict=True) if cases else ((), ())
            known = [place for place, answer in enumerate(answers) if answer is not None]
            score = balanced_score(
                kind,
                [truths[place] for place in known],
                [bool(answers[place]) for place in known],
                judge="delphi",
            )
            if score is not None:
                yield score


def _answers(cases: list[Any], path: Path) -> Iterable[tuple[bool, bool | None]]:
    """(truth, answer) of every case; the answer is None where the judge gave none."""
    for place, case in enumerate(cases, start=1):
        where = f"{path}, case {place}"
        content = keys_of(case, ["activating", "prediction"], where)
        truth, answer = content["activating"], content["prediction"]
        if truth not in (True, False) or answer not in (True, False, None):
            raise InputError(f"{where}: activating and prediction must be true or false.")
        yield bool(truth), answer
