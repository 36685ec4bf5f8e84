"""SAELens' format: we read what SAELens 6.54 wrote (the fixture), and our own files give back what was saved.

That SAELens reads what we write is checked by ``fixtures/saelens/write_fixture.py``, in SAELens' own environment.
"""

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.errors import InputError
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

FIXTURE = Path(__file__).parent / "fixtures" / "saelens"
NAMES = sorted(path.parent.name for path in FIXTURE.glob("*/cfg.json"))
FINISHED = [name for name in NAMES if not name.startswith(("old_", "checkpoint"))]


def random_sae(
    architecture: str, d_in: int, d_sae: int, k: int, *, unit_rows: bool, seed: int
) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    rows, W_dec = torch.randn(2, d_sae, d_in, generator=generator)
    if unit_rows:
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = Weights(
        rows, torch.randn(d_sae, generator=generator), W_dec, torch.randn(d_in, generator=generator)
    )
    config = SAEConfig(architecture="topk" if architecture == "topk" else "relu", d_sae=d_sae, k=k)
    return SparseAutoencoder(config, weights, {"hook_name": "blocks.0.hook_resid_pre", "context_size": 64})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_fixture_is_complete() -> None:
    assert len(NAMES) == len(list(FIXTURE.glob("*/expected.safetensors"))) == 20


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_saelens_wrote(name: str) -> None:
    """Codes and reconstructions equal what SAELens computed from the same files."""
    expected = load_file(FIXTURE / name / "expected.safetensors")
    sae = SparseAutoencoder.load(FIXTURE / name)
    codes = sae.encode(expected["x"])
    close(codes.to_dense() / units(sae, expected["x"]), expected["codes"])
    close(sae.decode(codes, expected["x"]), expected["reconstruction"])
    close(sae(expected["x"]), expected["reconstruction"])
    assert (sae.d_in, sae.d_sae) == (8, 24)
    assert sae.hook_name == "blocks.1.hook_resid_post"
    assert sae.metadata["model_name"] == "gpt2"
    assert sae.metadata["context_size"] == 128
    if "topk" in name and "batch" not in name:
        assert (codes.l0(), sae.config.k) == (4.0, 4)
    if "transcoder" in name:
        assert (sae.d_out, sae.hook_out) == (6, "blocks.2.hook_resid_post")


def units(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Ours of the activations over SAELens', which has them in the units of what it encodes."""
    if sae.normalisation == "layer_norm":
        return x.std(dim=1, keepdim=True)
    return x.norm(dim=1, keepdim=True) / 8**0.5 if sae.normalisation else torch.ones(len(x), 1)


def test_nothing_of_the_old_layout_is_lost() -> None:
    """Before 6.0 it lay beside what says how the SAE computes; SAELens keeps some of it."""
    metadata = SparseAutoencoder.load(FIXTURE / "old_standard").metadata
    assert metadata["hook_layer"] == 1
    assert metadata["dataset_path"] == "some/dataset"
    assert metadata["activation_fn"] == "relu"
    assert "d_in" not in metadata


def test_a_checkpoint_has_the_threshold_it_had_reached() -> None:
    """``topk_threshold`` 0.6 for inputs times 2.5: 0.24 in the units of the activations."""
    sae = SparseAutoencoder.load(FIXTURE / "checkpoint")
    assert sae.weights.threshold is not None
    close(sae.weights.threshold, torch.full((24,), 0.6 / 2.5))
    close(sae.W_dec.norm(dim=1), torch.ones(24))


def test_a_checkpoint_of_early_jumprelu(tmp_path: Path) -> None:
    """Before 6.48 a JumpReLU in training had the logarithms of its thresholds."""
    tensors = load_file(FIXTURE / "jumprelu" / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text((FIXTURE / "jumprelu" / "cfg.json").read_text())
    expected = load_file(FIXTURE / "jumprelu" / "expected.safetensors")
    close(SparseAutoencoder.load(tmp_path).encode(expected["x"]).to_dense(), expected["codes"])


def test_a_decoder_of_any_norm_is_read_as_unit_rows() -> None:
    """SAELens divides codes by the norms when it decodes; we do it once, on reading."""
    stored = load_file(FIXTURE / "topk_rescaled" / "sae_weights.safetensors")["W_dec"].norm(dim=1)
    assert stored.std() > 0.1
    close(SparseAutoencoder.load(FIXTURE / "topk_rescaled").W_dec.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("name", NAMES)
def test_saving_a_foreign_sae_keeps_its_function(name: str, tmp_path: Path) -> None:
    expected = load_file(FIXTURE / name / "expected.safetensors")
    sae = SparseAutoencoder.load(FIXTURE / name)
    sae.save(tmp_path / "sae")
    again = SparseAutoencoder.load(tmp_path / "sae")
    close(again.encode(expected["x"]).to_dense() / units(sae, expected["x"]), expected["codes"])
    close(again(expected["x"]), expected["reconstruction"])
    assert again.metadata == {**sae.metadata, "sae_lens_version": "6.54.12"}


@pytest.mark.parametrize(
    "name", [name for name in FINISHED if "uncentred" not in name and name != "topk_rescaled"]
)
def test_what_needs_no_folding_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    SparseAutoencoder.load(FIXTURE / name).save(tmp_path / "sae")
    before, after = (
        load_file(folder / "sae_weights.safetensors") for folder in (FIXTURE / name, tmp_path / "sae")
    )
    assert before.keys() == after.keys()
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]), tensor
    configs = [json.loads((folder / "cfg.json").read_text()) for folder in (FIXTURE / name, tmp_path / "sae")]
    for key in (
        "architecture",
        "d_in",
        "d_sae",
        "d_out",
        "k",
        "apply_b_dec_to_input",
        "normalize_activations",
    ):
        assert configs[0].get(key) == configs[1].get(key), key


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "relu"]),
    d_in=st.integers(1, 12),
    d_sae=st.integers(2, 40),
    share=st.floats(0, 1),
    unit_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_saving_and_loading_gives_the_same_bits(
    architecture: str, d_in: int, d_sae: int, share: float, unit_rows: bool, seed: int
) -> None:
    k = 1 + int(share * (d_sae - 2))
    sae = random_sae(architecture, d_in, d_sae, k, unit_rows=unit_rows, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        sae.save(Path(folder) / "sae")
        again = SparseAutoencoder.load(Path(folder) / "sae")
        flag = json.loads((Path(folder) / "sae" / "cfg.json").read_text()).get("rescale_acts_by_decoder_norm")
    for name, tensor in sae.weights.tensors().items():
        assert torch.equal(again.weights.tensors()[name], tensor), name
    assert again.hash == sae.hash
    assert again.config.architecture == sae.config.architecture
    # The flag is what SAELens' users expect of a trained TopK SAE, and true only where it changes nothing.
    assert flag == (None if architecture == "relu" else unit_rows)
    x = torch.randn(9, d_in, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again.encode(x).to_dense(), sae.encode(x).to_dense())
    assert torch.equal(again(x), sae(x))
    assert again.metadata == {**sae.metadata, "sae_lens_version": "6.54.12"}


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    first, second = (random_sae("topk", 4, 8, 2, unit_rows=True, seed=seed) for seed in (1, 2))
    first.save(tmp_path / "sae")
    second.save(tmp_path / "sae")
    assert SparseAutoencoder.load(tmp_path / "sae").hash == second.hash
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cfg.json", "sae", "sae_weights.safetensors"]


# ---- bad input: whole sentences, and nothing on disk changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_sae("topk", 4, 8, 2, unit_rows=True, seed=0).save(tmp_path / "sae")
    return tmp_path / "sae"


def change(folder: Path, **keys: object) -> None:
    """Put keys into cfg.json; None takes one out."""
    config = json.loads((folder / "cfg.json").read_text()) | keys
    (folder / "cfg.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def refused(folder: Path) -> str:
    """The sentence with which loading refuses, after checking that it left the disk alone."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        SparseAutoencoder.load(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return str(caught.value)


def test_no_configuration(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    assert refused(folder) == f"{folder} holds no SAE: it has no cfg.json."
    missing = folder / "nowhere"
    assert refused(missing) == f"{missing} holds no SAE: it has no cfg.json."
    assert not missing.exists()


def test_no_tensors(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()
    assert refused(folder) == f"{folder} holds no SAE: it has no sae_weights.safetensors."


def test_configuration_is_no_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")
    reason = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert refused(folder) == f"{folder / 'cfg.json'} is not valid JSON ({reason})."


@pytest.mark.parametrize(
    "data",
    [b"", b"no safetensors", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 7) + b"nothing"],
    ids=["empty", "text", "header beyond the end", "header no JSON"],
)
def test_corrupt_tensors(folder: Path, data: bytes) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(data)
    assert refused(folder) == f"{file} is corrupt: it is not a readable safetensors file."


def test_cut_tensors(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert refused(folder) == f"{file} is corrupt: it is not a readable safetensors file."


def test_tensors_that_are_not_finite(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["b_enc"][3] = float("nan")
    save_file(tensors, file)
    assert refused(folder) == f"{file} is corrupt: it holds values that are not finite."


@pytest.mark.parametrize("architecture", ["temporal", None, ["topk"]])
def test_unknown_architecture(folder: Path, architecture: object) -> None:
    change(folder, architecture=architecture)
    assert refused(folder) == (
        f"{folder / 'cfg.json'} names the architecture {architecture!r}, and this saescope knows batchtopk, gated,"
        " jumprelu, matryoshka_batchtopk, standard, topk, and transcoders of them."
    )


def test_unknown_normalisation(folder: Path) -> None:
    change(folder, normalize_activations="covariance_whitening")
    assert refused(folder) == (
        f"{folder / 'cfg.json'} asks for normalize_activations='covariance_whitening' at run time, which this"
        " saescope does not do: fold the normalisation into the weights first."
    )


@pytest.mark.parametrize(
    ("key", "value"), [("d_in", None), ("d_sae", "many"), ("k", None), ("k", [2]), ("k", 2.7)]
)
def test_sizes_missing(folder: Path, key: str, value: object) -> None:
    change(folder, **{key: value})
    assert refused(folder) == f"{folder / 'cfg.json'} lacks a whole number for d_in, d_sae or k."


def test_k_too_large(folder: Path) -> None:
    change(folder, k=8)
    assert refused(folder) == "k is 8, and must be at least 1 and less than the number of features, 8."


def test_shapes_do_not_fit(folder: Path) -> None:
    change(folder, d_sae=9)
    found = "{'W_dec': (8, 4), 'W_enc': (4, 8), 'b_dec': (4,), 'b_enc': (8,)}"
    promised = "{'W_enc': (4, 9), 'b_enc': (9,), 'W_dec': (9, 4), 'b_dec': (4,)}"
    assert (
        refused(folder)
        == f"{folder / 'sae_weights.safetensors'} holds {found}, where cfg.json promises {promised}."
    )


def test_extra_tensor(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    save_file({**load_file(file), "threshold": torch.zeros(8)}, file)
    found = "{'W_dec': (8, 4), 'W_enc': (4, 8), 'b_dec': (4,), 'b_enc': (8,), 'threshold': (8,)}"
    promised = "{'W_enc': (4, 8), 'b_enc': (8,), 'W_dec': (8, 4), 'b_dec': (4,)}"
    assert refused(folder) == f"{file} holds {found}, where cfg.json promises {promised}."
