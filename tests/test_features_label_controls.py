"""Controls of labels: neurons and random directions that fire as often as the features they are compared with."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_language_model

from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.models import LanguageModel
from features.explain import make_labels
from features.firing_table import FiringTable
from features.label_controls import control_evidence, mlp_neurons, random_directions
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

HOOK = "blocks.1.hook_resid_post"
D_SAE = 100  # more than there are neurons


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def text(seed: int) -> TokenBlocks:
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (12, 30)).astype(np.uint16)
    ids[:, 4] = END_OF_TEXT
    documents = np.repeat(np.arange(12, dtype=np.int32)[:, None], 30, axis=1)
    return TokenBlocks(ids, documents, [f"d{n}" for n in range(12)], "train", "isolated", False)


def make_sae(hook_name: str = HOOK) -> SparseAutoencoder:
    rows = torch.randn(D_SAE, 32, generator=torch.Generator().manual_seed(1))
    weights = Weights(rows, torch.zeros(D_SAE), rows.clone(), torch.zeros(32))
    return SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=4), weights, {"hook_name": hook_name, "max_norm": 40.0})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.mark.parametrize("make", [mlp_neurons, random_directions])
def test_a_control_fires_exactly_as_often_on_the_same_positions(model: LanguageModel, make: object) -> None:
    blocks, sae = text(0), make_sae()
    own = FiringTable.of(model, sae, blocks)
    count = own.count
    count[3] = 0
    control = make(model, sae, blocks, count)  # type: ignore[operator]
    evidence = control_evidence(model, control, blocks, text(1))
    assert evidence.train.count.tolist() == count.tolist()
    assert evidence.train.kept.tolist() == own.kept.tolist()
    x = model.capture(blocks.ids_tensor(0, 12), [control.hook_name])[control.hook_name].reshape(
        len(blocks.ids) * 30, -1
    )
    for feature in (0, 50, 99):
        direction = control.directions[feature]
        read = x @ direction if direction.is_floating_point() else x[:, direction]
        read = read.numpy()[own.kept]
        strongest = np.sort(own.kept[np.argsort(-read, kind="stable")[: count[feature]]])
        assert evidence.train.position[evidence.train.feature == feature].tolist() == strongest.tolist()
    assert len(make_labels(evidence)) == D_SAE


def test_neurons_are_those_of_the_layer_each_as_often_as_needed(model: LanguageModel) -> None:
    control = mlp_neurons(model, make_sae(), text(0), np.full(D_SAE, 3))
    assert control.hook_name == "blocks.1.mlp.hook_post"
    used = np.bincount(control.directions.numpy(), minlength=72)
    assert len(used) == 72
    assert set(used.tolist()) == {1, 2}


def test_an_sae_outside_of_the_layers_has_no_neurons_to_be_compared_with(model: LanguageModel) -> None:
    with pytest.raises(InputError) as caught:
        mlp_neurons(model, make_sae("hook_embed"), text(0), np.full(D_SAE, 3))
    assert (
        str(caught.value)
        == "hook_embed is in no layer, so that no neurons can be compared with its features."
    )
