"""A first label for every feature without a language model: what its tokens say, tested on other documents.

For each feature the index (train split) proposes one predicate of each kind::

    on       fires on ‹self›                     the token itself
    after    fires after ‹(›                     the token before
    end      fires at the end of ‹.join›         the token before and the token itself
    before   fires before ‹:›                    the token that follows
    says     says ‹return›                       the token that follows is one that the feature promotes
    always   fires on 43% of all tokens          nothing at all; for dense features

and the one with the best F1 on the score split (:mod:`features.score` measures it) becomes the label. "says"
is judged by the text as the others are, but its tokens come from the logit lens: what a feature reads and
what it writes together describe it better than either alone (Gur-Arieh et al. 2025, 2501.08319).

Nothing is fitted on the score split except which of the kinds is best. A kind's set is chosen on the train
split: of the tokens that would reach the best F1 alone, at most :data:`MAX_TOKENS`, the most precise first,
as many as make the F1 of the whole set largest.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.groups import group_starts, place_in_group
from features.index import FeatureIndex
from features.labels import Label, Labels
from features.score import Counts, Place, Predicates, count_predictions, find, position_keys
from sae.model import SparseAutoencoder

MAX_TOKENS = 5
"""In one label: a person must be able to take it in."""
UNSURE_BELOW = 0.3
"""F1 below which a label begins with "maybe": it predicts firing too badly to be an explanation."""
DENSE_ABOVE = 0.1
"""Density above which "always" is tried."""
_MIN_FIRINGS = 2  # of a feature's (sampled) firings must have a token: one may be chance

_EDGES_AND_RUNS = re.compile(r"^ +| +$| {2,}")
_MARKS = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})


def visible(text: str) -> str:
    """A token in guillemets with its white space to be seen: ``‹self›``, ``‹ self›``, ``‹⏎␣␣›``, ``‹␣×12›``.

    One space before a word stays a space; other characters that print nothing show as escapes.
    """
    lead = " " if text[:1] == " " and text[1:2].strip() else ""
    body = _EDGES_AND_RUNS.sub(lambda run: _spaces(len(run[0])), text[len(lead) :]).translate(_MARKS)
    body = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in body)
    return f"‹{lead}{body}›"


def _spaces(n: int) -> str:
    return "␣" * n if n <= 4 else f"␣×{n}"


@dataclass(frozen=True)
class Proposal:
    """What one kind of label would say of each feature.

    Attributes:
        kind: see the module.
        words: how the text begins.
        predicates: its token sets, those of one feature together, tokens with most firings first.
        f1: float64 ``[d_sae]``, estimated on the train split; nan for features without a set.
    """

    kind: str
    words: str
    predicates: Predicates
    f1: np.ndarray


def label_features(
    index: FeatureIndex,
    model: LanguageModel,
    sae: SparseAutoencoder,
    score_blocks: TokenBlocks,
    labels: Labels,
    *,
    progress: Progress = silent,
) -> None:
    """Give every feature a label, with precision, recall and F1 on ``score_blocks``; people's labels stay.

    Args:
        index: of this SAE, over the train split.
        score_blocks: the score split.
        labels: where they go; automatic labels that are there are replaced.

    Raises:
        InputError: the labels cannot be written.
    """
    proposals = propose(index)
    counts = count_predictions(
        model, sae, score_blocks, [proposal.predicates for proposal in proposals], progress=progress
    )
    labels.put_automatic(choose(index, proposals, counts), label_inputs(sae, index, score_blocks))


def label_inputs(sae: SparseAutoencoder, index: FeatureIndex, score_blocks: TokenBlocks) -> dict[str, Any]:
    """What automatic labels depend on; :attr:`Labels.inputs` says what those on disk were made from."""
    return {"sae_hash": sae.hash, "index": index.manifest["inputs"], "score_blocks_hash": score_blocks.hash}


def propose(index: FeatureIndex) -> list[Proposal]:
    """Token sets for every feature and every kind but "always", from the index alone."""
    ids = index.blocks.ids
    d_sae, d_vocab = index.d_sae, len(index.vocabulary)
    fired = np.asarray(index.count)

    token, count = _array(index, "token_id"), _array(index, "token_count")
    feature, place = np.nonzero((token >= 0) & (count >= np.minimum(_MIN_FIRINGS, fired)[:, None]))
    key, hits = token[feature, place].astype(np.int64), count[feature, place].astype(np.float64)
    total = _array(index, "vocabulary_count")[key]
    proposals = [_proposal("on", "fires on", "current", feature, key, hits, total, fired)]

    # The index does not count the tokens around firings: a fair sample of each feature's stands for them.
    sample = _array(index, "range_position").reshape(d_sae, -1)
    sampled = (sample >= 0).sum(axis=1)
    owner, place = np.nonzero(sample >= 0)
    position = sample[owner, place]
    surroundings: tuple[tuple[str, str, Place], ...] = (
        ("after", "fires after", "previous"),
        ("end", "fires at the end of", "pair"),
        ("before", "fires before", "next"),
    )
    for kind, words, where in surroundings:
        keys = position_keys(ids, where, d_vocab)
        feature, key, times = _count_pairs(owner, keys[position])
        enough = (times >= np.minimum(_MIN_FIRINGS, fired[feature])) & (key >= 0)
        feature, key, times = feature[enough], key[enough], times[enough]
        total = _count_keys(key, keys)
        hits = np.minimum(times / sampled[feature] * fired[feature], total)
        proposals.append(_proposal(kind, words, where, feature, key, hits, total, fired))

    if index.manifest["logit_lens"]:
        promoted = _array(index, "promoted_id").astype(np.int64)
        pairs = np.sort((np.arange(d_sae)[:, None] * d_vocab + promoted).reshape(-1))
        says = find(pairs, feature * d_vocab + key) >= 0
        proposals.append(
            _proposal("says", "says", "next", feature[says], key[says], hits[says], total[says], fired)
        )
    return proposals


def choose(index: FeatureIndex, proposals: list[Proposal], counts: Counts) -> list[Label]:
    """The label of every feature: its best proposal by F1 on the score split.

    A feature that did not fire there keeps the best by the train split's estimate, without figures.
    """
    estimate = np.array([proposal.f1 for proposal in proposals])
    has_set = ~np.isnan(estimate)
    # Where two are equal on the score split (all 0, say) the estimate decides.
    merit = np.where(has_set, np.nan_to_num(counts.f1) + 1e-6 * np.nan_to_num(estimate), -1.0)
    best, f1 = merit.argmax(axis=0), counts.f1
    always_f1 = 2 * counts.fired / (counts.fired + counts.n_positions)
    sets = [_sets(proposal.predicates, index.d_sae) for proposal in proposals]
    labels = []
    for feature in range(index.d_sae):
        kind, n = int(best[feature]), int(counts.fired[feature])
        if not index.count[feature]:
            text = f"never fired in {index.n_tokens:,} tokens"
            labels.append(Label(feature, text, "automatic", "dead", n=n))
            continue
        row = f1[kind, feature] if has_set[kind, feature] else 0.0
        if index.density[feature] > DENSE_ABOVE and always_f1[feature] > row:
            labels.append(_dense_label(index, counts, feature))
            continue
        if not has_set[kind, feature]:
            labels.append(Label(feature, "no token explains it", "automatic", "none", n=n))
            continue
        proposal = proposals[kind]
        text = f"{proposal.words} {_name(index, proposal, sets[kind][feature])}"
        if not n:
            labels.append(Label(feature, text, "automatic", proposal.kind, n=0))
            continue
        if f1[kind, feature] < UNSURE_BELOW:
            text = f"maybe {text}"
        figures = (float(array[kind, feature]) for array in (f1, counts.precision, counts.recall))
        f1_, precision, recall = (None if np.isnan(figure) else figure for figure in figures)
        labels.append(Label(feature, text, "automatic", proposal.kind, f1_, precision, recall, n))
    return labels


def _proposal(
    kind: str,
    words: str,
    place: Place,
    feature: np.ndarray,
    key: np.ndarray,
    hits: np.ndarray,
    total: np.ndarray,
    fired: np.ndarray,
) -> Proposal:
    """Choose the set of each feature among its m (feature, key) pairs.

    Args:
        feature, key: int64 ``[m]``. hits: float64 ``[m]``, firings of the feature at that key.
        total: int64 ``[m]``, positions with that key. fired: int64 ``[d_sae]``, firings of each feature.
    """
    alone = 2 * hits / (total + fired[feature])
    order = np.lexsort((-alone, feature))
    order = order[place_in_group(feature[order]) < MAX_TOKENS]
    order = order[np.lexsort((-hits[order] / total[order], feature[order]))]
    feature, key, hits, total = feature[order], key[order], hits[order], total[order]
    together = 2 * _running_sum(hits, feature) / (_running_sum(total, feature) + fired[feature])
    by_merit = np.lexsort((-together, feature))
    best = by_merit[group_starts(feature[by_merit])]
    f1, last = np.full(len(fired), np.nan), np.full(len(fired), -1)
    f1[feature[best]], last[feature[best]] = together[best], best
    chosen = np.flatnonzero(np.arange(len(feature)) <= last[feature])
    chosen = chosen[np.lexsort((-hits[chosen], feature[chosen]))]
    return Proposal(kind, words, Predicates(place, feature[chosen], key[chosen]), f1)


def _running_sum(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the values so far within each run of equal numbers of ``group``, which is sorted."""
    sums = np.cumsum(values)
    starts = group_starts(group)
    before = sums[starts] - values[starts]
    return sums - np.repeat(before, np.diff(starts, append=len(group)))


def _count_pairs(feature: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (feature, key) pairs and how often each occurs; sorted by feature."""
    order = np.lexsort((key, feature))
    feature, key = feature[order], key[order]
    new = np.ones(len(feature), dtype=bool)
    new[1:] = (feature[1:] != feature[:-1]) | (key[1:] != key[:-1])
    starts = np.flatnonzero(new)
    return feature[starts], key[starts], np.diff(starts, append=len(feature))


def _count_keys(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How often each of ``wanted`` stands in ``keys``: int64 of its shape."""
    known, number = np.unique(wanted, return_inverse=True)
    found = find(known, keys)
    return np.bincount(found[found >= 0], minlength=len(known))[number]


def _sets(predicates: Predicates, d_sae: int) -> list[np.ndarray]:
    """The keys of every feature."""
    return np.split(predicates.keys, np.searchsorted(predicates.features, np.arange(1, d_sae)))


def _name(index: FeatureIndex, proposal: Proposal, keys: np.ndarray) -> str:
    vocabulary, d_vocab = index.vocabulary, len(index.vocabulary)
    if proposal.predicates.place == "pair":
        texts = [vocabulary[int(key) // d_vocab] + vocabulary[int(key) % d_vocab] for key in keys]
    else:
        texts = [vocabulary[int(key)] for key in keys]
    return ", ".join(map(visible, texts))


def _dense_label(index: FeatureIndex, counts: Counts, feature: int) -> Label:
    """Firing is predicted everywhere: precision is the density on the score split, recall 1."""
    n = int(counts.fired[feature])
    precision = n / counts.n_positions
    text = f"fires on {index.density[feature]:.0%} of all tokens"
    return Label(feature, text, "automatic", "always", 2 * precision / (1 + precision), precision, 1.0, n)


def _array(index: FeatureIndex, name: str) -> np.ndarray:
    """A file of the index (:mod:`features.layout`), memory-mapped."""
    array: np.ndarray = np.load(index.folder / f"{name}.npy", mmap_mode="r")
    return array
