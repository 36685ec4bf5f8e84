"""dictionary_learning and sparsify: we compute what they compute, and writing loses nothing of what was read.

The fixtures were written by the libraries, which also read what we write (``fixtures/*/write_fixture.py``).
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from fixtures.exchange import random_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from activations.errors import InputError
from sae.formats.convert import WRITERS, convert
from sae.formats.detect import load
from sae.formats.folding import with_input_bias, without_input_bias
from sae.formats.reading import read_content
from sae.model import SparseAutoencoder

FIXTURES = Path(__file__).parent / "fixtures"
CLASSES = sorted(path.parent.name for path in (FIXTURES / "dictionary_learning").glob("*/ae.pt"))
HOOKPOINTS = ("layers.1", "layers.1.mlp", "h.2.mlp")
FOLDERS = [
    *(FIXTURES / "dictionary_learning" / name for name in CLASSES),
    *(FIXTURES / "sparsify" / name for name in HOOKPOINTS),
]
FOLDED = ("AutoEncoderNew", "JumpReluAutoEncoder")  # these do not take b_dec off their input


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Of the one file of weights in a folder."""
    (file,) = (
        file for name in ("ae.pt", "sae.safetensors", "sae_weights.safetensors") for file in folder.glob(name)
    )
    return read_content(file)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_reads_what_the_library_wrote(folder: Path) -> None:
    """Codes and reconstructions equal the library's own."""
    expected = load_file(folder / "expected.safetensors")
    sae = SparseAutoencoder.load(folder)
    codes = sae.encode(expected["x"])
    assert expected["codes"].count_nonzero() > 8
    close(codes.to_dense(), expected["codes"])
    close(sae.decode(codes, expected["x"]), expected["reconstruction"])
    close(sae(expected["x"]), expected["reconstruction"])
    if folder.parent.name == "dictionary_learning":
        assert sae.hook_name == "blocks.1.hook_resid_post"
        assert (sae.metadata["model_name"], sae.metadata["context_size"]) == (
            "EleutherAI/pythia-70m-deduped",
            128,
        )
    else:
        assert sae.metadata["model_name"] == "EleutherAI/pythia-70m"


@pytest.mark.parametrize("name", sorted({*CLASSES} - {"AutoEncoderNew"}))
def test_saelens_makes_the_same_of_it(name: str) -> None:
    """Of dictionary_learning's files, all but one class, which it takes for another."""
    folder = FIXTURES / "dictionary_learning" / name
    expected = load_file(folder / "saelens.safetensors")
    sae = load(folder)
    close(sae.encode(expected["x"]).to_dense(), expected["codes"])
    close(sae(expected["x"]), expected["reconstruction"])


def test_architectures() -> None:
    """One threshold below 0, BatchTopK's before it was measured, lets every positive pre-activation pass."""
    found = {folder.name: load(folder).config.architecture for folder in FOLDERS}
    assert found == {
        "AutoEncoder": "relu",
        "AutoEncoderNew": "relu",
        "AutoEncoderTopK": "topk",
        "BatchTopKSAE": "jumprelu",
        "BatchTopKSAE_unmeasured": "jumprelu",
        "GatedAutoEncoder": "gated",
        "JumpReluAutoEncoder": "jumprelu",
        "MatryoshkaBatchTopKSAE": "jumprelu",
        "layers.1": "topk",
        "layers.1.mlp": "topk",
        "h.2.mlp": "topk",
    }


def test_sparsify_says_in_the_name_of_a_folder_where_it_belongs() -> None:
    saes = {name: load(FIXTURES / "sparsify" / name) for name in HOOKPOINTS}
    assert saes["layers.1"].hook_name == saes["layers.1"].hook_out == "blocks.1.hook_resid_post"
    assert (saes["h.2.mlp"].hook_name, saes["h.2.mlp"].hook_out) == (
        "blocks.2.mlp.hook_in",
        "blocks.2.hook_mlp_out",
    )
    assert saes["h.2.mlp"].W_skip is not None


@pytest.mark.parametrize("through", ["", "saelens"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_writing_what_was_read_loses_nothing(folder: Path, through: str, tmp_path: Path) -> None:
    """Every tensor bit by bit, in its number format, and the whole configuration; also by way of SAELens' format.

    Where the decoder's bias was folded into the encoder's, that one tensor comes back within its rounding.
    """
    source = folder
    if through:
        convert(folder, tmp_path / "between", through)
        source = tmp_path / "between"
    convert(source, tmp_path / folder.name, folder.parent.name)
    before, after = tensors_in(folder), tensors_in(tmp_path / folder.name)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        if folder.name in FOLDED and name in ("encoder.bias", "b_enc"):
            close(after[name], tensor, 1e-6)
        else:
            assert torch.equal(after[name], tensor), name
    config = "config.json" if folder.parent.name == "dictionary_learning" else "cfg.json"
    assert json.loads((folder / config).read_text()) == json.loads(
        (tmp_path / folder.name / config).read_text()
    )


WORDS = {
    "dictionary_learning": ("", "unit", "constant", "transcoder"),
    "sparsify": ("", "unit", "transcoder", "skip"),
    "saelens": ("", "unit", "transcoder", "narrow", "skip", "skip narrow", "layer_norm"),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_ours_come_back(data: st.DataObject, seed: int) -> None:
    """Weights, configuration and metadata, through every format that is written and every architecture it has."""
    to = data.draw(st.sampled_from(sorted(WRITERS)))
    architectures = ["topk"] if to == "sparsify" else ["relu", "topk", "jumprelu", "gated"]
    architecture = data.draw(st.sampled_from(architectures))
    words = data.draw(st.sampled_from(WORDS[to])).split()
    torch.manual_seed(seed)
    sae = random_sae(architecture, *words)
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[to](sae, Path(folder) / "sae")
        again = load(Path(folder) / "sae")
    assert again.config == sae.config
    version = {"sae_lens_version": "6.54.12"} if to == "saelens" else {}
    assert again.metadata == {**sae.metadata, **version}
    # Only dictionary_learning has classes whose encoder reads another input than ours.
    uncentred = architecture == "jumprelu" and "constant" not in words
    folds = to == "dictionary_learning" and uncentred != sae.config.transcoder
    for name, tensor in sae.weights.tensors().items():
        if folds and name in ("b_enc", "b_mag"):
            close(again.weights.tensors()[name], tensor, 1e-5)
        else:
            assert torch.equal(again.weights.tensors()[name], tensor), name
    x = torch.randn(5, sae.d_in)
    close(again(x), sae(x), 1e-4)


@settings(max_examples=40, deadline=None)
@given(gated=st.booleans(), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 10_000))
def test_folding_a_bias_is_undone_to_a_rounding(gated: bool, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    weights = random_sae("gated" if gated else "relu").weights
    folded = with_input_bias(weights)
    again = without_input_bias(folded)
    for name in ("b_enc", "b_mag") if gated else ("b_enc",):
        before, between, after = (w.tensors()[name].double() for w in (weights, folded, again))
        bound = torch.maximum(before.abs(), between.abs()) * torch.finfo(torch.float32).eps
        assert bool(((after - before).abs() <= bound).all())
    x = torch.randn(6, 8).double() * scale
    reads_x = x @ weights.encoder_rows.double().t() + weights.b_enc.double()
    reads_centred = (x - weights.b_dec.double()) @ weights.encoder_rows.double().t() + folded.b_enc.double()
    close(reads_centred, reads_x, 1e-5)


@pytest.mark.parametrize(("said", "k"), [({}, 32), ({"k": 20}, 20), ({"k": 12.6}, 13)])
def test_one_threshold_is_written_as_batch_topk(said: dict[str, float], k: int, tmp_path: Path) -> None:
    """What BatchTopK and Matryoshka leave: nothing is folded, so every tensor comes back bit by bit."""
    sae = random_sae("jumprelu", "constant")
    sae.metadata.update(said)
    WRITERS["dictionary_learning"](sae, tmp_path / "sae")
    trainer = json.loads((tmp_path / "sae" / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"]) == ("BatchTopKSAE", k)
    state = tensors_in(tmp_path / "sae")
    assert torch.equal(state["k"], torch.tensor(k, dtype=torch.int32))
    assert torch.equal(state["encoder.bias"], sae.b_enc)
    again = load(tmp_path / "sae")
    assert again.hash == sae.hash
    assert again.metadata == sae.metadata


# ---- what the formats cannot hold


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "topk narrow", "topk layer_norm"])
def test_sparsify_refuses_what_it_cannot_hold(name: str, tmp_path: Path) -> None:
    sae = random_sae(*name.split())
    with pytest.raises(InputError, match="sparsify holds TopK SAEs") as caught:
        WRITERS["sparsify"](sae, tmp_path / "sae")
    assert str(caught.value).endswith("write SAELens' format.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["topk skip", "relu narrow", "topk layer_norm"])
def test_dictionary_learning_refuses_what_it_cannot_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dictionary_learning has no class"):
        WRITERS["dictionary_learning"](random_sae(*name.split()), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_convert_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError) as caught:
        convert(FOLDERS[0], tmp_path / "mine", "saelens")
    assert str(caught.value) == f"{tmp_path / 'mine'} is there already: give the name of a new folder."
    with pytest.raises(InputError) as caught:
        convert(FOLDERS[0], tmp_path / "new", "gguf")
    assert (
        str(caught.value)
        == "'gguf' is no format that is written: choose saelens, dictionary_learning, sparsify."
    )


# ---- files that do not fit


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    WRITERS["dictionary_learning"](random_sae("topk"), tmp_path / "trainer_0")
    return tmp_path / "trainer_0"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


def test_a_class_that_is_not_that_of_the_tensors(trainer: Path) -> None:
    config = json.loads((trainer / "config.json").read_text())
    config["trainer"]["dict_class"] = "GatedAutoEncoder"
    (trainer / "config.json").write_text(json.dumps(config))
    assert refusal(trainer) == (
        f"{trainer / 'ae.pt'} holds the tensors b_dec, decoder.weight, encoder.bias, encoder.weight, k, threshold,"
        " which are not those of the class GatedAutoEncoder."
    )


def test_two_classes_with_the_same_tensors(trainer: Path) -> None:
    (trainer / "config.json").unlink()
    assert refusal(trainer) == (
        f"{trainer / 'ae.pt'} may be of the class AutoEncoderTopK or BatchTopKSAE: put the config.json that the library"
        " wrote beside it."
    )


def test_a_backup_and_a_checkpoint(trainer: Path) -> None:
    """While it trains, the library writes backups with more in them, and checkpoints a folder deeper."""
    wanted = load(trainer)
    state = read_content(trainer / "ae.pt")
    (trainer / "checkpoints").mkdir()
    torch.save(state, trainer / "checkpoints" / "ae_100.pt")
    assert load(trainer / "checkpoints" / "ae_100.pt").hash == wanted.hash
    torch.save({"step": 3, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 1.5}, trainer / "ae.pt")
    assert load(trainer).hash == wanted.hash


def test_a_scalar_that_is_none(trainer: Path) -> None:
    state = read_content(trainer / "ae.pt")
    torch.save({**state, "threshold": torch.tensor(float("nan"))}, trainer / "ae.pt")
    assert refusal(trainer) == f"{trainer / 'ae.pt'} says threshold = nan, which must be a number."


def test_shapes_that_do_not_fit(trainer: Path) -> None:
    state = read_content(trainer / "ae.pt")
    torch.save({**state, "b_dec": torch.zeros(9)}, trainer / "ae.pt")
    assert "'b_dec': (9,)" in refusal(trainer)
    assert "where the class AutoEncoderTopK promises" in refusal(trainer)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"activation": "groupmax"},
            "asks for the activation 'groupmax', and this saescope has topk only of what",
        ),
        (
            {"signed": True},
            "asks for signed activations, and this saescope has topk only of what sparsify has.",
        ),
        (
            {"skip_connection": True},
            "asks for a skip connection in an SAE, and this saescope has them in transcoders",
        ),
        ({"k": 2.5}, "says k = 2.5, and it must be a whole number."),
        ({"num_latents": 23}, "promises {'encoder.weight': (23, 8)"),
        ({"d_in": None}, "says d_in = None, and it must be a number above 0."),
    ],
)
def test_settings_of_sparsify_that_we_do_not_have(
    keys: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    WRITERS["sparsify"](random_sae("topk"), tmp_path / "layers.1")
    path = tmp_path / "layers.1" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    assert sentence in refusal(tmp_path / "layers.1")


def test_early_files_of_sparsify_lack_keys(tmp_path: Path) -> None:
    sae = random_sae("topk")
    WRITERS["sparsify"](sae, tmp_path / "layers.1")
    (tmp_path / "layers.1" / "cfg.json").write_text(
        '{"d_in": 8, "expansion_factor": 3, "k": 4, "signed": false}'
    )
    again = load(tmp_path / "layers.1")
    assert (again.hash, again.config.k) == (sae.hash, 4)
