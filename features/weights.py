"""What the weights alone tell of every feature: ready before any text has been read, and the same for all texts.

The folder holds ``weights.npy``, one record per feature (:func:`weight_record`), and, once it is made, ``map.npz``
(:mod:`features.decoder_map`). It is read without torch and without the model.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.errors import InputError
from activations.files import MANIFEST, is_finished, new_folder, read_manifest, room_needed, write_manifest
from activations.progress import Progress, silent
from features.records import read_array, write_records

if TYPE_CHECKING:
    from torch import Tensor

    from activations.models import LanguageModel
    from sae.model import SparseAutoencoder

KIND = "weight index"
WEIGHTS = "weights.npy"
MAP = "map.npz"
LENS_TOKENS = 20
NEIGHBOURS = 50
MOST_WITH_NEIGHBOURS = 131_072
"""Features above which neighbours are looked up when they are asked for: the work for all grows with their square."""
_FEATURES_AT_ONCE = 2048
_RESIDUAL = re.compile(r"hook_(resid_(pre|mid|post)|attn_out|mlp_out)$")
"""Hooks whose vectors are (added to) the residual stream, which the unembedding reads."""


def weight_record(logit_lens: bool, neighbours: bool) -> np.dtype:
    """The record of a feature.

    The logit lens is there where it means something: LENS_TOKENS tokens at either end, their logits per unit of
    activation less the mean over the vocabulary, and ``moments`` of all logits: mean, standard deviation, skewness and
    kurtosis. Neighbours are the nearest decoder rows by cosine.
    """
    fields: list[tuple[Any, ...]] = []
    if logit_lens:
        for side in ("promoted", "suppressed"):
            fields += [(f"{side}_id", np.int32, LENS_TOKENS), (f"{side}_logit", np.float16, LENS_TOKENS)]
        fields.append(("moments", np.float32, 4))
    if neighbours:
        fields += [("neighbour_id", np.int32, NEIGHBOURS), ("neighbour_cosine", np.float16, NEIGHBOURS)]
    return np.dtype(fields)


class WeightIndex:
    """What a folder made by :func:`build_weights` holds.

    Attributes:
        folder: where it lies. manifest: facts, and ``inputs``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> "WeightIndex":
        """Open it.

        Raises:
            InputError: the folder holds no finished weight index.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder, KIND))

    @property
    def has_logit_lens(self) -> bool:
        """Whether the logit lens means something here, and was taken."""
        return bool(self.manifest["logit_lens"])

    @property
    def has_neighbours(self) -> bool:
        """Whether neighbours were worked out for all features."""
        return bool(self.manifest["neighbours"])

    @cached_property
    def records(self) -> np.ndarray:
        """[d_sae] records, mapped from the file; see :func:`weight_record`."""
        return read_array(self.folder / WEIGHTS)

    @property
    def decoder_map(self) -> np.ndarray | None:
        """float32 ``[d_sae, 2]``, a place in the plane for every decoder row; None before it is made."""
        path = self.folder / MAP
        return np.load(path)["points"] if path.is_file() else None


def build_weights(
    model: "LanguageModel", sae: "SparseAutoencoder", folder: str | Path, *, progress: Progress = silent
) -> WeightIndex:
    """Work out what the weights of ``sae`` tell into ``folder``; if that is done already, open it.

    Raises:
        InputError: the disk is full, or ``folder`` holds something else.
    """
    import torch

    from features.lens import decoder_neighbours, logit_lens

    folder = Path(folder)
    inputs = {"sae_hash": sae.hash, "model_hash": model.hash, "hook_name": sae.hook_name}
    if is_finished(folder, KIND, inputs):
        return WeightIndex.open(folder)
    if (folder / MANIFEST).is_file():
        read_manifest(folder, KIND)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something other than a {KIND}: move it away.")
    reading = _unembedding(model, sae)
    with_neighbours = 1 < sae.d_sae <= MOST_WITH_NEIGHBOURS
    dtype = weight_record(reading is not None, with_neighbours)

    def blocks() -> Iterator[np.ndarray]:
        directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=1) if with_neighbours else None
        with progress("weights", total=sae.d_sae, unit="features") as step:
            for start in range(0, sae.d_sae, _FEATURES_AT_ONCE):
                rows = sae.W_dec[start : start + _FEATURES_AT_ONCE]
                records = np.zeros(len(rows), dtype)
                if reading is not None:
                    gain, unembedding = reading
                    lens = logit_lens(rows, gain, unembedding, LENS_TOKENS)
                    for name in lens._fields:
                        _put(records[name], getattr(lens, name).numpy(), -1 if name.endswith("_id") else 0)
                if directions is not None:
                    nearest = decoder_neighbours(directions, start, len(rows), NEIGHBOURS)
                    _put(records["neighbour_id"], nearest.feature.numpy(), -1)
                    _put(records["neighbour_cosine"], nearest.cosine.numpy(), 0)
                step(len(rows))
                yield records

    no_space = (
        f"The disk has too little room for {folder}, {sae.d_sae * dtype.itemsize / 1e6:,.1f} MB: free some."
    )
    with room_needed(no_space), new_folder(folder) as new:
        write_records(new / WEIGHTS, dtype, (sae.d_sae,), blocks())
        facts = {"d_sae": sae.d_sae, "logit_lens": reading is not None, "neighbours": with_neighbours}
        write_manifest(new, KIND, inputs, **facts)
    return WeightIndex.open(folder)


def _put(field: np.ndarray, values: np.ndarray, missing: float) -> None:
    """Fill a field of records, which may have more places than there are values."""
    field[:] = missing
    limit = np.finfo(field.dtype).max if field.dtype.kind == "f" else None
    field[:, : values.shape[1]] = values if limit is None else values.clip(-limit, limit)


def _unembedding(model: "LanguageModel", sae: "SparseAutoencoder") -> "tuple[Tensor, Tensor] | None":
    """Gain of the final norm and W_U; None where features write off the residual stream, or the norm is not known."""
    if not _RESIDUAL.search(sae.hook_out) or sae.d_out != model.d_model:
        return None
    try:
        return model.logit_lens_weights()
    except InputError:
        return None


def neighbours_of(sae: "SparseAutoencoder", feature: int, most: int = NEIGHBOURS) -> list[tuple[int, float]]:
    """(feature, cosine) of the features with the most similar decoder rows, nearest first, worked out now."""
    import torch

    rows = sae.W_dec.detach().float()
    cosines = rows @ rows[feature] / (rows.norm(dim=1) * rows[feature].norm()).clamp_min(1e-12)
    cosines[feature] = -torch.inf
    nearest = cosines.topk(min(most, len(rows) - 1))
    return list(zip(nearest.indices.tolist(), nearest.values.clamp(max=1).tolist(), strict=True))
