"""Where in the model: TransformerLens hook names on the modules of a plain Hugging Face model.

A :class:`Site` is the input or the output of one module. :class:`HookSites` knows the sites of one model by
hook name and runs forward passes that capture and edit there. A site's torch hook is installed at its first
use and stays; what it does in a given forward pass stands in a context variable, so concurrent passes do not
meet, and a call from outside costs one look-up per hook.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from activations.edits import EditScope
from activations.errors import InputError

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model: the input or the output of a module, or a TransformerLens ``HookPoint``.

    ``in_place`` marks a tensor that the block reads twice (``hook_resid_mid`` is both the normalisation's
    input and the residual that the MLP's output is added to): an edit must be written into it. ``flatten``
    joins the last two dimensions (heads and d_head) of what is captured and edited there.
    """

    module: nn.Module
    side: Literal["input", "output", "hook_point"]
    in_place: bool = False
    flatten: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where one family of Hugging Face models keeps its parts: paths inside the base model or a block."""

    blocks: str
    attention: str
    attention_projection: str
    mlp: str
    mlp_projection: str
    mlp_norm: str
    final_norm: str


LLAMA = Architecture(
    blocks="layers",
    attention="self_attn",
    attention_projection="self_attn.o_proj",
    mlp="mlp",
    mlp_projection="mlp.down_proj",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
)
GPT2 = Architecture(
    blocks="h",
    attention="attn",
    attention_projection="attn.c_proj",
    mlp="mlp",
    mlp_projection="mlp.c_proj",
    mlp_norm="ln_2",
    final_norm="ln_f",
)
GPT_NEOX = Architecture(
    blocks="layers",
    attention="attention",
    attention_projection="attention.dense",
    mlp="mlp",
    mlp_projection="mlp.dense_4h_to_h",
    mlp_norm="post_attention_layernorm",
    final_norm="final_layer_norm",
)
ARCHITECTURES: Mapping[str, Architecture] = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": GPT_NEOX}
"""Hugging Face ``model_type`` → layout, for the families that the SDPA path serves."""

BLOCK_HOOKS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""What the SDPA path serves in every block, in the order of the computation."""


def has_parallel_residual(config: Any) -> bool:
    """Whether attention and MLP both read the block's input (GPT-NeoX), so that nothing lies between them."""
    return config.model_type == "gpt_neox" and bool(config.use_parallel_residual)


def model_sites(base_model: nn.Module, config: Any) -> dict[str, Site]:
    """Every hook that the SDPA path serves on ``base_model``, in the order of the computation.

    ``base_model`` is the model without unembedding. Empty for a family not in :data:`ARCHITECTURES`.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return {}
    sites: dict[str, Site] = {}
    for layer, block in enumerate(base_model.get_submodule(architecture.blocks).children()):
        at = {
            "hook_resid_pre": Site(block, "input"),
            "attn.hook_z": Site(block.get_submodule(architecture.attention_projection), "input"),
            "hook_attn_out": Site(block.get_submodule(architecture.attention), "output"),
            "hook_resid_mid": Site(block.get_submodule(architecture.mlp_norm), "input", in_place=True),
            "mlp.hook_post": Site(block.get_submodule(architecture.mlp_projection), "input"),
            "hook_mlp_out": Site(block.get_submodule(architecture.mlp), "output"),
            "hook_resid_post": Site(block, "output"),
        }
        if has_parallel_residual(config):
            del at["hook_resid_mid"]
        sites.update({f"blocks.{layer}.{name}": at[name] for name in BLOCK_HOOKS if name in at})
    return sites


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


class _StopForwardError(Exception):
    """Ends a forward pass as soon as everything asked for has been captured."""


class _ForwardPass:
    """What the hooks of one model do during one forward pass."""

    def __init__(
        self, sites: "HookSites", names: Sequence[str], scopes: Sequence[EditScope], positions: Tensor | None
    ):
        self.captured: dict[str, Tensor] = {}
        self.wanted: dict[Site, list[str]] = {}
        for name in names:
            self.wanted.setdefault(sites[name], []).append(name)
        self.remaining = len(self.wanted)
        self.edits: dict[Site, list[tuple[EditScope, int]]] = {}
        for scope in scopes:
            for index, edit in enumerate(scope.edits):
                self.edits.setdefault(sites[edit.hook_name], []).append((scope, index))
        self.positions = positions

    def visit(self, site: Site, x: Tensor) -> Tensor:
        """Edit, then capture ``x``; returns what flows on (``x`` itself where nothing is edited)."""
        edits = self.edits.get(site)
        names = self.wanted.get(site)
        if edits is None and names is None:
            return x
        value = x.flatten(2) if site.flatten else x
        for scope, index in edits or ():
            assert self.positions is not None
            value = scope.edits[index](value, self.positions)
            scope.fired.add(index)
        if edits and site.in_place:
            value = x.copy_(value)
        if names is not None and names[0] not in self.captured:
            self.captured.update(dict.fromkeys(names, value))
            self.remaining -= 1
            if self.remaining == 0:
                raise _StopForwardError
        if not edits:
            return x
        return value.view_as(x)


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
        scopes: Sequence[EditScope] = (),
        positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run ``forward`` until everything in ``names`` has been seen, with the edits of ``scopes``.

        Raises:
            InputError: a hook did not fire.
        """
        forward_pass = _ForwardPass(self, names, scopes, positions)
        if forward_pass.wanted:
            try:
                self._run(forward, forward_pass, scopes)
            except _StopForwardError:
                pass
            else:
                silent = [name for name in names if name not in forward_pass.captured]
                raise InputError(
                    f"{silent[0]} did not fire: this model does not compute it in a forward pass."
                )
        return forward_pass.captured

    def run(
        self, forward: Callable[[], R], scopes: Sequence[EditScope] = (), positions: Tensor | None = None
    ) -> R:
        """Run ``forward`` to its end with the edits of ``scopes`` and return its result."""
        return self._run(forward, _ForwardPass(self, (), scopes, positions), scopes)

    def _run(self, forward: Callable[[], R], forward_pass: _ForwardPass, scopes: Sequence[EditScope]) -> R:
        for site in (*forward_pass.wanted, *forward_pass.edits):
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
        site.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        site.module.register_forward_hook(on_output)
