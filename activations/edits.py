"""Edits of a running model, as values, and the scopes in which they hold.

An :class:`Edit` names a hook and a function of what flows there. :class:`EditScope` is one ``with
model.edited(...)`` block. Active scopes live in a context variable, so two threads or two browser sessions
that use one model never see each other's edits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from activations.errors import InputError


@dataclass(frozen=True)
class Edit:
    """Replace what flows through ``hook_name`` by ``apply(x, positions)``.

    ``x`` is ``[batch, pos, width]`` in the model's dtype (``attn.hook_z`` with its heads flattened) and must
    not be changed in place; the result has the same shape and is cast back to the model's dtype.
    ``positions`` ``[batch, pos]`` int64 holds the index of each token in its sequence, absolute also under
    the KV cache, and −1 at padding and at special tokens (BOS, end of text), which edits leave alone by
    convention. ``reads`` names another hook, one that is computed earlier: ``apply(x, positions, read)`` is then also
    given what flows there in the same forward pass, edits included.
    """

    hook_name: str
    apply: Callable[..., Tensor]
    reads: str | None = None

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks that it needs."""
        return (self.hook_name,) if self.reads is None else (self.hook_name, self.reads)

    def __call__(self, x: Tensor, positions: Tensor, read: Tensor | None = None) -> Tensor:
        """Apply the edit to ``x [batch, pos, width]`` and check what comes back.

        Args:
            read: what flows at ``reads``, if that is given.

        Raises:
            InputError: the result is not a tensor of the shape of ``x``.
        """
        edited = self.apply(x, positions) if read is None else self.apply(x, positions, read)
        if not isinstance(edited, Tensor) or edited.shape != x.shape:
            found = f"shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
            raise InputError(
                f"The edit at {self.hook_name} returned {found}; it must return a tensor of shape"
                f" {tuple(x.shape)}, the shape it was given."
            )
        return edited.to(device=x.device, dtype=x.dtype)


class StreamEdit(Edit):
    """An edit that is given what really flows, also where the model centres what it shows (replays need this)."""


@dataclass(eq=False)
class EditScope:
    """The edits of one ``with`` block on one model, and which of them have taken effect so far."""

    owner: object
    edits: tuple[Edit, ...]
    ran: bool = False
    fired: set[int] = field(default_factory=set)

    def check_fired(self) -> None:
        """Raise if the model ran in this scope and an edit's hook never fired.

        Raises:
            InputError: names the hook.
        """
        for index, edit in enumerate(self.edits):
            if self.ran and index not in self.fired:
                raise InputError(
                    f"The edit at {edit.hook_name} never took effect: the model ran inside the block, but"
                    " this hook did not fire."
                )


_active: ContextVar[tuple[EditScope, ...]] = ContextVar("active_edit_scopes", default=())


def active_scopes(owner: object) -> tuple[EditScope, ...]:
    """The scopes open for ``owner`` in this thread or task, outermost first."""
    return tuple(scope for scope in _active.get() if scope.owner is owner)


@contextmanager
def edit_scope(owner: object, edits: tuple[Edit, ...]) -> Iterator[None]:
    """Hold ``edits`` for ``owner`` inside the block, in this thread or task only.

    Raises:
        InputError: at the end of the block, when the model ran and an edit's hook never fired.
    """
    scope = EditScope(owner, edits)
    token = _active.set((*_active.get(), scope))
    try:
        yield
    finally:
        _active.reset(token)
    scope.check_fired()


def token_positions(ids: Tensor, attention_mask: Tensor | None, special_ids: frozenset[int]) -> Tensor:
    """Index of each token in its sequence, −1 at padding and at special tokens.

    Args:
        ids: ``[batch, pos]`` int64.
        attention_mask: ``[batch, pos]``, 0 at padding; None when there is none.
        special_ids: tokens that edits leave alone.

    Returns:
        ``[batch, pos]`` int64.
    """
    if attention_mask is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    else:
        positions = position_ids(attention_mask)
        positions = positions.masked_fill(attention_mask == 0, -1)
    if special_ids:
        special = torch.tensor(sorted(special_ids), device=ids.device)
        positions = positions.masked_fill(torch.isin(ids, special), -1)
    return positions


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row (0 at left padding), ``[batch, pos]`` int64.

    Hugging Face's GPT-2 does not derive this from the mask by itself.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def is_left_padded(attention_mask: Tensor) -> bool:
    """Whether a real token stands behind padding somewhere in ``attention_mask [batch, pos]``."""
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())
