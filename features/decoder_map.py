"""A map of the features: every decoder row as a point in the plane, similar directions near each other.

By UMAP (McInnes et al. 2018, 1802.03426) with cosine distance where ``umap-learn`` is installed, else by t-SNE
(van der Maaten & Hinton 2008) up to :data:`MOST_FOR_TSNE` features, else by the two first principal components of the
directions. Distances within a neighbourhood mean something, those between neighbourhoods little, and under principal
components only the large differences show: a page that draws it should say which it is.
"""

import importlib.util
import io
from typing import TYPE_CHECKING, Literal

import numpy as np

from activations.errors import InputError
from activations.files import write_bytes
from features.weights import MAP, WeightIndex

if TYPE_CHECKING:
    from sae.model import SparseAutoencoder

Method = Literal["auto", "umap", "tsne", "pca"]
MOST_FOR_TSNE = 20_000
"""Features above which t-SNE takes too long on a laptop."""


def map_decoder(
    weights: WeightIndex, sae: "SparseAutoencoder", method: Method = "auto", seed: int = 0
) -> np.ndarray:
    """Make the map and keep it beside the other facts about the weights; if it is there already, read it.

    Returns:
        float32 ``[d_sae, 2]``, within −1 and 1.

    Raises:
        InputError: UMAP is asked for and not installed.
    """
    import torch

    chosen = _chosen(method, sae.d_sae)
    there = weights.decoder_map
    if there is not None and _made_by(weights) == (chosen, seed):
        return there
    directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=1).cpu().numpy()
    points = {"umap": _umap, "tsne": _tsne, "pca": _pca}[chosen](directions, seed)
    points = points - points.mean(axis=0)
    points = (points / max(np.abs(points).max(), 1e-12)).astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, points=points, method=np.array(chosen), seed=np.array(seed))
    write_bytes(weights.folder / MAP, buffer.getvalue())
    return points


def map_method(weights: WeightIndex) -> str | None:
    """By which method the map that is there was made; None without one."""
    return None if weights.decoder_map is None else _made_by(weights)[0]


def _made_by(weights: WeightIndex) -> tuple[str, int]:
    with np.load(weights.folder / MAP) as file:
        return str(file["method"]), int(file["seed"])


def _chosen(method: Method, d_sae: int) -> str:
    has_umap = importlib.util.find_spec("umap") is not None
    if method == "umap" and not has_umap:
        raise InputError("UMAP is not installed: pip install umap-learn, or choose --map tsne or --map pca.")
    if method != "auto":
        return method
    if d_sae < 10:
        return "pca"
    return "umap" if has_umap else "tsne" if d_sae <= MOST_FOR_TSNE else "pca"


def _umap(directions: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    reducer = UMAP(metric="cosine", n_neighbors=min(15, len(directions) - 1), min_dist=0.1, random_state=seed)
    return np.asarray(reducer.fit_transform(directions))


def _tsne(directions: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(directions) - 1) / 3)
    reducer = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return np.asarray(reducer.fit_transform(directions))


def _pca(directions: np.ndarray, seed: int) -> np.ndarray:
    centred = directions.astype(np.float64) - directions.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, np.argsort(-values)[:2]]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1][: axes.shape[1]]])
    return np.asarray(centred @ axes)
