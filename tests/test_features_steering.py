"""Steering: every edit against the sum it is defined by, in float64; units; positions left alone; text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, one_thread, random_ids, tiny_language_model
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.errors import InputError
from features.steering import edit_features, edit_for, edit_rows, output_scores, steer
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE = 32, 48
POSITIONS = torch.tensor([[-1, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]])
KEPT = POSITIONS >= 0


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def random_sae(
    architecture: str = "topk", dtype: torch.dtype = torch.float64, **metadata: object
) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = Weights(normal(D_SAE, D_IN), normal(D_SAE), normal(D_SAE, D_IN), normal(D_IN))
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=8)
    return SparseAutoencoder(config, weights, {"hook_name": HOOK, **metadata})


def random_x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *POSITIONS.shape, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).to(dtype)


def activations(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Dense ``[batch, pos, d_sae]``, the slow and obvious way."""
    return sae.encode(x.reshape(-1, D_IN)).to_dense().view(*x.shape[:2], -1)


def with_features_at(sae: SparseAutoencoder, x: Tensor, targets: dict[int, float]) -> Tensor:
    """The definition: replace the terms in x = Σ a_i W_dec[i] + b_dec + error, kept positions only."""
    a = activations(sae, x)
    error = x - (a @ sae.W_dec + sae.b_dec)
    for feature, target in targets.items():
        a[..., feature] = target
    return torch.where(KEPT[..., None], a @ sae.W_dec + sae.b_dec + error, x)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_clamping_replaces_exactly_the_terms_of_the_features(architecture: str) -> None:
    sae, x = random_sae(architecture), random_x()
    targets = {5: 3.0, 7: 0.0, 11: -1.5}
    edited = edit_features(sae, targets, unit="activation").apply(x, POSITIONS)
    torch.testing.assert_close(edited, with_features_at(sae, x, targets), rtol=0, atol=1e-12)
    assert not torch.equal(edited, x)


def test_clamping_a_feature_to_its_own_value_changes_nothing() -> None:
    sae, x = random_sae(), random_x()[:1, 1:2]
    own = activations(sae, x)[0, 0]
    firing, silent = int(own.argmax()), int(own.argmin())
    edit = edit_features(sae, {firing: float(own[firing]), silent: 0.0}, unit="activation")
    assert torch.equal(edit.apply(x, torch.tensor([[0]])), x)


def test_ablating_is_clamping_to_zero() -> None:
    sae, x = random_sae(), random_x()
    fired = int(activations(sae, x)[KEPT].sum(0).argmax())
    ablated = edit_for(sae, fired, method="ablate").apply(x, POSITIONS)
    assert torch.equal(ablated, edit_for(sae, fired, 0.0).apply(x, POSITIONS))
    assert not torch.equal(ablated, x)


def test_adding_adds_decoder_rows_whatever_fires() -> None:
    sae, x = random_sae(), random_x()
    edited = edit_features(sae, {3: 2.0, 4: -0.5}, method="add", unit="activation").apply(x, POSITIONS)
    expected = torch.where(KEPT[..., None], x + 2.0 * sae.W_dec[3] - 0.5 * sae.W_dec[4], x)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-12)


def test_units_of_strength() -> None:
    sae, x = random_sae(), random_x()
    at = {"method": "add"}
    in_activations = edit_for(sae, 3, 6.0, unit="activation", **at).apply(x, POSITIONS)
    in_maxima = edit_for(sae, 3, 1.5, unit="max", maximum=4.0, **at).apply(x, POSITIONS)
    torch.testing.assert_close(in_maxima, in_activations, rtol=0, atol=1e-12)
    in_norms = edit_for(sae, 3, 0.5, unit="residual", residual_norm=10.0, **at).apply(x, POSITIONS)
    lengths = (in_norms - x).norm(dim=-1)
    torch.testing.assert_close(lengths, 5.0 * KEPT.double(), rtol=0, atol=1e-12)


def test_special_positions_and_outlier_norms_are_left_alone() -> None:
    sae, x = random_sae(max_norm=20.0), random_x()
    x[0, 2] *= 20.0 / x[0, 2].norm() * 1.01
    for method in ("add", "clamp"):
        changed = (edit_for(sae, 3, 5.0, unit="activation", method=method).apply(x, POSITIONS) != x).any(-1)
        expected = KEPT.clone()
        expected[0, 2] = False
        assert torch.equal(changed, expected)


def test_an_edit_leaves_its_input_and_keeps_its_dtype() -> None:
    sae = random_sae(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = random_x(dtype)
        before = x.clone()
        edited = edit_for(sae, 3, 5.0, unit="activation", method="add").apply(x, POSITIONS)
        assert torch.equal(x, before)
        assert edited.dtype == dtype
        exact = torch.where(KEPT[..., None], x.double() + 5 * sae.W_dec[3].double(), x.double())
        torch.testing.assert_close(edited, exact.to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["add", "clamp"])
def test_rows_of_a_batch_are_steered_each_by_its_own_feature(method: str) -> None:
    sae, x = random_sae(), random_x()
    together = edit_rows(sae, [9, 4], [3.0, 2.0], method).apply(x, POSITIONS)
    for row, (feature, activation) in enumerate([(9, 3.0), (4, 2.0)]):
        alone = edit_for(sae, feature, activation, method=method, unit="activation")
        expected = alone.apply(x[row : row + 1], POSITIONS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=0, atol=1e-12)


def refused(**changes: object) -> str:
    arguments: dict[str, object] = {"feature": 3, "strength": 1.0, "maximum": 2.0, **changes}
    with pytest.raises(InputError) as caught:
        edit_for(random_sae(), **arguments)
    return str(caught.value)


def test_bad_settings_are_one_sentence_each() -> None:
    assert refused(feature=48) == "There is no feature 48: this SAE has the features 0 to 47."
    assert refused(method="push") == "There is no steering method 'push': it is one of add, clamp, ablate."
    assert (
        refused(unit="volts")
        == "There is no unit 'volts' of strength: it is one of max, activation, residual."
    )
    assert refused(strength=float("nan")) == "The strength of feature 3 is nan; it must be a finite number."
    assert refused(method="ablate") == (
        "Ablating feature 3 sets it to 0 and takes no strength, but 1.0 was given: leave it at 0, or clamp."
    )
    assert refused(maximum=0.0) == (
        "Feature 3 never fired in the index, so that it has no maximum to measure strength by: use the unit"
        ' "activation" or "residual".'
    )
    assert "needs the maximum of feature 3" in refused(maximum=None)
    assert "needs residual_norm" in refused(unit="residual")


def model_sae() -> SparseAutoencoder:
    return random_sae(dtype=torch.float32)


def test_steering_changes_the_text_and_only_inside_the_edit() -> None:
    model = tiny_language_model("llama")
    edit = edit_for(model_sae(), 3, 50.0, method="add", unit="activation")
    pair = steer(model, [edit], "def read", seed=3, max_new_tokens=8)
    assert pair.default == model.generate("def read", seed=3, max_new_tokens=8)[0]
    assert pair.steered != pair.default
    with model.edited(edit):
        assert pair.steered == model.generate("def read", seed=3, max_new_tokens=8)[0]


def test_a_feature_held_at_a_value_is_seen_there_by_the_model() -> None:
    """Clamping at the hook and then capturing there gives x + (target − a) W_dec[f]."""
    model, sae = tiny_language_model("llama"), model_sae()
    ids = random_ids(2, 6)
    ids[0, 2] = END_OF_TEXT
    x = model.capture(ids, [HOOK])[HOOK]
    with model.edited(edit_for(sae, 3, 2.0, unit="activation")):
        edited = model.capture(ids, [HOOK])[HOOK]
    change = (2.0 - activations(sae, x)[..., 3:4]) * sae.W_dec[3]
    change[0, 2] = 0
    torch.testing.assert_close(edited, x + change, rtol=1e-5, atol=1e-4)


@dataclass
class LensIndex:
    """What output scores read of an index."""

    max: np.ndarray
    tokens: np.ndarray
    blocks: TokenBlocks

    def promoted(self, feature: int) -> list[tuple[str, int, float]]:
        return [("", int(token), 0.0) for token in self.tokens[feature]]


def test_output_scores_equal_one_feature_and_prompt_at_a_time() -> None:
    model, sae = tiny_language_model("llama"), model_sae()
    prompts = random_ids(3, 5)
    tokens = torch.randint(320, (D_SAE, 10), generator=torch.Generator().manual_seed(4))
    index = LensIndex(np.full(D_SAE, 3.0), tokens.numpy(), None)  # type: ignore[arg-type]
    features = [40, 3, 17]

    def value(prompt: Tensor, feature: int) -> float:
        p = model.logits(prompt[None])[0, -1].softmax(-1)
        best = max(float(p[t]) for t in tokens[feature])
        rank = sorted(p.tolist(), reverse=True).index(best)
        return (1 - rank / 320) * best

    expected = []
    for feature in features:
        gains = []
        for prompt in prompts:
            before = value(prompt, feature)
            with model.edited(edit_for(sae, feature, 6.0, method="add", unit="activation")):
                gains.append(value(prompt, feature) - before)
        expected.append(sum(gains) / len(gains))
    scores = output_scores(model, sae, index, features, strength=2.0, prompts=prompts)  # type: ignore[arg-type]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
