"""Transcoders: read at one hook, write at another. Inference, evaluation in the place of what they predict (against
hooks by hand over single blocks, and in cases whose answer is known), controls, steering, and the whole road."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_sae_evaluate import assert_agrees, make_blocks
from tiny_models import END_OF_TEXT, one_thread, random_ids, tiny_hf_model, tiny_tokenizer
from torch import Tensor, nn

from activations.blocks import PADDING, TokenBlocks
from activations.errors import InputError
from activations.exclusion import Moments
from activations.models import LanguageModel
from features.steering import edit_features, edit_rows
from features.trace import mean_norm
from sae.architectures.base import Weights
from sae.architectures.registry import ARCHITECTURES, architecture_from
from sae.config import SAEConfig, TrainConfig
from sae.controls import ReducedRank, control_autoencoders, evaluated_activations, reference_activations
from sae.evaluate import evaluate
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.trainer import Trainer

READ, WRITTEN = "blocks.0.mlp.hook_post", "blocks.1.hook_mlp_out"
D_IN, D_OUT, D_SAE, K = 72, 32, 96, 6


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def hf_model() -> Any:
    """A random Llama whose predictions depend on the context, in float64."""
    made = tiny_hf_model("llama", seed=3).double()
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(hf_model(), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def reference(model: LanguageModel) -> Tensor:
    """Activations of other text than the test blocks, both hooks side by side: ``[n, 72 + 32]``."""
    blocks = make_blocks(n_documents=40, n_tokens=600, split="train", seed=1)
    found = model.capture(blocks.ids_tensor(0, blocks.n_blocks), [READ, WRITTEN])
    text = torch.from_numpy(blocks.ids.astype(np.int64)) != END_OF_TEXT
    return torch.cat([found[READ][text], found[WRITTEN][text]], dim=1)


def transcoder(architecture: Any = "topk", *, skip: bool = False, **metadata: Any) -> SparseAutoencoder:
    """Random weights; where the architecture leaves it open, a bias lets few features fire."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = Weights(normal(D_SAE, D_IN), normal(D_SAE), normal(D_SAE, D_OUT) / 20, normal(D_OUT) / 10)
    if skip:
        weights = Weights(**{**weights.tensors(), "W_skip": normal(D_OUT, D_IN) / 20})
    if architecture != "topk":
        weights.b_enc.sub_(1.0)
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=K, transcoder=True, skip=skip)
    return SparseAutoencoder(config, weights, {"hook_name": READ, "hook_name_out": WRITTEN, **metadata})


def by_the_formula(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations ``[d_sae]`` and prediction ``[d_out]`` of one vector."""
    codes = (x @ sae.W_enc + sae.b_enc).relu()
    if sae.config.architecture == "topk":
        codes = codes * (codes >= codes.sort(descending=True).values[sae.config.k - 1])
    output = codes @ sae.W_dec + sae.b_dec
    return codes, output if sae.W_skip is None else output + sae.W_skip @ x


# Inference


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_computes_its_formula_for_any_leading_shape(skip: bool) -> None:
    sae = transcoder(skip=skip)
    x = torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (sae.d_in, sae.d_out, sae.d_sae) == (D_IN, D_OUT, D_SAE)
    assert (sae.hook_name, sae.hook_out) == (READ, WRITTEN)
    found = sae(x)
    assert found.shape == (2, 3, D_OUT)
    for i, j in np.ndindex(2, 3):
        codes, output = by_the_formula(sae, x[i, j])
        torch.testing.assert_close(sae.encode(x[i, j][None]).to_dense()[0], codes)
        torch.testing.assert_close(found[i, j], output)
    assert torch.equal(sae.to("cpu")(x), found)


def test_decoding_without_the_input_is_refused_where_there_is_a_skip_connection() -> None:
    x = torch.randn(4, D_IN, dtype=torch.float64)
    plain, with_skip = transcoder(), transcoder(skip=True)
    assert torch.equal(plain.decode(plain.encode(x)), plain(x))
    with pytest.raises(
        InputError, match=r"depends on its input beyond the codes: give decode the x that was enco"
    ):
        with_skip.decode(with_skip.encode(x))
    assert transcoder(skip=True).hash != plain.hash


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_folded_weights_are_the_same_function_of_raw_activations(architecture: Any, kind: str) -> None:
    """What training computes on centred and scaled activations, brought back to the units of the output."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_out = 7 if kind == "sae" else 5
    config = SAEConfig(
        architecture=architecture, d_sae=40, k=3, transcoder=kind != "sae", skip=kind == "skip"
    )
    made = architecture_from(config)
    initial = made.initial_weights(7, d_out, generator).tensors()
    trained = Weights(
        **{name: tensor.double() + 0.1 * normal(*tensor.shape) for name, tensor in initial.items()}
    )
    config, weights = made.finished(trained, made.initial_state())
    scaling = Scaling(normal(7), 0.4, *(() if kind == "sae" else (normal(5), 2.5)))
    x = 3 * normal(200, 7)
    scaled = SparseAutoencoder(config, weights, {})
    raw = SparseAutoencoder(config, scaling.folded(weights), {})
    units, _ = scaling.apply(x if kind == "sae" else torch.cat([x, normal(200, 5)], dim=1))
    mean = scaling.mean if scaling.mean_out is None else scaling.mean_out
    factor = scaling.scale if scaling.scale_out is None else scaling.scale_out
    assert 0 < scaled.encode(units).l0() < 40
    torch.testing.assert_close(raw.encode(x).to_dense(), scaled.encode(units).to_dense() / factor)
    torch.testing.assert_close(raw(x), scaled(units) / factor + mean)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_learns_to_predict(architecture: Any, skip: bool) -> None:
    """A small MLP, y = relu(x A) B, from activations that are neither centred nor scaled."""
    generator = torch.Generator().manual_seed(5)
    inner, outer = torch.randn(8, 16, generator=generator), torch.randn(16, 6, generator=generator)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 8, generator=generator)
        return 3 * x + 1, (x @ inner).relu() @ outer / 10 - 2

    selects = architecture in ("topk", "batch_topk", "matryoshka")
    settings: dict[str, Any] = {"k": 12} if selects else {"sparsity_weight": 0.02}
    config = TrainConfig(
        hook_out=WRITTEN,
        sae=SAEConfig(architecture=architecture, d_sae=48, skip=skip, **settings),
        tokens=250 * 128,
        batch_tokens=128,
        learning_rate=1e-2,
    )
    config.check()
    x, y = batch(4096)
    of_x, of_y = Moments(8), Moments(6)
    of_x.add(x)
    of_y.add(y)
    scaling = Scaling(of_x.mean, of_x.scale, of_y.mean, of_y.scale)
    trainer = Trainer(config, scaling)
    for _ in range(250):
        trainer.step(*scaling.apply(torch.cat(batch(128), dim=1)))
    sae = trainer.folded({})
    assert sae.config.transcoder
    assert (sae.W_skip is not None) == skip
    x, y = batch(2000)
    error, variance = (y - sae(x)).square().sum(), (y - y.mean(0)).square().sum()
    assert float(1 - error / variance) > 0.85


# Evaluation: the slow, obvious way, one block and one position at a time, with hooks by hand


def by_hand(
    language_model: Any, ids: Tensor, change: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What flows at READ and at WRITTEN in one block, and its logits, with ``change(x, y)`` in the place of y."""
    seen: dict[str, Tensor] = {}
    layers = language_model.model.layers

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0][0].clone()

    def write(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["y"] = output[0].clone()
        return output if change is None else change(seen["x"], output[0])[None]

    handles = [
        layers[0].mlp.down_proj.register_forward_pre_hook(read),
        layers[1].mlp.register_forward_hook(write),
    ]
    with torch.no_grad():
        logits = language_model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return seen["x"], seen["y"], logits


def slow_evaluation(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, reference: Tensor
) -> dict[str, Any]:
    evaluated = evaluated_activations(model, sae, blocks, seed=0).double()
    controls: dict[str, Any] = control_autoencoders(sae, reference, evaluated, seed=0)
    of_random = controls["random_weights"]
    known_x, known_y = reference.split([D_IN, D_OUT], dim=1)
    mean_x, mean_y = known_x.mean(0), known_y.mean(0)
    least_squares = torch.from_numpy(
        np.linalg.lstsq((known_x - mean_x).numpy(), (known_y - mean_y).numpy(), rcond=None)[0]
    )
    rank = controls["reduced_rank"].components.shape[0]
    predicted = ((known_x - mean_x) @ least_squares).numpy()
    directions = torch.from_numpy(np.linalg.svd(predicted, full_matrices=False)[2][:rank])
    predict: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": lambda x: by_the_formula(sae, x)[1],
        "zero": lambda x: torch.zeros(D_OUT, dtype=torch.float64),
        "mean": lambda x: mean_y,
        "reduced_rank": lambda x: (
            sum(((x - mean_x) @ least_squares @ d) * d for d in directions) + mean_y  # type: ignore[operator]
        ),
        "random_weights": lambda x: by_the_formula(of_random, x)[1],
    }
    l0 = {
        "sae": lambda x: int((by_the_formula(sae, x)[0] > 0).sum()),
        "reduced_rank": lambda x: rank,
        "random_weights": lambda x: int((by_the_formula(of_random, x)[0] > 0).sum()),
    }
    language_model = hf_model()
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    ce: dict[str, list[float]] = {name: [] for name in ("clean", *predict)}
    kl: dict[str, list[float]] = {name: [] for name in predict}
    at_replaced: list[bool] = []
    for block in range(blocks.n_blocks):
        n = int((blocks.documents[block] != PADDING).sum())
        ids = torch.from_numpy(blocks.ids[block].astype(np.int64))[:n]
        x, y, clean = by_hand(language_model, ids)
        kept = [
            int(ids[p]) != END_OF_TEXT
            and float(x[p].norm()) <= sae.metadata["max_norm"]
            and float(y[p].norm()) <= sae.metadata["max_norm_out"]
            for p in range(n)
        ]
        xs += [x[p] for p in range(n) if kept[p]]
        ys += [y[p] for p in range(n) if kept[p]]
        at_replaced += kept[: n - 1]
        log_p = clean.log_softmax(-1)
        ce["clean"] += [-float(log_p[p, ids[p + 1]]) for p in range(n - 1)]
        for name, function in predict.items():

            def change(x: Tensor, y: Tensor, function: Any = function, kept: Any = kept) -> Tensor:
                return torch.stack([function(x[p]) if kept[p] else y[p] for p in range(len(y))])

            log_q = by_hand(language_model, ids, change)[2].log_softmax(-1)
            ce[name] += [-float(log_q[p, ids[p + 1]]) for p in range(n - 1)]
            kl[name] += [float((log_p[p].exp() * (log_p[p] - log_q[p])).sum()) for p in range(n - 1)]
    y = torch.stack(ys)
    variance = (y - y.mean(0)).square().sum()

    def reconstruction(name: str) -> dict[str, float]:
        found = torch.stack([predict[name](x) for x in xs])
        return {
            "l0": float(np.mean([l0[name](x) for x in xs])),
            "explained_variance": float(1 - (y - found).square().sum() / variance),
            "cosine": float(torch.cosine_similarity(y, found).mean()),
        }

    def losses(where: Any, name: str) -> dict[str, float]:
        m = {key: float(np.array(values)[where].mean()) for key, values in ce.items()}
        return {
            "ce": m[name],
            "ce_loss_recovered": (m["zero"] - m[name]) / (m["zero"] - m["clean"]),
            "ce_loss_recovered_mean": (m["mean"] - m[name]) / (m["mean"] - m["clean"]),
            "kl": float(np.array(kl[name])[where].mean()),
        }

    def of_the_sae(where: Any) -> dict[str, float]:
        found = losses(where, "sae")
        found["ce_sae"] = found.pop("ce")
        found |= {f"ce_{key}": float(np.array(ce[key])[where].mean()) for key in ("clean", "zero", "mean")}
        return found | {f"kl_{key}": float(np.array(kl[key])[where].mean()) for key in ("zero", "mean")}

    everywhere = np.ones(len(at_replaced), dtype=bool)
    return {
        "replaced": len(ys),
        "predictions": len(at_replaced),
        **reconstruction("sae"),
        **of_the_sae(everywhere),
        "at_replaced": {"predictions": sum(at_replaced), **of_the_sae(np.array(at_replaced))},
        "controls": {name: reconstruction(name) | losses(everywhere, name) for name in controls},
    }


@pytest.mark.parametrize(
    ("architecture", "skip", "packing"), [("topk", True, "concatenated"), ("relu", False, "isolated")]
)
def test_every_metric_equals_hooks_by_hand(
    model: LanguageModel, reference: Tensor, architecture: str, skip: bool, packing: str
) -> None:
    bounds = {
        "max_norm": float(reference[:, :D_IN].norm(dim=1).quantile(0.85)),
        "max_norm_out": float(reference[:, D_IN:].norm(dim=1).quantile(0.85)),
    }
    blocks = make_blocks(packing)
    sae = transcoder(architecture, skip=skip, **bounds)
    expected = slow_evaluation(model, sae, blocks, reference)
    text = int(((blocks.ids != END_OF_TEXT) & (blocks.documents != PADDING)).sum())
    assert 0.5 * text < expected["replaced"] < 0.85 * text  # both bounds leave some out
    assert abs(expected["ce_zero"] - expected["ce_clean"]) > 1e-3
    found = evaluate(model, sae, blocks, reference=reference).to_json()
    assert_agrees(found, expected, rel=1e-8)
    assert found["controls"]["reduced_rank"]["l0"] == round(found["l0"])
    assert found["controls"]["random_weights"]["l0"] == pytest.approx(found["l0"], rel=0.02)


class Linear(nn.Module):
    """In the place of an MLP, and of the normalisation before it: a known linear map."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


@pytest.fixture(scope="module")
def model_of_a_linear_mlp() -> LanguageModel:
    made = hf_model()
    made.model.layers[1].post_attention_layernorm = nn.Identity()
    made.model.layers[1].mlp = Linear(torch.randn(32, 32, dtype=torch.float64) / 4)
    return LanguageModel.from_hf(made, tiny_tokenizer(), "linear")


def of_a_map(weight: Tensor, **metadata: Any) -> SparseAutoencoder:
    """A transcoder of nothing but a skip connection, from before an MLP to behind it."""
    zeros = torch.zeros(1, 32, dtype=torch.float64)
    weights = Weights(zeros, torch.full((1,), -1.0, dtype=torch.float64), zeros, zeros[0], W_skip=weight)
    hooks = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    config = SAEConfig(architecture="relu", d_sae=1, transcoder=True, skip=True)
    return SparseAutoencoder(config, weights, {**hooks, **metadata})


def test_a_transcoder_that_computes_the_mlp_changes_nothing(model_of_a_linear_mlp: LanguageModel) -> None:
    model = model_of_a_linear_mlp
    weight = model._any_model.model.layers[1].mlp.weight.detach()
    sae, train = of_a_map(weight), make_blocks(n_documents=40, n_tokens=600, split="train", seed=1)
    reference = reference_activations(model, sae, train).double()
    found = evaluate(model, sae, make_blocks(), reference=reference)
    assert found.explained_variance == pytest.approx(1, abs=1e-12)
    assert found.ce_loss_recovered == pytest.approx(1, abs=1e-10)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.kl_zero > 1e-3
    # The best linear map of one number is far from it, that of 32 numbers is the MLP, up to the reference's float32.
    assert found.controls["reduced_rank"]["explained_variance"] < 0.9
    whole = ReducedRank.fit(*reference.split([32, 32], dim=1), 100)
    torch.testing.assert_close(whole.reading @ whole.components, weight.t(), rtol=1e-4, atol=1e-4)

    wrong = evaluate(model, of_a_map(weight * 0), make_blocks(), reference=reference, controls=False)
    assert wrong.ce_loss_recovered == 0
    assert wrong.kl == wrong.kl_zero


def test_hooks_of_the_bridge_are_evaluated_too() -> None:
    """``ln2.hook_normalized`` is none of the SDPA path's; the figures are those of the same values by another name."""
    model = LanguageModel.from_hf(tiny_hf_model("llama", seed=3), tiny_tokenizer(), "tiny")
    generator = torch.Generator().manual_seed(4)
    rows, out = (torch.randn(16, 32, generator=generator) for _ in range(2))
    weights = Weights(rows, torch.zeros(16), out / 10, torch.zeros(32))
    config = SAEConfig(d_sae=16, k=4, transcoder=True)
    train, found = make_blocks(n_documents=20, n_tokens=200, split="train", seed=1), []
    for hook_out in ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"):
        hooks = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": hook_out}
        sae = SparseAutoencoder(config, weights, hooks)
        reference = reference_activations(model, sae, train)
        found.append(evaluate(model, sae, make_blocks(n_tokens=48), reference=reference, controls=False))
    assert found[0].ce_clean != found[0].ce_sae != found[0].ce_zero
    assert_agrees(vars(found[0]), {"ce_sae": found[1].ce_sae, "kl": found[1].kl, "l0": found[1].l0}, rel=1e-5)


def test_reading_behind_what_is_predicted_is_refused(model: LanguageModel, reference: Tensor) -> None:
    backwards = transcoder()
    backwards.metadata.update(hook_name="blocks.1.mlp.hook_post", hook_name_out="blocks.1.hook_resid_mid")
    elsewhere = transcoder(hook_name="blocks.1.hook_resid_mid")
    too_wide = transcoder(hook_name_out="blocks.1.mlp.hook_post")
    nowhere = transcoder()
    del nowhere.metadata["hook_name_out"]
    cases = [
        (
            backwards,
            "tiny computes blocks.1.hook_resid_mid before blocks.1.mlp.hook_post: a transcoder reads at the earlier"
            " hook and predicts the later one.",
        ),
        (
            elsewhere,
            "The SAE reads vectors of width 72, and blocks.1.hook_resid_mid of tiny has width 32: choose the model that"
            " the SAE was trained on.",
        ),
        (
            too_wide,
            "The SAE writes vectors of width 32, and blocks.1.mlp.hook_post of tiny has width 72: choose the model that"
            " the SAE was trained on.",
        ),
        (nowhere, "The transcoder does not say where it writes: set metadata['hook_name_out']."),
    ]
    for sae, sentence in cases:
        with pytest.raises(InputError) as error:
            evaluate(model, sae, make_blocks(), reference=reference)
        assert str(error.value) == sentence
    with pytest.raises(InputError, match=r"have shape \(5, 72\); they must be \[n, 104\]"):
        evaluate(model, transcoder(), make_blocks(), reference=reference[:5, :D_IN])


# Controls


def test_reduced_rank_regression_has_the_least_error_of_its_rank(reference: Tensor) -> None:
    """Izenman 1975: that of least squares plus the smallest squared singular values of what least squares predicts."""
    x, y = reference.split([D_IN, D_OUT], dim=1)
    centred, goal = x - x.mean(0), y - y.mean(0)
    solution = torch.from_numpy(np.linalg.lstsq(centred.numpy(), goal.numpy(), rcond=None)[0])
    fitted = centred @ solution
    rest = (goal - fitted).square().sum()
    for k in (1, 5, 32):
        control = ReducedRank.fit(x, y, k)
        error = (y - control.decode(control.encode(x))).square().sum()
        assert float(error) == pytest.approx(
            float(rest + torch.linalg.svdvals(fitted)[k:].square().sum()), rel=1e-9
        )
    few = ReducedRank.fit(x[:10], y[:10], 100)  # fewer rows than columns: an exact fit
    torch.testing.assert_close(few.decode(few.encode(x[:10])), y[:10])


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_a_random_transcoder_has_the_l0_and_the_best_length(reference: Tensor, architecture: str) -> None:
    sae = transcoder(architecture, skip=True)
    x, y = reference.split([D_IN, D_OUT], dim=1)
    control: Any = control_autoencoders(sae, reference, reference, seed=0)["random_weights"]
    assert control.encode(x).l0() == pytest.approx(sae.encode(x).l0(), rel=0.02)
    assert control.W_skip is None
    goal, estimate = y - y.mean(0), control(x) - y.mean(0)
    residual = float(((goal - estimate) * estimate).sum())
    assert residual == pytest.approx(0, abs=1e-6 * float(goal.norm() * estimate.norm()))


# Steering


def test_steering_replaces_one_term_of_what_is_written(model: LanguageModel) -> None:
    """The activation is that of the same pass, at the other hook; special tokens and outliers at either stay."""
    ids = random_ids(2, 9)
    ids[0, 4] = END_OF_TEXT
    found = model.capture(ids, [READ, WRITTEN])
    x, y = found[READ], found[WRITTEN]
    bounds = {
        "max_norm": float(x.norm(dim=-1).quantile(0.8)),
        "max_norm_out": float(y.norm(dim=-1).quantile(0.8)),
    }
    kept = (ids != END_OF_TEXT) & (x.norm(dim=-1) <= bounds["max_norm"])
    kept &= y.norm(dim=-1) <= bounds["max_norm_out"]
    sae = transcoder("relu", **bounds)
    a = torch.stack([torch.stack([by_the_formula(sae, row)[0] for row in text]) for text in x])
    targets = {5: 3.0, 7: 0.0}
    expected = {"clamp": y.clone(), "add": y.clone()}
    for feature, target in targets.items():
        expected["clamp"] += ((target - a[..., feature]) * kept)[..., None] * sae.W_dec[feature]
        expected["add"] += (target * kept)[..., None] * sae.W_dec[feature]
    assert 0 < kept.sum() < (ids != END_OF_TEXT).sum()
    for method in ("clamp", "add"):
        edit = edit_features(sae, targets, method=method, unit="activation")
        with model.edited(edit):
            torch.testing.assert_close(model.capture(ids, [WRITTEN])[WRITTEN], expected[method])
            assert torch.equal(model.capture(ids, [READ])[READ], x)

    rows = edit_rows(sae, [5, 7], [3.0, 0.0], "clamp")
    with model.edited(rows):
        changed = model.capture(ids, [WRITTEN])[WRITTEN]
    for row, (feature, target) in enumerate(targets.items()):
        change = ((target - a[row, :, feature]) * kept[row])[:, None] * sae.W_dec[feature]
        torch.testing.assert_close(changed[row], y[row] + change)


def test_steering_holds_while_text_is_written_over_the_cache(model: LanguageModel) -> None:
    """Token by token over the KV cache as in one pass: the same next tokens."""
    edit = edit_features(transcoder(), {5: 40.0, 7: 0.0}, unit="activation")
    ids = model.tokenizer.encode("def ")
    n = len(ids)
    with model.edited(edit):
        (written,) = model.generate("def ", max_new_tokens=8, temperature=0)
        for _ in range(8):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    # A character that the last token leaves incomplete is held back.
    assert written == model.tokenizer.decode(ids[n:]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert written.strip()
    assert model.generate("def ", max_new_tokens=8, temperature=0) != [written]


def test_an_edit_that_reads_what_comes_later_is_refused(model: LanguageModel) -> None:
    sae = transcoder()
    sae.metadata.update(hook_name="blocks.2.mlp.hook_post")
    edit = edit_features(sae, {5: 1.0}, unit="activation")
    with pytest.raises(InputError) as error, model.edited(edit):
        model.logits(random_ids(1, 4))
    assert str(error.value) == (
        "The edit at blocks.1.hook_mlp_out reads blocks.2.mlp.hook_post, which is not computed before it."
    )


def test_the_unit_residual_is_measured_where_features_write(model: LanguageModel) -> None:
    blocks = make_blocks()
    y = model.capture(blocks.ids_tensor(0, blocks.n_blocks), [WRITTEN])[WRITTEN]
    text = torch.from_numpy((blocks.ids != END_OF_TEXT) & (blocks.documents != PADDING))
    expected = float(y[text].norm(dim=-1).mean())
    assert mean_norm(model, transcoder(), blocks) == pytest.approx(expected, rel=1e-5)
