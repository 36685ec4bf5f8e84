"""Windows of the score split in which a feature is silent: anywhere, or around a token on which it often fires."""

from collections.abc import Iterable
from contextlib import closing

import numpy as np

from activations.blocks import PADDING
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.firings import stream_firings
from features.index import FeatureIndex
from features.layout import WINDOW, WINDOW_BEFORE
from features.llm.explain import LISTED_TOKENS, WIDTH
from sae.model import SparseAutoencoder

RANDOM_WINDOWS = 256
"""Random windows from which every feature takes those where it is silent."""
BEFORE = (WIDTH - 1) * WINDOW_BEFORE // (WINDOW - 1)
"""Tokens of a window before the one that it is about: as in the examples of an index of the same width."""


class SilentWindows:
    """Encodes the score split once, and remembers where some features fire.

    A window is given by its start, its end, and the place in it that it is about; int64 ``[n, 3]``.

    Args:
        index: over the score split.
        explained: the index over the train split: on which tokens a feature often fires.
        model, sae: to see where a feature is silent.
        features: those that will be asked for; all if None.
        seed: of the random windows.
    """

    def __init__(
        self,
        index: FeatureIndex,
        explained: FeatureIndex,
        model: LanguageModel,
        sae: SparseAutoencoder,
        *,
        features: Iterable[int] | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self._explained = explained
        blocks = index.blocks
        self._context = blocks.context_length
        self._lengths = (blocks.documents != PADDING).sum(axis=1)
        self._random = self._random_windows(seed)
        self._read(model, sae, index, features, progress)

    def random(self, feature: int) -> np.ndarray:
        """Those of the random windows in which a feature is silent; about no place: their first stands there."""
        return self._random[self._is_silent(feature, self._random)]

    def near_misses(self, feature: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Windows around a token on which a feature often fires, in which it is silent; at most one of a block.

        They are of the tokens that an explainer sees first (:data:`LISTED_TOKENS`), drawn with the probability of
        finding a firing on the token among all firings on these.
        """
        tokens = self._explained.top_tokens(feature)[:LISTED_TOKENS]
        found = [self._positions_of(token.token_id) for token in tokens]
        n_of = np.array([len(positions) for positions in found], dtype=np.int64)
        # Drawing without replacement, each by its weight (a token's firings / places where it stands), is sorting by
        # exponential times of these rates (Efraimidis and Spirakis 2006).
        weight = np.repeat([token.count for token in tokens] / np.maximum(n_of, 1), n_of)
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        windows = self._around(positions[np.argsort(rng.exponential(size=len(positions)) / weight)])
        windows = windows[self._is_silent(feature, windows)]
        _, first = np.unique(windows[:, 0] // self._context, return_index=True)
        return windows[np.sort(first)[:n]]

    def _random_windows(self, seed: int) -> np.ndarray:
        """One of each of some blocks, in the order of the text."""
        width = min(WIDTH, self._context)
        rng = np.random.default_rng([seed, RANDOM_WINDOWS])
        chosen = np.sort(rng.permutation(np.flatnonzero(self._lengths >= width))[:RANDOM_WINDOWS])
        start = chosen * self._context + rng.integers(0, self._lengths[chosen] - width + 1)
        return np.stack([start, start + width, start], axis=1)

    def _around(self, positions: np.ndarray) -> np.ndarray:
        """The window about each position, within the text of its block."""
        block = positions // self._context
        first = block * self._context
        stop = np.minimum(positions - BEFORE + WIDTH, first + self._lengths[block])
        return np.stack([np.maximum(positions - BEFORE, first), stop, positions], axis=1)

    def _is_silent(self, feature: int, windows: np.ndarray) -> np.ndarray:
        """bool ``[n]``: no firing lies in the window."""
        assert self._wanted[feature], f"feature {feature} is not among those that were to be asked for"
        fired = self._fired[slice(*np.searchsorted(self._feature, [feature, feature + 1]))]
        silent: np.ndarray = np.equal(*np.searchsorted(fired, windows[:, :2].T))
        return silent

    def _positions_of(self, token_id: int) -> np.ndarray:
        """Where a token stands at positions that count, in the order of the text."""
        return self._by_token[slice(*np.searchsorted(self._token, [token_id, token_id + 1]))]

    def _read(
        self,
        model: LanguageModel,
        sae: SparseAutoencoder,
        index: FeatureIndex,
        features: Iterable[int] | None,
        progress: Progress,
    ) -> None:
        """``_fired`` is sorted by ``_feature``, ``_by_token`` by ``_token``; the positions of one are ascending."""
        self._wanted = np.full(sae.d_sae, features is None)
        self._wanted[list(features or ())] = True
        blocks = index.blocks
        owners, fired, usable = [], [], []
        stream = stream_firings(model, sae, blocks)
        with progress("read text", total=blocks.n_blocks, unit="blocks") as step, closing(stream):
            for firings, n_blocks in stream:
                chosen = self._wanted[firings.feature]
                owners.append(firings.feature[chosen])
                fired.append(firings.position[chosen])
                usable.append(np.setdiff1d(firings.kept, firings.barred, assume_unique=True))
                step(n_blocks)
        # The parts come in the order of the text, so that a stable sort leaves positions ascending.
        self._feature, self._fired = _sorted_by(np.concatenate(owners), np.concatenate(fired))
        positions = np.concatenate(usable)
        self._token, self._by_token = _sorted_by(
            blocks.ids.reshape(-1)[positions].astype(np.int64), positions
        )


def _sorted_by(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the order of the keys, equal keys in the order that they have."""
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]
