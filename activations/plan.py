"""What a store is made from, and how its blocks are dealt to shards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.blocks import TokenBlocks
from activations.capture import BlockRange, BlockRanges, blocks_per_batch
from activations.config import ExclusionRule, StoredAs
from activations.errors import InputError
from activations.files import FORMAT_VERSION
from activations.store import KIND, own_hash, whole_manifest

if TYPE_CHECKING:
    from activations.models import LanguageModel

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SHARD_BYTES = 1 << 25
LEAST_BATCHES = {"cpu": 8}
"""Batches that a shard has at least, so that several threads have work to share; 4 where it is not said."""


@dataclass(frozen=True)
class Plan:
    """What a store is made from, and how its blocks are dealt to shards.

    inputs: hashes and settings that decide about every byte of the shards.
    hooks: width at each hook.
    captures: for each capture (the first and those appended) what is known of it, its tokens' hash, how many blocks
        it has, and whether their tokens count by role.
    tokens: of every split the hash of its token blocks.
    """

    inputs: dict[str, Any]
    hooks: dict[str, int]
    special_ids: list[int]
    rule: ExclusionRule
    captures: list[dict[str, Any]]
    tokens: dict[str, str]

    @classmethod
    def of(
        cls,
        model: "LanguageModel",
        tokens: Mapping[str, TokenBlocks],
        hook_names: Sequence[str],
        stored_as: StoredAs,
        rule: ExclusionRule,
        captures: Sequence[Mapping[str, Any]],
        like: Mapping[str, Any] | None = None,
    ) -> "Plan":
        """The plan for these inputs.

        Args:
            tokens: the token blocks of every split; the activations are those of "train".
            captures: what is known of each capture.
            like: inputs of a store that is there; batches and shards are cut as in it, whatever device it was
                captured on, if it has the same hooks, number format and context.
        """
        blocks = tokens["train"]
        hooks = {name: model.width(name) for name in dict.fromkeys(hook_names)}
        inputs: dict[str, Any] = {
            "model": model.hash,
            "hook_names": list(hooks),
            "tokens": blocks.hash,
            "captured_blocks": [capture["blocks"] for capture in captures],
            "dtype": str(model.dtype).removeprefix("torch."),
            "stored_as": stored_as,
            "context_length": blocks.context_length,
        }
        alike = ("hook_names", "stored_as", "context_length")
        if like is not None and all(like.get(name) == inputs[name] for name in alike):
            batch_blocks, shard_blocks = like["batch_blocks"], like["shard_blocks"]
        else:
            batch_blocks = blocks_per_batch(model, blocks.context_length)
            batch_bytes = row_bytes(hooks, stored_as) * blocks.context_length * batch_blocks
            least = LEAST_BATCHES.get(model.device.type, 4)
            # Whole batches, so that a shard that is computed again is computed from the very same batches.
            shard_blocks = max(least, SHARD_BYTES // batch_bytes) * batch_blocks
        inputs |= {"batch_blocks": batch_blocks, "shard_blocks": shard_blocks}
        hashes = {split: held.hash for split, held in tokens.items()}
        special_ids = sorted(model.tokenizer.special_ids)
        return cls(inputs, hooks, special_ids, rule, [dict(capture) for capture in captures], hashes)

    @cached_property
    def shards(self) -> list[BlockRange]:
        """The blocks of each shard; an appended capture begins with a new one."""
        ranges: list[BlockRange] = []
        for n_blocks in self.inputs["captured_blocks"]:
            start = ranges[-1][1] if ranges else 0
            ranges += BlockRanges(start + n_blocks, self.inputs["shard_blocks"], start)
        return ranges

    def batches(self, shard: int) -> BlockRanges:
        """The batches of blocks that a shard is computed from."""
        start, stop = self.shards[shard]
        return BlockRanges(stop, self.inputs["batch_blocks"], start)

    def counts_by_role(self, block: int) -> bool:
        """Whether the capture that a block belongs to says of each token if it counts."""
        ends = accumulate(self.inputs["captured_blocks"])
        number = next(number for number, end in enumerate(ends) if block < end)
        return bool(self.captures[number]["counted"])

    def same_shards(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the shards of a store with these inputs are shards of this one: the same, or before an append."""
        grown = ("tokens", "captured_blocks")
        if any(inputs.get(name) != value for name, value in self.inputs.items() if name not in grown):
            return False
        held, wanted = inputs["captured_blocks"], self.inputs["captured_blocks"]
        if held == wanted:
            return bool(inputs["tokens"] == self.inputs["tokens"])
        return bool(held == wanted[: len(held)])

    def start(self) -> dict[str, Any]:
        """What ``start.json`` and, until the store is finished, ``manifest.json`` say."""
        start = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "complete": False,
            "inputs": self.inputs,
            "hooks": self.hooks,
            "special_ids": self.special_ids,
            "rule": asdict(self.rule),
            "captures": self.captures,
            "tokens": self.tokens,
        }
        return {**start, "hash": own_hash(start)}

    def is_finished(self, folder: Path) -> bool:
        """Whether ``folder`` holds a finished store by this plan."""
        try:
            found = whole_manifest(folder)
        except InputError:
            return False
        wanted = self.start()
        same = all(found.get(key) == wanted[key] for key in ("inputs", "rule", "special_ids", "tokens"))
        return same and bool(found["complete"])

    def bytes(self, tokens: Mapping[str, TokenBlocks]) -> int:
        """What the store takes on disk, to within a percent; tokens are written in blocks and by row."""
        n_rows = tokens["train"].n_tokens
        blocks = sum((held.ids.itemsize + 4) * held.ids.size for held in tokens.values())
        return row_bytes(self.hooks, self.inputs["stored_as"]) * n_rows + blocks


def row_bytes(hooks: Mapping[str, int], stored_as: StoredAs) -> int:
    """Bytes of a row: id, position and document; at each hook the activations, their norm and with int8 the scale."""
    extra = 4 + 4 * (stored_as == "int8")
    return 12 + sum(width * ITEM_BYTES[stored_as] + extra for width in hooks.values())
