"""Activations of one hook on disk, as bfloat16.

A store is a folder::

    shard-00000.safetensors …   "activations": bfloat16 [blocks, context, width], about 32 MB each
    tokens/                     the token blocks they were computed from
    statistics.safetensors      "mean": float32 [width]
    manifest.json               written last: hashes of the inputs, scale, exclusion

Every file is written atomically, so an interrupted run continues at the first shard that is missing.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import (
    BlockRange,
    blocks_per_batch,
    capture_blocks,
    kept_positions,
    single_threaded,
)
from activations.errors import InputError
from activations.exclusion import SAMPLE_TOKENS, Exclusion, Moments, is_text
from activations.files import (
    MANIFEST,
    hash_json,
    is_finished,
    read_manifest,
    room_needed,
    write_bytes,
    write_manifest,
)
from activations.progress import Progress, Step, silent

if TYPE_CHECKING:
    from activations.models import LanguageModel

KIND = "store of activations"
TOKENS_FOLDER = "tokens"
STATISTICS_FILE = "statistics.safetensors"
SHARD_BYTES = 1 << 25


@dataclass(frozen=True)
class ActivationStore:
    """A finished folder of activations at one hook.

    hook_name: where in the model they are from.
    width: size of one activation vector.
    blocks: the tokens they belong to.
    exclusion: which positions count.
    mean, scale: float32 [width] and a factor such that E‖(x − mean)·scale‖² = width where positions count.
    n_kept: number of positions that count.
    inputs: hashes and settings of what the store was made from.
    """

    folder: Path
    hook_name: str
    width: int
    blocks: TokenBlocks
    exclusion: Exclusion
    mean: Tensor
    scale: float
    n_kept: int
    shard_blocks: int
    inputs: dict[str, Any]

    @property
    def n_blocks(self) -> int:
        return self.blocks.n_blocks

    @classmethod
    def open(cls, folder: Path | str) -> "ActivationStore":
        """Open what :func:`write_store` wrote.

        Raises:
            InputError: the folder holds no finished store, or one whose files are damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        blocks = TokenBlocks.load(folder / TOKENS_FOLDER)
        try:
            mean = load_file(folder / STATISTICS_FILE)["mean"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{folder / STATISTICS_FILE} cannot be read ({error}): capture again.") from None
        inputs = manifest["inputs"]
        return cls(
            folder=folder,
            hook_name=inputs["hook_name"],
            width=len(mean),
            blocks=blocks,
            exclusion=Exclusion(frozenset(manifest["special_ids"]), manifest["max_norm"]),
            mean=mean,
            scale=manifest["scale"],
            n_kept=manifest["n_kept"],
            shard_blocks=manifest["shard_blocks"],
            inputs=inputs,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Activations of blocks ``start`` to ``stop`` as they are stored: bfloat16 [stop - start, context, width].

        Raises:
            InputError: a shard is missing or damaged.
        """
        parts = []
        while start < stop:
            number, first = divmod(start, self.shard_blocks)
            last = min(stop - number * self.shard_blocks, self.shard_blocks)
            path = self.folder / _shard_name(number)
            try:
                # Opened for this read only: pages of a mapping that stays open count as memory in use.
                with safe_open(path, "pt") as shard:
                    parts.append(shard.get_slice("activations")[first:last])
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read ({error}): capture again.") from None
            start += last - first
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def delete(self) -> None:
        """Remove the store from disk."""
        shutil.rmtree(self.folder)


def write_store(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_name: str,
    folder: Path | str,
    *,
    progress: Progress = silent,
) -> ActivationStore:
    """Capture the activations of ``blocks`` at ``hook_name`` into ``folder``; if they are there, open them.

    An interrupted call continues where it stopped, to the same bits. A store made from other inputs is
    replaced.

    Raises:
        InputError: unknown hook, a folder that holds something else, or a full disk.
    """
    folder = Path(folder)
    width = model.width(hook_name)
    batch_blocks = blocks_per_batch(model)
    inputs = {
        "model": model.hash,
        "hook_name": hook_name,
        "tokens": blocks.hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_blocks": batch_blocks,
    }
    if is_finished(folder, KIND, inputs):
        return ActivationStore.open(folder)
    _check_replaceable(folder)
    needed = 2 * width * blocks.ids.size
    _check_space(folder, needed)
    with room_needed(_no_space(folder, needed)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        writer = _Writer(model, blocks, hook_name, folder, width, batch_blocks, hash_json(inputs))
        with progress("capture", total=blocks.ids.size, unit="tokens") as step:
            facts = writer.write(step)
        write_manifest(folder, KIND, inputs, **facts)
    return ActivationStore.open(folder)


@dataclass
class _Writer:
    """Writes the shards of one store and measures what counts on the way."""

    model: "LanguageModel"
    blocks: TokenBlocks
    hook_name: str
    folder: Path
    width: int
    batch_blocks: int
    inputs_hash: str

    def __post_init__(self) -> None:
        block_bytes = 2 * self.width * self.blocks.context_length
        batches = max(1, SHARD_BYTES // (block_bytes * self.batch_blocks))
        # Whole batches, so that a run that continues computes the very same batches.
        self.shard_blocks = batches * self.batch_blocks
        self.n_shards = -(-self.blocks.n_blocks // self.shard_blocks)

    def write(self, step: Step) -> dict[str, Any]:
        """Write what is missing; the facts for the manifest."""
        tokens = {"hash": self.blocks.hash}
        if not TokenBlocks.is_finished(self.folder / TOKENS_FOLDER, tokens):
            self.blocks.save(self.folder / TOKENS_FOLDER, tokens)
        for shard in self.folder.glob("shard-*"):
            if shard.name >= _shard_name(self.n_shards):
                shard.unlink()
        exclusion: Exclusion | None = None
        moments = Moments(self.width)
        special_ids = self.model.tokenizer.special_ids
        unmeasured: list[int] = []
        n_text = 0
        for number, x in self._shards(step):
            if exclusion is not None:
                self._measure(number, x, exclusion, moments)
                continue
            # The bound on norms is known after the first 100,000 tokens: their shards are read again.
            unmeasured.append(number)
            n_text += int(is_text(self._ids(number), special_ids).sum())
            if n_text >= SAMPLE_TOKENS or number == self.n_shards - 1:
                sample = ((self._ids(n), self._read(n)) for n in unmeasured)
                exclusion = Exclusion.measure(special_ids, sample)
                for n in unmeasured:
                    self._measure(n, self._read(n), exclusion, moments)
        assert exclusion is not None
        write_bytes(self.folder / STATISTICS_FILE, save({"mean": moments.mean}))
        return {
            "shard_blocks": self.shard_blocks,
            "n_tokens": self.blocks.n_tokens,
            "n_kept": moments.n_rows,
            "scale": moments.scale,
            "max_norm": exclusion.max_norm,
            "special_ids": sorted(exclusion.special_ids),
        }

    def _shards(self, step: Step) -> Iterator[tuple[int, Tensor]]:
        """(number, activations [blocks, context, width]) of every shard, all of them on disk by then."""
        number = 0
        while number < self.n_shards and self._is_valid(number):
            step(self._ids(number).numel())
            yield number, self._read(number)
            number += 1
        batches: list[Tensor] = []
        captured = capture_blocks(
            self.model,
            self.blocks,
            [self.hook_name],
            batch_blocks=self.batch_blocks,
            start=number * self.shard_blocks,
        )
        for start, activations in captured:
            x = activations[self.hook_name]
            with single_threaded():
                batches.append(x.to("cpu", torch.bfloat16))
            step(x.shape[0] * x.shape[1])
            stop = start + len(x)
            if stop % self.shard_blocks == 0 or stop == self.blocks.n_blocks:
                shard = torch.cat(batches)
                batches.clear()
                write_bytes(
                    self._path(number), save({"activations": shard}, {"checksum": self._checksum(shard)})
                )
                yield number, shard
                number += 1

    def _path(self, number: int) -> Path:
        return self.folder / _shard_name(number)

    def _range(self, number: int) -> BlockRange:
        return number * self.shard_blocks, min((number + 1) * self.shard_blocks, self.blocks.n_blocks)

    def _ids(self, number: int) -> Tensor:
        return self.blocks.ids_tensor(*self._range(number))

    def _measure(self, number: int, x: Tensor, exclusion: Exclusion, moments: Moments) -> None:
        with single_threaded():  # the other cores are capturing
            moments.add(x[kept_positions(self.blocks, *self._range(number), x, exclusion)])

    def _read(self, number: int) -> Tensor:
        return load_file(self._path(number))["activations"]

    def _is_valid(self, number: int) -> bool:
        """Whether this shard is there, whole, and from the same inputs."""
        try:
            with safe_open(self._path(number), "pt") as file:
                metadata, shard = file.metadata() or {}, file.get_tensor("activations")
        except (OSError, SafetensorError):
            return False
        start, stop = self._range(number)
        shape = (stop - start, self.blocks.context_length, self.width)
        return tuple(shard.shape) == shape and metadata.get("checksum") == self._checksum(shard)

    def _checksum(self, shard: Tensor) -> str:
        """sha256 over the inputs and the activations."""
        digest = hashlib.sha256(self.inputs_hash.encode())
        digest.update(shard.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _check_replaceable(folder: Path) -> None:
    """Refuse to write into a folder that holds anything but a store, finished or not."""
    ours = {MANIFEST, STATISTICS_FILE, TOKENS_FOLDER}
    if (folder / MANIFEST).is_file():
        read_manifest(folder, KIND)
    elif folder.exists():
        for path in folder.iterdir():
            if path.name not in ours and not path.name.startswith(("shard-", ".")):
                raise InputError(
                    f"{folder} holds {path.name}, which is no part of a {KIND}: give an empty or new folder."
                )


def _check_space(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("shard-*"))
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if shutil.disk_usage(disk).free + there < needed:
        raise InputError(_no_space(folder, needed))


def _no_space(folder: Path, needed: int) -> str:
    return (
        f"The disk has too little room for the activations in {folder}, {needed / 1e6:,.0f} MB in all: free"
        " some and run again to continue, or choose a folder on another disk."
    )
