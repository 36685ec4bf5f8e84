"""The feature index against a dense computation that is slow and obvious, and what it refuses; see lookup_model.py."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lookup_model import (
    CONTEXT,
    D_IN,
    D_SAE,
    HOOK,
    MAX_NORM,
    OUTLIERS,
    WRITTEN,
    Dense,
    LookupModel,
    build,
    make_blocks,
    make_sae,
    same_files,
)
from scipy import stats
from tiny_models import END_OF_TEXT, TEXT, VOCABULARY, one_thread, tiny_language_model
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.errors import InputError
from activations.writer import write_store
from features import firings as firings_module
from features import lens as lens_module
from features import pair_counts
from features.build import build_index
from features.examples import quantile_bands, sampling_rank
from features.firings import stream_firings
from features.index import Example, FeatureIndex
from features.layout import N_BANDS, PER_BAND, TOP_EXAMPLES, WINDOW, WINDOW_BEFORE
from features.lens import decoder_neighbours, logit_lens
from features.statistics import HISTOGRAM_EDGES, N_BINS, histogram_bin
from features.trace import trace_text
from features.weights import neighbours_of
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def all_examples(index: FeatureIndex, feature: int) -> list[Example]:
    return index.top_examples(feature) + [e for _, band in index.range_examples(feature) for e in band]


def placed(examples: list[Example]) -> list[tuple[float, int]]:
    return [(example.value, example.position) for example in examples]


@pytest.fixture(scope="module", params=["relu", "topk"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureIndex, Dense, TokenBlocks]:
    sae, blocks = make_sae(request.param), make_blocks()
    folder = tmp_path_factory.mktemp("index") / "index"
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(firings_module, "CHUNK_FIRINGS", 1500)
        patch.setattr(firings_module, "FIRINGS_PER_FEATURE", 1)
        patch.setattr(firings_module, "blocks_per_batch", lambda *about: 3)
        index = build(folder, blocks, sae)
    return index, Dense(sae, blocks), blocks


def test_the_tiny_case_is_not_trivial(case: Any) -> None:
    index, dense, blocks = case
    assert index.count[0] == 0
    assert index.count[1] > 1000
    assert (index.count > 64).sum() > 10  # more firings than are sampled
    assert ((index.count > 0) & (index.count < 64)).sum() > 5
    assert len(blocks.names) > TOP_EXAMPLES
    assert 0 < (~dense.kept).sum() < len(dense.kept) / 4


def test_statistics_equal_the_dense_computation(case: Any) -> None:
    index, dense, _ = case
    assert index.n_tokens == dense.kept.sum()
    for feature in range(D_SAE):
        a = dense.a[:, feature]
        a = a[a != 0]
        assert index.count[feature] == len(a)
        assert index.density[feature] == len(a) / dense.kept.sum()
        if len(a):
            assert index.mean[feature] == np.float32(a.mean())
            assert index.std[feature] == pytest.approx(a.std(), rel=1e-6, abs=1e-6)
            assert index.max[feature] == a.max()
        else:
            assert index.mean[feature] == index.std[feature] == index.max[feature] == 0
        assert index.histogram(feature).tolist() == np.histogram(a, HISTOGRAM_EDGES)[0].tolist()


def test_quantiles_are_right_to_within_a_bin(case: Any) -> None:
    index, dense, _ = case
    for feature in np.flatnonzero(index.count):
        a = np.sort(dense.a[:, feature][dense.a[:, feature] != 0])
        assert index.quantile(feature, 1.0) == a[-1]
        for q in (0.0, 0.3, 0.5, 0.9):
            exact = a[min(int(q * len(a)), len(a) - 1)]
            assert (
                abs(
                    histogram_bin(np.float32([index.quantile(feature, q)]))
                    - histogram_bin(np.float32([exact]))
                )
                <= 1
            )
    assert index.quantile(0, 0.5) == 0.0


def test_top_examples_are_the_strongest_one_per_document(case: Any) -> None:
    index, dense, blocks = case
    for feature in range(D_SAE):
        examples = index.top_examples(feature)
        assert placed(examples) == dense.strongest_per_document(feature)[:TOP_EXAMPLES]
        names = [example.document for example in examples]
        assert len(set(names)) == len(names)
        assert names == [blocks.names[dense.documents[example.position]] for example in examples]


def test_examples_show_their_surroundings(case: Any) -> None:
    index, dense, blocks = case
    tokenizer = LookupModel().tokenizer
    for feature in range(D_SAE):
        for example in all_examples(index, feature):
            row, place = divmod(example.position, CONTEXT)
            start = max(place - WINDOW_BEFORE, 0)
            stop = min(place - WINDOW_BEFORE + WINDOW, CONTEXT, int((blocks.documents[row] != PADDING).sum()))
            assert example.peak == place - start
            assert example.tokens == tokenizer.pieces(blocks.ids[row].tolist())[start:stop]
            exact = dense.a[row * CONTEXT + start : row * CONTEXT + stop, feature]
            assert example.activations[example.peak] == exact[example.peak] == example.value
            # One byte per activation: half a step of 1/255 of the largest; what fires is never shown as 0.
            np.testing.assert_allclose(example.activations, exact, atol=1.001 * exact.max() / 255)
            assert ((example.activations > 0) == (exact > 0)).all()


def test_narrower_windows_are_cut_out_of_the_widest(case: Any) -> None:
    index, _, _ = case
    wide, narrow = index.top_examples(1), index.top_examples(1, width=10)
    assert max(len(example.tokens) for example in narrow) == 10
    for a, b in zip(wide, narrow, strict=True):
        start = a.peak - b.peak
        assert a.tokens[start : start + len(b.tokens)] == b.tokens
        assert a.activations[start : start + len(b.tokens)].tolist() == b.activations.tolist()
    assert index.top_examples(1, width=1)[0].peak == 0
    with pytest.raises(InputError) as error:
        index.top_examples(1, width=0)
    assert str(error.value) == "An example 0 tokens wide cannot be shown: the width must be at least 1."
    with pytest.raises(InputError, match="opened by itself, without model and labels"):
        index.top_examples(1, width=65)


def test_bands_hold_what_they_claim(case: Any) -> None:
    index, dense, _ = case
    for feature in range(D_SAE):
        weakest_first = dense.firings(feature)
        weakest_first.sort(key=lambda f: (f[0], f[1]))
        n = len(weakest_first)
        rank = {position: i for i, (_, position) in enumerate(weakest_first)}
        bands = dict(index.range_examples(feature))
        names = [f"{10 * band}–{10 * band + 10}%" for band in range(N_BANDS)]
        assert list(bands) == [name for name in reversed(names) if name in bands]
        for band, name in enumerate(names):
            examples = bands.get(name, [])
            values = [example.value for example in examples]
            assert values == sorted(values, reverse=True)
            assert [dense.a[e.position, feature] for e in examples] == values
            if n <= 64:  # all firings are in the sample: the bands are exact, and full
                fractions = [(rank[e.position] + 0.5) / n for e in examples]
                assert all(band / N_BANDS <= f < (band + 1) / N_BANDS for f in fractions)
                population = sum(int((i + 0.5) / n * N_BANDS) == band for i in range(n))
                assert len(examples) == min(PER_BAND, population)


def test_top_tokens_are_exact(case: Any) -> None:
    index, dense, _ = case
    base = np.bincount(dense.ids[dense.kept], minlength=VOCABULARY) / dense.kept.sum()
    vocabulary = LookupModel().tokenizer.vocabulary()
    assert list(index.vocabulary) == vocabulary
    for feature in range(D_SAE):
        totals: dict[int, list[float]] = {}
        for value, position in dense.firings(feature):
            totals.setdefault(int(dense.ids[position]), []).append(value)
        expected = sorted(totals.items(), key=lambda t: (-sum(t[1]), t[0]))[:20]
        found = index.top_tokens(feature)
        assert [t.token_id for t in found] == [token for token, _ in expected]
        for statistic, (token, values) in zip(found, expected, strict=True):
            share = len(values) / index.count[feature]
            assert statistic.token == vocabulary[token]
            assert statistic.count == len(values)
            assert statistic.mean == np.float16(np.mean(values))
            assert statistic.share == pytest.approx(share, rel=1e-12)
            assert statistic.lift == pytest.approx(share / base[token], rel=1e-12)


def test_excluded_positions_never_appear(case: Any) -> None:
    index, dense, _ = case
    left_out = {END_OF_TEXT, *OUTLIERS}
    for feature in range(D_SAE):
        assert left_out.isdisjoint(t.token_id for t in index.top_tokens(feature))
        for example in all_examples(index, feature):
            assert dense.kept[example.position]
            assert dense.ids[example.position] not in left_out


def test_data_free_parts_in_the_index(case: Any) -> None:
    index, _, _ = case
    model, sae = LookupModel(), make_sae()
    W_dec = sae.W_dec.double().numpy()
    logits = (W_dec * model.gain.double().numpy()) @ model.W_U.double().numpy()
    logits -= logits.mean(axis=1, keepdims=True)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    for feature in range(D_SAE):
        order = np.argsort(logits[feature])
        assert [i for _, i, _ in index.promoted(feature)] == order[::-1][:20].tolist()
        assert [i for _, i, _ in index.suppressed(feature)] == order[:20].tolist()
        for token, i, logit in index.promoted(feature) + index.suppressed(feature):
            assert token == index.vocabulary[i]
            assert logit == pytest.approx(logits[feature, i], rel=1e-3)  # kept as float16
        moments = index.weights.records["moments"][feature]
        raw = (W_dec[feature] * model.gain.double().numpy()) @ model.W_U.double().numpy()
        expected = [raw.mean(), raw.std(), stats.skew(raw), stats.kurtosis(raw, fisher=False)]
        np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
        cosines = unit @ unit[feature]
        cosines[feature] = -2
        assert [i for i, _ in index.neighbours(feature)] == np.argsort(-cosines)[: D_SAE - 1].tolist()
        assert all(c == pytest.approx(cosines[i], rel=1e-3, abs=1e-6) for i, c in index.neighbours(feature))
        assert neighbours_of(sae, feature, 7) == [
            (i, pytest.approx(cosines[i], abs=1e-6)) for i in np.argsort(-cosines)[:7]
        ]


def test_lens_and_neighbours_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(50, 16, generator=generator), torch.randn(16, 70, generator=generator)
    gain = torch.rand(16, generator=generator)
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    whole = (*logit_lens(W_dec, gain, W_U, 10), *decoder_neighbours(unit, 0, 50, 10))
    monkeypatch.setattr(lens_module, "_TILE_BYTES", 4 * 70 * 7)  # seven features at a time
    halves = [decoder_neighbours(unit, 0, 30, 10), decoder_neighbours(unit, 30, 20, 10)]
    tiled = (*logit_lens(W_dec, gain, W_U, 10), *map(torch.cat, zip(*halves, strict=True)))
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b)
    assert decoder_neighbours(unit[:3], 0, 3, 10).feature.shape == (3, 2)


def test_off_the_residual_stream_there_is_no_logit_lens(tmp_path: Path) -> None:
    # As wide as d_model, and yet these are hidden units of the MLP, which the unembedding never reads.
    index = build(tmp_path / "index", make_blocks(10), make_sae(hook_name="blocks.0.mlp.hook_post"))
    assert index.promoted(1) == index.suppressed(1) == []
    assert len(index.neighbours(1)) == D_SAE - 1
    assert not index.weights.has_logit_lens


def test_a_fair_sample_is_uniform_and_its_bands_are_near_the_truth() -> None:
    # 400 features with 2,000 firings each, log-normal; the sample keeps 64 of each by hashed rank.
    d_sae, n, capacity = 400, 2000, 64
    random = np.random.default_rng(0)
    values = random.lognormal(0, 0.7, (d_sae, n)).astype(np.float32)
    feature = np.repeat(np.arange(d_sae), n)
    ranks = sampling_rank(feature, np.tile(np.arange(n), d_sae)).reshape(d_sae, n)
    chosen = np.argsort(ranks, axis=1)[:, :capacity]
    is_chosen = np.zeros((d_sae, n), dtype=np.float32)
    np.put_along_axis(is_chosen, chosen, 1, axis=1)
    overlap = is_chosen @ is_chosen.T  # 2 on average for features that choose independently
    assert (overlap - np.diag(overlap.diagonal())).max() < 16
    quantile = (values.argsort(axis=1).argsort(axis=1) + 0.5) / n
    sampled = np.take_along_axis(quantile, chosen, 1)
    # The mean of 25,600 uniform numbers has a standard deviation of 0.29 / 160.
    assert abs(sampled.mean() - 0.5) < 4 * 0.29 / 160

    sample = {"position": chosen, "value": np.take_along_axis(values, chosen, 1)}
    histogram = np.stack([np.bincount(histogram_bin(row), minlength=N_BINS) for row in values])
    bands = quantile_bands(sample, np.take_along_axis(ranks, chosen, 1), histogram, PER_BAND)
    row, band, _ = np.nonzero(bands >= 0)
    places = bands[bands >= 0]
    assert len(places) > 0.95 * d_sae * N_BANDS * PER_BAND
    truth = quantile[row, chosen[row, places]]
    outside = np.maximum(band / N_BANDS - truth, truth - (band + 1) / N_BANDS).clip(0)
    assert outside.max() < 0.1  # a bin holds up to 14% of these firings
    assert outside.mean() < 0.01


def test_histogram_bins_follow_the_edges_exactly() -> None:
    inner = HISTOGRAM_EDGES[1:-1]
    assert histogram_bin(inner).tolist() == list(range(1, N_BINS))
    assert histogram_bin(np.nextafter(inner, np.float32(0))).tolist() == list(range(N_BINS - 1))
    assert histogram_bin(np.float32([1e-30, 1e-3, 1e5, 1e30])).tolist() == [0, 0, N_BINS - 1, N_BINS - 1]


def test_any_density_can_be_told(tmp_path: Path) -> None:
    build(tmp_path / "index", make_blocks(10), make_sae())
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    manifest["n_tokens"] = 3_000_000_000
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    index = FeatureIndex.open(tmp_path / "index")
    rarest = int(np.where(index.count > 0, index.count, 10**9).argmin())
    assert 0 < index.density[rarest] == int(index.count[rarest]) / 3e9 < 1e-6


def test_same_bits_whatever_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, sae = make_blocks(30), make_sae()
    build(tmp_path / "whole", blocks, sae)
    build(tmp_path / "again", blocks, sae)
    monkeypatch.setattr(firings_module, "CHUNK_FIRINGS", 1)
    monkeypatch.setattr(firings_module, "FIRINGS_PER_FEATURE", 1)
    monkeypatch.setattr(firings_module, "blocks_per_batch", lambda *about: 1)
    n_chunks = sum(1 for _ in firings_module.stream_firings(LookupModel(), sae, blocks))  # type: ignore[arg-type]
    assert n_chunks > 20
    monkeypatch.setattr(pair_counts, "SORTED_AT_ONCE", 500)
    monkeypatch.setattr(pair_counts, "PAIRS_IN_MEMORY", 300)
    monkeypatch.setattr(pair_counts, "_PAIRS_AT_ONCE", 70)
    build(tmp_path / "cut", blocks, sae)
    same_files(tmp_path / "whole", tmp_path / "again")
    same_files(tmp_path / "whole", tmp_path / "cut", but=("features.npy",))
    whole, cut = (np.load(tmp_path / name / "features.npy") for name in ("whole", "cut"))
    for field in whole.dtype.names:  # in every stretch of text near misses are looked for
        assert field.startswith("miss_") or (whole[field] == cut[field]).all(), field


def test_from_a_store(tmp_path: Path) -> None:
    # Whole numbers below 256 are exact in the store's bfloat16.
    blocks, sae = make_blocks(20), make_sae()
    longer = make_blocks(30)
    assert (longer.ids[:15] == blocks.ids[:15]).all()  # same seed: the same text goes on
    first = replace(blocks, ids=blocks.ids[:15], documents=blocks.documents[:15])
    store = write_store(LookupModel(), longer, [HOOK], tmp_path / "store").at()  # type: ignore[arg-type]
    build(tmp_path / "live", first, sae)
    build(tmp_path / "stored", first, sae, activations=store)
    same_files(tmp_path / "live", tmp_path / "stored", but=("manifest.json",))

    with pytest.raises(InputError) as error:
        build(tmp_path / "x", make_blocks(20, seed=9), sae, activations=store)
    assert str(error.value) == (
        f"{tmp_path / 'store'} holds activations of other text than the index is to be made of."
    )
    with pytest.raises(InputError) as error:
        build(tmp_path / "x", first, make_sae(hook_name="blocks.0.hook_mlp_out"), activations=store)
    assert str(error.value) == (
        f"{tmp_path / 'store'} holds activations of {HOOK}, and the SAE reads blocks.0.hook_mlp_out: give a"
        " store of that hook."
    )
    assert not (tmp_path / "x").exists()


class TwoHookModel(LookupModel):
    """Beside HOOK, a hook whose activations are outliers at some tokens that are none at HOOK."""

    outliers = torch.tensor([5, 6, 7])

    def computes_before(self, hook_name: str, other: str) -> bool:
        return True

    def capture(self, ids: Tensor, hook_names: list[str], attention_mask: Any = None) -> dict[str, Tensor]:
        found = super().capture(ids, hook_names, attention_mask)
        y = torch.ones(*ids.shape, D_IN)
        y[torch.isin(ids, self.outliers)] = 99.0
        return {name: x if name == HOOK else y for name, x in found.items()}


def make_transcoder(max_norm_out: float | None) -> SparseAutoencoder:
    sae = make_sae(hook_name_out=WRITTEN, max_norm_out=max_norm_out)
    return SparseAutoencoder(replace(sae.config, transcoder=True), sae.weights, sae.metadata)


@pytest.mark.parametrize("source", ["live", "a store of both hooks", "a store of one hook"])
def test_a_transcoder_leaves_out_outliers_where_it_writes(source: str, tmp_path: Path) -> None:
    """Index, label scores and traces alike; with both in a store, the model does not run."""
    model: Any = TwoHookModel()
    blocks = make_blocks(20)
    hooks = [HOOK, WRITTEN] if source == "a store of both hooks" else [HOOK]
    store = None if source == "live" else write_store(model, blocks, hooks, tmp_path / "store").at(HOOK)
    if source == "a store of both hooks":
        model.capture = None
    index = build_index(model, make_transcoder(50.0), blocks, tmp_path / "bounded", activations=store)
    everywhere = build_index(model, make_transcoder(None), blocks, tmp_path / "all", activations=store)
    left_out = int(np.isin(blocks.ids, model.outliers.numpy()).sum())
    assert 0 < left_out == everywhere.n_tokens - index.n_tokens
    for token in model.outliers.tolist():
        assert everywhere._text["vocabulary_count"][token] > 0 == index._text["vocabulary_count"][token]
    told = {name: index.manifest["inputs"][name] for name in ("max_norm", "hook_name_out", "max_norm_out")}
    assert told == {"max_norm": MAX_NORM, "hook_name_out": WRITTEN, "max_norm_out": 50.0}
    assert everywhere.manifest["inputs"]["max_norm_out"] is None


def test_scores_and_traces_of_a_transcoder_leave_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = TwoHookModel()
    blocks, sae = make_blocks(20), make_transcoder(50.0)
    outlying = np.isin(blocks.ids, model.outliers.numpy())

    def n_positions(transcoder: SparseAutoencoder) -> int:
        return sum(len(firings.kept) for firings, _ in stream_firings(model, transcoder, blocks))

    assert n_positions(sae) == n_positions(make_transcoder(None)) - int(outlying.sum())
    ids = [9, 5, 10, 7, 11]
    monkeypatch.setattr(type(model.tokenizer), "encode", lambda self, text: ids)
    model.context_length = CONTEXT
    fired = trace_text(model, sae, "text").codes.to_dense().any(1)
    assert fired.tolist() == [True, False, True, False, True]
    assert trace_text(model, make_transcoder(None), "text").codes.to_dense().any(1).all()


def test_the_text_of_the_index_comes_back(tmp_path: Path) -> None:
    blocks = make_blocks(20, packing="isolated")
    index = build(tmp_path / "index", blocks, make_sae())
    assert index.blocks.hash == blocks.hash
    assert index.manifest["split"] == "train"
    dense = Dense(make_sae(), blocks)
    assert (index.count == (dense.a != 0).sum(axis=0)).all()


def test_characters_of_several_tokens_are_whole(tmp_path: Path) -> None:
    # The tiny tokenizer has no token for most of these characters: they are 2 to 4 byte tokens each.
    tokenizer = LookupModel().tokenizer
    text = "日本語 привет 😀 naïve — " * 12
    ids = np.array(tokenizer.encode(TEXT[2] + text), dtype=np.uint16)
    ids = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    blocks = TokenBlocks(ids, np.zeros(ids.shape, np.int32), ["ключ.txt"], "train", "concatenated", False)
    index = build(tmp_path / "index", blocks, make_sae())
    pieces = [tokenizer.pieces(row.tolist()) for row in ids]
    examples = [
        e for feature in range(D_SAE) for _, band in index.range_examples(feature, width=7) for e in band
    ]
    assert len(examples) > 100
    cut_inside = 0
    for example in examples:
        row, place = divmod(example.position, CONTEXT)
        start = place - example.peak
        assert example.tokens == pieces[row][start : start + len(example.tokens)]
        cut_inside += example.tokens[0] == ""
    assert cut_inside > 5  # windows that begin in the middle of a character
    assert index.top_examples(1)[0].document == "ключ.txt"
    assert any(statistic.token.startswith("<0x") for statistic in index.top_tokens(1))


def test_a_real_model(tmp_path: Path) -> None:
    """Counts, maxima and logit lens of a random SAE on a random GPT-2."""
    model = tiny_language_model("gpt2")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator)
    sae = SparseAutoencoder(
        SAEConfig(d_sae=64, k=4),
        Weights(rows, torch.zeros(64), rows / rows.norm(dim=1, keepdim=True), torch.zeros(32)),
        {"hook_name": "blocks.1.hook_resid_post"},
    )
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (6, 32)).astype(np.uint16)
    documents = np.repeat(np.arange(6, dtype=np.int32)[:, None], 32, axis=1)
    blocks = TokenBlocks(ids, documents, [str(i) for i in range(6)], "train", "isolated", False)
    index = build_index(model, sae, blocks, tmp_path / "index")
    x = model.capture(blocks.ids_tensor(0, 6), [sae.hook_name])[sae.hook_name].reshape(-1, 32)
    a = sae.encode(x).to_dense().numpy()
    assert (index.count == (a != 0).sum(axis=0)).all()
    np.testing.assert_allclose(index.max, a.max(axis=0), rtol=1e-5)
    gain, W_U = (tensor.detach().double() for tensor in model.logit_lens_weights())
    logits = (sae.W_dec[5].double() * gain) @ W_U
    assert [i for _, i, _ in index.promoted(5)] == logits.argsort(descending=True)[:20].tolist()
    assert index.promoted(5)[0][2] == pytest.approx(float(logits.max() - logits.mean()), rel=1e-3)


def test_reading_needs_no_torch_and_no_model(tmp_path: Path) -> None:
    index = build(tmp_path / "index", make_blocks(10), make_sae())
    code = (
        "import sys; from features.index import FeatureIndex; index = FeatureIndex.open(sys.argv[1]);"
        "print([e.position for e in index.top_examples(1)]); index.top_tokens(1); index.range_examples(1);"
        "index.promoted(1); index.neighbours(1); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert json.loads(done.stdout) == [example.position for example in index.top_examples(1)]


def test_an_index_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    blocks, sae, folder = make_blocks(10), make_sae(), tmp_path / "index"
    build(folder, blocks, sae)
    before = (folder / "manifest.json").stat().st_mtime_ns
    build(folder, blocks, sae)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    n_tokens = FeatureIndex.open(folder).n_tokens
    assert build(folder, make_blocks(20), sae).n_tokens > n_tokens  # other text: replaced
    assert build(folder, make_blocks(20), sae, inputs={"seed": 5}).manifest["inputs"]["seed"] == 5


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        FeatureIndex.open(tmp_path / "nothing")
    assert (
        str(error.value)
        == f"{tmp_path / 'nothing'} is not a finished feature index: it has no manifest.json."
    )

    blocks, sae, folder = make_blocks(10), make_sae(), tmp_path / "index"
    blocks.save(tmp_path / "tokens")
    with pytest.raises(InputError) as error:
        FeatureIndex.open(tmp_path / "tokens")
    assert str(error.value) == f"{tmp_path / 'tokens'} holds token blocks, not a feature index."
    with pytest.raises(InputError) as error:
        build(tmp_path / "tokens", blocks, sae)
    assert str(error.value) == f"{tmp_path / 'tokens'} holds token blocks, not a feature index."
    assert TokenBlocks.load(tmp_path / "tokens").hash == blocks.hash

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError) as error:
        build(tmp_path / "mine", blocks, sae)
    assert str(error.value) == (
        f"{tmp_path / 'mine'} holds something other than a feature index: give an empty or new folder."
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"

    build(folder, blocks, sae)
    assert FeatureIndex.open(folder, sae_hash=sae.hash).sae_hash == sae.hash
    with pytest.raises(InputError) as error:
        FeatureIndex.open(folder, sae_hash="0" * 64)
    assert str(error.value) == f"{folder} was made with another SAE: build the index of this one."
    (folder / "columns.npy").write_bytes(b"not numpy")
    with pytest.raises(InputError, match=r"columns\.npy cannot be read \(.*\): build the index again\.$"):
        _ = FeatureIndex.open(folder).count
    (folder / "columns.npy").unlink()
    with pytest.raises(InputError, match=r"lacks columns\.npy: build the index again\.$"):
        FeatureIndex.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["inputs"]["layout"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"was made by another version of saescope: build the index again\.$"
    ):
        FeatureIndex.open(folder)


def test_what_cannot_be_indexed_is_refused(tmp_path: Path) -> None:
    blocks, sae, folder = make_blocks(10), make_sae(), tmp_path / "index"
    narrow = SparseAutoencoder(
        sae.config,
        Weights(torch.ones(D_SAE, 4), torch.zeros(D_SAE), torch.ones(D_SAE, 4), torch.zeros(4)),
        sae.metadata,
    )
    with pytest.raises(InputError) as error:
        build(folder, blocks, narrow)
    assert str(error.value) == (
        f"The SAE reads vectors of width 4, and {HOOK} of lookup has width 8: choose the model that the SAE was"
        " trained on."
    )
    silence = replace(blocks, ids=np.full_like(blocks.ids, END_OF_TEXT))
    with pytest.raises(InputError) as error:
        build(folder, silence, sae)
    assert str(error.value) == (
        "The text holds special tokens only, and no feature fires there: give other text."
    )
    assert not folder.exists()
    index = build(folder, blocks, sae)
    for feature in (-1, D_SAE):
        with pytest.raises(InputError) as error:
            index.top_tokens(feature)
        assert str(error.value) == (
            f"Feature {feature} does not exist: the features of this SAE are 0 to {D_SAE - 1}."
        )


def test_a_full_disk_leaves_the_old_index(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file sizes can be limited on POSIX only")
    sae, folder = make_sae(), tmp_path / "index"
    before = build(folder, make_blocks(10), sae).n_tokens
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(InputError) as error:
            build(folder, make_blocks(20), sae)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"The disk has too little room for the feature index in {folder}, about 0.3 MB: free some, or choose a"
        " folder on another disk."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-index", "index", "index.partial"]
    assert FeatureIndex.open(folder).n_tokens == before
