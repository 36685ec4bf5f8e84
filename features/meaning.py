"""Labels near a query in meaning, by a sentence encoder on this machine; nothing is ever downloaded.

The vectors of label texts are kept in a folder, ``features/meaning/`` of the run, one for each distinct text, so that a
changed label costs one more encoding and nothing else.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from activations.errors import InputError
from activations.files import is_finished, new_folder, write_manifest
from activations.progress import Progress, silent

if TYPE_CHECKING:
    from features.run import Run

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
KIND = "label vectors"
_AT_ONCE = 1024  # texts
_ROWS_AT_ONCE = 65_536


class Encoder(Protocol):
    """A sentence encoder: texts of like meaning have vectors of a small angle."""

    name: str

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[len(texts), width]``."""
        ...


def nearest_labels(
    run: "Run",
    query: str,
    n: int,
    folder: Path,
    encoder: str | Encoder | None = None,
    progress: Progress = silent,
) -> list[tuple[int, float]]:
    """(feature, cosine) of the n features whose labels are nearest to ``query``; of equals, the lower number first.

    Args:
        folder: where vectors are kept.
        encoder: one, or the name or folder of a sentence-transformers model that is on this machine.

    Raises:
        InputError: there is no label, sentence-transformers is not installed, or the encoder is not on this machine.
    """
    table = run.labels.table()
    table = table[table["text"] != ""].sort_values("feature")
    if table.empty:
        raise InputError(f"{run.name} has no label to compare with: run sae index or sae label first.")
    if encoder is None or isinstance(encoder, str):
        encoder = _load(encoder or DEFAULT_ENCODER)
    texts, text_of = np.unique(table["text"].to_numpy(dtype=object), return_inverse=True)
    vectors = _vectors(folder, texts.tolist(), encoder, progress)
    wanted = _unit(encoder.encode([query]))[0].astype(np.float32)
    parts = (vectors[start : start + _ROWS_AT_ONCE] for start in range(0, len(vectors), _ROWS_AT_ONCE))
    similarity = np.concatenate([part.astype(np.float32) @ wanted for part in parts])[text_of]
    order = np.argsort(-similarity, kind="stable")[:n]
    features = table["feature"].to_numpy()
    return [(int(features[row]), float(similarity[row])) for row in order]


def _vectors(folder: Path, texts: list[str], encoder: Encoder, progress: Progress) -> np.ndarray:
    """Unit vectors of ``texts``, float16 ``[len(texts), width]``; those not kept yet are made and kept."""
    keys = np.array([int.from_bytes(hashlib.sha256(t.encode()).digest()[:8]) for t in texts], dtype=np.uint64)
    inputs = {"encoder": encoder.name}
    known = np.zeros(0, dtype=np.uint64)
    kept: np.ndarray | None = None
    if is_finished(folder, KIND, inputs):
        known, kept = np.load(folder / "text.npy"), np.load(folder / "vector.npy", mmap_mode="r")
    missing = np.flatnonzero(~np.isin(keys, known))
    if len(missing) or kept is None:
        parts = [] if kept is None else [kept]
        with progress("meaning", total=len(missing), unit="labels") as step:
            for start in range(0, len(missing), _AT_ONCE):
                some = missing[start : start + _AT_ONCE]
                parts.append(_unit(encoder.encode([texts[i] for i in some])).astype(np.float16))
                step(len(some))
        known, kept = np.concatenate([known, keys[missing]]), np.concatenate(parts)
        with new_folder(folder) as new:
            np.save(new / "text.npy", known)
            np.save(new / "vector.npy", kept)
            write_manifest(new, KIND, inputs)
    order = np.argsort(known, kind="stable")
    found: np.ndarray = kept[order[np.searchsorted(known, keys, sorter=order)]]
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def _load(name: str) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError(
            "Search by meaning needs a sentence encoder: pip install sentence-transformers, or search for words."
        ) from None
    try:
        model = SentenceTransformer(name, local_files_only=True)
    except Exception as error:  # what a missing or broken folder raises differs from version to version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"The sentence encoder {name} is not on this machine ({reason}): download it, or give the folder of one."
        ) from None
    return _Local(name, model)


class _Local:
    def __init__(self, name: str, model: object) -> None:
        self.name, self._model = name, model

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self._model.encode(list(texts), show_progress_bar=False)  # type: ignore[attr-defined]
        return np.asarray(vectors, dtype=np.float32)
