"""Writing text with a model: our own sampling loop over the KV cache.

It differs from Hugging Face's ``generate`` in what a toolkit for steering needs: the randomness comes from
the request's own generators, edits see absolute positions, and text comes out token by token as whole
characters.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from activations.edits import position_ids, token_positions
from activations.errors import InputError
from activations.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many tokens are written for each prompt.
        temperature: the logits are divided by it; 0 takes the most likely token (greedy).
        top_k: sample from the ``top_k`` most likely tokens only; None means all.
        top_p: sample from the fewest tokens whose probabilities sum to at least ``top_p`` (nucleus sampling,
            Holtzman et al. 2020); None means all.
        seed: row ``i`` of a batch draws from its own generator seeded with ``seed + i``, on the CPU: the
            first prompt of a batch gets the text it would get alone, on every device.

    Raises:
        InputError: a value is out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number."
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each row.

        Args:
            logits: ``[batch, d_vocab]``, any device and dtype.
            generators: one CPU generator per row.

        Returns:
            ``[batch]`` int64 on the CPU.
        """
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        logits = logits.float().cpu() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = descending.cumsum(-1) - descending
            descending = descending.masked_fill(before >= self.top_p, 0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, descending)
        return torch.cat(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
        )


def prompt_ids(tokenizer: Tokenizer, prompt: str, bos: bool | None) -> list[int]:
    """Token ids of a prompt; an empty one becomes BOS or, without BOS, the end-of-text token."""
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos if bos is None else bos)
    return ids or [tokenizer.separator_id if tokenizer.bos_id is None else tokenizer.bos_id]


def check_fits(prompts: Sequence[Sequence[int]], max_new_tokens: int, context_length: int) -> None:
    """Refuse to write beyond the model's context.

    Raises:
        InputError: says how many tokens fit.
    """
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context_length:
        room = context_length - longest
        fits = f"at most {room} new tokens fit" if room > 0 else "no new token fits"
        raise InputError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of"
            f" {context_length} tokens: {fits}."
        )


def left_padded(sequences: Sequence[Sequence[int]], padding_id: int) -> tuple[Tensor, Tensor]:
    """``ids [batch, pos]`` and ``mask [batch, pos]`` (1 at real tokens), int64, padded on the left."""
    length = max(map(len, sequences))
    ids = torch.tensor([[padding_id] * (length - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


Step = Callable[[dict[str, Any], Tensor], Any]
"""Runs the model on keyword arguments, with edits at these positions; returns logits and KV cache."""


def write(
    step: Step,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    device: torch.device,
) -> Iterator[list[str]]:
    """Continue each prompt; yields the new text of every prompt after each step, whole characters only.

    A row that has ended yields ``""``. Rows of unequal length are padded on the left, which changes nothing. A model
    that returns no KV cache (a recurrent one) reads everything again at each step.
    """
    ids, mask = (t.to(device) for t in left_padded(prompts, tokenizer.separator_id))
    padded = not bool(mask.all())
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    decoders = [tokenizer.text_decoder(prompt) for prompt in prompts]
    running = [True] * len(prompts)
    cache: Any = None
    new_ids = ids
    for _ in range(sampling.max_new_tokens):
        n_new = new_ids.shape[1]
        arguments: dict[str, Any] = {"input_ids": new_ids, "past_key_values": cache, "use_cache": True}
        if padded:
            arguments |= {"attention_mask": mask, "position_ids": position_ids(mask)[:, -n_new:]}
        positions = token_positions(ids, mask, tokenizer.special_ids)[:, -n_new:]
        output = step(arguments, positions)
        cache = getattr(output, "past_key_values", None)
        chosen = sampling.choose(output.logits[:, -1], generators)
        texts = []
        for row, token_id in enumerate(chosen.tolist()):
            if running[row] and token_id in tokenizer.eos_ids:
                running[row] = False
                texts.append(decoders[row].finish())
            else:
                texts.append(decoders[row].step(token_id) if running[row] else "")
        yield texts
        if not any(running):
            return
        next_ids = chosen.to(device)[:, None]
        ids = torch.cat([ids, next_ids], dim=1)
        mask = torch.cat([mask, torch.ones_like(next_ids)], dim=1)
        new_ids = ids if cache is None else next_ids
    rest = [decoder.finish() if row else "" for decoder, row in zip(decoders, running, strict=True)]
    if any(rest):
        yield rest
