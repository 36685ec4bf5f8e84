"""What is the model: loading, capturing, running with edits, generating.

One class, :class:`LanguageModel`, with two ways to run behind one vocabulary of hook names: hooks on the
plain Hugging Face model with PyTorch's fused attention (the SDPA path) for the common sites, and
TransformerLens' ``TransformerBridge`` for every other one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from activations.bridge import bridge_backend, start_bridge
from activations.edits import Edit, EditScope, active_scopes, edit_scope, position_ids, token_positions
from activations.errors import InputError
from activations.files import hash_files, hash_tensors
from activations.generation import Sampling, check_fits, prompt_ids, write
from activations.hooks import (
    ARCHITECTURES,
    BLOCK_HOOKS,
    Backend,
    HookSites,
    has_parallel_residual,
    missing_hook,
    model_sites,
)
from activations.loading import load_folder, locate, resolve_device
from activations.replay import Replay, without_blocks
from activations.tokenizer import Tokenizer

RunPath = Literal["auto", "sdpa", "bridge"]


NO_LIMIT = 2**31 - 1
"""Context length of a model whose configuration names none (ALiBi, recurrent models)."""


class LanguageModel:
    """A causal language model whose activations are captured and edited by TransformerLens hook name.

    Made by :meth:`load`, :meth:`from_hf` or :meth:`from_bridge`. Several threads may use one model at once:
    each sees its own edits and captures only (a new thread starts without the edits of the one that started
    it, unless it is run in a copy of its context).

    Attributes:
        name: what it was loaded by.
        tokenizer: text to ids and back.
        config: the Hugging Face configuration.
        n_layers, d_model, n_heads, d_head, d_vocab: its dimensions.
        context_length: how many tokens it reads at most.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        config: Any,
        *,
        hf_model: Any = None,
        bridge: Any = None,
        path: RunPath = "auto",
        weight_files: Sequence[Path] = (),
    ):
        self.name = name
        self.tokenizer = tokenizer
        config = config.get_text_config()
        self.config = config
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_vocab: int = config.vocab_size
        self.context_length: int = (
            getattr(config, "max_position_embeddings", None)
            or getattr(config, "seq_length", None)
            or NO_LIMIT
        )
        self._hf_model = hf_model
        self._bridge = bridge
        self._path = path
        self._weight_files = tuple(weight_files)
        self._lock = Lock()
        self._lazy_bridge_backend: Backend | None = None
        self._sites: HookSites | None = None
        if hf_model is not None and path != "bridge":
            self._sites = HookSites(model_sites(hf_model.base_model, config))
        if path == "sdpa" and not self._sites:
            raise InputError(
                f"The SDPA path serves {', '.join(ARCHITECTURES)} models, and {name} is of type"
                f" {config.model_type}: load it with path 'auto' or 'bridge'."
            )

    @classmethod
    def load(
        cls,
        name: str = "builtin",
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        path: RunPath = "auto",
    ) -> "LanguageModel":
        """Load the bundled model, a local Hugging Face folder or a model of the Hugging Face hub.

        Loading never runs code that comes with the model: safetensors weights and JSON only.

        Args:
            name: ``"builtin"``, a folder, or a hub name such as ``gpt2``.
            device: ``"cpu"``, ``"cuda"``, ``"mps"``; None takes the CUDA device if there is one, else the
                CPU.
            dtype: of the weights; None means float32, whatever the checkpoint holds, except on CUDA, where
                the checkpoint's own is kept (half precision is slow on a CPU).
            path: ``"sdpa"`` hooks the plain Hugging Face model; ``"bridge"`` runs everything through
                TransformerLens' ``TransformerBridge``; ``"auto"`` takes the first where it serves the hooks
                asked for, and otherwise starts a bridge on the same weights.

        Raises:
            InputError: the model cannot be found or read, or its architecture cannot be run this way.
        """
        if path not in ("auto", "sdpa", "bridge"):
            raise InputError(f"path is {path!r}; it must be 'auto', 'sdpa' or 'bridge'.")
        chosen_device = resolve_device(device)
        folder = locate(name)
        if dtype is None and chosen_device.type != "cuda":
            dtype = torch.float32
        hf_model, hf_tokenizer = load_folder(folder, chosen_device, dtype)
        return cls(
            name,
            Tokenizer(hf_tokenizer, _eos_ids(hf_model), vocab_size=hf_model.config.vocab_size),
            hf_model.config,
            hf_model=hf_model,
            path=path,
            weight_files=sorted(folder.glob("*.safetensors")),
        )

    @classmethod
    def from_hf(cls, model: Any, tokenizer: Any, name: str, *, path: RunPath = "auto") -> "LanguageModel":
        """Wrap a loaded Hugging Face causal language model and its tokenizer.

        ``model`` is used as it is (device, dtype, attention), and put into evaluation mode.
        """
        wrapped = Tokenizer(tokenizer, _eos_ids(model), vocab_size=model.config.vocab_size)
        return cls(name, wrapped, model.config, hf_model=model.eval(), path=path)

    @classmethod
    def from_bridge(cls, bridge: Any) -> "LanguageModel":
        """Wrap an existing ``TransformerBridge``; everything runs through it, with its weights as they are.

        Texts begin with BOS where the bridge's ``default_prepend_bos`` says so.
        """
        model = bridge.original_model.eval()
        tokenizer = Tokenizer(
            bridge.tokenizer,
            _eos_ids(model),
            vocab_size=model.config.vocab_size,
            adds_bos=bool(bridge.cfg.default_prepend_bos),
        )
        return cls(str(bridge.cfg.model_name), tokenizer, model.config, bridge=bridge, path="bridge")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._any_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return next(self._any_model.parameters()).dtype

    @cached_property
    def hash(self) -> str:
        """sha256 over the weight files, or over the tensors of a model that was not loaded from files."""
        if self._weight_files:
            return hash_files(self._weight_files)
        return hash_tensors(self._any_model.state_dict())

    def hook_widths(self) -> dict[str, int]:
        """Every hook that the SDPA path serves, in the order of the computation, and the width there.

        ``attn.hook_z`` counts all heads: ``n_heads * d_head``. Empty where only the bridge can run the model.
        """
        return {name: self.width(name) for name in self._sites or ()}

    def width(self, hook_name: str) -> int:
        """Size of the last dimension of what :meth:`capture` gives at ``hook_name``.

        Raises:
            InputError: this model has no such hook (the sentence names the nearest), or what flows there is
                not of shape ``[batch, pos, width]``.
        """
        kind = hook_name.split(".", 2)[-1]
        if self._sites and hook_name in self._sites:
            if kind == "attn.hook_z":
                return self.n_heads * self.d_head
            if kind == "mlp.hook_post":
                return self._mlp_width(hook_name)
            return self.d_model
        probe = torch.full((1, 2), self.tokenizer.separator_id)
        x = self.capture(probe, [hook_name])[hook_name]
        if x.ndim != 3:
            raise InputError(
                f"{hook_name} gives a tensor of {x.ndim} dimensions, not one vector for each token: choose a"
                " hook such as hook_resid_post, hook_mlp_out or attn.hook_z."
            )
        return x.shape[-1]

    @torch.no_grad()
    def capture(
        self, ids: Tensor, hook_names: Sequence[str], *, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What flows at ``hook_names`` when the model reads ``ids``; stops after the last of them.

        Args:
            ids: ``[batch, pos]`` int64.
            hook_names: TransformerLens names.
            attention_mask: ``[batch, pos]``, 0 at padding (left or right); None when there is none. What
                comes out at padding means nothing.

        Returns:
            for each name ``[batch, pos, width]`` in the model's dtype, on its device; ``attn.hook_z`` with
            its heads flattened. Other hooks of the bridge keep their shape. The tensors may share memory: do
            not change them in place.

        Raises:
            InputError: a hook does not exist or does not fire, or ``ids`` exceeds the context.
        """
        scopes = active_scopes(self)
        backend = self._backend(hook_names, scopes)
        ids, mask = self._checked(ids, attention_mask)
        arguments = self._arguments(ids, mask)
        return backend.sites.capture(
            lambda: backend.base_model(**arguments),
            list(dict.fromkeys(hook_names)),
            scopes,
            self._positions(ids, mask, scopes),
        )

    @torch.no_grad()
    def logits(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits ``[batch, pos, d_vocab]`` for ``ids [batch, pos]``; see :meth:`capture`."""
        scopes = active_scopes(self)
        backend = self._backend((), scopes)
        ids, mask = self._checked(ids, attention_mask)
        arguments = self._arguments(ids, mask)
        logits: Tensor = backend.sites.run(
            lambda: backend.causal_lm(**arguments), scopes, self._positions(ids, mask, scopes)
        ).logits
        return logits

    @torch.no_grad()
    def replay(self, ids: Tensor, hook_name: str, *, attention_mask: Tensor | None = None) -> Replay:
        """Run the model on ``ids [batch, pos]`` so that what follows ``hook_name`` can be run again by itself.

        For logits under many different activations at one hook: on the SDPA path, each
        :meth:`Replay.logits_with` computes only the blocks from the hook on. Arguments as for :meth:`capture`.

        Raises:
            InputError: as for :meth:`capture`, and inside a block of :meth:`edited`.
        """
        if active_scopes(self):
            raise InputError("A replay starts from the model as it is: leave the block of edited() first.")
        backend = self._backend([hook_name], ())
        ids, mask = self._checked(ids, attention_mask)
        arguments = self._arguments(ids, mask)
        positions = token_positions(ids, mask, self.tokenizer.special_ids)
        first_block, entrance, place = self._replay_start(backend, hook_name)
        rest: Any = backend.causal_lm
        if first_block:
            assert backend.blocks is not None
            rest = without_blocks(rest, backend.blocks, first_block)
        seen: dict[str, Tensor] = {}

        def recorded(name: str) -> Edit:
            def apply(x: Tensor, positions: Tensor) -> Tensor:
                seen[name] = x.clone()  # what follows may write into it
                return x

            return Edit(name, apply)

        def logits(causal_lm: Any, edits: Iterable[Edit]) -> Tensor:
            scope = EditScope(self, tuple(edits))
            result: Tensor = backend.sites.run(lambda: causal_lm(**arguments), [scope], positions).logits
            scope.check_fired()
            return result

        def logits_with(activations: Tensor) -> Tensor:
            values = {entrance: seen[entrance], place: activations}
            return logits(rest, (_replaced(name, value) for name, value in values.items()))

        clean = logits(backend.causal_lm, map(recorded, dict.fromkeys((entrance, place))))
        return Replay(seen[place], clean, logits_with)

    def _replay_start(self, backend: Backend, hook_name: str) -> tuple[int, str, str]:
        """Where a replay begins: its first block, the hook at which that is entered, and the hook to replace at."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
        if backend.blocks is None or match is None:
            return 0, hook_name, hook_name
        block = int(match[1])
        if match[2] == "hook_resid_post" and block + 1 < self.n_layers:  # what the next block reads
            block += 1
            hook_name = f"blocks.{block}.hook_resid_pre"
        return block, f"blocks.{block}.hook_resid_pre", hook_name

    def edited(self, *edits: Edit) -> AbstractContextManager[None]:
        """Hold ``edits`` for captures, logits and generation inside the block, in this thread only.

        Edits at one hook apply in the order given, those of an outer block first; a capture sees the edited
        value. A stream that was started inside the block keeps its edits.

        Raises:
            InputError: a hook does not exist; at the end of the block, an edit's hook never fired although
                the model ran.
        """
        self._backend([edit.hook_name for edit in edits], ())
        return edit_scope(self, edits)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        bos: bool | None = None,
    ) -> list[str]:
        """Continue each prompt; returns the continuations only. See :meth:`generate_stream`."""
        stream = self.generate_stream(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            bos=bos,
        )
        return ["".join(parts) for parts in zip(*stream, strict=True)]

    def generate_stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        bos: bool | None = None,
    ) -> Iterator[list[str]]:
        """Continue each prompt; yields, after each step, the new text of every prompt.

        A row ends at one of the tokenizer's ``eos_ids`` (which is no text) or after ``max_new_tokens``. A
        character that is not complete yet is held back. Edits active at the call hold for the whole stream.

        Args:
            prompts: one text or several; an empty one starts from BOS or the end-of-text token.
            max_new_tokens, temperature, top_k, top_p, seed: see :class:`activations.generation.Sampling`.
            bos: whether BOS is put in front; None does what the tokenizer does by default.

        Raises:
            InputError: a value is out of range, there is no prompt, or a prompt and its continuation do not
                fit into the context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise InputError("There is no prompt: give at least one text to continue.")
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        ids = [prompt_ids(self.tokenizer, text, bos) for text in texts]
        check_fits(ids, max_new_tokens, self.context_length)
        scopes = active_scopes(self)
        backend = self._backend((), scopes)

        @torch.no_grad()
        def step(arguments: dict[str, Any], positions: Tensor) -> Any:
            return backend.sites.run(
                lambda: backend.causal_lm(**arguments, logits_to_keep=1), scopes, positions
            )

        return write(step, self.tokenizer, ids, sampling, self.device)

    @torch.no_grad()
    def logit_lens_weights(self) -> tuple[Tensor, Tensor]:
        """Gain of the final normalisation ``[d_model]`` and unembedding ``W_U [d_model, d_vocab]``, float32.

        Raises:
            InputError: the architecture is not one whose final normalisation we know.
        """
        architecture = ARCHITECTURES.get(self.config.model_type)
        if architecture is None:
            raise InputError(
                f"The logit lens of {self.name} is not known: its architecture {self.config.model_type} is"
                f" not one of {', '.join(ARCHITECTURES)}."
            )
        norm = self._any_model.base_model.get_submodule(architecture.final_norm)
        unembedding = self._any_model.get_output_embeddings()
        gain: Tensor = norm.weight
        weight: Tensor = unembedding.weight
        return gain.detach().float(), weight.detach().float().T

    @property
    def _any_model(self) -> Any:
        return self._hf_model if self._hf_model is not None else self._bridge.original_model

    def _mlp_width(self, hook_name: str) -> int:
        assert self._sites is not None
        weight = self._sites[hook_name].module.weight
        assert isinstance(weight, Tensor)
        # A torch Linear is [out, in], GPT-2's Conv1D [in, out]: the other side is d_model.
        in_features = getattr(self._sites[hook_name].module, "in_features", weight.shape[0])
        assert isinstance(in_features, int)
        return in_features

    def _backend(self, hook_names: Sequence[str], scopes: Sequence[EditScope]) -> Backend:
        """The way to run the model that serves all these hooks."""
        needed = {*hook_names, *(edit.hook_name for scope in scopes for edit in scope.edits)}
        if self._sites is not None and needed <= self._sites.keys():
            architecture = ARCHITECTURES.get(self.config.model_type)
            blocks = None if architecture is None else architecture.blocks
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
            if self._path == "sdpa" or layer_is_absent or hook in BLOCK_HOOKS:
                raise self._missing(name, self._sites)

    def _missing(self, name: str, known: Iterable[str]) -> InputError:
        return missing_hook(name, known, self.n_layers, has_parallel_residual(self.config))

    @property
    def _bridge_backend(self) -> Backend:
        with self._lock:
            if self._lazy_bridge_backend is None:
                if self._bridge is None:
                    self._bridge = start_bridge(self._hf_model)
                self._lazy_bridge_backend = bridge_backend(self._bridge)
            return self._lazy_bridge_backend

    def _checked(self, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise InputError(
                f"Token ids have shape {tuple(ids.shape)}; they must be [batch, pos] with at least one"
                " position."
            )
        if ids.shape[1] > self.context_length:
            raise InputError(
                f"A sequence of {ids.shape[1]} tokens exceeds the model's context of {self.context_length}"
                " tokens."
            )
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise InputError(
                f"The attention mask has shape {tuple(attention_mask.shape)}; it must be {tuple(ids.shape)},"
                " the shape of the token ids."
            )
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return ids.to(self.device, torch.int64), mask

    def _arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        # Padding on the right is behind every real token, so causal attention never reads it: without a mask,
        # SDPA takes its fast causal path.
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            arguments |= {"attention_mask": mask, "position_ids": position_ids(mask)}
        return arguments

    def _positions(self, ids: Tensor, mask: Tensor | None, scopes: Sequence[EditScope]) -> Tensor | None:
        return token_positions(ids, mask, self.tokenizer.special_ids) if scopes else None


def _replaced(hook_name: str, value: Tensor) -> Edit:
    """An edit that puts ``value`` in the place of whatever comes."""
    return Edit(hook_name, lambda x, positions: value)


def _eos_ids(hf_model: Any) -> list[int]:
    """The tokens that end a text: the generation config may name several (chat models do)."""
    eos = getattr(hf_model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = hf_model.config.eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
