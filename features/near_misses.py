"""Near misses: positions of a feature's own token where it is silent. What it takes besides the token shows there.

The token is that of one of the feature's strongest firings so far, known early in the pass, in every stretch of text
another one. A few positions of it are looked at there, and those where the feature is silent compete to be kept, by a
hash.
"""

import numpy as np

from features.examples import Candidates, sampling_rank, splitmix64
from features.firings import Firings

LOOKED_AT = 8
"""Positions of each feature's token, in every stretch of text."""


def near_misses(
    firings: Firings, token_of: np.ndarray, ids: np.ndarray, document_of: np.ndarray
) -> Candidates:
    """Positions of these firings' text that hold a feature's token, where it does not fire.

    Args:
        token_of: int64 ``[d_sae]``, the token of each feature, -1 for none.
        ids, document_of: ``[n_positions]``, of the whole text.
    """
    usable = np.setdiff1d(firings.kept, firings.barred, assume_unique=True)
    tokens = ids[usable]
    by_token = np.argsort(tokens, kind="stable")
    n_tokens = max(int(tokens.max(initial=0)), int(token_of.max(initial=0))) + 1
    n_of = np.bincount(tokens, minlength=n_tokens)
    begins = n_of.cumsum() - n_of

    features = np.flatnonzero(token_of >= 0)
    features = features[n_of[token_of[features]] > 0]
    n = n_of[token_of[features]]
    seed = features.astype(np.uint64) ^ splitmix64(firings.kept[:1].astype(np.uint64))
    start = (splitmix64(seed) % n.astype(np.uint64)).astype(np.int64)
    looked_at = np.minimum(n, LOOKED_AT)
    feature = np.repeat(features, looked_at)
    step = np.arange(len(feature)) - np.repeat(looked_at.cumsum() - looked_at, looked_at)
    place = (np.repeat(start, looked_at) + step) % np.repeat(n, looked_at)
    position = usable[by_token[begins[token_of[feature]] + place]]
    silent = ~firings.fires(feature, position)
    feature, position = feature[silent], position[silent]
    order = np.lexsort((position, feature))
    feature, position = feature[order], position[order]
    return Candidates(
        feature,
        position,
        np.zeros(len(feature), np.float32),
        document_of[position],
        sampling_rank(feature, position),
    )
