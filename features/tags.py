"""Tags: what rules say of a feature at a glance. Every rule and its threshold stands in one table, :data:`RULES`.

A tag is a fact about numbers, not an explanation. The bits of all features' tags are kept in the index, so that they
can be counted and filtered by.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    """When a feature bears a tag.

    Attributes:
        name: the tag. measure: the number it looks at, as :func:`tag_bits` is given it. threshold: from which on.
        meaning: a sentence that says so, shown as a tooltip; ``{threshold}`` stands for the threshold.
    """

    name: str
    measure: str
    threshold: float
    meaning: str

    @property
    def tooltip(self) -> str:
        """The meaning, with its threshold."""
        return self.meaning.format(threshold=f"{self.threshold:g}", percent=f"{self.threshold:.0%}")


RULES = (
    Rule("dead", "silence", 1, "Never fires on the text of the index."),
    Rule("dense", "density", 0.1, "Fires on at least {percent} of all positions."),
    Rule(
        "single token", "one_token", 0.9, "At least {percent} of its firings are at one and the same token."
    ),
    Rule(
        "position-bound",
        "starts",
        0.5,
        "At least {percent} of its firings are at the first position of a document or of the model's window.",
    ),
    Rule(
        "says",
        "says",
        0.5,
        "At least {percent} of its firings are followed by one of the 20 tokens that it promotes most.",
    ),
    Rule("numeric", "numeric", 0.8, "At least {percent} of its firings are at tokens made of digits."),
    Rule(
        "whitespace",
        "whitespace",
        0.8,
        "At least {percent} of its firings are at tokens made of white space.",
    ),
    Rule(
        "duplicate",
        "duplicate",
        0.9,
        "Another feature's decoder row has a cosine of at least {threshold} with its own.",
    ),
    Rule(
        "high-norm only",
        "outlier",
        0.9,
        "At least {percent} of its firings are at positions whose norm is far above the usual.",
    ),
)
"""In the order of their bits."""


@dataclass(frozen=True)
class Tag:
    """A tag of one feature.

    Attributes:
        name: of its rule. text: the name, with what it is about ("says ‹return›", "duplicate of 17").
        tooltip: what it means.
    """

    name: str
    text: str
    tooltip: str


def tag_bits(measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tags of n features, as bits in the order of :data:`RULES`.

    Args:
        measures: float ``[n]`` by the names of the rules' measures; nan, or a missing measure, bears no tag.

    Returns:
        uint32 ``[n]``.
    """
    n = len(next(iter(measures.values())))
    bits = np.zeros(n, dtype=np.uint32)
    for place, rule in enumerate(RULES):
        if rule.measure in measures:
            with np.errstate(invalid="ignore"):
                holds = measures[rule.measure] >= rule.threshold
            bits |= holds.astype(np.uint32) << np.uint32(place)
    return bits


def rules_of(bits: int) -> list[Rule]:
    """The rules whose bits are set."""
    return [rule for place, rule in enumerate(RULES) if bits >> place & 1]
