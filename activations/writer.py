"""Writing a store: capture, conversion and disk work at the same time, and can be killed at any moment.

The model runs in worker threads, which also convert what they captured. Full shards go to one more thread, which
hashes and writes them. A shard is there once its line stands in ``shards.jsonl``; capturing the next one waits at
half for that line, so that no more than one whole shard is ever captured twice.

Several processes share the work by shards (``torchrun``): what a shard holds depends on no other.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.capture import BlockRange, BlockRanges, in_order
from activations.config import ExclusionRule, StoredAs
from activations.errors import InputError
from activations.exclusion import norms
from activations.files import (
    MANIFEST,
    append_line,
    hash_file,
    read_json,
    read_manifest,
    room_for,
    room_needed,
    write_bytes,
    write_json,
)
from activations.plan import Plan
from activations.processes import ALONE, Processes
from activations.progress import Progress, Step, silent
from activations.shards import to_stored, write_shard
from activations.store import (
    KIND,
    SHARDS_FILE,
    SHUFFLED,
    STATISTICS_FILE,
    TOKENS,
    ActivationStore,
    Shard,
    own_hash,
    read_shards,
    shard_name,
)

if TYPE_CHECKING:
    from activations.models import LanguageModel

_LOCK = ".lock"


def write_store(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_names: Sequence[str],
    folder: Path | str,
    *,
    stored_as: StoredAs = "bfloat16",
    rule: ExclusionRule | None = None,
    about: Mapping[str, Any] | None = None,
    others: Mapping[str, TokenBlocks] | None = None,
    replace_other: bool = False,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> ActivationStore:
    """Capture the activations of ``blocks`` at some hooks into ``folder``; if they are there, open them.

    An interrupted call goes on where it stopped, and ends in the same bytes.

    Args:
        stored_as: number format on disk; float16 cuts off what it cannot hold, int8 has one scale for each token.
        rule: which positions do not count.
        about: where model and text came from (JSON-able), for the manifest.
        others: token blocks of other splits, to lie beside.
        replace_other: put the store in the place of one from other inputs, which is refused otherwise.
        processes: those that share the work.

    Raises:
        InputError: unknown hook, activations that are not finite, a folder that holds something else or another
            store, one that another process is writing, or a full disk.
    """
    plan = Plan.of(model, blocks, hook_names, stored_as, rule or ExclusionRule(), [about or {}])
    return _write(model, blocks, plan, Path(folder), others or {}, replace_other, processes, progress)


def append_store(
    model: "LanguageModel",
    blocks: TokenBlocks,
    folder: Path | str,
    *,
    about: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> ActivationStore:
    """Capture ``blocks`` behind what a finished store holds, at the same hooks and in the same format.

    Which positions count and the statistics stay as they were. An interrupted call goes on; text that was appended
    last is not appended twice.

    Raises:
        InputError: no store, an unfinished one, one of another model or context length; else as :func:`write_store`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    inputs, captures = manifest["inputs"], manifest["captures"]
    rule = ExclusionRule(**manifest["rule"])
    held = TokenBlocks.load(folder / TOKENS / "train")
    if captures[-1]["tokens"] == blocks.hash:  # this very text: finish it
        blocks = held if held.hash == inputs["tokens"] else TokenBlocks.joined([held, blocks])
    elif not manifest["complete"]:
        raise InputError(f"{folder} is unfinished: run the sae capture that began it again before appending.")
    else:
        if held.context_length != blocks.context_length:
            raise InputError(
                f"{folder} has sequences of {held.context_length} tokens, and the new text {blocks.context_length}:"
                f" give --context-length {held.context_length}."
            )
        captures = [*captures, {**(about or {}), "tokens": blocks.hash, "blocks": blocks.n_blocks}]
        blocks = TokenBlocks.joined([held, blocks])
    plan = Plan.of(model, blocks, inputs["hook_names"], inputs["stored_as"], rule, captures)
    for name in ("model", "dtype"):
        if plan.inputs[name] != inputs[name]:
            raise InputError(
                f"{folder} holds activations of another {name}: append with the one that it was captured with."
            )
    others = {
        path.name: TokenBlocks.load(path) for path in (folder / TOKENS).iterdir() if path.name != "train"
    }
    return _write(model, blocks, plan, folder, others, True, processes, progress)


def _write(
    model: "LanguageModel",
    blocks: TokenBlocks,
    plan: Plan,
    folder: Path,
    others: Mapping[str, TokenBlocks],
    replace_other: bool,
    processes: Processes,
    progress: Progress,
) -> ActivationStore:
    if plan.is_finished(folder):
        return ActivationStore.open(folder)
    writer = Writer(model, blocks, plan, folder)
    needed = plan.bytes(blocks)
    if processes.rank == 0:
        _check_replaceable(folder, plan, replace_other)
        if room_for(folder, freed=folder.glob("shard-*")) < needed:
            raise InputError(_no_space(folder, needed))
    with room_needed(_no_space(folder, needed)), only_writer(folder, processes):
        if processes.rank == 0:
            writer.begin(others)
        processes.wait()
        mine = writer.missing()[processes.rank :: processes.size]
        with progress("capture", total=writer.tokens_in(mine), unit="tokens") as step:
            writer.capture(mine, step, processes)
        processes.wait()
        if processes.rank == 0:
            writer.finish()
        processes.wait()
    return ActivationStore.open(folder)


@dataclass(frozen=True)
class Writer:
    """Writes the files of one store by its plan."""

    model: "LanguageModel"
    blocks: TokenBlocks
    plan: Plan
    folder: Path

    def begin(self, others: Mapping[str, TokenBlocks]) -> None:
        """Write the manifest and the tokens, keep the shards that are there, clear away what a killed run left."""
        folder, start = self.folder, self.plan.manifest()
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.*"):
            left_over.unlink()
        kept = self._kept_shards()
        write_json(folder / MANIFEST, start)
        for path in (folder / TOKENS).glob("*"):
            if path.name not in ("train", *others):
                shutil.rmtree(path)
        for split, held in {"train": self.blocks, **others}.items():
            # The start of the manifest lies with the tokens too, so that either can be made from the other.
            inputs = {"hash": held.hash, "store": start}
            if not TokenBlocks.is_finished(folder / TOKENS / split, inputs):
                held.save(folder / TOKENS / split, inputs)
        self._write_shard_list(kept)
        names = {shard.file for shard in kept}
        for path in folder.glob("shard*-*"):
            if path.name not in names:
                path.unlink()

    def _kept_shards(self) -> list[Shard]:
        """The shards on disk that belong to this plan."""
        if not (self.folder / MANIFEST).is_file():
            return []
        found = read_json(self.folder / MANIFEST)["inputs"]
        grown = {"tokens", "captured_blocks"}  # what appending changes
        if any(found.get(key) != value for key, value in self.plan.inputs.items() if key not in grown):
            return []
        held, wanted = found["captured_blocks"], self.plan.inputs["captured_blocks"]
        if held != wanted[: len(held)] or (held == wanted and found["tokens"] != self.plan.inputs["tokens"]):
            return []
        kept = {}
        for path in self.folder.glob("shards*.jsonl"):
            listed = read_shards(path)
            for shard in listed:
                file = self.folder / shard.file
                whole = file.is_file() and file.stat().st_size == shard.bytes
                # Only what was written last can have been cut short by a crash of the whole system.
                if whole and (shard is not listed[-1] or hash_file(file) == shard.sha256):
                    kept[shard.number] = shard
        ranges = self.plan.shards
        return [s for n, s in sorted(kept.items()) if n < len(ranges) and s.blocks == ranges[n]]

    def missing(self) -> list[int]:
        """The numbers of the shards that are to be captured."""
        there = {shard.number for shard in read_shards(self.folder / SHARDS_FILE)}
        return [number for number in range(len(self.plan.shards)) if number not in there]

    def tokens_in(self, numbers: Iterable[int]) -> int:
        """How many tokens these shards hold."""
        shards = (self.blocks.documents[slice(*self.plan.shards[number])] for number in numbers)
        return sum(int((documents != PADDING).sum()) for documents in shards)

    def capture(self, numbers: Sequence[int], step: Step, processes: Processes = ALONE) -> list[Shard]:
        """Compute and write these shards, in this order; each gets its line in this process's list of shards."""
        journal = self.folder / (SHARDS_FILE if processes.size == 1 else f"shards-{processes.rank:03d}.jsonl")
        ranges = self.plan.shards
        written: list[Shard] = []
        pending: Future[Shard] | None = None
        parts: list[dict[str, Tensor]] = []
        batches = (
            (number, batch)
            for number in numbers
            for batch in BlockRanges(ranges[number][1], self.plan.batch_blocks, ranges[number][0])
        )

        def work(batch: tuple[int, BlockRange]) -> tuple[int, int, dict[str, Tensor]]:
            number, block_range = batch
            return number, block_range[1], self.rows(block_range)

        with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
            for number, stop, rows in in_order(self.model.device, work, batches):
                parts.append(rows)
                start, end = ranges[number]
                if pending is not None and (2 * (stop - start) >= end - start):
                    written.append(pending.result())
                    pending = None
                step(len(rows["ids"]))
                if stop == end:
                    pending = background.submit(self._write_shard, number, parts, journal)
                    parts = []
            if pending is not None:
                written.append(pending.result())
        return written

    @torch.no_grad()
    def rows(self, block_range: BlockRange) -> dict[str, Tensor]:
        """What a shard holds of some blocks: name → [rows, ...] on the CPU."""
        start, stop = block_range
        ids, mask = self.blocks.ids_tensor(start, stop), self.blocks.attention_mask(start, stop)
        documents = torch.from_numpy(self.blocks.documents[start:stop].copy())
        real = documents != PADDING
        row, position = real.nonzero(as_tuple=True)
        rows = {
            "ids": ids[row, position].int(),
            "positions": position.int(),
            "documents": documents[row, position],
        }
        if self.blocks.counted is not None:
            rows["counted"] = torch.from_numpy(self.blocks.counted[start:stop][real.numpy()]).to(torch.int8)
        captured = self.model.capture(ids, list(self.plan.hooks), attention_mask=mask)
        for name, x in captured.items():
            flat = x.flatten(0, 1) if mask is None else x[real.to(x.device)]
            norm = norms(flat)
            if not bool(norm.isfinite().all()):
                raise InputError(
                    f"The model's activations at {name} are not finite: its weights are damaged, or {self.model.dtype}"
                    " cannot hold them (try --dtype float32)."
                )
            values, scale = to_stored(flat, self.plan.inputs["stored_as"])
            rows[f"activations/{name}"], rows[f"norm/{name}"] = values.cpu(), norm.cpu()
            if scale is not None:
                rows[f"scale/{name}"] = scale.cpu()
        return rows

    def _write_shard(self, number: int, parts: Sequence[Mapping[str, Tensor]], journal: Path) -> Shard:
        path = self.folder / shard_name(number)
        sha256 = write_shard(path, {name: [part[name] for part in parts] for name in parts[0]})
        n_rows = sum(len(part["ids"]) for part in parts)
        shard = Shard(number, self.plan.shards[number], n_rows, path.stat().st_size, sha256)
        append_line(journal, shard.line())
        return shard

    def _write_shard_list(self, shards: Sequence[Shard]) -> None:
        write_bytes(self.folder / SHARDS_FILE, "".join(shard.line() for shard in shards).encode())
        for path in self.folder.glob("shards-*.jsonl"):
            path.unlink()

    def finish(self) -> None:
        """Join the lists of all processes, measure, and write the manifest that says that all is there."""
        found = {
            shard.number: shard for path in self.folder.glob("shards*.jsonl") for shard in read_shards(path)
        }
        self._write_shard_list([found[number] for number in sorted(found)])
        store = ActivationStore.open(self.folder)
        hooks = [store.at(name) for name in store.hook_names]
        means = {f"mean/{hook.hook_name}": hook.mean for hook in hooks}
        write_bytes(self.folder / STATISTICS_FILE, save(means))
        statistics = {
            hook.hook_name: {
                "scale": hook.scale,
                "max_norm": hook.exclusion.max_norm if hook.exclusion.max_norm < float("inf") else None,
                "counts": hook.counts,
            }
            for hook in hooks
        }
        files = [
            self.folder / STATISTICS_FILE,
            *(p for p in (self.folder / TOKENS).rglob("*") if p.is_file()),
        ]
        manifest = {
            **self.plan.manifest(),
            "complete": True,
            "n_tokens": store.n_rows,
            "shard_stops": [shard.blocks[1] for shard in store.shards],
            "statistics": statistics,
            "shards_sha256": hash_file(self.folder / SHARDS_FILE),
            "files": {path.relative_to(self.folder).as_posix(): hash_file(path) for path in sorted(files)},
        }
        write_json(self.folder / MANIFEST, {**manifest, "hash": own_hash(manifest)})


def _check_replaceable(folder: Path, plan: Plan, replace_other: bool) -> None:
    """Refuse to write into a folder that holds anything but a store, or a store of other activations."""
    ours = {MANIFEST, SHARDS_FILE, STATISTICS_FILE, TOKENS, SHUFFLED}
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder, KIND)["inputs"]
        changed = [name for name, value in plan.inputs.items() if found.get(name) != value]
        if changed and not replace_other:
            raise InputError(
                f"{folder} holds other activations (their {', '.join(changed)} differ): give another --out, or --append"
                " to add text to them."
            )
    elif folder.exists():
        if not folder.is_dir():
            raise InputError(f"{folder} is a file, and a store needs a folder of that name.")
        for path in folder.iterdir():
            if path.name not in ours and not path.name.startswith(("shard-", ".")):
                raise InputError(
                    f"{folder} holds {path.name}, which is no part of a {KIND}: give an empty or new folder."
                )


@contextmanager
def only_writer(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Hold the store's lock; the system lets go of it when a process dies."""
    if processes.rank != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"Another process is writing {folder}: wait until it is done, or give another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _no_space(folder: Path, needed: int) -> str:
    return (
        f"The disk has too little room for the activations in {folder}, {needed / 1e6:,.0f} MB in all: free some and"
        " run again to continue, or choose a folder on another disk; what is there can be used."
    )
