"""Changing the model through its features: edits, and default and steered text side by side.

Every edit replaces exactly one term of ``x = Σ a_i · W_dec[i] + b_dec + error`` per feature, so everything
the SAE does not explain stays::

    add      x + s · W_dec[f]
    clamp    x + (target − a_f) · W_dec[f],   a_f from the SAE's own encoding of x
    ablate   x − a_f · W_dec[f],              which is clamp to 0

A transcoder's features write at its second hook, and so that is where it is edited: y takes the place of x above, and
a_f comes from the x at its first hook in the same forward pass.

Encoding the edited x again will in general give other features other activations too, and a concept may live
on in the error or in neighbouring features: to ablate a feature is not to remove what it stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from activations.edits import Edit
from activations.errors import InputError
from activations.models import LanguageModel
from sae.model import SparseAutoencoder

if TYPE_CHECKING:
    from features.index import FeatureIndex

Method = Literal["add", "clamp", "ablate"]
Unit = Literal["max", "activation", "residual"]
METHODS: tuple[Method, ...] = ("add", "clamp", "ablate")
UNITS: tuple[Unit, ...] = ("max", "activation", "residual")


def edit_for(
    sae: SparseAutoencoder,
    feature: int,
    strength: float = 0.0,
    *,
    method: Method = "clamp",
    unit: Unit = "max",
    maximum: float | None = None,
    residual_norm: float | None = None,
) -> Edit:
    """The edit that steers one feature; see :func:`edit_features`.

    Args:
        maximum: the feature's largest activation in the index, for ``unit="max"``.
    """
    maxima = None if maximum is None else {feature: maximum}
    return edit_features(
        sae, {feature: strength}, method=method, unit=unit, maxima=maxima, residual_norm=residual_norm
    )


def edit_features(
    sae: SparseAutoencoder,
    strengths: Mapping[int, float],
    *,
    method: Method = "clamp",
    unit: Unit = "max",
    maxima: Mapping[int, float] | None = None,
    residual_norm: float | None = None,
) -> Edit:
    """One edit that steers several features of an SAE at once, at every position that the SAE was trained on.

    All activations come from one encoding of the unedited x. Special tokens, padding (position −1) and
    positions with a norm above the SAE's ``max_norm`` (a transcoder's: at either hook) are left alone.

    Args:
        strengths: feature → strength. Ablating takes 0, the strength it stands for.
        method: see the module.
        unit: what strength 1 means: ``"max"`` the feature's maximum in the index, ``"activation"`` an
            activation of 1, ``"residual"`` a vector as long as the mean activation vector at the edited hook.
        maxima: feature → its maximum in the index, for ``unit="max"``.
        residual_norm: mean norm of the activation vectors at the edited hook, for ``unit="residual"``.

    Raises:
        InputError: an unknown feature, method or unit, a strength that is no number, or a unit whose size is
            not known.
    """
    targets = activation_targets(
        sae, strengths, method=method, unit=unit, maxima=maxima, residual_norm=residual_norm
    )
    features = torch.tensor(list(targets), dtype=torch.int64)
    amounts = torch.tensor(list(targets.values()), dtype=torch.float64)
    steering = _Steering(sae, features, clamped=method != "add")
    return steering.edit(lambda batch: amounts.expand(batch, -1))


def edit_rows(
    sae: SparseAutoencoder, features: Sequence[int], activations: Sequence[float], method: Method
) -> Edit:
    """An edit for a batch in which every sequence is steered by a feature of its own.

    Used to try many features and strengths in one pass.

    Args:
        features: one per row of the batch. activations: strength of each, as an activation.
        method: ``"add"`` or ``"clamp"``.
    """
    unique, slots = torch.tensor(features, dtype=torch.int64).unique(return_inverse=True)
    steering = _Steering(sae, unique, clamped=method != "add")
    amounts = torch.full((len(slots), len(unique)), float("nan"), dtype=torch.float64)
    amounts[torch.arange(len(slots)), slots] = torch.tensor(activations, dtype=torch.float64)
    return steering.edit(lambda batch: amounts)


def activation_targets(
    sae: SparseAutoencoder,
    strengths: Mapping[int, float],
    *,
    method: Method,
    unit: Unit,
    maxima: Mapping[int, float] | None,
    residual_norm: float | None,
) -> dict[int, float]:
    """Strengths as activations of their features; arguments and errors as in :func:`edit_features`."""
    if method not in METHODS:
        raise InputError(f"There is no steering method {method!r}: it is one of {', '.join(METHODS)}.")
    if unit not in UNITS:
        raise InputError(f"There is no unit {unit!r} of strength: it is one of {', '.join(UNITS)}.")
    if not strengths:
        raise InputError("There is no feature to steer: give at least one.")
    targets = {}
    for feature, strength in strengths.items():
        if not 0 <= feature < sae.d_sae:
            raise InputError(
                f"There is no feature {feature}: this SAE has the features 0 to {sae.d_sae - 1}."
            )
        if not abs(strength) < float("inf"):
            raise InputError(f"The strength of feature {feature} is {strength}; it must be a finite number.")
        if method == "ablate" and strength:
            raise InputError(
                f"Ablating feature {feature} sets it to 0 and takes no strength, but {strength} was given:"
                " leave it at 0, or clamp."
            )
        targets[int(feature)] = (
            strength * _size(sae, feature, unit, maxima, residual_norm) if strength else 0.0
        )
    return targets


def _size(
    sae: SparseAutoencoder,
    feature: int,
    unit: Unit,
    maxima: Mapping[int, float] | None,
    residual_norm: float | None,
) -> float:
    """The activation that strength 1 stands for."""
    if unit == "activation":
        return 1.0
    if unit == "residual":
        if residual_norm is None:
            raise InputError(
                'Strength in the unit "residual" needs residual_norm, the mean norm at the hook.'
            )
        return residual_norm / max(float(sae.W_dec[feature].norm()), 1e-12)
    if maxima is None or feature not in maxima:
        raise InputError(
            f'Strength in the unit "max" needs the maximum of feature {feature} in the index: give it, or use'
            ' the unit "activation".'
        )
    if not maxima[feature]:
        raise InputError(
            f"Feature {feature} never fired in the index, so that it has no maximum to measure strength by:"
            ' use the unit "activation" or "residual".'
        )
    return float(maxima[feature])


class _Steering:
    """Adds what given amounts of some features are worth, or the difference to what they are already."""

    def __init__(self, sae: SparseAutoencoder, features: Tensor, *, clamped: bool) -> None:
        bounds = (sae.metadata.get(name) for name in ("max_norm", "max_norm_out"))
        self.max_norm, self.max_norm_out = (
            float("inf") if bound is None else float(bound) for bound in bounds
        )
        self.sae = sae
        self.features = features
        self.clamped = clamped

    def edit(self, amounts: Callable[[int], Tensor]) -> Edit:
        """The edit that applies ``amounts(batch)`` ``[batch, m]`` of the m features; nan leaves one alone."""
        if not self.sae.config.transcoder:
            return Edit(
                self.sae.hook_name, lambda x, positions: self._applied(x, positions, x, amounts(len(x)))
            )
        return Edit(
            self.sae.hook_out,
            lambda y, positions, x: self._applied(y, positions, x, amounts(len(x))),
            reads=self.sae.hook_name,
        )

    def _applied(self, y: Tensor, positions: Tensor, x: Tensor, amounts: Tensor) -> Tensor:
        """``y [batch, pos, d_out]`` with ``amounts [batch, m]`` of the features.

        Args:
            x: ``[batch, pos, d_in]``, what they are read from: y itself, but for a transcoder.
        """
        if self.sae.device != y.device:
            self.sae = self.sae.to(y.device)
        x = x.to(y.device)
        kept = (positions >= 0) & (x.float().norm(dim=-1) <= self.max_norm)
        if self.sae.config.transcoder:
            kept &= y.float().norm(dim=-1) <= self.max_norm_out
        directions = self.sae.W_dec[self.features.to(y.device)]
        # Half precision is edited in the SAE's own, and float64 stays float64.
        dtype = torch.promote_types(y.dtype, directions.dtype)
        change = amounts.to(dtype).to(y.device)[kept.nonzero()[:, 0]]
        if self.clamped:
            change = change - self._activations(x[kept]).to(dtype)
        edited = y.clone()
        edited[kept] = (y[kept].to(dtype) + change.nan_to_num(nan=0.0) @ directions.to(dtype)).to(y.dtype)
        return edited

    def _activations(self, rows: Tensor) -> Tensor:
        """Activations ``[n, m]`` of the m features, from a whole encoding: TopK compares them all."""
        token, feature, value = self.sae.encode(rows).entries()
        slot_of_feature = torch.full((self.sae.d_sae,), -1, dtype=torch.int64, device=rows.device)
        slot_of_feature[self.features.to(rows.device)] = torch.arange(len(self.features), device=rows.device)
        slot = slot_of_feature[feature]
        mine = slot >= 0
        activations = value.new_zeros(len(rows), len(self.features))
        activations[token[mine], slot[mine]] = value[mine]
        return activations


@dataclass(frozen=True)
class Steered:
    """Two continuations of one prompt from the same seed; neither contains the prompt."""

    prompt: str
    default: str
    steered: str


def steer(
    model: LanguageModel,
    edits: Sequence[Edit],
    prompt: str,
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Steered:
    """Continue a prompt without and with ``edits``, from the same seed.

    Raises:
        InputError: sampling settings out of range, a prompt that is too long, or an edit whose hook never
            fires.
    """

    def write() -> str:
        return model.generate(
            prompt,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )[0]

    default = write()
    with model.edited(*edits):
        return Steered(prompt, default, write())


LENS_TOKENS = 10  # of a feature's promoted tokens
_PROMPTS, _PROMPT_TOKENS = 4, 12
_LOGITS_BYTES = 1 << 27  # of one pass


@torch.no_grad()
def output_scores(
    model: LanguageModel,
    sae: SparseAutoencoder,
    index: "FeatureIndex",
    features: Sequence[int],
    *,
    strength: float = 1.0,
    prompts: Tensor | None = None,
) -> Tensor:
    """Which features will steer? How far adding one raises, in one pass, the tokens that it promotes.

    The output score of Arad, Mueller and Belinkov (2025, 2505.20063): add the feature to a neutral prompt and
    look, among its :data:`LENS_TOKENS` first tokens by the logit lens, for the most probable next token; the
    score is ``(1 − rank / d_vocab) · probability``. We subtract what it is without the feature, and average
    over several prompts.

    Args:
        features: whom to score; they must have fired in the index.
        strength: in units of the feature's maximum, added at every position.
        prompts: ids ``[n, pos]``; by default the beginnings of blocks spread over the index's tokens.

    Returns:
        float64 ``[len(features)]``, −1 to 1; features that write nothing of their own lie near 0.

    Raises:
        InputError: a feature never fired or is none of this SAE's, or the index has no logit lens.
    """
    if not all(index.promoted(feature) for feature in features):
        raise InputError(
            f"Output scores need the logit lens, and the index has none: {sae.hook_out} does not write into"
            " the residual stream of a model whose final normalisation is known."
        )
    if prompts is None:
        prompts = neutral_prompts(index)
    n_prompts, n_tokens = prompts.shape
    maxima = {feature: float(index.max[feature]) for feature in features}
    targets = activation_targets(
        sae, dict.fromkeys(features, strength), method="add", unit="max", maxima=maxima, residual_norm=None
    )
    lens = torch.tensor([[token for _, token, _ in index.promoted(f)[:LENS_TOKENS]] for f in features])
    before = model.logits(prompts)[:, -1].float().softmax(-1)
    per_pass = max(1, _LOGITS_BYTES // (4 * n_prompts * n_tokens * model.d_vocab))
    scores = []
    for start in range(0, len(features), per_pass):
        chosen = features[start : start + per_pass]
        tokens = lens[start : start + per_pass].to(before.device)
        rows = [feature for feature in chosen for _ in range(n_prompts)]
        with model.edited(edit_rows(sae, rows, [targets[feature] for feature in rows], "add")):
            logits = model.logits(prompts.repeat(len(chosen), 1))[:, -1]
        after = logits.float().softmax(-1).view(len(chosen), n_prompts, -1)
        gain = _weighted_by_rank(after, tokens) - _weighted_by_rank(before.expand_as(after), tokens)
        scores.append(gain.mean(dim=1).cpu().double())
    return torch.cat(scores)


def neutral_prompts(index: "FeatureIndex") -> Tensor:
    """The beginnings of a few blocks spread evenly over the index's tokens, int64 ``[n, pos]``."""
    blocks = index.blocks
    numbers = torch.linspace(0, blocks.n_blocks - 1, min(_PROMPTS, blocks.n_blocks)).long().tolist()
    return torch.cat([blocks.ids_tensor(n, n + 1)[:, :_PROMPT_TOKENS] for n in numbers])


def _weighted_by_rank(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """``(1 − rank / d_vocab) · probability`` of a feature's most probable token, ``[features, prompts]``.

    Args:
        probabilities: ``[features, prompts, d_vocab]``. tokens: ids ``[features, m]``.
    """
    _, n_prompts, d_vocab = probabilities.shape
    best = probabilities.gather(2, tokens[:, None, :].expand(-1, n_prompts, -1)).amax(dim=2)
    rank = (probabilities > best[..., None]).sum(dim=2)
    return (1 - rank / d_vocab) * best
