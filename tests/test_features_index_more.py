"""What else the index knows, from near misses to tags; and passes over the text that stop, or are shared."""

import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import ended, forked, kill_at
from lookup_model import (
    CONTEXT,
    D_SAE,
    HOOK,
    MAX_NORM,
    OUTLIERS,
    Dense,
    LookupModel,
    build,
    make_blocks,
    make_sae,
    same_files,
)
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread

from activations.blocks import PADDING
from activations.errors import InputError
from activations.processes import Processes
from activations.writer import write_store
from features import build as build_module
from features import coactivation as coactivation_module
from features import firings as firings_module
from features.index import FeatureIndex
from features.layout import COACTIVE, N_BINS, NEAR_MISSES, NEXT_TOKENS
from features.tags import RULES
from sae.architectures.base import Weights
from sae.model import SparseAutoencoder


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=["relu", "topk"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    sae, blocks = make_sae(request.param), make_blocks()
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(firings_module, "CHUNK_FIRINGS", 1500)
        patch.setattr(firings_module, "FIRINGS_PER_FEATURE", 1)
        patch.setattr(firings_module, "blocks_per_batch", lambda *about: 3)
        index = build(tmp_path_factory.mktemp("index") / "index", blocks, sae)
    return index, Dense(sae, blocks), blocks


def test_near_misses_are_the_features_tokens_without_a_firing(case: Any) -> None:
    index, dense, _ = case
    n_found = 0
    for feature in range(D_SAE):
        own = {token.token_id for token in index.top_tokens(feature)}
        misses = index.near_misses(feature)
        assert len(misses) <= NEAR_MISSES
        assert len({miss.document for miss in misses}) == len(misses)
        for miss in misses:
            assert dense.kept[miss.position]
            assert dense.a[miss.position, feature] == 0 == miss.value
            assert dense.ids[miss.position] in own
            row, place = divmod(miss.position, CONTEXT)
            start = row * CONTEXT + place - miss.peak
            exact = dense.a[start : start + len(miss.tokens), feature]
            np.testing.assert_allclose(miss.activations, exact, atol=1.001 * exact.max() / 255)
        n_found += len(misses)
    assert n_found > 30


def test_tokens_that_follow_are_exact(case: Any) -> None:
    index, dense, _ = case
    for feature in range(D_SAE):
        counts: dict[int, int] = {}
        for _, position in dense.firings(feature):
            place = position % CONTEXT
            if place + 1 < CONTEXT and dense.documents[position + 1] == dense.documents[position]:
                token = int(dense.ids[position + 1])
                counts[token] = counts.get(token, 0) + 1
        expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:NEXT_TOKENS]
        assert [(t.token_id, t.count) for t in index.next_tokens(feature)] == expected


def test_places_entropy_and_what_fires_elsewhere_are_exact(case: Any) -> None:
    index, dense, blocks = case
    sae = make_sae(index.manifest["inputs"]["architecture"])
    documents = dense.documents
    begins = {int(d): int(np.flatnonzero(documents == d)[0]) for d in np.unique(documents) if d != PADDING}
    first_kept: set[int] = set()
    for key in {(int(d), p // CONTEXT) for p, d in enumerate(documents) if d != PADDING}:
        inside = [p for p in range(key[1] * CONTEXT, key[1] * CONTEXT + CONTEXT) if documents[p] == key[0]]
        kept = [p for p in inside if dense.kept[p]]
        first_kept.update(kept[:1])
    x = LookupModel().capture(blocks.ids_tensor(0, blocks.n_blocks), ["x"])["x"].view(-1, 8)
    everywhere = sae.encode(x).to_dense().numpy() != 0
    is_special = (dense.ids == END_OF_TEXT) & (documents != PADDING)
    is_outlier = np.isin(dense.ids, OUTLIERS) & (x.norm(dim=1).numpy() > MAX_NORM)
    assert (index.column("special") == everywhere[is_special].sum(axis=0)).all()
    assert (index.column("outlier") == everywhere[is_outlier].sum(axis=0)).all()
    assert (index.column("left_out") == everywhere[is_outlier | is_special].sum(axis=0)).all()
    assert not index.column("bos").any()  # this tokenizer has none
    for feature in range(D_SAE):
        positions = np.flatnonzero(dense.a[:, feature])
        firsts: dict[int, int] = {}
        for p in positions:
            firsts.setdefault(int(documents[p]), int(p) - begins[int(documents[p])])
        assert index.column("documents")[feature] == len(firsts)
        assert index.column("first_place")[feature] == np.float32(np.mean(list(firsts.values()) or [0]))
        assert index.column("starts")[feature] == sum(int(p) in first_kept for p in positions)
        shares = np.bincount(dense.ids[positions], minlength=1) / max(len(positions), 1)
        entropy = -sum(p * np.log2(p) for p in shares if p)
        assert index.token_entropy[feature] == pytest.approx(entropy, abs=1e-5)


def test_coactivation_is_exact_on_its_sample(case: Any) -> None:
    index, dense, _ = case  # the text is so short that every position is in the sample
    assert index.manifest["n_sampled"] == dense.kept.sum()
    fires = (dense.a != 0).astype(np.int64)
    both, count = fires.T @ fires, fires.sum(axis=0)
    assert fires.sum(axis=1).max() < coactivation_module.MOST_PER_POSITION
    assert (index.column("sampled") == count).all()
    for feature in range(D_SAE):
        together = both[feature].astype(np.float64)
        together[feature] = 0
        likeness = together / np.maximum(count[feature] + count - together, 1)
        order = sorted(np.flatnonzero(together), key=lambda f: (-likeness[f], f))[:COACTIVE]
        found = index.coactive(feature)
        assert [c.feature for c in found] == order
        for c in found:
            n = both[feature, c.feature]
            assert c.count == n
            assert c.jaccard == pytest.approx(likeness[c.feature])
            chance = count[feature] * count[c.feature] / dense.kept.sum()
            assert c.pmi == pytest.approx(np.log2(n / chance))


def test_only_the_strongest_of_a_crowded_position_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactivation_module, "MOST_PER_POSITION", 2)
    sae, blocks = make_sae(), make_blocks(20)
    index, dense = build(tmp_path / "index", blocks, sae), Dense(sae, blocks)
    expected = np.zeros(D_SAE, dtype=np.int64)
    for row in dense.a:
        strongest = sorted(np.flatnonzero(row), key=lambda f: (-row[f], f))[:2]
        expected[strongest] += 1
    assert (index.column("sampled") == expected).all()


def test_a_sample_of_positions_estimates_coactivation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coactivation_module, "SAMPLED_POSITIONS", 400)
    blocks = make_blocks(60)
    index = build(tmp_path / "index", blocks, make_sae())
    assert 300 < index.manifest["n_sampled"] < 500
    share = index.column("sampled") / index.manifest["n_sampled"]
    assert np.abs(share - index.density).max() < 4 * 0.5 / 300**0.5


def test_tags_follow_their_rules(case: Any) -> None:
    index, dense, _ = case
    vocabulary = LookupModel().tokenizer.vocabulary()
    n = len(dense.kept)
    for feature in range(D_SAE):
        names = {tag.name for tag in index.tags(feature)}
        a = dense.a[:, feature]
        positions = np.flatnonzero(a)
        left_out = int(index.column("left_out")[feature])
        assert ("dead" in names) == (len(positions) + left_out == 0)
        assert ("dense" in names) == (len(positions) >= 0.1 * dense.kept.sum())
        cosine = max(c for _, c in index.neighbours(feature))
        assert ("duplicate" in names) == (cosine >= 0.9)
        if not len(positions):
            continue
        counts = np.bincount(dense.ids[positions], minlength=VOCABULARY)
        assert ("single token" in names) == (counts.max() >= 0.9 * len(positions))
        digits = sum(counts[i] for i, text in enumerate(vocabulary) if text.strip().isdigit())
        assert ("numeric" in names) == (digits >= 0.8 * len(positions))
        followed = [
            p + 1
            for p in positions
            if p + 1 < n and (p + 1) % CONTEXT and dense.documents[p + 1] == dense.documents[p]
        ]
        promoted = {i for _, i, _ in index.promoted(feature)}
        said = sum(int(dense.ids[p]) in promoted for p in followed)
        assert ("says" in names) == bool(followed and said >= 0.5 * len(followed))
        outlier = int(index.column("outlier")[feature])
        assert ("high-norm only" in names) == (outlier >= 0.9 * (left_out + len(positions)))
    assert {"dead", "dense"} <= {tag.name for f in (0, 1) for tag in index.tags(f)}
    assert all(
        str(rule.threshold)[0] in rule.tooltip or "%" in rule.tooltip or rule.name == "dead" for rule in RULES
    )


def test_what_training_kept_makes_no_example_if_it_is_special_or_an_outlier(tmp_path: Path) -> None:
    """An SAE trained on everything: these positions count, and yet never win an example."""
    sae = make_sae(exclude_special_tokens=False)
    sae.metadata["max_norm"] = None
    blocks = make_blocks(30)
    index = build(tmp_path / "index", blocks, sae)
    ids = blocks.ids.reshape(-1)
    assert index.n_tokens == blocks.n_tokens
    assert index._text["vocabulary_count"][[END_OF_TEXT, *OUTLIERS]].all()
    shown = [e for f in range(D_SAE) for e in [*index.top_examples(f), *index.near_misses(f)]]
    shown += [e for f in range(D_SAE) for _, band in index.range_examples(f) for e in band]
    assert len(shown) > 500
    assert not {END_OF_TEXT, *OUTLIERS} & {int(ids[e.position]) for e in shown}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_pass_that_stops_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    sae, blocks = make_sae(), make_blocks()
    for name, value in (("CHUNK_FIRINGS", 400), ("FIRINGS_PER_FEATURE", 1)):
        monkeypatch.setattr(firings_module, name, value)
    monkeypatch.setattr(firings_module, "blocks_per_batch", lambda *about: 2)
    monkeypatch.setattr(build_module, "SAVE_EVERY", 300)
    build(tmp_path / "whole" / "index", blocks, sae)

    add, save = build_module.Gathering.add, build_module.Gathering.save
    saved: list[int] = []

    def add_until(self: Any, firings: Any) -> None:
        if len(saved) > after:
            raise Stopped
        add(self, firings)

    def counted_save(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(1)

    monkeypatch.setattr(build_module.Gathering, "save", counted_save)
    monkeypatch.setattr(build_module.Gathering, "add", add_until)
    folder = tmp_path / "stopped" / "index"
    with pytest.raises(Stopped):
        build(folder, blocks, sae)
    assert not folder.exists()
    monkeypatch.setattr(build_module.Gathering, "add", add)
    read: list[int] = []
    monkeypatch.setattr(
        build_module.Gathering, "add", lambda self, f: (read.append(len(f.kept)), add(self, f))[1]
    )
    index = build(folder, blocks, sae)
    assert 0 < sum(read) < index.n_tokens  # it went on, and did not begin again
    same_files(tmp_path / "whole", tmp_path / "stopped")


def test_a_pass_over_other_text_does_not_go_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firings_module, "CHUNK_FIRINGS", 400)
    monkeypatch.setattr(firings_module, "FIRINGS_PER_FEATURE", 1)
    monkeypatch.setattr(build_module, "SAVE_EVERY", 100)
    monkeypatch.setattr(firings_module, "blocks_per_batch", lambda *about: 2)
    write = build_module._write
    monkeypatch.setattr(build_module, "_write", lambda *arguments: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        build(tmp_path / "index", make_blocks(30), make_sae())
    monkeypatch.setattr(build_module, "_write", write)
    other = make_blocks(30, seed=8)
    index = build(tmp_path / "index", other, make_sae())
    assert (index.count == (Dense(make_sae(), other).a != 0).sum(axis=0)).all()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Threads stand for processes. Documents go on from one part of the text to the next."""
    sae, blocks = make_sae(), make_blocks(31)
    for name, value in (("CHUNK_FIRINGS", 400), ("FIRINGS_PER_FEATURE", 1)):
        monkeypatch.setattr(firings_module, name, value)
    monkeypatch.setattr(firings_module, "blocks_per_batch", lambda *about: 1)
    alone = build(tmp_path / "alone" / "index", blocks, sae)
    together, barrier = tmp_path / "together" / "index", threading.Barrier(size)
    problems: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with torch.inference_mode():
                build(
                    together, blocks, sae, processes=Processes(rank, size, lambda: barrier.wait(60) and None)
                )
        except BaseException as problem:
            problems.append(problem)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    found = FeatureIndex.open(together)
    assert found.n_tokens == alone.n_tokens
    for name in alone._columns.dtype.names:
        np.testing.assert_allclose(found.column(name), alone.column(name), rtol=1e-6, err_msg=name)
    for name in alone._records.dtype.names:
        if not name.startswith("miss_"):
            assert (found.array(name) == alone.array(name)).all(), name
    assert not (tmp_path / "together" / "index.partial").exists()


def test_a_record_is_small() -> None:
    from features.layout import COLUMNS, feature_record
    from features.weights import weight_record

    assert feature_record(1).itemsize + COLUMNS.itemsize + weight_record(True, True).itemsize <= 6000
    assert feature_record(1)["histogram"].shape == (N_BINS,)


def test_the_index_of_another_layout_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build(folder, make_blocks(10), make_sae())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["layout"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "columns.npy").write_bytes(b"of another version")
    assert build(folder, make_blocks(10), make_sae()).count.sum() > 0


@pytest.mark.parametrize(
    ("call", "number"), [("write", 3), ("write", 40), ("fsync", 70), ("rename", 60), ("rename", 90)]
)
def test_a_killed_pass_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    sae, blocks = make_sae(), make_blocks(40)
    for name, value in (("CHUNK_FIRINGS", 400), ("FIRINGS_PER_FEATURE", 1)):
        monkeypatch.setattr(firings_module, name, value)
    monkeypatch.setattr(firings_module, "blocks_per_batch", lambda *about: 2)
    monkeypatch.setattr(build_module, "SAVE_EVERY", 300)
    build(tmp_path / "whole" / "index", blocks, sae)
    folder = tmp_path / "killed" / "index"

    def work() -> None:
        kill_at(call, number)
        build(folder, blocks, sae)

    assert ended(forked(work)) == signal.SIGKILL
    build(folder, blocks, sae)
    same_files(tmp_path / "whole" / "index", folder)
    assert not folder.with_name("index.partial").exists()


def test_two_commands_do_not_build_one_index_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stream = tmp_path / "index", build_module.stream_firings

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(InputError) as error:
            build(folder, make_blocks(10), make_sae())
        assert str(error.value) == f"Another command is building {folder}: wait for it."
        return stream(*arguments, **options)

    monkeypatch.setattr(build_module, "stream_firings", meanwhile)
    assert build(folder, make_blocks(10), make_sae()).count.sum() > 0


def test_what_lies_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "thesis.pt").write_text("precious")
    index = build(tmp_path / "index", make_blocks(10), make_sae())
    assert index.promoted(1)
    assert (tmp_path / "weights" / "thesis.pt").read_text() == "precious"
    with pytest.raises(InputError, match="holds something other than a weight index: move it away"):
        build(tmp_path / "other", make_blocks(10), make_sae(), weights_folder=tmp_path / "weights")


def test_an_open_index_stays_what_it_was(tmp_path: Path) -> None:
    before = build(tmp_path / "index", make_blocks(10), make_sae())
    other = make_blocks(40, seed=5)
    build(tmp_path / "index", other, make_sae())
    fresh = build(tmp_path / "again", make_blocks(10), make_sae())
    assert (before.count == fresh.count).all()
    for feature in range(D_SAE):
        assert before.histogram(feature).sum() == fresh.count[feature]
        assert before.top_tokens(feature) == fresh.top_tokens(feature)


def test_tokens_that_do_not_count_stay_known(tmp_path: Path) -> None:
    """In a chat only some roles' tokens count."""
    blocks = make_blocks(20)
    blocks = replace(blocks, counted=np.random.default_rng(0).random(blocks.ids.shape) < 0.5)
    index = build(tmp_path / "index", blocks, make_sae())
    assert index.blocks.hash == blocks.hash
    assert index.blocks.counted is not None
    assert (index.blocks.counted == blocks.counted).all()


def test_a_single_feature_has_no_neighbours(tmp_path: Path) -> None:
    sae = make_sae()
    w = sae.weights
    one = SparseAutoencoder(
        replace(sae.config, d_sae=1, k=1),
        Weights(w.encoder_rows[1:2], w.b_enc[1:2], w.W_dec[1:2], w.b_dec),
        sae.metadata,
    )
    index = build(tmp_path / "index", make_blocks(10), one)
    assert index.neighbours(0) == index.coactive(0) == []
    assert index.count[0] > 100


def test_a_store_of_other_weights_is_refused(tmp_path: Path) -> None:
    blocks = make_blocks(10)
    other = LookupModel()
    other.hash = "other-weights"
    store = write_store(other, blocks, [HOOK], tmp_path / "store").at()  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        build(tmp_path / "index", blocks, make_sae(), activations=store)
    assert (
        str(error.value) == f"{tmp_path / 'store'} holds activations of other weights than those of lookup."
    )


def test_wider_surroundings_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from features import index as index_module

    sae, blocks = make_sae(), make_blocks(30)
    index, dense = build(tmp_path / "index", blocks, sae), Dense(sae, blocks)
    narrow = index.top_examples(5)

    class Run:
        model = LookupModel()

    Run.sae, Run.index = sae, index  # type: ignore[attr-defined]
    monkeypatch.setattr(index_module, "WINDOW", 8)  # as if the index had kept less
    monkeypatch.setattr(index_module, "WINDOW_BEFORE", 5)
    wide = index.of_run(Run()).top_examples(5, width=30)  # type: ignore[arg-type]
    assert [e.position for e in wide] == [e.position for e in narrow]
    for example in wide:
        row, place = divmod(example.position, CONTEXT)
        start = max(place - 18, 0)
        assert example.peak == place - start
        assert len(example.tokens) == min(
            30, CONTEXT - start, int((blocks.documents[row] >= 0).sum()) - start
        )
        exact = dense.a[row * CONTEXT + start : row * CONTEXT + start + len(example.tokens), 5]
        assert example.activations.tolist() == exact.tolist()
