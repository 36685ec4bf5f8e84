"""Neuronpedia's files: explanations as they are downloaded, and batches of features as they are uploaded.

Explanations are JSON lines, ``explanations/batch-<i>.jsonl.gz`` in the folder of a source; a feature may have several.
An upload is the body of ``POST /api/feature/upload-batch``: ``{modelId, source, features}`` with at most
:data:`MOST_FEATURES` features, each of which must have at least one example.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.errors import InputError
from activations.progress import Progress, silent
from features.exchange.entries import Entry, feature_number, keys_of, parsed, text
from features.labels import Label

if TYPE_CHECKING:
    from features.index import Example, FeatureIndex

EXPLANATIONS = "explanations"
MOST_FEATURES = 128
MOST_LOGITS = 20
LONGEST_TEXT = 512
_LINES = 4096  # explanations to a file
_NEEDED = ("modelId", "layer", "index", "description")
_UNBINNED = -1  # stands in place of a quantile at the strongest examples


def read_explanations(files: Iterable[tuple[str, str]], d_sae: int) -> list[Entry]:
    """Explanations, the oldest of a feature first.

    Args:
        files: (name, JSON lines) of each file.

    Raises:
        InputError: a line is wrong, or the lines are of several sources.
    """
    entries: list[Entry] = []
    sources: dict[tuple[str, str], str] = {}
    for name, content in files:
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                where = f"{name}, line {number}"
                row = keys_of(parsed(line, where), _NEEDED, where)
                source = (text(row["modelId"], "modelId", where), text(row["layer"], "layer", where))
                sources.setdefault(source, where)
                if len(sources) > 1:
                    (one, _), (other, _) = sources.items()
                    raise InputError(
                        f"{where}: this is of {'/'.join(other)}, and the lines before are of {'/'.join(one)}:"
                        " import the files of one source."
                    )
                entries += _explanation(row, where, d_sae)
    return sorted(entries, key=lambda entry: entry.label.made)


def _explanation(row: dict[str, Any], where: str, d_sae: int) -> list[Entry]:
    texts = {
        key: text(row.get(key), key, where)
        for key in ("description", "explanationModelName", "authorId", "typeName", "notes", "createdAt")
    }
    if not texts["description"].strip():
        return []  # an explainer had nothing to say
    label = Label(
        feature_number(row["index"], where, d_sae),
        texts["description"].strip(),
        "import",
        texts["explanationModelName"] or texts["authorId"],
        texts["typeName"],
        made=texts["createdAt"],
        note=texts["notes"].strip(),
    )
    return [Entry(where, label)]


def write_explanations(folder: Path, labels: Sequence[Label], model_id: str, source_id: str) -> None:
    """Write labels as explanations into an empty folder, in files as they are downloaded."""
    (folder / EXPLANATIONS).mkdir()
    for batch, first in enumerate(range(0, len(labels), _LINES)):
        rows = [_explanation_row(label, model_id, source_id) for label in labels[first : first + _LINES]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / EXPLANATIONS / f"batch-{batch}.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def _explanation_row(label: Label, model_id: str, source_id: str) -> dict[str, Any]:
    by_person = label.source == "person"
    return {
        "id": f"{model_id}-{source_id}-{label.feature}-{label.id or 0}",
        "modelId": model_id,
        "layer": source_id,
        "index": str(label.feature),
        "description": label.text,
        "authorId": label.author if by_person else None,
        "embedding": None,
        "triggeredById": None,
        "typeName": label.method or None,
        "explanationModelName": None if by_person else label.author or None,
        "notes": label.note or None,
        "createdAt": label.made or None,
    }


def write_upload(
    folder: Path,
    index: "FeatureIndex",
    labels: Mapping[int, Label],
    features: Sequence[int],
    model_id: str,
    source_id: str,
    *,
    progress: Progress = silent,
) -> int:
    """Write the bodies of uploads into an empty folder: ``batch-<i>.json``, :data:`MOST_FEATURES` features to a file.

    Args:
        labels: by feature; a feature without one is uploaded without an explanation.

    Returns:
        how many of the features are in it: those without an example cannot be uploaded.
    """
    fired = [feature for feature in features if index.count[feature]]
    written = 0
    with progress("export", total=len(fired), unit="features") as step:

        def rows() -> Iterator[dict[str, Any]]:
            for feature in fired:
                row = upload_row(index, feature, labels.get(feature))
                step(1)
                if row["activations"]:
                    yield row

        remaining = rows()
        while batch := list(islice(remaining, MOST_FEATURES)):
            body = {"modelId": model_id, "source": source_id, "features": batch}
            content = json.dumps(body, ensure_ascii=False, allow_nan=False)
            (folder / f"batch-{written // MOST_FEATURES}.json").write_text(content, encoding="utf-8")
            written += len(batch)
    return written


def upload_row(index: "FeatureIndex", feature: int, label: Label | None) -> dict[str, Any]:
    """One feature as an upload has it: its strongest examples, then those of its bands that are not among them."""
    strongest = index.top_examples(feature)
    activations = [_example(each, _UNBINNED, float(index.max[feature]), _UNBINNED) for each in strongest]
    seen = {each.position for each in strongest}
    for band, examples in index.range_examples(feature):
        low, high = (int(percent) / 100 for percent in band.rstrip("%").split("–"))
        ends = index.quantile(feature, low), index.quantile(feature, high)
        fresh = [each for each in examples if each.position not in seen]
        activations += [_example(each, *ends, round(high - low, 6)) for each in fresh]
    explanations = []
    if label is not None and label.text:
        words = label.text if len(label.text) <= LONGEST_TEXT else label.text[: LONGEST_TEXT - 1] + "…"
        explanations = [{"text": words, "methodName": label.method, "modelName": label.author}]
    return {
        "index": feature,
        "density": float(index.density[feature]),
        "topLogits": _logits(index.promoted(feature)),
        "bottomLogits": _logits(index.suppressed(feature)),
        "explanations": explanations,
        "activations": activations,
    }


def _logits(tokens: Sequence[tuple[str, int, float]]) -> list[dict[str, Any]]:
    return [{"token": token, "value": _short(value)} for token, _, value in tokens[:MOST_LOGITS]]


def _example(example: "Example", low: float, high: float, fraction: float) -> dict[str, Any]:
    return {
        "tokens": list(example.tokens),
        "values": [_short(value) for value in example.activations.tolist()],
        "quantileMin": _short(low),
        "quantileMax": _short(high),
        "quantileFraction": fraction,
    }


def _short(value: float) -> float:
    """Six digits: float32 has no more, and its neighbours print seventeen."""
    return float(f"{value:.6g}")
