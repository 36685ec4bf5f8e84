"""Show that steering works: choose a feature that steers and a strength that leaves the text whole.

The measure is the share of written tokens that are the feature's *own*: those that it promotes by the logit
lens, and those that it fires on. It is compared with the share in the text written without steering from the
same seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from activations.edits import Edit
from activations.errors import InputError
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.steering import LENS_TOKENS, Method, edit_for, edit_rows, output_scores, steer
from sae.model import SparseAutoencoder

if TYPE_CHECKING:
    from features.index import FeatureIndex

STRENGTHS = (0.5, 0.75, 1.0)
"""In units of the feature's maximum; clamped higher, a small model repeats one token."""
FINALISTS = 12
SEEDS = 6
DEFAULT_TEXTS = 32
SHOWN_SEEDS = 3
MIN_DISTINCT = 0.6
"""Of the variety of unsteered text (:func:`distinct_share`): below, the text has begun to repeat itself."""
MAX_DEFAULT_SHARE = 0.1
"""Of the feature's own tokens in unsteered text."""
_CANDIDATES = 256
_RAREST, _DENSEST = 5e-4, 0.02  # share of tokens on which a candidate fires, if there are any such


@dataclass(frozen=True)
class Demonstration:
    """One feature steered, with what it takes to do it again.

    Attributes:
        feature, strength, method, prompt, seed, max_new_tokens, temperature: the settings; strength in units
            of the feature's maximum.
        output_score: see :func:`features.steering.output_scores`.
        default, steered: the two continuations from that seed.
        default_share, steered_share: share of the feature's own tokens in them.
        mean_default_share, mean_steered_share: the same over ``n_seeds`` seeds, of which the one shown is the
            median.
        own_tokens: ids of the feature's own tokens.
    """

    feature: int
    strength: float
    method: Method
    prompt: str
    seed: int
    max_new_tokens: int
    temperature: float
    output_score: float
    default: str
    steered: str
    default_share: float
    steered_share: float
    mean_default_share: float
    mean_steered_share: float
    n_seeds: int
    own_tokens: frozenset[int]


def own_tokens(index: "FeatureIndex", feature: int) -> frozenset[int]:
    """Ids of the tokens that a feature promotes most, and of those that it fires on most."""
    promoted = (token_id for _, token_id, _ in index.promoted(feature)[:LENS_TOKENS])
    fired_on = (statistic.token_id for statistic in index.top_tokens(feature)[:LENS_TOKENS])
    return frozenset((*promoted, *fired_on))


def promoted_share(model: LanguageModel, text: str, tokens: frozenset[int]) -> float:
    """Share of the tokens of ``text`` that are among ``tokens``; 0 for an empty text."""
    ids = model.tokenizer.encode(text)
    return sum(i in tokens for i in ids) / max(len(ids), 1)


def _changing_share(model: LanguageModel, text: str, tokens: frozenset[int]) -> float:
    """As :func:`promoted_share`, but a token that repeats the one before it does not count as one of ``tokens``."""
    ids = model.tokenizer.encode(text)
    changes = [i for last, i in zip([-1, *ids], ids, strict=False) if i != last]
    return sum(i in tokens for i in changes) / max(len(ids), 1)


def distinct_share(model: LanguageModel, text: str) -> float:
    """Number of different tokens of ``text`` as a share of all of them: low where a text repeats itself."""
    ids = model.tokenizer.encode(text)
    return len(set(ids)) / max(len(ids), 1)


def choose_demonstration(
    model: LanguageModel,
    sae: SparseAutoencoder,
    index: "FeatureIndex",
    *,
    prompt: str = "def",
    method: Method = "clamp",
    max_new_tokens: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
    progress: Progress = silent,
) -> Demonstration:
    """Choose a feature by its output score and a strength by a small sweep.

    The features with the best output scores are steered at several strengths, from several seeds, all in one
    batch. That pair of feature and strength wins that adds most to the share of the feature's own tokens (immediate
    repetitions left out), weighted by how varied the texts stay, if they stay nearly as varied as unsteered ones.

    Raises:
        InputError: no feature fired, the index has no logit lens, or the prompt is too long.
    """
    density = index.density
    usable = np.flatnonzero((density >= _RAREST) & (density <= _DENSEST))
    if not len(usable):  # an index of few tokens
        usable = np.flatnonzero(density)
    if not len(usable):
        raise InputError("There is no feature to demonstrate steering with: none fired in the index.")
    candidates = usable[np.linspace(0, len(usable) - 1, min(_CANDIDATES, len(usable))).astype(int)].tolist()
    with progress("steer", total=SHOWN_SEEDS + 1, unit="rounds") as step:
        feature, strength, score = _best_setting(
            model, sae, index, candidates, prompt, method, max_new_tokens, temperature, seed
        )
        step(1)
        # Written again one by one: in a batch sums are rounded otherwise, and sampling takes other turns.
        edit = edit_for(sae, feature, strength, method=method, maximum=float(index.max[feature]))
        pairs = []
        for s in range(seed, seed + SHOWN_SEEDS):
            pairs.append(
                steer(model, [edit], prompt, seed=s, max_new_tokens=max_new_tokens, temperature=temperature)
            )
            step(1)
    own = own_tokens(index, feature)
    shares = np.array(
        [[promoted_share(model, text, own) for text in (pair.default, pair.steered)] for pair in pairs]
    )
    shown = int(np.argsort(shares[:, 1] - shares[:, 0], kind="stable")[SHOWN_SEEDS // 2])
    pair = pairs[shown]
    return Demonstration(
        feature=feature,
        strength=strength,
        method=method,
        prompt=prompt,
        seed=seed + shown,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        output_score=score,
        default=pair.default,
        steered=pair.steered,
        default_share=float(shares[shown, 0]),
        steered_share=float(shares[shown, 1]),
        mean_default_share=float(shares[:, 0].mean()),
        mean_steered_share=float(shares[:, 1].mean()),
        n_seeds=SHOWN_SEEDS,
        own_tokens=own,
    )


def _best_setting(
    model: LanguageModel,
    sae: SparseAutoencoder,
    index: "FeatureIndex",
    candidates: list[int],
    prompt: str,
    method: Method,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[int, float, float]:
    """The feature and the strength that win the sweep, and the feature's output score."""
    scores = output_scores(model, sae, index, candidates)
    best = scores.argsort(descending=True, stable=True)[:FINALISTS].tolist()
    score_of = {candidates[i]: float(scores[i]) for i in best}
    settings = [(feature, strength) for feature in score_of for strength in STRENGTHS]
    rows = [setting for setting in settings for _ in range(SEEDS)]

    def write(n: int) -> list[str]:
        return model.generate([prompt] * n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    default = write(DEFAULT_TEXTS)
    with model.edited(_edit(sae, index, rows, method)):
        steered = write(len(rows))
    own = {feature: own_tokens(index, feature) for feature in score_of}
    usual = {f: float(np.mean([_changing_share(model, text, own[f]) for text in default])) for f in own}
    before = np.array([usual[feature] for feature, _ in settings])
    after = np.array(
        [_changing_share(model, text, own[feature]) for (feature, _), text in zip(rows, steered, strict=True)]
    ).reshape(len(settings), SEEDS)
    usual_variety = np.mean([distinct_share(model, text) for text in default])
    variety = np.array([distinct_share(model, text) for text in steered]).reshape(len(settings), SEEDS)
    variety = np.minimum(variety / max(usual_variety, 1e-9), 1)
    gains = (after - before[:, None]) * variety
    # A feature whose tokens stand everywhere shows nothing. Gains lie between −1 and 1, so settings that are not
    # usable win only where none is; the median seed, so that one lucky text does not choose.
    usable = 2 * (before <= MAX_DEFAULT_SHARE) + 2 * (variety.mean(axis=1) >= MIN_DISTINCT)
    feature, strength = settings[int((np.median(gains, axis=1) + usable).argmax())]
    return feature, strength, score_of[feature]


def _edit(
    sae: SparseAutoencoder, index: "FeatureIndex", rows: Sequence[tuple[int, float]], method: Method
) -> Edit:
    """Row i of a batch steered by the feature and strength of ``rows[i]``."""
    features = [feature for feature, _ in rows]
    return edit_rows(sae, features, [s * float(index.max[f]) for f, s in rows], method)
