"""What a store is made from, and how its blocks are dealt to shards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.blocks import TokenBlocks
from activations.capture import BlockRange, BlockRanges, blocks_per_batch
from activations.config import ExclusionRule, StoredAs
from activations.errors import InputError
from activations.files import FORMAT_VERSION, read_manifest
from activations.store import KIND, SHARD_BYTES, own_hash

if TYPE_CHECKING:
    from activations.models import LanguageModel

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Plan:
    """What a store is made from, and how its blocks are dealt to shards.

    inputs: hashes and settings that decide about every byte of the shards.
    hooks: width at each hook.
    captures: for each capture (the first and those appended) what is known of it, its tokens' hash, its blocks.
    """

    inputs: dict[str, Any]
    hooks: dict[str, int]
    special_ids: list[int]
    rule: ExclusionRule
    captures: list[dict[str, Any]]
    batch_blocks: int
    shard_blocks: int
    row_bytes: int

    @classmethod
    def of(
        cls,
        model: "LanguageModel",
        blocks: TokenBlocks,
        hook_names: Sequence[str],
        stored_as: StoredAs,
        rule: ExclusionRule,
        captures: Sequence[Mapping[str, Any]],
    ) -> "Plan":
        """The plan for these inputs; the only capture takes its tokens and number of blocks from ``blocks``."""
        if len(captures) == 1:
            captures = [{**captures[0], "tokens": blocks.hash, "blocks": blocks.n_blocks}]
        hooks = {name: model.width(name) for name in dict.fromkeys(hook_names)}
        batch_blocks = blocks_per_batch(model, blocks.context_length)
        extra = 4 + 4 * (stored_as == "int8")
        row_bytes = 12 + sum(width * ITEM_BYTES[stored_as] + extra for width in hooks.values())
        batches = max(1, SHARD_BYTES // (row_bytes * blocks.context_length * batch_blocks))
        inputs = {
            "model": model.hash,
            "hook_names": list(hooks),
            "tokens": blocks.hash,
            "captured_blocks": [capture["blocks"] for capture in captures],
            "dtype": str(model.dtype).removeprefix("torch."),
            "stored_as": stored_as,
            "batch_blocks": batch_blocks,
        }
        special_ids = sorted(model.tokenizer.special_ids)
        # Whole batches, so that a shard that is computed again is computed from the very same batches.
        return cls(
            inputs,
            hooks,
            special_ids,
            rule,
            [dict(c) for c in captures],
            batch_blocks,
            batches * batch_blocks,
            row_bytes,
        )

    @cached_property
    def shards(self) -> list[BlockRange]:
        """The blocks of each shard; an appended capture begins with a new one."""
        ranges: list[BlockRange] = []
        for n_blocks in self.inputs["captured_blocks"]:
            start = ranges[-1][1] if ranges else 0
            ranges += BlockRanges(start + n_blocks, self.shard_blocks, start)
        return ranges

    def is_finished(self, folder: Path) -> bool:
        """Whether ``folder`` holds a finished store by this plan."""
        try:
            manifest = read_manifest(folder, KIND)
        except InputError:
            return False
        wanted = self.manifest()
        same = all(manifest.get(key) == wanted[key] for key in ("inputs", "rule", "special_ids"))
        return same and bool(manifest.get("complete")) and manifest.get("hash") == own_hash(manifest)

    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says while the store is being written."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "complete": False,
            "inputs": self.inputs,
            "hooks": self.hooks,
            "special_ids": self.special_ids,
            "rule": asdict(self.rule),
            "captures": self.captures,
        }

    def bytes(self, blocks: TokenBlocks) -> int:
        """What the store takes on disk, to within a percent; tokens are written twice, in blocks and by row."""
        return self.row_bytes * blocks.n_tokens + (blocks.ids.itemsize + 4) * blocks.ids.size
