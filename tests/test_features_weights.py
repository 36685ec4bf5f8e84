"""What the weights alone tell: ready without any text; and the map of the decoder."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lookup_model import D_SAE, LookupModel, build, make_blocks, make_sae

from activations.errors import InputError
from features import decoder_map as decoder_map_module
from features import weights as weights_module
from features.decoder_map import map_decoder, map_method
from features.index import FeatureIndex
from features.weights import WeightIndex, build_weights


def made(folder: Path) -> WeightIndex:
    return build_weights(LookupModel(), make_sae(), folder)  # type: ignore[arg-type]


def test_weights_need_no_text_and_are_made_once(tmp_path: Path) -> None:
    weights = made(tmp_path / "weights")
    assert len(weights.records) == D_SAE
    assert weights.has_logit_lens
    assert weights.has_neighbours
    assert weights.decoder_map is None
    before = (tmp_path / "weights" / "manifest.json").stat().st_mtime_ns
    made(tmp_path / "weights")
    assert (tmp_path / "weights" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="is not a finished weight index"):
        WeightIndex.open(tmp_path)


def test_a_wide_sae_looks_neighbours_up_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = build(tmp_path / "kept" / "index", make_blocks(10), make_sae())
    monkeypatch.setattr(weights_module, "MOST_WITH_NEIGHBOURS", 10)
    index = build(tmp_path / "wide" / "index", make_blocks(10), make_sae())
    assert not index.weights.has_neighbours
    assert not any(tag.name == "duplicate" for f in range(D_SAE) for tag in index.tags(f))
    with pytest.raises(
        InputError, match=r"opened by itself, without model and labels: use open_run\(\.\.\.\)\.index\.$"
    ):
        index.neighbours(3)

    class Run:
        sae = make_sae()

    index.of_run(Run())  # type: ignore[arg-type]
    for feature in (0, 3, D_SAE - 1):
        now, then = index.neighbours(feature), kept.neighbours(feature)
        assert [f for f, _ in now] == [f for f, _ in then]
        np.testing.assert_allclose([c for _, c in now], [c for _, c in then], rtol=1e-3)


def test_the_map_puts_similar_directions_near_each_other(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 3
    rows = torch.cat([c + 0.3 * torch.randn(30, 16, generator=generator) for c in centres])

    class Sae:
        W_dec, d_sae = rows, len(rows)

    weights = made(tmp_path / "weights")
    for method in ("tsne", "pca"):
        points = map_decoder(weights, Sae(), method)  # type: ignore[arg-type]
        assert points.shape == (120, 2)
        assert np.abs(points).max() <= 1
        assert map_method(weights) == method
        assert weights.decoder_map is not None
        assert (weights.decoder_map == points).all()
        groups = points.reshape(4, 30, 2)
        within = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=2).mean()
        between = np.linalg.norm(groups.mean(axis=1)[:, None] - groups.mean(axis=1)[None], axis=2)
        assert within < 0.5 * between[between > 0].min()
        assert (map_decoder(weights, Sae(), method) == points).all()  # type: ignore[arg-type]


def test_umap_is_taken_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, sae = made(tmp_path / "weights"), make_sae()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else find_spec(name))
    with pytest.raises(InputError) as error:
        map_decoder(weights, sae, "umap")
    assert str(error.value) == (
        "UMAP is not installed: pip install umap-learn, or choose --map tsne or --map pca."
    )
    map_decoder(weights, sae)
    assert map_method(weights) == "tsne"
    monkeypatch.setattr(decoder_map_module, "MOST_FOR_TSNE", D_SAE - 1)
    map_decoder(weights, sae)
    assert map_method(weights) == "pca"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "umap" else find_spec(name)
    )
    monkeypatch.setattr(decoder_map_module, "_umap", lambda directions, seed: directions[:, :2] + seed)
    map_decoder(weights, sae)
    assert map_method(weights) == "umap"


def test_the_index_shows_the_map_that_was_made_after_it(tmp_path: Path) -> None:
    index = build(tmp_path / "index", make_blocks(10), make_sae())
    assert index.decoder_map is None
    points = map_decoder(index.weights, make_sae(), "pca")
    found = FeatureIndex.open(tmp_path / "index").decoder_map
    assert found is not None
    assert (found == points).all()


def test_weights_of_another_sae_beside_the_index_are_not_its_own(tmp_path: Path) -> None:
    index = build(tmp_path / "index", make_blocks(10), make_sae())
    mine = index.promoted(3)
    other = make_sae()
    other.weights.W_dec.neg_()
    build_weights(LookupModel(), other, tmp_path / "weights")  # type: ignore[arg-type]
    assert FeatureIndex.open(tmp_path / "index").promoted(3) == mine
    manifest: dict[str, Any] = json.loads((tmp_path / "weights" / "manifest.json").read_text())
    assert manifest["inputs"]["sae_hash"] != index.sae_hash
    assert len(mine) == 20
