"""Read the same tokens again with other activations at one hook, computing only what comes after them.

An evaluation compares one forward pass with several that differ at a hook and behind it. What lies before comes out
the same each time, so a replay starts at the block of the hook, from the residual stream that entered it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from activations.edits import Edit, EditScope, StreamEdit
from activations.errors import InputError
from activations.hooks import Backend


@dataclass(frozen=True)
class Replay:
    """One forward pass, and the means to repeat its end; made by :meth:`LanguageModel.replay`.

    Attributes:
        activations: what flowed at the hook, ``[batch, pos, width]``.
        logits: ``[batch, pos, d_vocab]``.
        captured: what flowed in the same pass at the other hooks that were asked for, by name.
    """

    activations: Tensor
    logits: Tensor
    _logits_with: Callable[[Tensor], Tensor]
    captured: Mapping[str, Tensor] = field(default_factory=dict)

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


def start_replay(
    backend: Backend,
    owner: object,
    arguments: dict[str, Any],
    positions: Tensor,
    hook_name: str,
    n_layers: int,
    also: Sequence[str] = (),
) -> Replay:
    """Run ``backend``'s model on ``arguments`` and keep what is needed to run it again from ``hook_name`` on.

    Args:
        backend: serves the hooks.
        owner: the model in whose name edits are made.
        arguments: of the forward pass; ``input_ids [batch, pos]`` among them.
        positions: of the tokens, ``[batch, pos]``, as edits see them.
        hook_name: where activations are to be replaced.
        n_layers: of the model.
        also: further hooks, computed earlier, whose activations are kept.
    """
    first_block, entrance, place = _start(backend, hook_name, n_layers)
    rest: Any = backend.causal_lm
    if first_block:
        assert backend.blocks is not None
        rest = without_blocks(rest, backend.blocks, first_block)
    entering: list[Tensor] = []
    flowing: list[Tensor] = []

    def logits(causal_lm: Any, edits: Sequence[Edit]) -> Tensor:
        scope = EditScope(owner, tuple(edits))
        batch = arguments["input_ids"].shape[0]
        result: Tensor = backend.sites.run(lambda: causal_lm(**arguments), batch, [scope], positions).logits
        scope.check_fired()
        return result

    def logits_with(activations: Tensor) -> Tensor:
        edits = [
            StreamEdit(entrance, lambda x, positions: entering[0]),
            Edit(place, lambda x, positions: activations),
        ]
        return logits(rest, edits)

    seen: dict[str, list[Tensor]] = {name: [] for name in also}
    edits = [StreamEdit(entrance, _recorded(entering)), Edit(place, _recorded(flowing))]
    edits += [Edit(place, _recorded_elsewhere(values), reads=name) for name, values in seen.items()]
    clean = logits(backend.causal_lm, edits)
    return Replay(flowing[0], clean, logits_with, {name: values[0] for name, values in seen.items()})


def _start(backend: Backend, hook_name: str, n_layers: int) -> tuple[int, str, str]:
    """Where a replay begins: its first block, the hook at which that is entered, and the hook to replace at."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if backend.blocks is None or match is None:
        return 0, hook_name, hook_name
    block = int(match[1])
    if match[2] == "hook_resid_post" and block + 1 < n_layers:  # what the next block reads
        block += 1
        hook_name = f"blocks.{block}.hook_resid_pre"
    return block, f"blocks.{block}.hook_resid_pre", hook_name


def _recorded(seen: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An edit's function that changes nothing and keeps a copy of what it saw (what follows may write into it)."""

    def apply(x: Tensor, positions: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    return apply


def _recorded_elsewhere(seen: list[Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As :func:`_recorded`, for what the edit reads at another hook."""
    record = _recorded(seen)

    def apply(x: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        record(read, positions)
        return x

    return apply


def without_blocks(causal_lm: nn.Module, blocks: str, count: int) -> nn.Module:
    """The model with its first ``count`` blocks doing nothing; all modules but the containers are shared.

    Args:
        causal_lm: a Hugging Face model, which stays as it is.
        blocks: where its base model keeps the list of blocks.
    """
    path = f"{causal_lm.base_model_prefix}.{blocks}"
    remaining = list(causal_lm.get_submodule(path).children())[count:]
    kept = nn.ModuleList([*(_Skipped() for _ in range(count)), *remaining])
    return _with_part(causal_lm, path, kept)


def _with_part(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """A copy of ``module`` and of what it holds on the way to ``path``, with ``part`` there; all else is shared."""
    name, _, rest = path.partition(".")
    other = copy(module)
    child = _with_part(module.get_submodule(name), rest, part) if rest else part
    other._modules = {**module._modules, name: child}
    return other
