"""The firings of all features on a text, in memory: what labels are fitted to and scored against."""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from activations.progress import Progress, silent
from features.examples import sampling_rank
from features.firings import Encoder, stream_firings
from features.groups import group_starts, place_in_group

if TYPE_CHECKING:
    from activations.blocks import TokenBlocks
    from activations.models import LanguageModel
    from activations.store import HookActivations

_AT_ONCE = 1 << 21  # firings that the control draws at once: bounds its memory


@dataclass(frozen=True)
class FiringTable:
    """Firings of ``d_sae`` features, sorted by feature and then by position.

    Attributes:
        feature: int32 ``[m]``.
        position: int32 ``[m]``.
        value: float32 ``[m]``, activations.
        kept: int64 ``[n]``, the positions that count, ascending.
        d_sae: number of features.
    """

    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray
    kept: np.ndarray
    d_sae: int

    @classmethod
    def of(
        cls,
        model: "LanguageModel",
        encoder: Encoder,
        blocks: "TokenBlocks",
        store: "HookActivations | None" = None,
        *,
        task: str = "firings",
        progress: Progress = silent,
    ) -> "FiringTable":
        """All firings on ``blocks``; positions are block · context_length + place in the block.

        Args:
            store: holds the activations of these blocks; ``model`` computes them when None.
            task: what ``progress`` is told is going on.
        """
        features, positions, values, kept = [], [], [], []
        stream = stream_firings(model, encoder, blocks, store)
        with progress(task, total=blocks.ids.size, unit="tokens") as step, closing(stream):
            for firings, n_blocks in stream:
                features.append(firings.feature.astype(np.int32))
                positions.append(firings.position.astype(np.int32))
                values.append(firings.value)
                kept.append(firings.kept)
                step(n_blocks * blocks.context_length)
        # Chunks come in the order of the text, each sorted by feature: every firing's place is known.
        count = np.zeros(encoder.d_sae, dtype=np.int64)
        for feature in features:
            count += np.bincount(feature, minlength=encoder.d_sae)
        filled = np.cumsum(count)
        table = cls(
            np.repeat(np.arange(encoder.d_sae, dtype=np.int32), count),
            np.empty(count.sum(), dtype=np.int32),
            np.empty(count.sum(), dtype=np.float32),
            np.concatenate([np.zeros(0, dtype=np.int64), *kept]),
            encoder.d_sae,
        )
        while features:  # each chunk is let go as soon as it is in its place
            feature = features.pop()
            filled -= np.bincount(feature, minlength=encoder.d_sae)
            place = filled[feature] + place_in_group(feature)
            table.position[place], table.value[place] = positions.pop(), values.pop()
        return table

    def __len__(self) -> int:
        return len(self.feature)

    @cached_property
    def count(self) -> np.ndarray:
        """int64 ``[d_sae]``, firings of each feature."""
        return np.bincount(self.feature, minlength=self.d_sae)

    def only(self, chosen: np.ndarray) -> "FiringTable":
        """Some of the firings; ``chosen`` bool ``[m]`` or ascending numbers. The positions that count stay."""
        return replace(
            self, feature=self.feature[chosen], position=self.position[chosen], value=self.value[chosen]
        )

    def within(self, where: np.ndarray) -> "FiringTable":
        """What happens at some positions; ``where`` bool, by position."""
        return replace(self.only(where[self.position]), kept=self.kept[where[self.kept]])

    def moved(self, offset: int) -> "FiringTable":
        """The same with ``offset`` added to every position."""
        return replace(self, position=self.position + offset, kept=self.kept + offset)

    def thinned(self, most: int) -> "FiringTable":
        """At most ``most`` firings of each feature, a fair choice of them."""
        if not len(self) or self.count.max() <= most:
            return self
        many = np.flatnonzero((self.count > most)[self.feature])
        feature = self.feature[many].astype(np.int64)
        order = np.lexsort((sampling_rank(feature, self.position[many]), feature))
        chosen = (self.count <= most)[self.feature]
        chosen[many[order[place_in_group(feature[order]) < most]]] = True
        return self.only(chosen)

    def with_more(self, feature: np.ndarray, position: np.ndarray, value: np.ndarray) -> "FiringTable":
        """The same and some further firings of features that it has none of."""
        joined = [
            np.concatenate([mine, more.astype(mine.dtype)])
            for mine, more in ((self.feature, feature), (self.position, position), (self.value, value))
        ]
        order = np.lexsort((joined[1], joined[0]))
        feature, position, value = (column[order] for column in joined)
        return replace(self, feature=feature, position=position, value=value)

    def shuffled(self, seed: int = 0) -> "FiringTable":
        """The control: every feature fires as often, with the same activations, at random positions that count."""
        generator = np.random.default_rng(seed)
        n = len(self.kept)
        position = np.empty_like(self.position)
        ends = np.cumsum(self.count)
        group = ends // _AT_ONCE
        for features in np.split(np.arange(self.d_sae), np.flatnonzero(np.diff(group)) + 1):
            wanted = self.count[features]
            drawn, missing = np.zeros(0, dtype=np.int64), wanted
            while missing.any():  # a feature that draws a place twice draws again
                again = np.repeat(np.arange(len(features)), missing) * n
                again = np.sort(again + generator.integers(n, size=len(again)))
                drawn = np.sort(np.concatenate([drawn, again]), kind="stable")  # two sorted runs: a merge
                drawn = drawn[np.diff(drawn, prepend=-1) > 0]
                missing = wanted - np.bincount(drawn // n, minlength=len(features))
            stop = ends[features[-1]]
            position[stop - len(drawn) : stop] = self.kept[drawn % n]
        return replace(self, position=position)

    def medians(self) -> np.ndarray:
        """float32 ``[d_sae]``, the median activation of each feature; nan for one that never fires."""
        medians = np.full(self.d_sae, np.nan, dtype=np.float32)
        order = np.lexsort((self.value, self.feature))
        starts, count = group_starts(self.feature), self.count[self.count > 0]
        values = self.value[order]
        medians[self.count > 0] = (values[starts + (count - 1) // 2] + values[starts + count // 2]) / 2
        return medians
