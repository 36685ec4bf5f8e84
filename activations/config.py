"""The configuration of a capture: which activations, of which text, and what is kept of them.

This module imports no torch, so that ``sae --help`` stays quick. Every field carries its sentence; the command
line makes its flags from them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from activations.corpus import CorpusConfig
from activations.errors import InputError

ModelDtype = Literal["float32", "bfloat16", "float16"]
StoredAs = Literal["bfloat16", "float32", "float16", "int8"]


@dataclass(frozen=True)
class ExclusionRule:
    """Which positions an SAE does not see; :class:`activations.exclusion.Exclusion` is what it means at one hook."""

    exclude_special: bool = True
    """Leave out special tokens (beginning and end of text, padding, markers of a chat)."""
    outlier_factor: float | None = 10.0
    """Leave out activations with a norm above so many times the median of the first 100,000 tokens; None: keep all."""

    def check(self) -> None:
        """Raise InputError for a factor that would leave out everything."""
        if self.outlier_factor is not None and self.outlier_factor <= 1:
            raise InputError(
                f"outlier_factor is {self.outlier_factor}, and must be above 1: half of all norms exceed their median."
            )


@dataclass(frozen=True)
class CaptureConfig:
    """Activations of which model at which hooks on which text, and how they are kept."""

    model: str = "builtin"
    """The bundled model (builtin), a local Hugging Face folder, or a hub name."""
    hook_names: tuple[str, ...] = ("blocks.3.hook_resid_post",)
    """Where in the model the activations are read, by TransformerLens name; several cost one forward pass."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text that the model reads."""
    tokens: int = 2_000_000
    """Tokens of the train split to capture."""
    context_length: int | None = None
    """Tokens per sequence; by default what the model was made for, at most 1,024."""
    stored_as: StoredAs = "bfloat16"
    """Number format on disk; int8 has one scale for each token."""
    rule: ExclusionRule = field(default_factory=ExclusionRule)
    """Which positions do not count."""
    device: str | None = None
    """cuda, mps or cpu; by default the first of them that is there."""
    dtype: ModelDtype | None = None
    """Number format the model computes in; by default float32, on CUDA that of its checkpoint."""
    center_writing_weights: bool = False
    """Subtract from activations their mean over d_model, as TransformerLens does (matters with LayerNorm only)."""

    def check(self) -> None:
        """Raise InputError for settings that no capture can have."""
        if self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}, and must be at least 1.")
        if not self.hook_names:
            raise InputError("hook_names is empty: name at least one hook, such as blocks.3.hook_resid_post.")
        if len(set(self.hook_names)) < len(self.hook_names):
            raise InputError("hook_names names a hook twice: name each once.")
        if self.context_length is not None and self.context_length < 8:
            raise InputError(f"context_length is {self.context_length}, and must be at least 8.")
        self.rule.check()

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> "CaptureConfig":
        """The configuration that ``dataclasses.asdict`` gave, after a journey through JSON."""
        parts = {"corpus": CorpusConfig, "rule": ExclusionRule}
        made = {name: kind(**_with_tuples(table[name])) for name, kind in parts.items()}
        return cls(**{**_with_tuples(table), **made})


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
