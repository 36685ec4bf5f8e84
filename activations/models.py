"""What is the model: loading, capturing, running with edits, generating.

One class, :class:`LanguageModel`, with two ways to run behind one vocabulary of hook names: hooks on the
plain Hugging Face model with PyTorch's fused attention (the SDPA path) for the common sites, and
TransformerLens' ``TransformerBridge`` for every other one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from activations.architectures import ARCHITECTURES, logit_lens_weights
from activations.chunks import CHUNK_TOKENS, LONG_INPUT, capture_in_chunks, joined, rotation_depends_on_length
from activations.edits import (
    Edit,
    EditScope,
    active_scopes,
    edit_scope,
    is_left_padded,
    position_ids,
    token_positions,
)
from activations.errors import InputError
from activations.generation import Sampling, check_fits, prompt_ids, write
from activations.hooked import HookedModel, RunPath
from activations.hooks import Backend
from activations.loading import (
    embedding_rows,
    is_masked_lm,
    load_folder,
    locate,
    resolve_device,
    resolve_dtype,
    wrap_tokenizer,
)
from activations.replay import Replay, start_replay
from activations.tokenizer import Tokenizer

NO_LIMIT = 2**31 - 1
"""Context length of a model whose configuration names none (ALiBi, recurrent models)."""

READ_PADDING = frozenset({"rwkv", "recurrent_gemma"})
"""Types of recurrent models that transformers lets read padding on the left as if it were text."""


class LanguageModel(HookedModel):
    """A language model whose activations are captured and edited by TransformerLens hook name.

    Made by :meth:`load`, :meth:`from_hf` or :meth:`from_bridge`. Several threads may use one model at once:
    each sees its own edits and captures only (a new thread starts without the edits of the one that started
    it, unless it is run in a copy of its context). Most are causal; a masked one (BERT) captures and gives logits,
    with its padding on the right, and writes no text.

    Attributes:
        name: what it was loaded by.
        tokenizer: text to ids and back.
        config: the Hugging Face configuration.
        n_layers, d_model, n_heads, d_head, d_vocab: its dimensions; no heads where there is no attention.
        context_length: how many tokens it reads at most.
        center_writing_weights: whether what is captured in the residual stream (``hook_resid_*``,
            ``hook_attn_out``, ``hook_mlp_out``) has its mean over ``d_model`` subtracted, as TransformerLens'
            processed weights have it. Edits there are given the centred value, and the mean is added to their
            result. Only models that read the stream through LayerNorm are affected; those with RMSNorm are not.
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
        center_writing_weights: bool = False,
    ):
        super().__init__(
            name,
            config,
            hf_model=hf_model,
            bridge=bridge,
            path=path,
            weight_files=weight_files,
            center_writing_weights=center_writing_weights,
        )
        self.tokenizer = tokenizer
        self.d_vocab: int = self.config.vocab_size
        self.context_length: int = (
            getattr(self.config, "max_position_embeddings", None)
            or getattr(self.config, "seq_length", None)
            or NO_LIMIT
        )
        self._is_causal = not is_masked_lm(self._any_model)
        # A masked language model counts positions from the left, padding included.
        self._allows_left_padding = self._is_causal and self.config.model_type not in READ_PADDING
        self._embedding_rows = embedding_rows(self._any_model)

    @classmethod
    def load(
        cls,
        name: str = "builtin",
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        path: RunPath = "auto",
        center_writing_weights: bool = False,
    ) -> "LanguageModel":
        """Load the bundled model, a local Hugging Face folder or a model of the Hugging Face hub.

        Loading never runs code that comes with the model: safetensors weights and JSON only.

        Args:
            name: ``"builtin"``, a folder, or a hub name such as ``gpt2``.
            device: ``"cpu"``, ``"cuda"``, ``"mps"``; None takes the CUDA device if there is one (under ``torchrun``
                that of the process), else the MPS device, else the CPU.
            dtype: of the weights, as a torch dtype or by name (``"float32"``, ``"bfloat16"``, ``"float16"``); None
                means float32 on the CPU, where half precision is slow, and elsewhere the checkpoint's own.
            path: ``"sdpa"`` hooks the plain Hugging Face model; ``"bridge"`` runs everything through
                TransformerLens' ``TransformerBridge``; ``"auto"`` takes the first where it serves the hooks
                asked for, and otherwise starts a bridge on the same weights.
            center_writing_weights: see the class.

        Raises:
            InputError: the model cannot be found or read, its tokenizer is missing or does not fit, or its
                architecture cannot be run this way.
        """
        if path not in ("auto", "sdpa", "bridge"):
            raise InputError(f"path is {path!r}; it must be 'auto', 'sdpa' or 'bridge'.")
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        folder = locate(name)
        hf_model, hf_tokenizer = load_folder(folder, chosen_device, chosen_dtype)
        return cls(
            name,
            wrap_tokenizer(hf_tokenizer, hf_model),
            hf_model.config,
            hf_model=hf_model,
            path=path,
            weight_files=sorted(folder.glob("*.safetensors")),
            center_writing_weights=center_writing_weights,
        )

    @classmethod
    def from_hf(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        path: RunPath = "auto",
        center_writing_weights: bool = False,
    ) -> "LanguageModel":
        """Wrap a loaded Hugging Face causal or masked language model and its tokenizer.

        ``model`` is used as it is (devices, dtype, quantisation, attention), and put into evaluation mode.

        Raises:
            InputError: the tokenizer is empty or does not fit the model.
        """
        return cls(
            name,
            wrap_tokenizer(tokenizer, model),
            model.config,
            hf_model=model.eval(),
            path=path,
            center_writing_weights=center_writing_weights,
        )

    @classmethod
    def from_bridge(cls, bridge: Any, *, center_writing_weights: bool = False) -> "LanguageModel":
        """Wrap an existing ``TransformerBridge``; everything runs through it, with its weights as they are.

        Texts begin with BOS where the bridge's ``default_prepend_bos`` says so.

        Raises:
            InputError: the bridge has no tokenizer, or one that does not fit.
        """
        if bridge.tokenizer is None:
            raise InputError("The TransformerBridge has no tokenizer: give it one before it is wrapped.")
        model = bridge.original_model.eval()
        return cls(
            str(bridge.cfg.model_name),
            wrap_tokenizer(bridge.tokenizer, model, adds_bos=bool(bridge.cfg.default_prepend_bos)),
            model.config,
            bridge=bridge,
            path="bridge",
            center_writing_weights=center_writing_weights,
        )

    @torch.no_grad()
    def capture(
        self,
        ids: Tensor,
        hook_names: Sequence[str],
        *,
        attention_mask: Tensor | None = None,
        out: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """What flows at ``hook_names`` when the model reads ``ids``; stops after the last of them.

        More than 8,192 positions go through the model in chunks, as :meth:`capture_chunks` says, where they can.

        Args:
            ids: ``[batch, pos]`` int64.
            hook_names: TransformerLens names.
            attention_mask: ``[batch, pos]``, 0 at padding (left or right); None when there is none. What
                comes out at padding means nothing.
            out: tensors ``[batch, pos, width]`` of any dtype, by hook name, into which what is captured is written.

        Returns:
            for each name ``[batch, pos, width]``: the tensor of ``out`` where there is one, else one in the model's
            dtype, on the device of that layer; ``attn.hook_z`` with its heads flattened. Other hooks of the bridge
            keep their shape. The tensors may share memory: do not change them in place.

        Raises:
            InputError: a hook does not exist or does not fire, ``ids`` exceeds the context or the vocabulary, or a
                tensor of ``out`` has another shape or belongs to no hook asked for.
        """
        scopes = active_scopes(self)
        backend = self._backend(hook_names, scopes)
        ids, mask = self._checked(ids, attention_mask)
        names = list(dict.fromkeys(hook_names))
        for name in out:
            if name not in names:
                raise InputError(f"out holds a buffer for {name}, which is not among the hooks to capture.")
        positions = self._positions(ids, mask, scopes)
        if ids.shape[1] > LONG_INPUT and self._reads_in_chunks(backend, ids):
            chunks = capture_in_chunks(
                backend, self.config, ids, mask, names, CHUNK_TOKENS, scopes, positions
            )
            return joined(chunks, ids.shape[1], out)
        forward = partial(backend.base_model, **self._arguments(ids, mask))
        return backend.sites.capture(forward, names, ids.shape[0], scopes, positions, out)

    def capture_chunks(
        self,
        ids: Tensor,
        hook_names: Sequence[str],
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        attention_mask: Tensor | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """As :meth:`capture`, at most ``chunk_tokens`` positions at a time over the KV cache, in bounded memory.

        Held at a time are the keys and values of the layers up to the last hook, the activations of one chunk, and
        its attention mask, which is kept below 2^26 entries (``batch * chunk * pos so far``) by shorter chunks. Edits
        active at the call hold for all chunks. What takes no more than one chunk is read in one pass.

        Yields:
            (first position of the chunk, {name: ``[batch, chunk, width]``}), in order.

        Raises:
            InputError: as for :meth:`capture`; or the text is longer than a chunk and must be read in one pass: at
                hooks of the bridge, in a model without KV cache, and where rotary positions depend on the length.
        """
        if chunk_tokens < 1:
            raise InputError(f"chunk_tokens is {chunk_tokens}; it must be at least 1.")
        scopes = active_scopes(self)
        backend = self._backend(hook_names, scopes)
        ids, mask = self._checked(ids, attention_mask)
        if ids.shape[1] <= chunk_tokens:
            return iter([(0, self.capture(ids, hook_names, attention_mask=mask))])
        if not self._reads_in_chunks(backend, ids):
            raise InputError(
                f"{self.name} reads {ids.shape[1]} tokens at these hooks in one pass only: choose hooks of the SDPA"
                f" path, or at most chunk_tokens ({chunk_tokens}) tokens."
            )
        names = list(dict.fromkeys(hook_names))
        positions = self._positions(ids, mask, scopes)
        return capture_in_chunks(backend, self.config, ids, mask, names, chunk_tokens, scopes, positions)

    @torch.no_grad()
    def logits(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits ``[batch, pos, d_vocab]`` for ``ids [batch, pos]``; see :meth:`capture`.

        A masked language model gives those of each token itself.
        """
        scopes = active_scopes(self)
        backend = self._backend((), scopes)
        ids, mask = self._checked(ids, attention_mask)
        forward = partial(backend.causal_lm, **self._arguments(ids, mask))
        output = backend.sites.run(forward, ids.shape[0], scopes, self._positions(ids, mask, scopes))
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def replay(
        self,
        ids: Tensor,
        hook_name: str,
        *,
        also: Sequence[str] = (),
        attention_mask: Tensor | None = None,
    ) -> Replay:
        """Run the model on ``ids [batch, pos]`` so that what follows ``hook_name`` can be run again by itself.

        For logits under many different activations at one hook: on the SDPA path, each
        :meth:`Replay.logits_with` computes only the blocks from the hook on. ``also`` names hooks that are computed
        earlier, and :attr:`Replay.captured` then says what flowed there; other arguments are as for :meth:`capture`.

        Raises:
            InputError: as for :meth:`capture`, and inside a block of :meth:`edited`.
        """
        if active_scopes(self):
            raise InputError("A replay starts from the model as it is: leave the block of edited() first.")
        backend = self._backend([hook_name, *also], ())
        ids, mask = self._checked(ids, attention_mask)
        positions = token_positions(ids, mask, self.tokenizer.special_ids)
        arguments = self._arguments(ids, mask)
        return start_replay(backend, self, arguments, positions, hook_name, self.n_layers, also)

    def edited(self, *edits: Edit) -> AbstractContextManager[None]:
        """Hold ``edits`` for captures, logits and generation inside the block, in this thread only.

        Edits at one hook apply in the order given, those of an outer block first; a capture sees the edited
        value. A stream that was started inside the block keeps its edits.

        Raises:
            InputError: a hook does not exist; at the end of the block, an edit's hook never fired although
                the model ran.
        """
        self._backend([name for edit in edits for name in edit.hook_names], ())
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
        if not self._is_causal:
            raise InputError(
                f"{self.name} is a masked language model and writes no text: choose a causal one."
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise InputError("There is no prompt: give at least one text to continue.")
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        ids = [prompt_ids(self.tokenizer, text, bos) for text in texts]
        check_fits(ids, max_new_tokens, self.context_length)
        if not self._allows_left_padding and len({len(prompt) for prompt in ids}) > 1:
            raise InputError(
                f"{self.name} cannot continue prompts of different lengths together: give them one by one."
            )
        scopes = active_scopes(self)
        backend = self._backend((), scopes)

        @torch.no_grad()
        def step(arguments: dict[str, Any], positions: Tensor) -> Any:
            forward = partial(backend.causal_lm, **arguments, logits_to_keep=1)
            return backend.sites.run(forward, len(ids), scopes, positions)

        return write(step, self.tokenizer, ids, sampling, self.device)

    @torch.no_grad()
    def logit_lens_weights(self) -> tuple[Tensor, Tensor]:
        """Gain of the final normalisation ``[d_model]`` and unembedding ``W_U [d_model, d_vocab]``, float32.

        Raises:
            InputError: the architecture is not one whose final normalisation we know.
        """
        if self._architecture is None:
            raise InputError(
                f"The logit lens of {self.name} is not known: its architecture {self.config.model_type} is"
                f" not one of {', '.join(ARCHITECTURES)}."
            )
        return logit_lens_weights(self._any_model, self._architecture)

    def _probe(self, batch: int, pos: int) -> dict[str, Any]:
        return self._arguments(
            torch.full((batch, pos), self.tokenizer.separator_id, device=self.device), None
        )

    def _reads_in_chunks(self, backend: Backend, ids: Tensor) -> bool:
        on_sdpa_path = backend.sites is self._sites and self._architecture is not None
        return on_sdpa_path and not rotation_depends_on_length(self.config, ids.shape[1])

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
        if ids.device.type == "cpu":  # elsewhere this would wait for the device
            least, largest = (int(i) for i in ids.aminmax())
            if least < 0 or largest >= self._embedding_rows:
                raise InputError(
                    f"Token id {least if least < 0 else largest} does not exist: the embedding of {self.name} has"
                    f" {self._embedding_rows} rows, so take ids of this model's tokenizer."
                )
        mask = None if attention_mask is None else attention_mask.to(self.device)
        if mask is not None and not self._allows_left_padding and is_left_padded(mask):
            raise InputError(f"{self.name} reads a text behind padding as another one: pad on the right.")
        return ids.to(self.device, torch.int64), mask

    def _arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if not self._is_causal:
            return arguments if mask is None else arguments | {"attention_mask": mask}
        # Padding on the right is behind every real token, so causal attention never reads it: without a mask,
        # SDPA takes its fast causal path.
        if mask is not None and is_left_padded(mask):
            arguments |= {"attention_mask": mask, "position_ids": position_ids(mask)}
        return arguments

    def _positions(self, ids: Tensor, mask: Tensor | None, scopes: Sequence[EditScope]) -> Tensor | None:
        return token_positions(ids, mask, self.tokenizer.special_ids) if scopes else None
