"""A run in the hand: its parts, features, steering and traces, and folders that are no run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    END_OF_TEXT,
    one_thread,
    random_ids,
    tiny_hf_model,
    tiny_tokenizer,
)

from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.files import write_json, write_manifest
from activations.models import LanguageModel
from features.build import build_index
from features.demonstration import choose_demonstration, own_tokens, promoted_share
from features.labels import Labels
from features.run import Run, open_run
from features.steering import edit_for, steer
from sae.architectures.base import Weights
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.run import RunFolder, write_run_config

HOOK = "blocks.1.hook_resid_post"
D_SAE = 40


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny random model and a random SAE."""
    root = tmp_path_factory.mktemp("run")
    tiny_hf_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    model = LanguageModel.load(str(root / "model"))
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=generator), dim=1)
    weights = Weights(rows, torch.zeros(D_SAE), rows.clone(), torch.zeros(32))
    metadata = {"hook_name": HOOK, "model_hash": model.hash, "context_size": 16, "prepend_bos": False}
    sae = SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=4), weights, metadata)
    run = RunFolder(root / "tiny")
    config = TrainConfig(model=str(root / "model"), hook_name=HOOK, sae=sae.config, tokens=1000)
    write_run_config(run.path, config)
    sae.save(run.sae)
    write_manifest(run.sae, "sae", {}, sae_hash=sae.hash)
    ids = random_ids(20, 16).numpy().astype(np.uint16)
    ids[:, 5] = END_OF_TEXT
    documents = np.repeat(np.arange(20, dtype=np.int32)[:, None], 16, axis=1)
    blocks = TokenBlocks(ids, documents, [f"d{n}" for n in range(20)], "train", "concatenated", False)
    build_index(model, sae, blocks, run.index)
    Labels.open(run.labels).set(3, "three")
    write_json(run.evaluation, {"l0": 4.0, "inputs": {"sae": sae.hash}})
    run.metrics.write_text('{"tokens": 500}\n{"tokens": 1000}\n')
    return run.path


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder)


def alive(run: Run) -> int:
    """The feature that fires most often."""
    return int(run.index.count.argmax())


def test_a_run_has_its_parts(run: Run, folder: Path) -> None:
    assert run.name == "tiny"
    assert run.config.tokens == 1000
    assert run.sae.d_sae == run.index.d_sae == D_SAE
    assert run.model.n_layers == 3
    assert run.evaluation["l0"] == 4.0
    assert run.metrics == [{"tokens": 500}, {"tokens": 1000}]
    assert run.model is run.model
    assert run.sae is run.sae


def test_a_feature_tells_what_the_index_and_the_labels_know(run: Run) -> None:
    number = alive(run)
    feature, index = run.feature(number), run.index
    assert (feature.index, feature.count) == (number, int(index.count[number]))
    assert feature.density == pytest.approx(feature.count / index.n_tokens)
    assert feature.max == float(index.max[number]) > 0
    assert feature.top_tokens == index.top_tokens(number)
    assert feature.promoted == index.promoted(number)
    assert feature.neighbours == index.neighbours(number)
    assert feature.histogram.sum() == feature.count
    assert feature.top_examples()[0].value == pytest.approx(feature.max)
    assert run.feature(3).label is not None
    assert str(run.feature(3)) == "Feature 3: three"
    assert run.feature(4).label is None


def test_a_label_written_now_is_seen_by_a_feature_that_is_already_there(run: Run) -> None:
    feature = run.feature(5)
    run.labels.set(5, "five")
    assert feature.label is not None
    assert feature.label.text == "five"


def test_the_index_opens_without_torch(folder: Path) -> None:
    code = (
        "import sys; from features.run import open_run; r = open_run(sys.argv[1]);"
        "r.feature(3).label; r.index.density; sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_steering_clamps_in_units_of_the_maximum(run: Run) -> None:
    feature, ids = alive(run), random_ids(2, 6, seed=5)
    before = run.model.capture(ids, [HOOK])[HOOK]
    with run.steered({feature: 2.0}):
        after = run.model.capture(ids, [HOOK])[HOOK]
    own = run.sae.encode(before.reshape(-1, 32)).column(feature).view(2, 6, 1)
    expected = before + (2 * run.feature(feature).max - own) * run.sae.W_dec[feature]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_the_residual_unit_is_the_mean_norm_at_the_hook(run: Run) -> None:
    blocks = run.index.blocks
    x = run.model.capture(blocks.ids_tensor(0, blocks.n_blocks), [HOOK])[HOOK]
    kept = blocks.ids_tensor(0, blocks.n_blocks) != END_OF_TEXT
    assert run.residual_norm == pytest.approx(float(x[:16][kept[:16]].norm(dim=-1).mean()), rel=1e-5)
    with run.steered({3: 0.5}, method="add", unit="residual"):
        moved = run.model.capture(random_ids(1, 4), [HOOK])[HOOK]
    change = moved - run.model.capture(random_ids(1, 4), [HOOK])[HOOK]
    torch.testing.assert_close(change.norm(dim=-1), torch.full((1, 4), 0.5 * run.residual_norm))


def test_a_trace_gives_the_codes_of_every_token(run: Run) -> None:
    text = "import os\n<|endoftext|>def read(self):\n    return naïve" * 2
    trace = run.trace(text)
    assert "".join(trace.tokens) == text
    ids = run.model.tokenizer.encode(text)
    assert trace.ids == ids
    assert len(ids) > 32  # three windows of 16
    dense = np.zeros((len(ids), D_SAE), np.float32)
    for start in range(0, len(ids), 16):
        window = torch.tensor([ids[start : start + 16]])
        x = run.model.capture(window, [HOOK])[HOOK][0]
        dense[start : start + 16] = run.sae.encode(x).to_dense().numpy()
    dense[np.array(ids) == END_OF_TEXT] = 0
    np.testing.assert_allclose(trace.codes.to_dense().numpy(), dense, atol=1e-5)
    feature = alive(run)
    np.testing.assert_allclose(trace.activations(feature), dense[:, feature], atol=1e-5)
    at = trace.at(2)
    assert [f for f, _ in at] == np.argsort(-dense[2], kind="stable")[: len(at)].tolist()
    strongest = trace.strongest(5)
    peaks = dense.max(axis=0)
    assert [f for f, _, _ in strongest] == np.argsort(-peaks, kind="stable")[:5].tolist()
    assert all(dense[position, f] == pytest.approx(value, abs=1e-5) for f, value, position in strongest)
    relative = trace.strongest(1, maxima=np.where(np.arange(D_SAE) == feature, 1e-6, 1.0))
    assert relative[0][0] == feature


def test_a_demonstration_can_be_done_again(run: Run) -> None:
    index = run.index
    shown = choose_demonstration(run.model, run.sae, index, prompt="def", max_new_tokens=6)
    edit = edit_for(run.sae, shown.feature, shown.strength, maximum=float(index.max[shown.feature]))
    again = steer(run.model, [edit], "def", seed=shown.seed, max_new_tokens=6, temperature=shown.temperature)
    assert (again.default, again.steered) == (shown.default, shown.steered)
    assert shown.own_tokens == own_tokens(index, shown.feature)
    assert shown.steered_share == promoted_share(run.model, shown.steered, shown.own_tokens)


def test_the_share_of_own_tokens_is_counted(run: Run) -> None:
    ids = run.model.tokenizer.encode("def read(self)")
    assert promoted_share(run.model, "def read(self)", frozenset(ids[:2])) == pytest.approx(
        sum(i in ids[:2] for i in ids) / len(ids)
    )
    assert promoted_share(run.model, "", frozenset(ids)) == 0


def refusal(action: object) -> str:
    with pytest.raises(InputError) as caught:
        action()  # type: ignore[operator]
    return str(caught.value)


def test_bad_requests_are_one_sentence_each(run: Run, tmp_path: Path) -> None:
    assert refusal(lambda: open_run(tmp_path)) == f"{tmp_path} is not a run: it has no run.toml."
    assert refusal(lambda: run.feature(40)) == "There is no feature 40: tiny has the features 0 to 39."
    assert (
        refusal(lambda: run.steered({40: 1.0}))
        == "There is no feature 40: this SAE has the features 0 to 39."
    )
    assert refusal(lambda: run.trace("")) == "The text is empty: give at least one character."


def test_another_models_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny_hf_model("llama", seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    run = open_run(folder)
    run.config = replace(run.config, model=str(tmp_path / "other"))
    assert refusal(lambda: run.model) == (
        f"The weights of {tmp_path / 'other'} are not those that the SAE in {folder} was trained on: open"
        " the run with"
        " the model it was made with."
    )


def test_an_index_of_another_sae_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "features" / "train" / "manifest.json").read_text())
    manifest["inputs"]["sae_hash"] = "0" * 64
    (copy / "features" / "train" / "manifest.json").write_text(json.dumps(manifest))
    assert "another SAE" in refusal(lambda: open_run(copy).index)


def test_figures_and_labels_of_another_sae_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(folder, copy)
    (copy / "labels.sqlite").unlink()
    Labels.open(copy / "labels.sqlite").put_automatic([], {"sae_hash": "another"})
    write_json(copy / "evaluation.json", {"l0": 4.0, "inputs": {"sae": "another"}})
    with pytest.raises(InputError) as error:
        _ = open_run(copy).labels
    assert str(error.value) == f"{copy / 'labels.sqlite'} holds labels of another SAE: run sae index {copy}."
    with pytest.raises(InputError) as error:
        _ = open_run(copy).evaluation
    assert str(error.value) == f"{copy / 'evaluation.json'} measures another SAE: run sae evaluate {copy}."


def test_an_sae_alone_can_be_opened(run: Run, tmp_path: Path) -> None:
    """Of whatever format: its model, traces and absolute strengths are there, and nothing that a run would add."""
    from sae.formats.convert import convert

    convert(run.folder.sae, tmp_path / "layers.1", "sparsify")
    alone = open_run(tmp_path / "layers.1", model=run.model)
    assert alone.sae.hash == run.sae.hash
    assert (alone.config.hook_name, alone.config.sae.k) == (HOOK, 4)
    text = "one two three"
    assert torch.equal(alone.trace(text).codes.to_dense(), run.trace(text).codes.to_dense())
    assert alone.edit({3: 2.0}, unit="activation").hook_name == HOOK
    assert alone.metrics == []
    for part in ("index", "evaluation"):
        with pytest.raises(InputError):
            getattr(alone, part)
    with pytest.raises(InputError) as caught:
        _ = open_run(tmp_path / "layers.1").model
    assert (
        str(caught.value)
        == f"{tmp_path / 'layers.1'} does not say of which model it is: open it with that model."
    )
    assert sorted(path.name for path in (tmp_path / "layers.1").iterdir()) == ["cfg.json", "sae.safetensors"]
