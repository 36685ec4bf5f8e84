"""Foreign files cannot run code, and what is damaged or unknown is refused with one sentence."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from activations.errors import InputError
from sae.formats.detect import load


class Hostile:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


def read_or_refused(path: Path) -> str:
    """The sentence with which it is refused, or nothing."""
    try:
        load(path)
    except InputError as error:
        return str(error)
    return ""


def weights(**more: Any) -> dict[str, Any]:
    shapes = {"encoder.weight": (24, 8), "encoder.bias": (24,), "decoder.weight": (8, 24), "bias": (8,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | more


@pytest.mark.parametrize("name", ["ae.pt", "sae.pth"])
@pytest.mark.parametrize("how", ["among the tensors", "alone", "plain pickle", "old torch"])
def test_a_hostile_pickle_is_refused_and_does_not_run(how: str, name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "trainer_0" / name
    path.parent.mkdir()
    hostile = Hostile(marker)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(weights(extra=hostile)))
    else:
        content = hostile if how == "alone" else weights(extra=hostile)
        torch.save(content, path, _use_new_zipfile_serialization=how != "old torch")
    because = (
        "is corrupt: it is not a readable torch file."
        if how == "plain pickle"  # of Python, which torch does not write
        else "is refused: it is a pickle that asks for more than tensors and plain values, and reading it could run"
        " code; ask its author for safetensors."
    )
    assert refusal(path.parent) == f"{path} {because}"
    assert not marker.exists()
    # The same bytes do run where they are trusted: this test can fail.
    with path.open("rb") as file:
        (pickle.load if how == "plain pickle" else lambda _: torch.load(path, weights_only=False))(file)
    assert marker.exists()


def test_a_hostile_numpy_archive_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "params.npz"
    objects = np.array([Hostile(marker)], dtype=object)
    np.savez(path, w_enc=np.zeros((8, 24)), w_dec=np.zeros((24, 8)), threshold=objects)
    assert refusal(path) == (
        f"{path} is refused: it holds Python objects, and reading them could run code; only arrays of numbers are read."
    )
    assert not marker.exists()


@settings(max_examples=60, deadline=None)
@given(
    suffix=st.sampled_from([".pt", ".npz", ".safetensors"]), cut=st.floats(0, 1), noise=st.binary(max_size=40)
)
def test_damaged_files(
    suffix: str, cut: float, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere and with anything behind: a sentence, whatever the reader under it raises."""
    path, content = tmp_path_factory.mktemp("damaged") / f"params{suffix}", weights()
    if suffix == ".npz":
        np.savez(path, w_enc=np.zeros((8, 24)), w_dec=np.zeros((24, 8)), threshold=np.zeros(24))
    elif suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(
            {"w_enc": torch.zeros(8, 24), "w_dec": torch.zeros(24, 8), "threshold": torch.zeros(24)}, path
        )
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * (len(data) - 1))] + noise)
    try:
        sae = load(path)
    except InputError as error:
        sentence = str(error)
    else:  # a torch file without its last bytes may still be whole
        assert torch.equal(sae.b_dec, content["bias"])
        return
    assert sentence.startswith(str(path))
    assert sentence.count("\n") == 0


def test_not_finite(tmp_path: Path) -> None:
    torch.save(weights(bias=torch.full((8,), float("nan"))), tmp_path / "ae.pt")
    assert refusal(tmp_path) == f"{tmp_path / 'ae.pt'} is corrupt: it holds values that are not finite."
    torch.save(weights(bias=torch.full((8,), 1e300, dtype=torch.float64)), tmp_path / "ae.pt")  # no float32
    assert refusal(tmp_path) == f"{tmp_path / 'ae.pt'} is corrupt: it holds values that are not finite."


def test_what_should_be_a_tensor_is_none(tmp_path: Path) -> None:
    torch.save(weights(bias=[1.0] * 8), tmp_path / "ae.pt")
    assert "promises" in refusal(tmp_path)
    torch.save(weights(**{"encoder.weight": torch.zeros(24)}), tmp_path / "ae.pt")
    assert (
        refusal(tmp_path)
        == f"{tmp_path / 'ae.pt'} holds a encoder.weight of shape (24,), which must be a matrix."
    )
    torch.save(torch.zeros(3), tmp_path / "ae.pt")
    assert (
        refusal(tmp_path) == f"{tmp_path / 'ae.pt'} holds no SAE: its content is not a dictionary of tensors."
    )


def test_an_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{i}": torch.zeros(2) for i in range(9)}, path)
    assert refusal(tmp_path) == (
        f"{path} holds layers.0, layers.1, layers.2, layers.3, layers.4, layers.5, layers.6, layers.7, …: that is no"
        " SAE of a format that is read (saelens, dictionary_learning, sparsify, openai, gemma_scope, gemma_scope_2,"
        " llama_scope)."
    )
    (tmp_path / "notes.txt").write_text("")
    assert refusal(tmp_path / "notes.txt") == (
        f"{tmp_path / 'notes.txt'} is no file of weights: those end in .safetensors, .pt, .pth, .npz."
    )


def test_several_saes_in_one_folder(tmp_path: Path) -> None:
    for name in ("10.pt", "11.pt"):
        torch.save(weights(), tmp_path / name)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds several files of weights: give the path of one of them (10.pt, 11.pt)."
    )
    assert load(tmp_path / "11.pt").d_sae == 24


FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = sorted(
    path
    for name in ("cfg.json", "config.json", "hyperparams.json")
    for path in FIXTURES.rglob(name)
    if path.parent.name != "sparsify"
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**13),
    st.floats(),
    st.text("ab1./-é ", max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), path=st.sampled_from(CONFIGS), value=ODD)
def test_odd_configurations(
    data: st.DataObject, path: Path, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any value in the place of any other: the SAE is read, or refused with a sentence."""
    config = json.loads(path.read_text())
    table, keys = config, sorted(config)
    key = data.draw(st.sampled_from(keys))
    if isinstance(config[key], dict) and config[key] and data.draw(st.booleans()):
        table = config[key]
        key = data.draw(st.sampled_from(sorted(table)))
    table[key] = value
    folder = tmp_path_factory.mktemp("odd") / path.parent.name
    shutil.copytree(path.parent, folder)
    (folder / path.name).write_text(json.dumps(config))
    assert "\n" not in read_or_refused(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.parent.relative_to(FIXTURES)))
def test_configurations_that_are_no_table(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / path.parent.name
    shutil.copytree(path.parent, folder)
    for text in ("[1, 2]", "3", "null", "{"):
        (folder / path.name).write_text(text)
        assert "\n" not in read_or_refused(folder)
