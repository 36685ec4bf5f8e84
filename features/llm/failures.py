"""The features of a run for which no language model has had a label, and why; one file of the run folder."""

from collections.abc import Mapping
from pathlib import Path

from activations.errors import InputError
from activations.files import read_json, write_json
from features.llm.explain import Explained

FAILURES = "unlabelled.json"
"""Name of the file."""


def note_failures(path: Path, model: str, result: Explained) -> None:
    """Note the features that failed now; those that have a label now are struck off, and the others stay."""
    noted = dict(_noted(path))
    for label in result.labels:
        noted.pop(str(label.feature), None)
    for feature, reason in result.failed.items():
        noted[str(feature)] = {"model": model, "reason": reason}
    if noted or path.exists():
        write_json(path, {"features": dict(sorted(noted.items(), key=lambda item: int(item[0])))})


def _noted(path: Path) -> Mapping[str, object]:
    """What the file says; nothing if it is not there or cannot be read: these are only notes."""
    try:
        found = read_json(path)["features"] if path.is_file() else {}
        return {str(int(feature)): found[feature] for feature in found}
    except (InputError, KeyError, TypeError, ValueError):
        return {}
