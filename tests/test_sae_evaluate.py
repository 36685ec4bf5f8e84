"""sae/evaluate.py: the metrics against a slow dense float64 computation, against numbers worked out by hand,
and in cases whose answer is known; intervals, controls, JSON."""

import json
import threading
from contextlib import contextmanager
from functools import cache
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import END_OF_TEXT, VOCABULARY, tiny_hf_model, tiny_tokenizer

from activations.blocks import PADDING, TokenBlocks
from activations.capture import single_threaded
from activations.errors import InputError
from activations.models import LanguageModel
from activations.packing import Packer, TokenDocument
from activations.replay import Replay
from sae.architectures.base import Weights
from sae.architectures.registry import architecture_from
from sae.bootstrap import DocumentSums, Estimator, PartialSums
from sae.config import SAEConfig
from sae.controls import (
    PrincipalComponents,
    control_autoencoders,
    evaluated_activations,
    reference_activations,
)
from sae.evaluate import Evaluation, evaluate, evaluate_many
from sae.model import SparseAutoencoder
from sae.variants import Predictions

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, K, CONTEXT = 32, 64, 4, 16


@pytest.fixture(autouse=True)
def _one_thread():
    with single_threaded():
        yield


@cache
def model(dtype=torch.float64) -> LanguageModel:
    hf_model = tiny_hf_model("llama", seed=3)
    with (
        torch.no_grad()
    ):  # predictions that depend on the context: a random model's are nearly the same everywhere
        hf_model.lm_head.weight.mul_(4)
    return LanguageModel.from_hf(hf_model.to(dtype), tiny_tokenizer(), "tiny")


def make_blocks(packing="concatenated", n_documents=7, n_tokens=90, split="test", seed=0) -> TokenBlocks:
    """Documents of 3 to 23 tokens (repeating, so that there is something to predict) in blocks of 16."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(n_documents):
        ids = rng.integers(1, VOCABULARY, size=3 + 20 * i // max(n_documents - 1, 1)).tolist()
        documents.append(TokenDocument(f"document {i}", ids))
    packer = Packer(CONTEXT, END_OF_TEXT, None, VOCABULARY, split)
    return getattr(packer, packing)(documents, n_tokens)


@cache
def reference(dtype=torch.float64) -> torch.Tensor:
    """Activations of other text than the test blocks, ``[n, 32]``."""
    blocks = make_blocks(n_documents=40, n_tokens=600, split="train", seed=1)
    x = model(dtype).capture(blocks.ids_tensor(0, blocks.n_blocks), [HOOK])[HOOK]
    return x[torch.from_numpy(blocks.ids.astype(np.int64)) != END_OF_TEXT]


def make_sae(architecture="topk", dtype=torch.float64, max_norm=None, **metadata) -> SparseAutoencoder:
    """Random weights around the activations' mean; relu with a threshold, so that few features fire."""
    generator = torch.Generator().manual_seed(0)
    weights = Weights.tied(D_IN, D_SAE, generator).tensors()
    weights["encoder_rows"] = weights["encoder_rows"] + 0.1 * torch.randn(D_SAE, D_IN, generator=generator)
    weights["W_dec"] = 0.5 * weights["W_dec"]
    weights["b_dec"] = reference().mean(0)
    weights["b_enc"] = 0.1 * torch.randn(D_SAE, generator=generator)
    if architecture == "relu":
        norm = (reference() - reference().mean(0)).norm(dim=1).mean()
        weights["b_enc"] = weights["b_enc"] - 0.25 * norm
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=K)
    weights = Weights(**{name: tensor.to(dtype) for name, tensor in weights.items()})
    return SparseAutoencoder(config, weights, {"hook_name": HOOK, "max_norm": max_norm, **metadata})


def signed_identity(scale=1.0) -> SparseAutoencoder:
    """relu(x) − relu(−x) = x, to the bit."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(D_IN, dtype=torch.float64)
    weights = Weights(both, torch.zeros(2 * D_IN, dtype=torch.float64), scale * both, zeros)
    return SparseAutoencoder(SAEConfig(architecture="relu", d_sae=2 * D_IN), weights, {"hook_name": HOOK})


# The slow, obvious way: one block, one position, one feature vector at a time, in float64.


def slow_codes(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    codes = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    if sae.config.architecture == "topk":
        smallest_kept = codes.sort(descending=True).values[sae.config.k - 1]
        codes = codes * (codes >= smallest_kept)
    return codes


def slow_logits(ids: torch.Tensor, change=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at HOOK and logits of one block, with ``change(x)`` put in the place of x."""
    hf_model = tiny_hf_model("llama", seed=3).double()
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(4)
    seen = []

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x[0].clone())
        new = x if change is None else change(x[0])[None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = hf_model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        logits = hf_model(ids[None]).logits[0]
    handle.remove()
    return seen[0], logits


def slow_evaluation(sae: SparseAutoencoder, blocks: TokenBlocks) -> dict:
    max_norm = sae.metadata["max_norm"]
    evaluated = evaluated_activations(model(), sae, blocks, seed=0).double()
    controls = control_autoencoders(sae, reference(), evaluated, seed=0)
    centred = (reference() - reference().mean(0)).numpy()
    components = torch.from_numpy(np.linalg.svd(centred, full_matrices=False)[2])
    k = len(controls["principal_components"].components)
    random_sae = controls["random_weights"]
    mean = reference().mean(0)

    def pca(x):
        return sum(((x - mean) @ c) * c for c in components[:k]) + mean

    reconstruct = {
        "sae": lambda x: slow_codes(sae, x) @ sae.W_dec + sae.b_dec,
        "zero": lambda x: x * 0,
        "mean": lambda x: mean,
        "principal_components": pca,
        "random_weights": lambda x: slow_codes(random_sae, x) @ random_sae.W_dec + random_sae.b_dec,
    }
    l0 = {
        "sae": lambda x: int((slow_codes(sae, x) > 0).sum()),
        "principal_components": lambda x: k,
        "random_weights": lambda x: int((slow_codes(random_sae, x) > 0).sum()),
    }
    xs, fired = [], torch.zeros(D_SAE)
    ce = {name: [] for name in ("clean", *reconstruct)}
    kl = {name: [] for name in reconstruct}
    at_replaced = []
    for block in range(blocks.n_blocks):
        n = int((blocks.documents[block] != PADDING).sum())
        ids = torch.from_numpy(blocks.ids[block].astype(np.int64))[:n]
        x, clean = slow_logits(ids)
        kept = [int(ids[p]) != END_OF_TEXT and float(x[p].norm()) <= max_norm for p in range(n)]
        xs += [x[p] for p in range(n) if kept[p]]
        for p in range(n):
            if kept[p]:
                fired += slow_codes(sae, x[p]) > 0
        at_replaced += kept[: n - 1]
        log_p = clean.log_softmax(-1)
        ce["clean"] += [-float(log_p[p, ids[p + 1]]) for p in range(n - 1)]
        for name, function in reconstruct.items():

            def change(x, function=function, kept=kept):
                return torch.stack(
                    [function(row) if keep else row for row, keep in zip(x, kept, strict=True)]
                )

            log_q = slow_logits(ids, change)[1].log_softmax(-1)
            ce[name] += [-float(log_q[p, ids[p + 1]]) for p in range(n - 1)]
            kl[name] += [float((log_p[p].exp() * (log_p[p] - log_q[p])).sum()) for p in range(n - 1)]
    xs = torch.stack(xs)
    variance = (xs - xs.mean(0)).square().sum()
    ce = {name: np.array(values) for name, values in ce.items()}
    kl = {name: np.array(values) for name, values in kl.items()}

    def reconstruction(name):
        xhats = torch.stack([reconstruct[name](x) for x in xs])
        return {
            "l0": np.mean([l0[name](x) for x in xs]),
            "explained_variance": float(1 - (xs - xhats).square().sum() / variance),
            "cosine": float(torch.cosine_similarity(xs, xhats).mean()),
        }

    def losses(where, name):
        m = {key: values[where].mean() for key, values in ce.items()}
        return {
            "ce": m[name],
            "ce_loss_recovered": (m["zero"] - m[name]) / (m["zero"] - m["clean"]),
            "ce_loss_recovered_mean": (m["mean"] - m[name]) / (m["mean"] - m["clean"]),
            "kl": kl[name][where].mean(),
        }

    def sae_losses(where):
        found = losses(where, "sae")
        found["ce_sae"] = found.pop("ce")
        found |= {f"ce_{key}": ce[key][where].mean() for key in ("clean", "zero", "mean")}
        return found | {f"kl_{key}": kl[key][where].mean() for key in ("zero", "mean")}

    everywhere = np.ones(len(at_replaced), dtype=bool)
    return {
        "tokens": int((blocks.documents != PADDING).sum()),
        "documents": len({int(d) for d in blocks.documents.flatten()} - {PADDING}),
        "replaced": len(xs),
        "predictions": len(at_replaced),
        **reconstruction("sae"),
        **sae_losses(everywhere),
        "alive_fraction": float((fired > 0).double().mean()),
        "at_replaced": {"predictions": sum(at_replaced), **sae_losses(np.array(at_replaced))},
        "controls": {name: reconstruction(name) | losses(everywhere, name) for name in controls},
    }


def assert_agrees(found: dict, expected: dict, rel: float) -> None:
    """Every number in ``expected`` stands in ``found`` too."""
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_agrees(found[name], value, rel)
        else:
            assert found[name] == (
                value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=rel)
            ), name


@pytest.mark.parametrize(("architecture", "packing"), [("topk", "concatenated"), ("relu", "isolated")])
def test_every_metric_equals_the_slow_dense_computation(architecture, packing):
    max_norm = float(reference().norm(dim=1).quantile(0.8))
    blocks = make_blocks(packing)
    sae = make_sae(architecture, max_norm=max_norm)
    expected = slow_evaluation(sae, blocks)
    found = evaluate(model(), sae, blocks, reference=reference()).to_json()
    # The bound on norms leaves some out, and the denominator of the ratio is not small.
    assert expected["replaced"] < 0.9 * (blocks.ids != END_OF_TEXT).sum()
    assert abs(expected["ce_zero"] - expected["ce_clean"]) > 0.05
    assert_agrees(found, expected, rel=1e-9)

    # In single precision, through the same definitions.
    sae32 = make_sae(architecture, torch.float32, max_norm=max_norm)
    found32 = evaluate(model(torch.float32), sae32, blocks, reference=reference(torch.float32)).to_json()
    assert_agrees(found32, expected, rel=2e-4)
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "explained_variance", "cosine", "l0"):
        assert found32[name] == pytest.approx(expected[name], rel=1e-5), name


class HandModel:
    """Logits are the activations: (0, ln 4, 0) for token 1, (0, 0, ln 4) for token 2, zeros for token 0."""

    name, hash, d_vocab, device, dtype = "hand", "0", 3, torch.device("cpu"), torch.float64
    tokenizer = SimpleNamespace(special_ids=frozenset({0}))
    table = torch.tensor([[0, 0, 0], [0, log(4), 0], [0, 0, log(4)]], dtype=torch.float64)

    def width(self, hook_name):
        return 3

    def replay(self, ids, hook_name, also=(), attention_mask=None):
        return Replay(self.table[ids], self.table[ids], lambda x: x)


def test_an_example_of_two_documents_worked_out_by_hand():
    """Document A: separator 1 1 1, document B: separator 2. The SAE halves x; the mean is (0, ln 3, 0).

    Positions 1, 2, 3, 5 are replaced. Probabilities of the predicted tokens:
        position, predicted, of  0→1 A   1→1 A   1→1 A   1→0 B   0→2 B
        clean                    1/3     4/6     4/6     1/6     1/3
        SAE                      1/3     2/4     2/4     1/4     1/3
        zero                     1/3     1/3     1/3     1/3     1/3
        mean                     1/3     3/5     3/5     1/5     1/3
    """
    ids = np.array([[0, 1, 1, 1, 0, 2]], dtype=np.uint16)
    documents = np.array([[0, 0, 0, 0, 1, 1]], dtype=np.int32)
    blocks = TokenBlocks(ids, documents, ["A", "B"], "test", "concatenated", bos=False)
    eye, zeros = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    metadata = {"hook_name": "here", "dead": 1, "dead_window_tokens": 100}
    sae = SparseAutoencoder(
        SAEConfig(architecture="relu", d_sae=3), Weights(eye, zeros, eye / 2, zeros), metadata
    )
    mean = torch.tensor([[0, log(3), 0]], dtype=torch.float64)
    result = evaluate(HandModel(), sae, blocks, reference=mean, controls=False)

    kl = log(2 / 3) / 3 + log(4 / 3) * 2 / 3
    recovered = log(27 / 16) / log(27 / 13.5)
    expected = {
        "split": "test",
        "tokens": 6,
        "documents": 2,
        "replaced": 4,
        "predictions": 5,
        "l0": 1.0,
        # Σ‖x − x̂‖² = 4 (a/2)² = a², Σ‖x − x̄‖² = 4a² − 4 (9/16 + 1/16) a² = 1.5 a², a = ln 4
        "explained_variance": 1 / 3,
        "cosine": 1.0,
        "ce_clean": (2 * log(3) + log(13.5)) / 5,
        "ce_sae": (2 * log(3) + log(16)) / 5,
        "ce_zero": log(3),
        "ce_mean": (2 * log(3) + log(125 / 9)) / 5,
        "ce_loss_recovered": recovered,
        "ce_loss_recovered_mean": log(125 / 144) / log(125 / 121.5),
        "kl": 3 * kl / 5,
        "alive_fraction": 2 / 3,
        "dead_fraction": 1 / 3,
        "dead_window_tokens": 100,
        "at_replaced": {
            "predictions": 3,
            "ce_clean": log(13.5) / 3,
            "ce_zero": log(3),
            "ce_loss_recovered": recovered,
            "kl": kl,
        },
    }
    assert_agrees(result.to_json(), expected, rel=1e-12)
    # A sample of two documents is AA or BB once in four times each: the bounds are extremes of AA, AB, BB.
    of_a, of_b = log(3 / 2) / log(2), log(3 / 4) / log(3 / 6)
    assert result.intervals["ce_loss_recovered"] == pytest.approx([of_b, recovered], rel=1e-12)
    assert of_b < of_a < recovered
    # Densities 3/4 and 1/4 lie in [−1/4, 0] and [−3/4, −1/2] (log10 −0.12 and −0.60); feature 0 is silent.
    assert result.density_histogram == {
        "log10_edges": [-0.75, -0.5, -0.25, 0.0],
        "features": [1, 0, 1],
        "silent": 1,
    }


def test_a_perfect_sae_changes_nothing():
    result = evaluate(model(), signed_identity(), make_blocks(), reference=reference(), controls=False)
    assert result.explained_variance == 1.0
    assert result.cosine == pytest.approx(1.0, abs=1e-12)
    assert result.ce_sae == result.ce_clean
    assert result.ce_loss_recovered == result.ce_loss_recovered_mean == 1.0
    assert result.kl == result.at_replaced["kl"] == 0.0
    assert result.intervals["ce_loss_recovered"] == [1.0, 1.0]


def test_an_sae_that_never_fires_is_zero_ablation():
    sae = signed_identity()
    silent = torch.full_like(sae.b_enc, -1e6)
    weights = Weights(sae.weights.encoder_rows, silent, sae.W_dec, sae.b_dec)
    result = evaluate(
        model(),
        SparseAutoencoder(sae.config, weights, sae.metadata),
        make_blocks(),
        reference=reference(),
    )
    assert result.ce_loss_recovered == 0.0
    assert result.ce_sae == result.ce_zero
    assert result.kl == result.kl_zero > 0
    assert result.l0 == result.cosine == result.alive_fraction == 0.0
    assert result.explained_variance <= 0
    assert result.density_histogram["silent"] == sae.d_sae
    assert result.controls["random_weights"]["l0"] == 0.0


def test_excluded_positions_pass_unchanged_in_every_variant(monkeypatch):
    """What every variant puts at the hook."""
    max_norm = float(reference().norm(dim=1).median())
    sae = make_sae(max_norm=max_norm)
    blocks = make_blocks("isolated")
    seen = []
    replay = LanguageModel.replay

    def spy(self, ids, hook_name, *, also, attention_mask=None):
        made = replay(self, ids, hook_name, also=also, attention_mask=attention_mask)
        variants = []
        seen.append((ids, attention_mask, made.activations, variants))

        def logits_with(x):
            variants.append(x.clone())
            return made.logits_with(x)

        return Replay(made.activations, made.logits, logits_with, made.captured)

    monkeypatch.setattr(LanguageModel, "replay", spy)
    evaluate(model(), sae, blocks, reference=reference(), controls=False)
    assert sum(len(ids) for ids, *_ in seen) == blocks.n_blocks
    for ids, mask, clean, (zero, mean, reconstruction) in seen:  # in the order of the module's docstring
        padding = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask == 0
        kept = (ids != END_OF_TEXT) & ~padding & (clean.norm(dim=-1) <= max_norm)
        assert 0 < kept.sum() < (~padding).sum()
        for variant in (zero, mean, reconstruction):
            assert torch.equal(variant[~kept], clean[~kept])
        assert not zero[kept].any()
        torch.testing.assert_close(mean[kept], reference().mean(0).expand_as(mean[kept]))
        torch.testing.assert_close(reconstruction[kept], sae(clean[kept]))


def test_a_batch_without_text_adds_its_predictions_only():
    """Seventy empty documents fill the first four blocks, one batch, with separators."""
    packer = Packer(CONTEXT, END_OF_TEXT, None, VOCABULARY, "test")
    documents = [TokenDocument(f"empty {i}", []) for i in range(70)]
    documents.append(TokenDocument("text", list(range(1, 50))))
    blocks = packer.concatenated(documents, n_tokens=8 * CONTEXT)
    result = evaluate(model(), make_sae("relu"), blocks, reference=reference())
    assert (blocks.ids[:4] == END_OF_TEXT).all()
    assert result.replaced == 49
    assert result.predictions == (blocks.documents[:, 1:] != PADDING).sum()
    assert result.documents == 71


def test_the_same_bits_however_many_workers(monkeypatch):
    results = []
    for n_threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        result = evaluate(
            model(torch.float32), make_sae(dtype=torch.float32), make_blocks(), reference=reference()
        )
        results.append(result)
    monkeypatch.undo()
    assert results[0] == results[1]


def test_several_saes_in_one_pass_have_the_results_they_have_alone(monkeypatch):
    """Names that variants bear are allowed, too. The unchanged model runs once for all."""
    max_norm = float(reference().norm(dim=1).quantile(0.8))
    saes = {
        "zero": make_sae(max_norm=max_norm, dead=3, dead_window_tokens=7),
        "clean": make_sae("relu", max_norm=max_norm),
    }
    passes = []
    replay = LanguageModel.replay
    monkeypatch.setattr(
        LanguageModel, "replay", lambda *given, **named: (passes.append(1), replay(*given, **named))[1]
    )
    found = evaluate_many(model(), saes, make_blocks(), reference=reference(), controls=True)
    n_passes = len(passes)
    alone = {name: evaluate(model(), sae, make_blocks(), reference=reference()) for name, sae in saes.items()}
    assert found == alone
    assert found["zero"] != found["clean"]
    assert len(passes) == 3 * n_passes


def test_saes_that_cannot_share_a_pass_are_refused():
    sae, blocks = make_sae(), make_blocks()
    other_hook = make_sae(hook_name="blocks.0.hook_resid_post")
    cases = [
        ({}, "There is no SAE to evaluate: give at least one."),
        (
            {"a": sae, "b": other_hook},
            "a and b cannot be evaluated together, for their hook_name differs (blocks.1.hook_resid_post and"
            " blocks.0.hook_resid_post): evaluate each by itself.",
        ),
        (
            {"a": sae, "b": make_sae(max_norm=1.0)},
            "a and b cannot be evaluated together, for their max_norm differs (None and 1.0): evaluate each by itself.",
        ),
        (
            {"a": sae, "b": make_sae(dtype=torch.float32)},
            "a and b are evaluated together: bring them to one number format and one device.",
        ),
    ]
    for saes, sentence in cases:
        with pytest.raises(InputError) as error:
            evaluate_many(model(), saes, blocks, reference=reference())
        assert str(error.value) == sentence


def test_batches_of_any_size_give_the_same_figures(monkeypatch):
    """Logits of 32 bytes and log-probabilities of 1 entry at a time: blocks one by one, rows one by one."""
    expected = evaluate(model(), make_sae(), make_blocks(), reference=reference(), controls=False).to_json()
    monkeypatch.setattr("sae.variants._LOGIT_BYTES", 32)
    monkeypatch.setattr("sae.variants._CHUNK_ENTRIES", 1)
    found = evaluate(model(), make_sae(), make_blocks(), reference=reference(), controls=False).to_json()
    assert_agrees(found, {name: value for name, value in expected.items() if isinstance(value, float)}, 1e-12)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_controls_have_the_l0_of_the_sae_and_are_centred(architecture):
    sae = make_sae(architecture)
    controls = control_autoencoders(sae, reference(), reference(), seed=0)
    l0 = sae.encode(reference()).l0()
    random_sae = controls["random_weights"]
    assert random_sae.encode(reference()).l0() == pytest.approx(l0, rel=0.02)
    assert len(controls["principal_components"].components) == round(l0)
    torch.testing.assert_close(random_sae.b_dec, reference().mean(0))
    # Tied: every decoder row points where its encoder row does, all with one length.
    ratio = random_sae.W_dec / random_sae.W_enc.t()
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    # The length is the best one: x̂ − μ cannot be scaled to fit better.
    centred = reference() - random_sae.b_dec
    estimate = random_sae(reference()) - random_sae.b_dec
    assert float(((centred - estimate) * estimate).sum()) == pytest.approx(
        0, abs=1e-6 * float(centred.norm() ** 2)
    )


@pytest.mark.parametrize("normalisation", [None, "layer_norm"])
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated", "batch_topk", "matryoshka"])
def test_there_is_a_random_control_for_every_architecture(architecture, normalisation):
    """As training finishes it; the control has about its L0, whatever decides which features fire."""
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=K)
    kind = architecture_from(config)
    initial = kind.initial_weights(D_IN, D_IN, torch.Generator().manual_seed(0)).tensors()
    centre = {} if normalisation else {"b_dec": reference().mean(0)}
    initial = Weights(**{name: tensor.double() for name, tensor in {**initial, **centre}.items()})
    config, weights = kind.finished(initial, kind.initial_state())
    if architecture != "topk":
        size = 1.0 if normalisation else float((reference() - reference().mean(0)).norm(dim=1).mean())
        weights.b_enc.sub_(0.25 * size * weights.encoder_rows.norm(dim=1))
    sae = SparseAutoencoder(config, weights, {"hook_name": HOOK, "normalize_activations": normalisation})
    l0 = sae.encode(reference()).l0()
    assert 1 < l0 < D_SAE / 2
    control = control_autoencoders(sae, reference(), reference(), seed=0)["random_weights"]
    assert control.encode(reference()).l0() == pytest.approx(l0, rel=0.02)
    centred, estimate = reference() - reference().mean(0), control(reference()) - reference().mean(0)
    assert 0 < float((centred * estimate).sum()) == pytest.approx(float(estimate.square().sum()), rel=1e-6)
    result = evaluate(model(), sae, make_blocks(), reference=reference())
    assert result.controls["random_weights"]["l0"] == pytest.approx(result.l0, rel=0.02)


@pytest.mark.parametrize("max_norm", [None, 0.9])
def test_controls_have_the_l0_that_the_sae_has_on_the_evaluated_text(max_norm):
    """A threshold SAE fires less on the reference, whose activations lie nearer to their mean."""
    if max_norm is not None:
        max_norm = float(reference().norm(dim=1).quantile(max_norm))
    sae, mean = make_sae("relu", max_norm=max_norm), reference().mean(0)
    near = mean + 0.8 * (reference() - mean)
    result = evaluate(model(), sae, make_blocks(), reference=near)
    assert sae.encode(near).l0() < 0.8 * result.l0
    assert result.controls["principal_components"]["l0"] == round(result.l0)
    assert result.controls["random_weights"]["l0"] == pytest.approx(result.l0, rel=0.02)


def test_l0_is_measured_on_blocks_from_everywhere():
    """All positions that count where there are few; else of some blocks, which ones the seed decides."""
    blocks = make_blocks("isolated", n_documents=30, n_tokens=400)
    sae = make_sae(max_norm=float(reference().norm(dim=1).quantile(0.7)))
    x = model().capture(blocks.ids_tensor(0, blocks.n_blocks), [HOOK])[HOOK]
    text = torch.from_numpy((blocks.ids != END_OF_TEXT) & (blocks.documents != PADDING))
    kept = text & (x.float().norm(dim=-1) <= sae.metadata["max_norm"])

    def sample(seed, **options):
        return evaluated_activations(model(), sae, blocks, seed, **options)

    def in_one_order(rows):
        return rows[rows[:, 0].argsort()]

    expected = x[kept].float()
    torch.testing.assert_close(in_one_order(sample(0)), in_one_order(expected), rtol=1e-5, atol=1e-6)
    some = sample(0, n_rows=20)
    assert some.shape == (20, D_IN)
    assert torch.equal(some, sample(0)[:20])
    assert not torch.equal(some, sample(1, n_rows=20))


def test_reading_ends_with_its_threads_even_where_an_exception_is_kept(monkeypatch):
    """A traceback holds the loop that it came through, and that its threads, until a collector finds both."""

    class Stop(Exception):
        pass

    def stop(*arguments):
        raise Stop

    @contextmanager
    def progress(description, *, total, unit):
        yield stop

    blocks = make_blocks(n_documents=40, n_tokens=600, split="train", seed=1)
    monkeypatch.setattr("sae.variants._LOGIT_BYTES", 32)
    evaluate(model(), make_sae(), blocks, reference=reference(), controls=False)
    before = {*threading.enumerate()}  # those that encode stay
    with pytest.raises(Stop) as in_evaluation:
        evaluate(model(), make_sae(), blocks, reference=reference(), controls=False, progress=progress)
    with monkeypatch.context() as patch, pytest.raises(Stop) as in_controls:
        patch.setattr("sae.controls.kept_at_all", stop)
        reference_activations(model(), make_sae(), blocks)
    assert in_evaluation.tb
    assert in_controls.tb
    assert {*threading.enumerate()} <= before


def test_principal_components_reconstruct_best_of_all_k_dimensional_subspaces():
    """The error is the sum of the smallest squared singular values (Eckart and Young)."""
    control = PrincipalComponents.fit(reference(), 5)
    error = (reference() - control.decode(control.encode(reference()))).square().sum()
    singular = torch.linalg.svdvals(reference() - reference().mean(0))
    assert float(error) == pytest.approx(float(singular[5:].square().sum()), rel=1e-9)
    everything = PrincipalComponents.fit(reference(), 1000)
    torch.testing.assert_close(everything.decode(everything.encode(reference())), reference())


def test_reference_activations_are_what_training_would_keep():
    train = make_blocks(n_documents=20, n_tokens=200, split="train", seed=2)
    max_norm = float(reference().norm(dim=1).quantile(0.7))
    sae = make_sae(max_norm=max_norm)
    rows = reference_activations(model(), sae, train, n_rows=10_000)
    x = model().capture(train.ids_tensor(0, train.n_blocks), [HOOK])[HOOK]
    text = torch.from_numpy((train.ids != END_OF_TEXT) & (train.documents != PADDING))
    expected = x[text & (x.float().norm(dim=-1) <= max_norm)].float()
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(reference_activations(model(), sae, train, n_rows=50), rows[:50])


def document_means(n_documents: int, seed: int) -> Estimator:
    """Documents of 1 to 20 values around a mean of their own, which has mean 0 and standard deviation 1."""
    rng = np.random.default_rng(seed)
    sums = DocumentSums(n_documents + 1)  # the last document does not occur
    lengths = rng.integers(1, 21, size=n_documents)
    owners = np.repeat(np.arange(n_documents), lengths)
    values = torch.from_numpy(rng.normal(size=n_documents)[owners] + 0.1 * rng.normal(size=len(owners)))
    part = PartialSums(np.arange(n_documents))
    part.add(owners, {"n": torch.ones(len(owners)), "sum": values})
    sums.add(part)
    return Estimator(sums, seed=0)


def test_intervals_contain_the_figure_and_shrink_with_more_documents():
    widths = []
    for n_documents in (25, 100, 400):
        values, intervals = document_means(n_documents, seed=1)(lambda t: {"mean": t["sum"] / t["n"]})
        low, high = intervals["mean"]
        assert low < values["mean"] < high
        widths.append(high - low)
    # Four times the documents, half the width.
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.35)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.35)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(150):
        _, intervals = document_means(60, seed)(lambda t: {"mean": t["sum"] / t["n"]})
        low, high = intervals["mean"]
        hits += low < 0 < high
    assert 0.88 <= hits / 150 <= 0.99  # 0.95 ± three standard errors, less what a percentile bootstrap misses


def test_a_figure_that_does_not_exist_is_none():
    sums = DocumentSums(1)
    part = PartialSums(np.array([0]))
    part.add(np.array([0]), {"zero": torch.zeros(1)})
    sums.add(part)
    values, intervals = Estimator(sums, seed=0)(lambda t: {"ratio": t["zero"] / t["zero"]})
    assert values == {"ratio": None}
    assert intervals == {"ratio": [None, None]}


def test_kl_is_finite_where_a_probability_underflows():
    """p = (1, 0) and q = (0, 1) but for e⁻²⁰⁰: KL = 200 exactly, where log(softmax) would give infinity."""
    ids = torch.tensor([[0, 1]])
    logits = torch.tensor([[[200.0, 0.0], [0.0, 0.0]]])
    predictions = Predictions(logits, ids, torch.tensor([[True]]))
    ce, kl = predictions.compare(logits.flip(-1))
    assert predictions.ce.tolist() == [200.0]
    assert ce.tolist() == [0.0]
    assert kl.tolist() == [200.0]


def test_json_holds_everything_and_comes_back():
    result = evaluate(model(), make_sae(dead=3, dead_window_tokens=7), make_blocks(), reference=reference())
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Evaluation.from_json(json.loads(text)) == result
    with pytest.raises(InputError, match=r"^This is no evaluation of an SAE \(.*\): evaluate again\.$"):
        Evaluation.from_json({"l0": 3})


def test_rows_show_the_figures_beside_their_controls():
    result = evaluate(model(), make_sae(), make_blocks(), reference=reference())
    rows = {row.name: row for row in result.rows()}
    recovered = rows["CE loss recovered"]
    assert recovered.value == result.ce_loss_recovered
    assert recovered.interval == result.intervals["ce_loss_recovered"]
    assert recovered.controls == {
        "principal_components": result.controls["principal_components"]["ce_loss_recovered"],
        "random_weights": result.controls["random_weights"]["ce_loss_recovered"],
    }
    assert rows["CE with zero"].controls == {}
    assert result.rows()[-3].value == result.at_replaced["kl"]
    assert rows["dead in training"].value is None


def test_progress_counts_the_tokens():
    calls = []

    @contextmanager
    def progress(description, *, total, unit):
        calls.append((description, total, unit))
        yield calls.append

    blocks = make_blocks("isolated")
    evaluate(model(), make_sae(), blocks, reference=reference(), controls=False, progress=progress)
    assert calls[0] == ("evaluate", blocks.n_tokens, "tokens")
    assert sum(calls[1:]) == blocks.n_tokens


def test_bad_input_is_one_sentence():
    sae = make_sae()
    cases = [
        (
            SparseAutoencoder(sae.config, sae.weights, {}),
            make_blocks(),
            reference(),
            "The SAE does not say where in a model it belongs: set metadata['hook_name'].",
        ),
        (
            SparseAutoencoder(sae.config, sae.weights, {"hook_name": "blocks.1.mlp.hook_post"}),
            make_blocks(),
            reference(),
            "The SAE reads vectors of width 32, and blocks.1.mlp.hook_post of tiny has width 72: choose the"
            " model that the SAE was trained on.",
        ),
        (
            sae,
            make_blocks(),
            reference()[:0],
            "The reference activations have shape (0, 32); they must be [n, 32] with at least one row.",
        ),
        (
            make_sae(max_norm=0.0),
            make_blocks(),
            reference(),
            "The blocks hold no token that the SAE would replace: give some that hold text.",
        ),
    ]
    for bad_sae, blocks, rows, sentence in cases:
        with pytest.raises(InputError) as error:
            evaluate(model(), bad_sae, blocks, reference=rows, controls=False)
        assert str(error.value) == sentence
