"""A run whose index is made up, for tests of what is shown and exported: every text and number is known."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from features.coactive import Coactive
from features.index import Example, TokenStatistic
from features.labels import Labels
from features.run import Run
from features.statistics import HISTOGRAM_EDGES
from features.tags import Tag

WINDOW = 64
SILENT = 3


@dataclass
class FakeIndex:
    """Looks like :class:`features.index.FeatureIndex`. Every example consists of ``words``; feature 3 is silent."""

    d_sae: int = 8
    words: list[str] = field(default_factory=lambda: ["self", ".", "x"])
    hook_name: str = "blocks.3.hook_resid_post"
    n_tokens: int = 100_000
    sae_hash: str = "5ae" * 21 + "5"

    def __post_init__(self) -> None:
        self.count = np.full(self.d_sae, 250)
        self.count[SILENT:][:1] = 0  # if there is such a feature
        self.max = np.where(self.count > 0, 4.0, 0.0).astype(np.float32)
        self.mean = self.std = self.max / 4
        self.density = self.count / self.n_tokens
        self.token_entropy = np.full(self.d_sae, 1.5)
        self.histogram_edges = HISTOGRAM_EDGES

        self.weights = SimpleNamespace(records={"moments": np.tile([0.25, 0.5, -1.5, 7.0], (self.d_sae, 1))})

    def column(self, name: str) -> np.ndarray:
        value = {"documents": 40, "first_place": 12.5, "special": 1234, "outlier": 5}[name]
        return np.where(self.count > 0, value, 0)

    def fetch(self, feature: int) -> None:
        """Nothing is on disk."""

    def histogram(self, feature: int) -> np.ndarray:
        counts = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
        if self.count[feature]:
            counts[10:13] = 50, 150, 50
        return counts

    def quantile(self, feature: int, q: float) -> float:
        return 4.0 * q

    def example(self, position: int, value: float) -> Example:
        tokens = [self.words[i % len(self.words)] for i in range(WINDOW)]
        activations = np.full(WINDOW, value / 2 if value else 0, np.float32)
        activations[40] = value
        return Example(f"doc <{position}>", position, tokens, activations, 40, value)

    def top_examples(self, feature: int, width: int = WINDOW) -> list[Example]:
        return [self.example(place, 4.0) for place in range(20)] if self.count[feature] else []

    def range_examples(self, feature: int, width: int = WINDOW) -> list[tuple[str, list[Example]]]:
        if not self.count[feature]:
            return []
        return [
            (f"{low}–{low + 10}%", [self.example(10 * low + place, low / 25 + 0.1) for place in range(3)])
            for low in range(90, -10, -10)
        ]

    def near_misses(self, feature: int, width: int = WINDOW) -> list[Example]:
        return [self.example(5000 + place, 0.0) for place in range(10)] if self.count[feature] else []

    def top_tokens(self, feature: int) -> list[TokenStatistic]:
        return [TokenStatistic(word, n, 50, 2.0, 0.2, 30.0) for n, word in enumerate(self.words)]

    next_tokens = top_tokens

    def promoted(self, feature: int) -> list[tuple[str, int, float]]:
        return [(self.words[n % len(self.words)], n, 1 / (n + 1)) for n in range(30)]

    def suppressed(self, feature: int) -> list[tuple[str, int, float]]:
        return [(word, n, -value) for word, n, value in self.promoted(feature)]

    def neighbours(self, feature: int) -> list[tuple[int, float]]:
        return [(other, 0.5) for other in range(self.d_sae) if other != feature][:20]

    def coactive(self, feature: int) -> list[Coactive]:
        return [Coactive(other, 9, 0.25, 3.0) for other in range(self.d_sae) if other != feature][:20]

    def tags(self, feature: int) -> list[Tag]:
        return [Tag("says", f"says ‹{self.words[0]}›", "what it means")]


def fake_run(folder: Path, name: str = "fake", **index: Any) -> Any:
    """Looks like :class:`features.run.Run`; labels are kept in ``folder``."""
    config = SimpleNamespace(
        model="org/tiny", hook_name="blocks.3.hook_resid_post", hook_names=["blocks.3.hook_resid_post"]
    )
    made_up = FakeIndex(**index)
    labels = Labels.open(folder / "labels.sqlite", sae_hash=made_up.sae_hash)
    run = SimpleNamespace(name=name, config=config, index=made_up, labels=labels)
    run.feature = lambda number: Run.feature(run, number)  # its own check of the number
    return run
