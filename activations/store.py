"""Activations on disk: captured once, read by many trainings, evaluations and indexes.

A store is a folder::

    start.json                    what it is made from and how it is cut into shards, known when capture begins
    manifest.json                 the same; in the end also statistics, counts and the hashes of all files
    shards.jsonl                  one line for each shard: its blocks, rows, bytes and sha256
    shard-00000.safetensors …     the rows (one row a token, padding left out), about 32 MB each:
                                  "ids", "positions", "documents" int32 [rows], and for each hook
                                  "activations/HOOK" [rows, width], "norm/HOOK" float32 [rows],
                                  with int8 also "scale/HOOK" float32 [rows] (value = int8 · scale);
                                  "counted" int8 [rows] for chats of which some roles count
    statistics.safetensors        "mean/HOOK": float32 [width]
    tokens/train-HASH/            the token blocks that the rows belong to, in the same order
    tokens/test-HASH/, …          those of the other splits, for evaluation and labels
    shuffled/                     copies in training order, where a training asked for one

Whatever is listed in ``shards.jsonl`` can be used, finished or not: an interrupted store is a shorter one.
:mod:`activations.writer` writes stores, :mod:`activations.verify` looks for damage.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.capture import BlockRange
from activations.config import ExclusionRule
from activations.errors import InputError
from activations.exclusion import Exclusion, is_text
from activations.files import MANIFEST, hash_file, hash_json, read_manifest
from activations.shards import map_shard
from activations.statistics import Statistics, statistics_of

KIND = "store of activations"
START_FILE = "start.json"
SHARDS_FILE = "shards.jsonl"
STATISTICS_FILE = "statistics.safetensors"
TOKENS = "tokens"
SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Shard:
    """One line of ``shards.jsonl``: blocks [start, stop), and what the file holds."""

    number: int
    blocks: BlockRange
    rows: int
    bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """Its name in the store's folder."""
        return shard_name(self.number)

    def line(self) -> str:
        """As it stands in ``shards.jsonl``."""
        return json.dumps(asdict(self)) + "\n"


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{number:05d}.safetensors"


def tokens_folder(folder: Path, split: str, tokens_hash: str) -> Path:
    """Where a store keeps the token blocks of a split: under their hash, so that new ones never replace old ones."""
    return folder / TOKENS / f"{split}-{tokens_hash[:8]}"


def read_shards(path: Path) -> list[Shard]:
    """The whole lines of a list of shards, as they were written; a line that was cut short does not count."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            fields = json.loads(line)
            shard = Shard(**{**fields, "blocks": tuple(fields["blocks"])})
        except (ValueError, TypeError, KeyError):
            continue
        if line.endswith(b"\n"):
            found.append(shard)
    return found


def shard_lists(folder: Path) -> list[Path]:
    """``shards.jsonl``, and the lists of processes that share a capture."""
    return [folder / SHARDS_FILE, *sorted(folder.glob("shards-*.jsonl"))]


def listed_shards(folder: Path) -> list[Shard]:
    """The shards on all lists of a store, by number."""
    found = {shard.number: shard for path in shard_lists(folder) for shard in read_shards(path)}
    return [found[number] for number in sorted(found)]


def whole_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        InputError: there is none, it is of something else or of a newer saescope, or it is not what was written.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        found = None
    is_ours = isinstance(found, dict) and found.get("kind") == KIND and "hash" in found
    if found is None or (is_ours and found["hash"] != own_hash(found)):
        raise InputError(f"{path} was changed since it was written: {_repair(folder)}")
    manifest = read_manifest(folder, KIND)
    if "hash" not in manifest:
        raise InputError(f"{folder} was captured by an older saescope in another layout: capture it again.")
    return manifest


@dataclass(frozen=True)
class ActivationStore:
    """A folder of activations at one or more hooks; made by :func:`activations.writer.write_store`.

    manifest: the content of ``manifest.json``.
    blocks: the tokens of all rows that are there.
    shards: without a gap, from the first.
    """

    folder: Path
    manifest: dict[str, Any]
    blocks: TokenBlocks
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path | str) -> "ActivationStore":
        """Open a store, finished or not.

        Raises:
            InputError: the folder holds no store, one that is damaged, or one without a single shard.
        """
        folder = Path(folder)
        manifest = whole_manifest(folder)
        if manifest["complete"]:
            path = folder / SHARDS_FILE
            if not path.is_file() or hash_file(path) != manifest["shards_sha256"]:
                raise InputError(f"{path} is not what was written: {_repair(folder)}")
        shards: list[Shard] = []
        for shard in listed_shards(folder):
            path = folder / shard.file
            if shard.number != len(shards):
                break
            if not path.is_file() or path.stat().st_size != shard.bytes:
                if manifest["complete"]:
                    what = "is missing" if not path.is_file() else "is truncated"
                    raise InputError(f"{path} {what}: {_repair(folder)}")
                break
            shards.append(shard)
        if not shards:
            raise InputError(f"{folder} holds no activations yet: run the same sae capture again to go on.")
        path = tokens_folder(folder, "train", manifest["tokens"]["train"])
        try:
            blocks = TokenBlocks.load(path)
        except InputError:
            raise InputError(f"{path} is missing or damaged: {_repair(folder)}") from None
        stop = shards[-1].blocks[1]
        blocks = blocks if stop == blocks.n_blocks else blocks.first(stop)
        return cls(folder, manifest, blocks, tuple(shards))

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks whose activations are there."""
        return tuple(self.manifest["inputs"]["hook_names"])

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for is there."""
        return bool(self.manifest["complete"])

    @property
    def n_rows(self) -> int:
        """Number of rows, one for each token."""
        return sum(shard.rows for shard in self.shards)

    def at(self, hook_name: str | None = None) -> "HookActivations":
        """The activations of one hook; None stands for the only one there is.

        Raises:
            InputError: the store has no such hook, or has several and none was named.
        """
        known = ", ".join(self.hook_names)
        if hook_name is None and len(self.hook_names) > 1:
            raise InputError(f"{self.folder} holds several hooks: name one of {known}.")
        chosen = hook_name or self.hook_names[0]
        if chosen not in self.hook_names:
            raise InputError(f"{self.folder} holds no activations of {chosen}: it has {known}.")
        return HookActivations(self, chosen)

    def map(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, memory-mapped; see :func:`activations.shards.map_shard`."""
        return map_shard(self.folder / self.shards[number].file)

    def delete(self) -> None:
        """Remove the store from disk."""
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class HookActivations:
    """The activations of a store at one hook, by row and by block."""

    store: ActivationStore
    hook_name: str

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self.store.folder

    @property
    def blocks(self) -> TokenBlocks:
        """The tokens that the rows belong to."""
        return self.store.blocks

    @property
    def width(self) -> int:
        """Size of one activation vector."""
        return int(self.store.manifest["hooks"][self.hook_name])

    @property
    def n_rows(self) -> int:
        """Number of rows, those that do not count among them."""
        return self.store.n_rows

    @property
    def stored_as(self) -> str:
        """Number format: "float32", "bfloat16", "float16" or "int8"."""
        return str(self.store.manifest["inputs"]["stored_as"])

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each shard, and the number of rows: int64 [n_shards + 1]."""
        return np.cumsum([0, *(shard.rows for shard in self.store.shards)], dtype=np.int64)

    @property
    def identity(self) -> str:
        """sha256 of what the rows are: hook, what was left out, and every shard's hash."""
        shards = [shard.sha256 for shard in self.store.shards]
        counted = self.store.manifest["rule"], self.store.manifest["special_ids"]
        return hash_json([self.hook_name, counted, shards])

    def values(self, shard: int) -> Tensor:
        """Rows of a shard as they are stored, [rows, width], memory-mapped."""
        return self.store.map(shard)[f"activations/{self.hook_name}"]

    def scales(self, shard: int) -> Tensor | None:
        """Of int8 rows, what each is to be multiplied by: float32 [rows], memory-mapped."""
        return self.store.map(shard).get(f"scale/{self.hook_name}")

    @cached_property
    def statistics(self) -> Statistics:
        """Mean, scale and exclusion, of the first 100,000 tokens of the first capture, whatever is appended.

        Raises:
            InputError: the file with them cannot be read, or no token counts.
        """
        if not self.store.complete:
            special, rule = self.store.manifest["special_ids"], ExclusionRule(**self.store.manifest["rule"])
            return statistics_of(self._text_rows(), special, rule)
        path = self.folder / STATISTICS_FILE
        try:
            mean = load_file(path)[f"mean/{self.hook_name}"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error}): {_repair(self.folder)}") from None
        facts = self.store.manifest["statistics"][self.hook_name]
        max_norm = float("inf") if facts["max_norm"] is None else facts["max_norm"]
        return Statistics(mean, facts["scale"], Exclusion(self._special, max_norm))

    @property
    def mean(self) -> Tensor:
        """float32 [width]; see :attr:`statistics`."""
        return self.statistics.mean

    @property
    def scale(self) -> float:
        """Makes E‖(x − mean)·scale‖² = width; see :attr:`statistics`."""
        return self.statistics.scale

    @property
    def exclusion(self) -> Exclusion:
        """Which positions count; see :attr:`statistics`."""
        return self.statistics.exclusion

    @property
    def n_kept(self) -> int:
        """Number of rows that count."""
        return self.counts["kept"]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of rows by what becomes of them: "kept", "special", "outlier", "other role" (in chats)."""
        if self.store.complete:
            return dict(self.store.manifest["statistics"][self.hook_name]["counts"])
        return self.count(self.exclusion)

    def count(self, exclusion: Exclusion) -> dict[str, int]:
        """:attr:`counts` under this exclusion, counted shard by shard."""
        totals = {"kept": 0, "special": 0, "outlier": 0, "other role": 0}
        for number in range(len(self.store.shards)):
            text, within, counted = self._judged(number, exclusion)
            totals["special"] += int((~text).sum())
            totals["other role"] += int((text & ~counted).sum())
            totals["outlier"] += int((text & counted & ~within).sum())
            totals["kept"] += int((text & counted & within).sum())
        return totals

    def kept(self) -> np.ndarray:
        """Which rows count: bits packed into uint8, row r at bit r % 8 of byte r // 8."""
        bits = np.zeros(-(-self.n_rows // 8), np.uint8)
        for number, start in enumerate(self.starts[:-1]):
            text, within, counted = self._judged(number, self.exclusion)
            rows = (text & within & counted).numpy()
            first = int(start) % 8
            packed = np.packbits(np.concatenate([np.zeros(first, bool), rows]), bitorder="little")
            bits[int(start) // 8 : int(start) // 8 + len(packed)] |= packed
        return bits

    def read(self, start: int, stop: int) -> Tensor:
        """Activations of blocks ``start`` to ``stop``: [stop - start, context, width], 0 at padding.

        In the number format of the store; int8 is given as float32.

        Raises:
            InputError: a shard is missing or damaged.
        """
        first, last = int(self._block_rows[start]), int(self._block_rows[stop])
        rows = torch.cat(list(self._slices(first, last)))
        shape = (stop - start, self.blocks.context_length, rows.shape[1])
        if len(rows) == shape[0] * shape[1]:
            return rows.view(shape)
        real = torch.from_numpy(self.blocks.documents[start:stop] != PADDING)
        padded = rows.new_zeros(shape)
        padded[real] = rows
        return padded

    @property
    def _special(self) -> frozenset[int]:
        rule = ExclusionRule(**self.store.manifest["rule"])
        return frozenset(self.store.manifest["special_ids"] if rule.exclude_special else ())

    @cached_property
    def _block_rows(self) -> np.ndarray:
        """First row of each block, and the number of rows: int64 [n_blocks + 1]."""
        sizes = (
            part != PADDING
            for part in np.array_split(self.blocks.documents, self.blocks.n_blocks // 4096 + 1)
        )
        return np.cumsum(np.concatenate([[0], *(part.sum(axis=1) for part in sizes)]), dtype=np.int64)

    def _slices(self, first: int, last: int) -> Iterator[Tensor]:
        """Rows ``first`` to ``last``, in pieces that each lie in one shard."""
        while first < last:
            number = int(np.searchsorted(self.starts, first, side="right")) - 1
            start, stop = (
                first - int(self.starts[number]),
                min(last, int(self.starts[number + 1])) - int(self.starts[number]),
            )
            rows = self.values(number)[start:stop]
            scales = self.scales(number)
            yield rows if scales is None else rows.float() * scales[start:stop, None]
            first += stop - start

    def _judged(self, number: int, exclusion: Exclusion) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row of a shard: whether it is text, within the bound on norms, of a role that was asked for."""
        shard = self.store.map(number)
        text = is_text(shard["ids"], exclusion.special_ids)
        counted = shard["counted"].bool() if "counted" in shard else torch.ones_like(text)
        return text, shard[f"norm/{self.hook_name}"] <= exclusion.max_norm, counted

    def _text_rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(ids, activations, norms) of the first capture's rows that may count, shard by shard."""
        first_capture = self.store.manifest["inputs"]["captured_blocks"][0]
        for number, start in enumerate(self.starts[:-1]):
            if self.store.shards[number].blocks[0] >= first_capture:
                return
            shard = self.store.map(number)
            (rows,) = self._slices(int(start), int(self.starts[number + 1]))
            found = shard["ids"], rows, shard[f"norm/{self.hook_name}"]
            if "counted" in shard:
                counted = shard["counted"].bool()
                found = found[0][counted], found[1][counted], found[2][counted]
            yield found


def own_hash(manifest: dict[str, Any]) -> str:
    """What ``manifest["hash"]`` must be: sha256 of all the rest."""
    return hash_json({key: value for key, value in manifest.items() if key != "hash"})


def _repair(folder: Path) -> str:
    return f"sae store repair {folder} makes it again."
