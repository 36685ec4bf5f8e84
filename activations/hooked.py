"""What every model here has, whether it reads text or pictures: weights, hooks, and two ways to run."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from activations.architectures import ARCHITECTURES, PROJECTED_HOOKS, architecture_of, model_sites
from activations.bridge import bridge_backend, centring_has_effect, start_bridge
from activations.edits import EditScope
from activations.errors import InputError
from activations.files import hash_files, hash_json, hash_tensors
from activations.hooks import Backend, HookSites, missing_hook

RunPath = Literal["auto", "sdpa", "bridge"]

_SHAPES_NOTHING = re.compile(
    r"_?name_or_path|_commit_hash|architectures|auto_map|transformers_version|tokenizer_class"  # where it is from
    r"|(torch_|_pre_quantization_)?dtype|_?(attn|experts)_implementation.*"  # how it was loaded
    r"|use_cache|return_dict|torchscript|output_(attentions|hidden_states|router_logits|scores)"  # what it returns
    r"|.*_token_ids?|id2label|label2id|num_labels|problem_type|task_specific_params"  # what its outputs mean
)
"""Settings of a configuration on which no activation depends."""


class HookedModel(ABC):
    """A Hugging Face model whose activations bear TransformerLens' names: the base of the public classes.

    Attributes:
        name: what it was loaded by.
        config: the Hugging Face configuration.
        n_layers, d_model, n_heads, d_head: its dimensions; the last two are 0 where there is no attention.
        center_writing_weights: whether captures in the residual stream have their mean subtracted.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        *,
        hf_model: Any = None,
        bridge: Any = None,
        path: RunPath = "auto",
        weight_files: Sequence[Path] = (),
        center_writing_weights: bool = False,
    ):
        self.name = name
        self.config = config.get_text_config()
        self.n_layers: int = self.config.num_hidden_layers
        self.d_model: int = self.config.hidden_size
        self.n_heads: int = getattr(self.config, "num_attention_heads", 0)
        head_width = self.d_model // self.n_heads if self.n_heads else 0
        self.d_head: int = getattr(self.config, "head_dim", None) or head_width
        self.center_writing_weights = center_writing_weights
        self._hf_model = hf_model
        self._bridge = bridge
        self._path = path
        self._weight_files = tuple(weight_files)
        self._lock = Lock()
        self._lazy_bridge_backend: Backend | None = None
        self._architecture = architecture_of(config)
        self._sites: HookSites | None = None
        if hf_model is not None and path != "bridge":
            sites = {}
            if self._architecture is not None:
                sites = model_sites(hf_model.base_model, self._architecture, centred=self._centred)
            self._sites = HookSites(sites)
        if path == "sdpa" and not self._sites:
            raise InputError(
                f"The SDPA path serves {', '.join(ARCHITECTURES)} models, and {name} is of type"
                f" {config.model_type}: load it with path 'auto' or 'bridge'."
            )

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding (a model may be spread over several)."""
        parameter = next(self._any_model.get_input_embeddings().parameters(), None)
        # Of an embedding that is offloaded or quantised, the model itself moves the input to the right place.
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the weights that are not quantised."""
        floating = (p.dtype for p in self._any_model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def n_bytes(self) -> int:
        """Of all weights."""
        return sum(p.nbytes for p in self._any_model.parameters())

    @cached_property
    def hash(self) -> str:
        """sha256 over the weights and over what else decides the activations.

        The weights are those of the files, or the tensors of a model that was not loaded from files; the rest are the
        settings in its configuration that the computation depends on, and whether centred writing weights change
        what is captured.
        """
        if self._weight_files:
            weights = hash_files(self._weight_files)
        else:
            weights = hash_tensors(_plain_tensors(self._any_model.state_dict()))
        return hash_json([weights, computation_settings(self._any_model.config), self._centred])

    def hook_widths(self) -> dict[str, int]:
        """Every hook that the SDPA path serves, in the order of the computation, and the width there.

        ``attn.hook_z`` counts all heads: ``n_heads * d_head``. Empty where only the bridge can run the model.
        """
        return {name: self.width(name) for name in self._sites or ()}

    @torch.no_grad()
    def bridge_shapes(self) -> dict[tuple[str, ...], tuple[int | str, ...]]:
        """What ``TransformerBridge`` offers: the names of each hook that fires, and the shape of what flows there.

        Dimensions that are those of the input are ``"batch"``, ``"pos"`` or ``"batch * pos"``, others that depend on
        it ``"?"``. Names in TransformerLens' order. Runs the bridge on two small inputs.
        """
        backend = self._bridge_backend
        names = list(backend.sites)
        sizes = [(1, 3), (2, 5)]
        probes = []
        for batch, pos in sizes:
            forward = partial(backend.causal_lm, **self._probe(batch, pos))
            probes.append(backend.sites.capture_fired(forward, names, batch))
        by_site: dict[int, list[str]] = {}
        for name in names:
            if name in probes[0]:
                by_site.setdefault(id(backend.sites[name].module), []).append(name)
        shapes: dict[tuple[str, ...], tuple[int | str, ...]] = {}
        for aliases in by_site.values():
            pairs = zip(*(probe[aliases[0]].shape for probe in probes), strict=True)
            shapes[tuple(aliases)] = tuple(self._dimension(pair, sizes) for pair in pairs)
        return shapes

    @staticmethod
    def _dimension(pair: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> int | str:
        meanings: Mapping[tuple[int, ...], str] = {
            tuple(batch for batch, _ in sizes): "batch",
            tuple(pos for _, pos in sizes): "pos",
            tuple(batch * pos for batch, pos in sizes): "batch * pos",
        }
        return meanings.get(pair, pair[0] if pair[0] == pair[1] else "?")

    def width(self, hook_name: str) -> int:
        """Size of the last dimension of what :meth:`capture` gives at ``hook_name``.

        Raises:
            InputError: this model has no such hook (the sentence names the nearest), or what flows there is
                not of shape ``[batch, pos, width]``.
        """
        kind = hook_name.split(".", 2)[-1]
        if self._sites and hook_name in self._sites:
            return _in_features(self._sites[hook_name].module) if kind in PROJECTED_HOOKS else self.d_model
        backend = self._backend([hook_name], ())
        forward = partial(backend.base_model, **self._probe(1, 2))
        x = backend.sites.capture(forward, [hook_name], 1)[hook_name]
        if x.ndim != 3:
            raise InputError(
                f"{hook_name} gives a tensor of {x.ndim} dimensions, not one vector for each token: choose a"
                " hook such as hook_resid_post, hook_mlp_out or attn.hook_z."
            )
        return x.shape[-1]

    def computes_before(self, first: str, then: str) -> bool:
        """Whether hook ``first`` fires before ``then`` in a forward pass, so that no change at ``then`` reaches it.

        Raises:
            InputError: this model has no such hook, or one that does not fire.
        """
        backend = self._backend([first, then], ())
        forward = partial(backend.base_model, **self._probe(1, 2))
        return next(iter(backend.sites.capture(forward, [then, first], 1))) == first

    @property
    def _any_model(self) -> Any:
        return self._hf_model if self._hf_model is not None else self._bridge.original_model

    @property
    def _centred(self) -> bool:
        """Whether centred writing weights were asked for and change what this model shows."""
        if not self.center_writing_weights:
            return False
        if self._architecture is not None:
            return self._architecture.pre_layer_norm
        return centring_has_effect(self._started_bridge())

    @abstractmethod
    def _probe(self, batch: int, pos: int) -> dict[str, Any]:
        """Arguments of a forward pass over a small input, of ``pos`` tokens where there are tokens."""

    def _backend(self, hook_names: Iterable[str], scopes: Sequence[EditScope]) -> Backend:
        """The way to run the model that serves all these hooks."""
        edits = (edit for scope in scopes for edit in scope.edits)
        needed = {*hook_names, *(name for edit in edits for name in edit.hook_names)}
        if self._sites is not None and needed <= self._sites.keys():
            blocks = self._architecture.blocks if self._architecture else None
            return Backend(self._hf_model, self._hf_model.base_model, self._sites, blocks)
        for name in sorted(needed):
            self._refuse_absent(name)
        backend = self._bridge_backend
        for name in sorted(needed - backend.sites.keys()):
            raise self._missing(name, [*(self._sites or ()), *backend.sites])
        return backend

    def _refuse_absent(self, name: str) -> None:
        """Refuse what no path serves, before a bridge is started for it."""
        if self._sites and name not in self._sites:
            block, _, hook = name.removeprefix("blocks.").partition(".")
            layer_is_absent = block.isdecimal() and int(block) >= self.n_layers
            if self._path == "sdpa" or layer_is_absent or hook == "hook_resid_mid":
                raise self._missing(name, self._sites)

    def _missing(self, name: str, known: Iterable[str]) -> InputError:
        is_parallel = self._architecture is not None and self._architecture.resid_mid is None
        return missing_hook(name, known, self.n_layers, is_parallel)

    def _started_bridge(self) -> Any:
        with self._lock:
            if self._bridge is None:
                self._bridge = start_bridge(self._hf_model)
            return self._bridge

    @property
    def _bridge_backend(self) -> Backend:
        bridge, centred = self._started_bridge(), self._centred
        with self._lock:
            if self._lazy_bridge_backend is None:
                self._lazy_bridge_backend = bridge_backend(bridge, centred=centred)
            return self._lazy_bridge_backend


def computation_settings(config: Any) -> dict[str, Any]:
    """The settings of a Hugging Face configuration that decide what its model computes from given weights.

    Of a model that reads more than text, those of its text part; and how its weights are quantised, if they are. Those
    at the default of their model type are left out: newer versions of transformers have more of them.
    """
    text_config = config.get_text_config()
    settings = _as_json(text_config)
    try:
        defaults = _as_json(type(text_config)())
    except Exception:  # a few cannot be made of nothing, each with its own exception
        defaults = {}
    shaping = {
        name: value
        for name, value in settings.items()
        if not _SHAPES_NOTHING.fullmatch(name) and (name not in defaults or value != defaults[name])
    }
    quantization = _as_json(config).get("quantization_config")
    return {**shaping, "model_type": settings["model_type"], "quantization_config": quantization}


def _as_json(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return settings


def _in_features(module: nn.Module) -> int:
    """Width of what a projection reads: a torch Linear names it, the weight of GPT-2's Conv1D begins with it."""
    weight: Any = module.weight
    return int(getattr(module, "in_features", None) or weight.shape[0])


def _plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict as floating-point tensors, also where torch keeps quantised weights in packed pairs."""
    tensors = {}
    for name, value in state.items():
        for index, part in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(part, Tensor):
                place = f"{name}.{index}" if isinstance(value, tuple) else name
                tensors[place] = part.dequantize() if part.is_quantized else part
    return tensors
