"""Long inputs, chunk by chunk over the KV cache, in bounded memory.

Every chunk attends to the keys and values of those before it, so the result is that of one pass. What is held at a
time: the cache of the layers up to the last hook, which a sliding window keeps short, the activations of one chunk and
its attention mask ``[batch, chunk, pos so far]``, for whose sake chunks become shorter in very long texts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from activations.edits import EditScope, is_left_padded, position_ids
from activations.hooks import Backend, check_buffer

CHUNK_TOKENS = 2048
MASK_ENTRIES = 2**26
"""Size of the attention mask of a chunk at most: 64 MB, and 256 MB where PyTorch needs it in float32."""
LONG_INPUT = 8192
"""Number of positions above which a capture goes chunk by chunk by itself."""


def rotation_depends_on_length(config: Any, n_positions: int) -> bool:
    """Whether a text of that length rotates queries and keys otherwise than its beginning alone does.

    So it is with "dynamic" and "longrope" rotary embeddings beyond the length of the original training.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    for rope in by_layer_type:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in ("dynamic", "longrope") and n_positions > original:
            return True
    return False


@torch.no_grad()
def capture_in_chunks(
    backend: Backend,
    config: Any,
    ids: Tensor,
    mask: Tensor | None,
    hook_names: Sequence[str],
    chunk_tokens: int,
    scopes: Sequence[EditScope] = (),
    positions: Tensor | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What flows at ``hook_names`` when the model reads ``ids``, at most ``chunk_tokens`` positions at a time.

    Args:
        backend: serves the hooks; a model with a KV cache.
        config: its Hugging Face configuration.
        ids: ``[batch, pos]`` on the model's device.
        mask: ``[batch, pos]``, 0 at padding; None when there is none.
        hook_names: distinct names.
        chunk_tokens: positions per chunk at most; fewer where the mask would exceed :data:`MASK_ENTRIES`.
        scopes: edits in force.
        positions: ``[batch, pos]`` as edits see them; needed with ``scopes``.

    Yields:
        (first position of the chunk, {name: ``[batch, chunk, width]``}).
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    batch, n_positions = ids.shape
    if mask is not None and not is_left_padded(mask):
        mask = None  # padding on the right is behind every real token, and causal attention never reads it
    places = position_ids(torch.ones_like(ids) if mask is None else mask)
    start = 0
    while start < n_positions:
        fitting = MASK_ENTRIES // (batch * min(start + chunk_tokens, n_positions))
        stop = min(start + max(1, min(chunk_tokens, fitting)), n_positions)
        # The forward pass ends after the last hook: the layers up to there have stored their keys and values by
        # then, and no other layer will ever be asked for its own.
        forward = partial(
            backend.base_model,
            input_ids=ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=places[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        here = None if positions is None else positions[:, start:stop]
        yield start, backend.sites.capture(forward, hook_names, batch, scopes, here)
        start = stop


def joined(
    chunks: Iterable[tuple[int, dict[str, Tensor]]], n_positions: int, out: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The captures of all chunks in one tensor ``[batch, n_positions, width]`` per name.

    Args:
        chunks: of :func:`capture_in_chunks`.
        n_positions: of all chunks.
        out: tensors to write into, by name; for other names one is made.
    """
    whole: dict[str, Tensor] = {}
    for start, captured in chunks:
        for name, piece in captured.items():
            batch, length, width = piece.shape
            if name not in whole:
                shape = (batch, n_positions, width)
                whole[name] = out[name] if name in out else piece.new_empty(shape)
                check_buffer(name, whole[name], shape)
            whole[name][:, start : start + length] = piece
    return whole
