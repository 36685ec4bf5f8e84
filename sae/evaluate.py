"""Is a sparse autoencoder any good: every metric, and its one definition.

**What is run.** The model reads each block of the split (the test split, for any figure that is quoted) as it
is, and once for each *variant*, in which the activation x at the SAE's hook is replaced by

====================  ==================================================================================
sae                   the reconstruction x̂ = decode(encode(x))
zero                  0
mean                  the mean of ``reference``, activations of training text
principal_components  x̂ from the first round(L0) principal components of ``reference`` (control)
random_weights        x̂ of :func:`sae.controls.random_weights`, an untrained SAE of the same size and L0
                      (control)
====================  ==================================================================================

For a *transcoder*, which predicts y at ``hook_out`` from x at ``hook_name``, everything is replaced at ``hook_out``: by
ŷ = decode(encode(x), x), with x from the unchanged pass (it is computed earlier, so no replacement reaches it), by 0,
by the mean of y, and by both controls; in the place of principal components stands ``reduced_rank``, the best
prediction of y from round(L0) numbers that are linear in x (:class:`sae.controls.ReducedRank`). Below, x and x̂ are then
y and ŷ. What is called ``ce_sae`` is the loss with the transcoder.

**Positions.** Every variant replaces the same positions: all tokens but those that training left out (special
tokens, norms above the SAE's ``max_norm``; of a transcoder, at either hook). The others pass through unchanged.
Padding counts nowhere.

**Reconstruction**, over the replaced positions of the whole split:

- ``l0``: mean number of features that fire (≠ 0).
- ``explained_variance``: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², where x̄ is the mean of x over the same positions.
  (Centred: the uncentred form credits an SAE with reproducing the mean.)
- ``cosine``: mean of x·x̂ / (‖x‖‖x̂‖); 0 where x̂ = 0.

**Predictions.** Every position but the last of a block predicts the token after it. A prediction belongs to
the document of the predicted token; a separator is predicted like any other token, and belongs to the
document that it opens. Logarithms are natural.

- ``ce_clean``, ``ce_sae``, ``ce_zero``, ``ce_mean``: mean cross-entropy over all predicted tokens.
- ``ce_loss_recovered``: (ce_zero − ce_sae) / (ce_zero − ce_clean), and ``ce_loss_recovered_mean`` the same
  with ce_mean for ce_zero.
- ``kl``: mean of Σ_v p(v) (log p(v) − log q(v)), p predicted by the unchanged model and q with the SAE, from
  log-softmax. ``kl_zero`` and ``kl_mean``, the same for the ablations, give it a scale.
- ``at_replaced``: all of these over the predictions that are made *at* replaced positions.

**Features.**

- ``density_histogram``: of log10 of the fraction of replaced positions at which a feature fires.
- ``alive_fraction``: features that fire at least once in this split.
- ``dead_fraction``: features that did not fire on the last ``dead_window_tokens`` training tokens, as the
  trainer recorded it; None for an SAE that does not say.

**Intervals** are 95% bootstrap intervals over documents (:mod:`sae.bootstrap`); the figures of a bootstrap
sample are ratios of that sample's sums, x̄ included. **Controls** have the SAE's figures under the same names,
and ``ce`` for ``ce_sae``; the L0 that they are given is the SAE's on 8,192 of the replaced positions, in blocks chosen
at random. Sums are in float64; the same inputs, seed and batches give the same bits.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import in_order
from activations.errors import InputError
from activations.files import hash_tensors
from activations.models import LanguageModel
from activations.progress import Progress, silent
from sae.bootstrap import DocumentSums, Estimator, Figure, Totals
from sae.controls import (
    Autoencoder,
    control_autoencoders,
    evaluated_activations,
    mean_activation,
    read_and_written,
)
from sae.model import SparseAutoencoder, check_belongs
from sae.variants import AT_REPLACED, Variants, check_alike

BINS_PER_DECADE = 4
_NOTHING_TO_REPLACE = "The blocks hold no token that the SAE would replace: give some that hold text."


@dataclass(frozen=True)
class Row:
    """One line of the table: a metric of the SAE, its interval, and the same metric of each control."""

    name: str
    value: Figure
    interval: list[Figure] | None = None
    controls: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The figures of one SAE on one split; definitions in the module's docstring.

    inputs: hashes of what was evaluated: model, sae, tokens, reference.
    tokens, documents: size of the split. replaced, predictions: what the means are over.
    intervals: ``[low, high]`` by the name of the figure.
    at_replaced, and each of controls: figures by name, with ``intervals`` of their own.

    A figure is None where its denominator is 0.
    """

    split: str
    inputs: dict[str, str]
    seed: int
    tokens: int
    documents: int
    replaced: int
    predictions: int
    l0: Figure
    explained_variance: Figure
    cosine: Figure
    ce_clean: Figure
    ce_sae: Figure
    ce_zero: Figure
    ce_mean: Figure
    ce_loss_recovered: Figure
    ce_loss_recovered_mean: Figure
    kl: Figure
    kl_zero: Figure
    kl_mean: Figure
    alive_fraction: float
    dead_fraction: float | None
    dead_window_tokens: int | None
    density_histogram: dict[str, Any]
    intervals: dict[str, list[Figure]]
    at_replaced: dict[str, Any]
    controls: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The content of ``evaluation.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Evaluation":
        """What :meth:`to_json` gave.

        Raises:
            InputError: a field is missing or unknown.
        """
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"This is no evaluation of an SAE ({error}): evaluate again.") from None

    def rows(self) -> list[Row]:
        """The table for a terminal."""
        figures = self.to_json()

        def row(name: str, key: str, control_key: str = "") -> Row:
            controls = self.controls.items() if control_key else ()
            values = {control: by_name[control_key] for control, by_name in controls}
            return Row(name, figures[key], self.intervals[key], values)

        def row_at_replaced(name: str, key: str) -> Row:
            return Row(name, self.at_replaced[key], self.at_replaced["intervals"][key])

        return [
            row("L0", "l0", "l0"),
            row("explained variance", "explained_variance", "explained_variance"),
            row("cosine", "cosine", "cosine"),
            row("CE of the model", "ce_clean"),
            row("CE with the SAE", "ce_sae", "ce"),
            row("CE with the mean", "ce_mean"),
            row("CE with zero", "ce_zero"),
            row("CE loss recovered", "ce_loss_recovered", "ce_loss_recovered"),
            row_at_replaced("… at replaced positions", "ce_loss_recovered"),
            row("… against the mean", "ce_loss_recovered_mean", "ce_loss_recovered_mean"),
            row("KL", "kl", "kl"),
            row_at_replaced("… at replaced positions", "kl"),
            Row("alive on this split", self.alive_fraction),
            Row("dead in training", self.dead_fraction),
        ]


def evaluate(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    *,
    reference: Tensor,
    controls: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Measure an SAE inside its model.

    Args:
        blocks: the split to measure on.
        reference: ``[n, d_in]``, activations of the *train* split at positions that training keeps, from
            which the mean of mean-ablation and both controls are made; of a transcoder ``[n, d_in + d_out]``, both
            hooks side by side. 20,000 rows do; see :func:`sae.controls.reference_activations`.
        controls: whether to run the two controls, which take a third of the time.
        seed: of the bootstrap, of the random weights and of the blocks on which L0 is measured for the controls.

    Raises:
        InputError: the SAE does not fit the model or ``reference``, or the blocks hold nothing to replace.
    """
    settings: dict[str, Any] = {"controls": controls, "seed": seed, "progress": progress}
    return evaluate_many(model, {"the SAE": sae}, blocks, reference=reference, **settings)["the SAE"]


def evaluate_many(
    model: LanguageModel,
    saes: Mapping[str, SparseAutoencoder],
    blocks: TokenBlocks,
    *,
    reference: Tensor,
    controls: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """:func:`evaluate` several SAEs of the same hooks: the unchanged model and the ablations are run once for all.

    Arguments as for :func:`evaluate`; each result, under the name of its SAE, is the one it would have by itself.

    Raises:
        InputError: as for :func:`evaluate`, or the SAEs differ in hook, in what they leave out, in number format or
            in device.
    """
    check_alike(saes)
    for sae in saes.values():
        _check(model, sae, reference)
    first = next(iter(saes.values()))
    reference = reference.to(first.b_dec)
    control: dict[str, dict[str, Autoencoder]] = {name: {} for name in saes}
    if controls:
        evaluated = evaluated_activations(model, first, blocks, seed).to(first.b_dec)
        if not len(evaluated):
            raise InputError(_NOTHING_TO_REPLACE)
        control = {name: control_autoencoders(sae, reference, evaluated, seed) for name, sae in saes.items()}
    # Sums carry names such as "sae.NAME" and "random_weights.NAME", which none of "clean", "zero", "mean" can be.
    variants = Variants(
        model,
        blocks,
        {f"sae.{name}": sae for name, sae in saes.items()},
        {f"{kind}.{name}": made for name, of_sae in control.items() for kind, made in of_sae.items()},
        mean_activation(read_and_written(first, reference)[1]),
    )
    sums = DocumentSums(len(blocks.names))
    firings = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in saes.items()}
    batches = in_order(model.device, variants.measure, variants.batches())
    with progress("evaluate", total=blocks.n_tokens, unit="tokens") as step, closing(batches):
        for batch in batches:
            sums.add(batch.documents)
            for name, counts in firings.items():
                counts += batch.firings[f"sae.{name}"]
            step(batch.n_tokens)
    estimate = Estimator(sums, seed)
    if not estimate.totals.get("positions", 0):
        raise InputError(_NOTHING_TO_REPLACE)
    inputs = {
        "model": model.hash,
        "tokens": blocks.hash,
        "reference": hash_tensors({"reference": reference}),
    }
    facts: dict[str, Any] = {
        "split": blocks.split,
        "seed": seed,
        "tokens": blocks.n_tokens,
        "documents": int(sums.occurs.sum()),
    }
    return {
        name: Evaluation(
            **facts,
            inputs={**inputs, "sae": sae.hash},
            **_figures(estimate, name, list(control[name])),
            **_firings(sae, firings[name], int(estimate.totals["positions"])),
        )
        for name, sae in saes.items()
    }


def _figures(estimate: Estimator, name: str, controls: Sequence[str]) -> dict[str, Any]:
    """What sums over documents say of an SAE and its controls: fields of :class:`Evaluation`."""
    own = f"sae.{name}"
    values, intervals = estimate(lambda t: {**_reconstruction(t, own), **_losses(t, "", own)})
    at_replaced, at_replaced_intervals = estimate(lambda t: _losses(t, AT_REPLACED, own))
    of_controls = {kind: estimate(partial(_control, name=f"{kind}.{name}")) for kind in controls}
    return {
        "replaced": int(estimate.totals["positions"]),
        "predictions": int(estimate.totals["predictions"]),
        **values,
        "intervals": intervals,
        "at_replaced": {
            "predictions": int(estimate.totals[f"{AT_REPLACED}predictions"]),
            **at_replaced,
            "intervals": at_replaced_intervals,
        },
        "controls": {kind: {**found, "intervals": bounds} for kind, (found, bounds) in of_controls.items()},
    }


def _firings(sae: SparseAutoencoder, firings: Tensor, n_positions: int) -> dict[str, Any]:
    """What an SAE's firings ``[d_sae]`` at these positions say of its features: fields of :class:`Evaluation`."""
    dead = sae.metadata.get("dead")
    return {
        "alive_fraction": float((firings > 0).double().mean()),
        "dead_fraction": None if dead is None else dead / sae.d_sae,
        "dead_window_tokens": sae.metadata.get("dead_window_tokens"),
        "density_histogram": _density_histogram(firings.numpy(), n_positions),
    }


def _reconstruction(t: Totals, name: str) -> dict[str, np.ndarray]:
    """How well an autoencoder reconstructs."""
    variance = t["squares"] - np.square(t["y"]).sum(-1) / t["positions"]
    return {
        "l0": t[f"l0.{name}"] / t["positions"],
        "explained_variance": 1 - t[f"error.{name}"] / variance,
        "cosine": t[f"cosine.{name}"] / t["positions"],
    }


def _effect(t: Totals, scope: str, name: str) -> dict[str, np.ndarray]:
    """What an autoencoder in the place of the activations does to the predictions."""
    n = t[f"{scope}predictions"]
    clean, zero, mean, ce = (t[f"{scope}ce.{variant}"] for variant in ("clean", "zero", "mean", name))
    return {
        "ce": ce / n,
        "ce_loss_recovered": (zero - ce) / (zero - clean),
        "ce_loss_recovered_mean": (mean - ce) / (mean - clean),
        "kl": t[f"{scope}kl.{name}"] / n,
    }


def _control(t: Totals, name: str) -> dict[str, np.ndarray]:
    """All figures of a control."""
    return {**_reconstruction(t, name), **_effect(t, "", name)}


def _losses(t: Totals, scope: str, name: str) -> dict[str, np.ndarray]:
    """The effect of an SAE, and the losses that it is compared with."""
    n = t[f"{scope}predictions"]
    effect = _effect(t, scope, name)
    return {
        "ce_clean": t[f"{scope}ce.clean"] / n,
        "ce_sae": effect.pop("ce"),
        "ce_zero": t[f"{scope}ce.zero"] / n,
        "ce_mean": t[f"{scope}ce.mean"] / n,
        **effect,
        "kl_zero": t[f"{scope}kl.zero"] / n,
        "kl_mean": t[f"{scope}kl.mean"] / n,
    }


def _density_histogram(firings: np.ndarray, n_positions: int) -> dict[str, Any]:
    """How many features lie in each bin of log10 density: four bins a decade, down to one firing in all.

    Returns:
        ``log10_edges`` (one more than there are bins, the last 0), ``features`` per bin, and ``silent``: how
        many features never fired and lie in no bin.
    """
    lowest = min(math.floor(-BINS_PER_DECADE * math.log10(n_positions)), -1)
    edges = np.arange(lowest, 1) / BINS_PER_DECADE
    features, _ = np.histogram(np.log10(firings[firings > 0] / n_positions), edges)
    silent_features = int((firings == 0).sum())
    return {"log10_edges": edges.tolist(), "features": features.tolist(), "silent": silent_features}


def _check(model: LanguageModel, sae: SparseAutoencoder, reference: Tensor) -> None:
    check_belongs(model, sae)
    width = sae.d_in + sae.d_out if sae.config.transcoder else sae.d_in
    if reference.ndim != 2 or reference.shape[1] != width or len(reference) == 0:
        raise InputError(
            f"The reference activations have shape {tuple(reference.shape)}; they must be [n, {width}] with"
            " at least one row."
        )
