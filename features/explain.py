"""A first label for every feature without a language model: what its tokens say, tested on other documents.

Each kind of label is a chain of aspects (:mod:`features.chains`), along which nodes are found that tell best where a
feature fires::

    token         fires on ‹self› after ‹(›                       an n-gram of one to four tokens
    token after   fires on ‹.› after capitalised words            the token, and the kind of token before it
    word          fires on ‹error› in any case
    class         fires in docstrings                             what the token is to Python, and the one before
    class after   fires on names after ‹raise›
    shape after   fires on capitalised words after ‹class›
    line          fires on ‹,› in lines that begin with ‹import›
    says          says ‹return›                                   before tokens that it promotes itself
    before        fires before ‹:›
    always        fires on 43% of all tokens                      for dense features

"says" is judged by the text as the others are, but its tokens come from the logit lens: what a feature reads and what
it writes together describe it better than either alone (Gur-Arieh et al. 2025, 2501.08319).

Nothing is decided on the score split. Of the documents of the train split three quarters propose a description of
every kind, the fourth decides by F1 which kind it is, and the description of that kind is made again from all of
them; only then is it scored (:mod:`features.score`). To every feature's shuffled control all this is done as well.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.store import HookActivations
from features.aspects import Text
from features.chains import Chain, Keys, Nodes, count_hits, describe
from features.firing_table import FiringTable
from features.groups import group_starts
from features.index import FeatureIndex
from features.labels import Label, Labels
from features.patterns import Condition, Pattern, joined
from features.score import Counts
from features.wording import says, sentence
from features.wording import visible as visible
from sae.model import SparseAutoencoder

METHOD = 2
"""Grows when labels are made in another way: those on disk are then made again."""
FIT_TOKENS = 500_000
"""Tokens of the index that labels are fitted to."""
FIT_FIRINGS = 16_000_000
"""Firings in them, at most: what fits into memory (16 bytes each)."""
THINNED = 2_000
"""Firings of one feature that descriptions are found with; what a kind is chosen by, and scores, are exact."""
TEXT_TOKENS = 2_000_000
"""Tokens of the index in which examples of rare features are looked for."""
RARE = 30
"""Firings in these tokens below which a feature's examples in the index, from all of its text, are taken instead."""
CHOOSING = 4
"""One of so many documents chooses between the kinds."""
OWN_WEIGHT = 0.2
"""How much F1 on the documents that made a description counts in the choice, beside 1 for that on the choosing ones, on
which rare features fire too seldom to tell."""
UNSURE_BELOW = 0.3
"""F1 below which a label begins with "maybe": it predicts firing too badly to be an explanation."""
DENSE_ABOVE = 0.1
"""Density above which "always" is tried."""


@dataclass(frozen=True)
class Kind:
    """A kind of label: its name, the aspects it looks at, and whether only tokens that the feature promotes will do."""

    name: str
    chain: Chain
    promoted: bool = False


KINDS = (
    Kind("token", ("token", "before", "before2", "before3")),
    Kind("token after", ("token", "shape_before")),
    Kind("word", ("word", "before")),
    Kind("class", ("class", "class_before")),
    Kind("class after", ("class", "before", "before2")),
    Kind("shape after", ("shape", "before", "before2")),
    Kind("line", ("line", "token")),
    Kind("says", ("next",), promoted=True),
    Kind("before", ("next", "class")),
)
NONE, ALWAYS = "none", "always"


@dataclass(frozen=True)
class Evidence:
    """What labels are made from.

    Attributes:
        text: of the train split, and behind it of the score split.
        train: what is known of the firings on the first. score: all firings on the second.
        scale: float64 ``[d_sae]``, firings in ``train`` for one on ``train.kept``: 1 unless some are from elsewhere.
        median: ``[d_sae]``, activations above which a firing is in the upper half.
        promoted: int ``[d_sae, n]``, token ids with the highest logits; None where the logit lens says nothing.
    """

    text: Text
    train: FiringTable
    score: FiringTable
    scale: np.ndarray
    median: np.ndarray
    promoted: np.ndarray | None

    def shuffled(self) -> "Evidence":
        """The control: as many firings at random positions."""
        return Evidence(
            self.text,
            self.train.shuffled(seed=0),
            self.score.shuffled(seed=1),
            self.scale,
            self.median,
            self.promoted,
        )


@dataclass(frozen=True)
class Explanations:
    """The best description of each feature, and how it does on the score split.

    Attributes:
        kind: the name of each feature's kind, ALWAYS or NONE.
        patterns: for each feature; one without conditions holds nowhere.
        counts: on the score split.
    """

    kind: list[str]
    patterns: list[Pattern]
    counts: Counts


def label_features(
    index: FeatureIndex,
    model: LanguageModel,
    sae: SparseAutoencoder,
    score_blocks: TokenBlocks,
    labels: Labels,
    *,
    activations: HookActivations | None = None,
    progress: Progress = silent,
) -> None:
    """Give every feature a label with its score on ``score_blocks``; people's labels stay.

    Args:
        index: of this SAE, over the train split.
        score_blocks: the score split.
        labels: where they go; automatic labels that are there stay in their history.
        activations: a store that begins with the blocks of the index, read instead of running the model.

    Raises:
        InputError: the labels cannot be written.
    """
    evidence = gather(index, model, sae, score_blocks, activations=activations, progress=progress)
    made = make_labels(evidence, progress=progress)
    for feature in np.flatnonzero(np.asarray(index.count) == 0).tolist():
        made[feature] = Label(
            feature, f"never fired in {index.n_tokens:,} tokens", "automatic", method="dead"
        )
    labels.put_automatic(made, label_inputs(sae, index, score_blocks))


def label_inputs(sae: SparseAutoencoder, index: FeatureIndex, score_blocks: TokenBlocks) -> dict[str, Any]:
    """What automatic labels depend on; :attr:`Labels.inputs` says what those on disk were made from."""
    return {
        "sae_hash": sae.hash,
        "index": index.manifest["inputs"],
        "score_blocks_hash": score_blocks.hash,
        "method": METHOD,
    }


def fitted_blocks(index: FeatureIndex) -> TokenBlocks:
    """The part of the index's text that labels are fitted to."""
    l0 = float(index.count.sum()) / index.n_tokens
    return index.blocks.first_tokens(min(FIT_TOKENS, int(FIT_FIRINGS / max(l0, 1))))


def gather(
    index: FeatureIndex,
    model: LanguageModel,
    sae: SparseAutoencoder,
    score_blocks: TokenBlocks,
    *,
    activations: HookActivations | None = None,
    progress: Progress = silent,
) -> Evidence:
    """The firings that labels are fitted to and scored on; arguments as for :func:`label_features`."""
    sample = fitted_blocks(index)
    train = FiringTable.of(model, sae, sample, activations, task="read firings", progress=progress)
    scale = np.ones(index.d_sae)
    text_blocks = sample
    if sample.n_blocks < index.blocks.n_blocks:
        text_blocks = index.blocks.first_tokens(TEXT_TOKENS)
        examples = index.array("range_position").reshape(index.d_sae, -1)
        usable = (examples >= 0) & (examples < text_blocks.ids.size)
        known = usable.sum(axis=1)
        rare = (train.count < RARE) & (known > train.count)
        feature, place = np.nonzero(usable & rare[:, None])
        value = index.array("range_value").reshape(index.d_sae, -1)[feature, place]
        train = train.only(~rare[train.feature]).with_more(feature, examples[feature, place], value)
        scale[rare] = known[rare] / (index.density[rare] * len(train.kept))
    score = FiringTable.of(model, sae, score_blocks, task="read held-out firings", progress=progress)
    tokenizer = model.tokenizer
    return Evidence(
        Text.of_blocks([text_blocks, score_blocks], tokenizer.vocabulary(), tokenizer.special_ids),
        train,
        score.moved(text_blocks.ids.size),
        scale,
        np.array([index.quantile(feature, 0.5) for feature in range(index.d_sae)]),
        np.asarray(index.array("promoted_id")) if index.weights.has_logit_lens else None,
    )


def make_labels(evidence: Evidence, *, progress: Progress = silent) -> list[Label]:
    """The label of every feature, scored beside its shuffled control; in the order of features."""
    with progress("label", total=4 * len(KINDS), unit="steps") as step:
        found = explain(evidence, step)
        control = explain(evidence.shuffled(), step).counts.f1
    hashes = _hashes(evidence.train)
    return [_label(feature, found, control, hashes) for feature in range(evidence.train.d_sae)]


def explain(evidence: Evidence, step: Callable[[int], None] = lambda n: None) -> Explanations:
    """Describe every feature in the way that is best, and score the descriptions."""
    text, train, score, scale = evidence.text, evidence.train, evidence.score, evidence.scale
    chooses = text.document % CHOOSING == CHOOSING - 1
    thinned, share = _thinned(train)
    fitting, choosing = thinned.within(~chooses), train.within(chooses)
    merit = np.full((len(KINDS) + 1, train.d_sae), -np.inf)
    for number, kind in enumerate(KINDS):
        keys = Keys.of(text, kind.chain)
        nodes = _described(keys, kind, fitting, scale * share, evidence)
        own = _f1(keys, nodes, fitting, scale * share)
        worth = _f1(keys, nodes, choosing, scale) + OWN_WEIGHT * own - nodes.costs(train.d_sae)
        merit[number] = np.where(own > 0, worth, -np.inf)
        step(1)
    density = train.count / len(train.kept)
    dense = density > DENSE_ABOVE
    merit[-1, dense] = (1 + OWN_WEIGHT) * (2 * density / (1 + density))[dense]
    best = np.where(np.isfinite(merit).any(axis=0), merit.argmax(axis=0), -1)

    patterns = [Pattern()] * train.d_sae
    hit, predicted = np.zeros(len(score), dtype=bool), np.zeros(train.d_sae, dtype=np.int64)
    for number, kind in enumerate(KINDS):
        mine = best == number
        keys = Keys.of(text, kind.chain)
        nodes = _described(keys, kind, thinned.only(mine[thinned.feature]), scale * share, evidence)
        hit_here, predicted_here = count_hits(keys, nodes, score)
        hit |= hit_here
        predicted += predicted_here
        for feature, pattern in _patterns(text, keys, nodes):
            patterns[feature] = pattern
        step(1)
    always = best == len(KINDS)
    hit |= always[score.feature]
    predicted[always] = len(score.kept)
    for feature in np.flatnonzero(always).tolist():
        patterns[feature] = Pattern((Condition(),))
    names = [*(kind.name for kind in KINDS), ALWAYS, NONE]
    return Explanations(
        [names[number] if pattern.any_of else NONE for number, pattern in zip(best, patterns, strict=True)],
        patterns,
        Counts.of(score, hit, predicted, evidence.median),
    )


def _thinned(firings: FiringTable) -> tuple[FiringTable, np.ndarray]:
    """At most THINNED firings of each feature, and which share of them that is, float64 ``[d_sae]``."""
    thinned = firings.thinned(THINNED)
    return thinned, np.divide(
        thinned.count, firings.count, out=np.ones(firings.d_sae), where=firings.count > 0
    )


def _described(keys: Keys, kind: Kind, firings: FiringTable, scale: np.ndarray, evidence: Evidence) -> Nodes:
    """Descriptions of one kind for the features that fire."""
    allowed = None
    if kind.promoted:
        if evidence.promoted is None:
            nothing = np.zeros(0, dtype=np.int64)
            return Nodes(nothing, nothing, nothing)
        promoted, width = evidence.promoted.astype(np.int64), len(evidence.text.vocabulary)
        pairs = np.unique(np.arange(len(promoted))[:, None] * width + promoted)

        def allowed(feature: np.ndarray, key: np.ndarray) -> np.ndarray:
            return np.isin(feature * width + keys.values[0][key, 0], pairs)

    return describe(keys, firings, scale, allowed)


def _f1(keys: Keys, nodes: Nodes, firings: FiringTable, scale: np.ndarray) -> np.ndarray:
    """float64 ``[d_sae]``, F1 of descriptions; 0 for features that do not fire."""
    hit, predicted = count_hits(keys, nodes, firings)
    hits = np.bincount(firings.feature[hit], minlength=firings.d_sae)
    whole = predicted * scale + firings.count
    return np.divide(2 * hits, whole, out=np.zeros(len(whole)), where=whole > 0)


def _patterns(text: Text, keys: Keys, nodes: Nodes) -> Iterable[tuple[int, Pattern]]:
    """The pattern of each feature that nodes describe."""
    values = [text.values(aspect) for aspect in keys.chain]
    for start, stop in pairwise(np.append(group_starts(nodes.feature), len(nodes)).tolist()):
        conditions = []
        for node in range(start, stop):
            numbers = keys.values[nodes.level[node]][nodes.key[node]]
            conditions.append(
                {
                    aspect: (values[n][number],)
                    for n, (aspect, number) in enumerate(zip(keys.chain, numbers, strict=False))
                }
            )
        yield int(nodes.feature[start]), Pattern(joined(conditions))


def _label(feature: int, found: Explanations, control: np.ndarray, hashes: list[str]) -> Label:
    kind, pattern = found.kind[feature], found.patterns[feature]
    if kind == NONE:
        return Label(feature, "no token explains it", "automatic", method=NONE)
    score = found.counts.score(feature, None if np.isnan(control[feature]) else float(control[feature]))
    if kind == ALWAYS:
        density = found.counts.fired[feature] / found.counts.n_positions
        words = f"fires on {density:.0%} of all tokens"
    elif kind == "says":
        words = says(dict(pattern.any_of[0].values)["next"])
    else:
        words = sentence(pattern)
    unsure = score is None or score.value < UNSURE_BELOW or score.value <= (score.control or 0)
    return Label(
        feature,
        f"maybe {words}" if unsure and kind != ALWAYS else words,
        "automatic",
        method=kind,
        pattern=pattern.to_json(),
        scores=() if score is None else (score,),
        examples_hash=hashes[feature],
    )


def _hashes(train: FiringTable) -> list[str]:
    """Of each feature, a hash of the firings that its description was made from."""
    starts = np.searchsorted(train.feature, np.arange(train.d_sae + 1))
    positions = np.ascontiguousarray(train.position, dtype="<i8")
    return [hashlib.sha256(positions[start:stop].data).hexdigest()[:16] for start, stop in pairwise(starts)]
