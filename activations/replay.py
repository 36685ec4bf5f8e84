"""Read the same tokens again with other activations at one hook, computing only what comes after them.

An evaluation compares one forward pass with several that differ at a hook and behind it. What lies before comes out
the same each time, so a replay starts at the block of the hook, from the residual stream that entered it.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activations.errors import InputError


@dataclass(frozen=True)
class Replay:
    """One forward pass, and the means to repeat its end; made by :meth:`LanguageModel.replay`.

    Attributes:
        activations: what flowed at the hook, ``[batch, pos, width]``.
        logits: ``[batch, pos, d_vocab]``.
    """

    activations: Tensor
    logits: Tensor
    _logits_with: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def logits_with(self, activations: Tensor) -> Tensor:
        """Logits ``[batch, pos, d_vocab]`` with these activations (of the same shape) at the hook.

        The same numbers as those of a whole forward pass under such an edit.

        Raises:
            InputError: ``activations`` have another shape.
        """
        if activations.shape != self.activations.shape:
            raise InputError(
                f"The activations have shape {tuple(activations.shape)}; they must have that of what they replace,"
                f" {tuple(self.activations.shape)}."
            )
        return self._logits_with(activations)


class _Skipped(nn.Module):
    """Stands where a block stood whose result is not needed, and gives on what it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def without_blocks(causal_lm: nn.Module, blocks: str, count: int) -> nn.Module:
    """The model with its first ``count`` blocks doing nothing; all modules but three containers are shared.

    Args:
        causal_lm: a Hugging Face model, which stays as it is.
        blocks: where its base model keeps the list of blocks.
    """
    prefix: str = causal_lm.base_model_prefix  # type: ignore[assignment]
    base_model = causal_lm.get_submodule(prefix)
    remaining = list(base_model.get_submodule(blocks).children())[count:]
    kept = nn.ModuleList([*(_Skipped() for _ in range(count)), *remaining])
    return _with_child(causal_lm, prefix, _with_child(base_model, blocks, kept))


def _with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A copy of ``module`` itself, sharing all it holds, with another child of that name."""
    other = copy(module)
    other._modules = {**module._modules, name: child}
    return other
