"""Where in the model: TransformerLens hook names on the modules of a plain Hugging Face model.

A :class:`Site` is the input or the output of one module. :class:`HookSites` knows the sites of one model by
hook name and runs forward passes that capture and edit there. A site's torch hook is installed at its first
use and stays; what it does in a given forward pass stands in a context variable, so concurrent passes do not
meet, and a call from outside costs one look-up per hook.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from activations.edits import Edit, EditScope, StreamEdit
from activations.errors import InputError

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model: the input or the output of a module, or a TransformerLens ``HookPoint``.

    ``in_place`` marks a tensor that the block reads twice (``hook_resid_mid`` is both the normalisation's
    input and the residual that the MLP's output is added to): an edit must be written into it. What is captured
    and edited is always ``[batch, pos, width]``: ``flatten`` joins the last two dimensions (heads and d_head) of
    what flows there, ``flat`` says that batch and pos are joined there. ``centred`` subtracts the mean over the
    width from it, and adds it again to what an edit returns.
    """

    module: nn.Module
    side: Literal["input", "output", "hook_point"]
    in_place: bool = False
    flatten: bool = False
    flat: bool = False
    centred: bool = False


def missing_hook(
    name: str, known: Iterable[str], n_layers: int, parallel_residual: bool = False
) -> InputError:
    """The error for a hook that a model does not have: one sentence that names the nearest one it has."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match and int(match[1]) >= n_layers:
        return InputError(f"{name} does not exist: the layers of this model are 0 to {n_layers - 1}.")
    if match and match[2] == "hook_resid_mid" and parallel_residual:
        return InputError(
            f"{name} does not exist: attention and MLP of this model read the block's input in parallel;"
            f" the nearest hook is blocks.{match[1]}.hook_resid_pre."
        )
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if near:
        return InputError(f"{name} does not exist; did you mean {near[0]}?")
    return InputError(
        f"{name} does not exist: hooks bear TransformerLens names such as"
        f" blocks.{n_layers // 2}.hook_resid_post."
    )


def check_buffer(name: str, buffer: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that was given to hold what flows at a hook and has another shape.

    Raises:
        InputError: names both shapes.
    """
    if buffer.shape != shape:
        raise InputError(
            f"The buffer for {name} has shape {tuple(buffer.shape)}; it must be {shape}, the shape of what flows there."
        )


class _StopForwardError(Exception):
    """Ends a forward pass as soon as everything asked for has been captured."""


class _ForwardPass:
    """What the hooks of one model do during one forward pass over ``batch`` rows."""

    def __init__(
        self,
        sites: "HookSites",
        names: Sequence[str],
        batch: int,
        scopes: Sequence[EditScope],
        positions: Tensor | None,
        out: Mapping[str, Tensor],
    ):
        self.captured: dict[str, Tensor] = {}
        self.wanted: dict[Site, list[str]] = {}
        for name in names:
            self.wanted.setdefault(sites[name], []).append(name)
        self.remaining = len(self.wanted)
        self.edits: dict[Site, list[tuple[EditScope, int]]] = {}
        self.read_by_edits: dict[Site, list[str]] = {}
        self.read: dict[str, Tensor] = {}
        for scope in scopes:
            for index, edit in enumerate(scope.edits):
                self.edits.setdefault(sites[edit.hook_name], []).append((scope, index))
                if edit.reads is not None:
                    self.read_by_edits.setdefault(sites[edit.reads], []).append(edit.reads)
        self.batch = batch
        self.positions = positions
        self.out = out

    def visit(self, site: Site, x: Tensor) -> Tensor:
        """Edit, then capture ``x``; returns what flows on (``x`` itself where nothing is edited)."""
        edits = self.edits.get(site)
        names = self.wanted.get(site)
        read = self.read_by_edits.get(site)
        if edits is None and names is None and read is None:
            return x
        value = x.flatten(2) if site.flatten else x
        if site.flat:
            value = value.view(self.batch, -1, value.shape[-1])
        for scope, index in edits or ():
            value = self._edited(site, scope.edits[index], value)
            scope.fired.add(index)
        if edits and site.in_place:
            x.copy_(value.reshape(x.shape))
            value = x.view(value.shape)
        shown = value - _mean(value) if site.centred and (names or read) else value
        self.read.update(dict.fromkeys(read or (), shown))
        if names is not None and names[0] not in self.captured:
            self._capture(names, shown)
        return value.reshape(x.shape) if edits else x

    def _edited(self, site: Site, edit: Edit, value: Tensor) -> Tensor:
        assert self.positions is not None
        read = self._read_by(edit)
        if not site.centred or isinstance(edit, StreamEdit):
            return edit(value, self.positions, read)
        mean = _mean(value)
        centred = value - mean
        edited = edit(centred, self.positions, read)
        return value if edited is centred else edited + mean

    def _read_by(self, edit: Edit) -> Tensor | None:
        if edit.reads is None:
            return None
        if edit.reads not in self.read:
            raise InputError(
                f"The edit at {edit.hook_name} reads {edit.reads}, which is not computed before it."
            )
        return self.read[edit.reads]

    def _capture(self, names: Sequence[str], value: Tensor) -> None:
        for name in names:
            buffer = self.out.get(name)
            if buffer is not None:
                check_buffer(name, buffer, tuple(value.shape))
            self.captured[name] = value if buffer is None else buffer.copy_(value)
        self.remaining -= 1
        if self.remaining == 0:
            raise _StopForwardError


def _mean(x: Tensor) -> Tensor:
    """Mean over the width, ``[batch, pos, 1]``."""
    return x.mean(-1, keepdim=True)


_current: ContextVar[_ForwardPass | None] = ContextVar("current_forward_pass", default=None)


class HookSites(Mapping[str, Site]):
    """The sites of one model by hook name, and forward passes over them."""

    def __init__(self, sites: Mapping[str, Site]):
        self._sites = dict(sites)
        self._installed: set[Site] = set()
        self._lock = Lock()

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def capture(
        self,
        forward: Callable[[], Any],
        names: Sequence[str],
        batch: int,
        scopes: Sequence[EditScope] = (),
        positions: Tensor | None = None,
        out: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Run ``forward`` on ``batch`` rows until everything in ``names`` has been seen, with the edits of ``scopes``.

        What is seen at a name in ``out`` is written into the tensor given there.

        Raises:
            InputError: a hook did not fire, or a tensor of ``out`` has another shape than what flows there.
        """
        captured = self.capture_fired(forward, names, batch, scopes, positions, out)
        for name in names:
            if name not in captured:
                raise InputError(f"{name} did not fire: this model does not compute it in a forward pass.")
        return captured

    def capture_fired(
        self,
        forward: Callable[[], Any],
        names: Sequence[str],
        batch: int,
        scopes: Sequence[EditScope] = (),
        positions: Tensor | None = None,
        out: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """As :meth:`capture`, leaving out the hooks that did not fire."""
        forward_pass = _ForwardPass(self, names, batch, scopes, positions, out)
        if forward_pass.wanted:
            with suppress(_StopForwardError):
                self._run(forward, forward_pass, scopes)
        return forward_pass.captured

    def run(
        self,
        forward: Callable[[], R],
        batch: int,
        scopes: Sequence[EditScope] = (),
        positions: Tensor | None = None,
    ) -> R:
        """Run ``forward`` on ``batch`` rows to its end with the edits of ``scopes`` and return its result."""
        return self._run(forward, _ForwardPass(self, (), batch, scopes, positions, {}), scopes)

    def _run(self, forward: Callable[[], R], forward_pass: _ForwardPass, scopes: Sequence[EditScope]) -> R:
        for site in (*forward_pass.wanted, *forward_pass.edits, *forward_pass.read_by_edits):
            self._install(site)
        for scope in scopes:
            scope.ran = True
        token = _current.set(forward_pass)
        try:
            return forward()
        finally:
            _current.reset(token)

    def _install(self, site: Site) -> None:
        if site in self._installed:
            return
        with self._lock:
            if site not in self._installed:
                _install(site)
                self._installed.add(site)


@dataclass(frozen=True)
class Backend:
    """One way to run a model: what gives logits, the same without the unembedding, and their hooks.

    ``blocks`` is where ``base_model`` keeps the list of its blocks; None where blocks cannot be left out.
    """

    causal_lm: nn.Module
    base_model: nn.Module
    sites: HookSites
    blocks: str | None = None


def _install(site: Site) -> None:
    """Put the torch hook for ``site`` on its module.

    The hook is a plain function bound to this very site, so that a deep copy of the model, which carries the
    hook along, does not answer for itself.
    """

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward_pass = _current.get()
        if forward_pass is None:
            return None
        if args:
            return (forward_pass.visit(site, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": forward_pass.visit(site, kwargs["hidden_states"])}

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward_pass = _current.get()
        if forward_pass is None:
            return None
        if isinstance(output, tuple):
            return (forward_pass.visit(site, output[0]), *output[1:])
        return forward_pass.visit(site, output)

    def on_hook_point(x: Tensor, hook: Any) -> Tensor | None:
        forward_pass = _current.get()
        value = x if forward_pass is None else forward_pass.visit(site, x)
        return None if value is x else value

    if site.side == "hook_point":
        point: Any = site.module
        point.add_perma_hook(on_hook_point)  # TransformerLens splits heads before it calls this
    elif site.side == "input":
        # What the block reads again comes before what only this module reads, where both are its input (OLMo 2).
        site.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=site.in_place)
    else:
        site.module.register_forward_hook(on_output)
