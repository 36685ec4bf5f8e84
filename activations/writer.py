"""Writing a store: capture, conversion and disk work at the same time, and can be killed at any moment.

The model runs in worker threads, which also convert what they captured. Full shards go to one more thread, which
hashes and writes them. A shard is there once its line stands in ``shards.jsonl``, and the last batch of a shard is not
begun before the line of the one before is written: whatever happens, no more than one whole shard is captured twice.

Every step leaves a store that can be opened or a capture that can be continued: token blocks lie under their hash
beside older ones, then the list of shards is written, then the manifest, and only then is anything deleted.

Several processes share the work by shards (``torchrun``): what a shard holds depends on no other.
"""

import re
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
from activations.capture import BlockRange, in_order
from activations.config import ExclusionRule, StoredAs
from activations.errors import InputError
from activations.exclusion import norms
from activations.files import (
    MANIFEST,
    append_line,
    hash_file,
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
    START_FILE,
    STATISTICS_FILE,
    TOKENS,
    ActivationStore,
    Shard,
    listed_shards,
    own_hash,
    read_shards,
    shard_lists,
    shard_name,
    tokens_folder,
    whole_manifest,
)

if TYPE_CHECKING:
    from activations.models import LanguageModel

LOCK = ".lock"
_FILES = (MANIFEST, START_FILE, SHARDS_FILE, STATISTICS_FILE)
_SHARD = re.compile(r"shard-\d{5,}\.safetensors|shards-\d{3,}\.jsonl")
_TOKENS = re.compile(r"(train|score|test)-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[^.]+")


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
        others: token blocks of the splits "test" and "score", to lie beside.
        replace_other: put the store in the place of one from other inputs, which is refused otherwise.
        processes: those that share the work.

    Raises:
        InputError: unknown hook, activations that are not finite, a folder that holds something else or another
            store, one that another process is writing, or a full disk.
    """
    folder = Path(folder)
    tokens = {"train": blocks, **(others or {})}
    captures = [capture_of(blocks, about or {})]

    def plan() -> Plan:
        found = _found_inputs(folder)
        made = Plan.of(model, tokens, hook_names, stored_as, rule or ExclusionRule(), captures, like=found)
        if not made.is_finished(folder) and processes.rank == 0:
            _check_replaceable(folder, made, found, replace_other)
            _check_room(folder, made, tokens)
        return made

    if plan().is_finished(folder):  # before the folder is touched
        return ActivationStore.open(folder)
    with only_writer(folder, processes):
        return _write(model, tokens, plan(), folder, processes, progress)


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
    whole_manifest(folder)  # before the folder is touched
    with only_writer(folder, processes):
        manifest = whole_manifest(folder)
        inputs, captures = manifest["inputs"], manifest["captures"]
        tokens = load_tokens(folder, manifest)
        if captures[-1]["tokens"] != blocks.hash:  # else it is this very text, begun before
            if not manifest["complete"]:
                raise InputError(
                    f"{folder} is unfinished: run the command that was interrupted again before appending."
                )
            if inputs["context_length"] != blocks.context_length:
                raise InputError(
                    f"{folder} has sequences of {inputs['context_length']} tokens, and the new text"
                    f" {blocks.context_length}: give --context-length {inputs['context_length']}."
                )
            captures = [*captures, capture_of(blocks, about or {})]
            tokens["train"] = TokenBlocks.joined([tokens["train"], blocks])
        rule = ExclusionRule(**manifest["rule"])
        plan = Plan.of(model, tokens, inputs["hook_names"], inputs["stored_as"], rule, captures, like=inputs)
        for name in ("model", "dtype"):
            if plan.inputs[name] != inputs[name]:
                raise InputError(
                    f"{folder} holds activations of another {name}: append with the one that it was captured with."
                )
        if plan.is_finished(folder):
            return ActivationStore.open(folder)
        _check_room(folder, plan, tokens)
        return _write(model, tokens, plan, folder, processes, progress)


def capture_of(blocks: TokenBlocks, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the capture of these blocks."""
    counted = blocks.counted is not None
    return {**about, "tokens": blocks.hash, "blocks": blocks.n_blocks, "counted": counted}


def load_tokens(folder: Path, start: Mapping[str, Any]) -> dict[str, TokenBlocks]:
    """The token blocks of every split of a store.

    Raises:
        InputError: they are missing or damaged.
    """
    places = {split: tokens_folder(folder, split, found) for split, found in start["tokens"].items()}
    return {split: TokenBlocks.load(place) for split, place in places.items()}


def _write(
    model: "LanguageModel",
    tokens: Mapping[str, TokenBlocks],
    plan: Plan,
    folder: Path,
    processes: Processes,
    progress: Progress,
) -> ActivationStore:
    writer = Writer(model, tokens, plan, folder)
    processes.wait()  # all have read what is there
    with room_needed(_no_space(folder, plan.bytes(tokens))):
        if processes.rank == 0:
            writer.begin()
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
    tokens: Mapping[str, TokenBlocks]
    plan: Plan
    folder: Path

    @property
    def blocks(self) -> TokenBlocks:
        """The blocks whose activations are captured."""
        return self.tokens["train"]

    def begin(self, damaged: Iterable[str] = ()) -> None:
        """Write tokens, list of shards and manifest; keep the shards that are there, but those that are damaged."""
        folder, start = self.folder, self.plan.start()
        kept = [shard for shard in self._kept_shards() if shard.file not in set(damaged)]
        for split, held in self.tokens.items():
            place = tokens_folder(folder, split, held.hash)
            if not TokenBlocks.is_finished(place, {"hash": held.hash}):
                held.save(place, {"hash": held.hash})
        self._write_shard_list(kept)
        write_json(folder / START_FILE, start)
        write_json(folder / MANIFEST, start)
        self._clear_away({shard.file for shard in kept})

    def _kept_shards(self) -> list[Shard]:
        """The shards on disk that belong to this plan."""
        found = _found_inputs(self.folder)
        if found is None or not self.plan.same_shards(found):
            return []
        kept = {}
        ranges = self.plan.shards
        for path in shard_lists(self.folder):
            listed = read_shards(path)
            for shard in listed:
                file = self.folder / shard.file
                whole = file.is_file() and file.stat().st_size == shard.bytes
                fits = shard.number < len(ranges) and shard.blocks == ranges[shard.number]
                # Only what was written last can have been cut short by a crash of the whole system.
                if whole and fits and (shard is not listed[-1] or hash_file(file) == shard.sha256):
                    kept[shard.number] = shard
        return [kept[number] for number in sorted(kept)]

    def _clear_away(self, shards: set[str]) -> None:
        """Delete shards and tokens that belong to no list any more, and what a killed process left."""
        for path in self.folder.iterdir():
            if (_SHARD.fullmatch(path.name) and path.name not in shards) or _left_over(path.name):
                path.unlink()
        used = {tokens_folder(self.folder, split, held.hash).name for split, held in self.tokens.items()}
        for path in (self.folder / TOKENS).iterdir():
            if _left_over(path.name) or (_TOKENS.fullmatch(path.name) and path.name not in used):
                shutil.rmtree(path, ignore_errors=True)

    def missing(self) -> list[int]:
        """The numbers of the shards that are to be captured."""
        there = {shard.number for shard in listed_shards(self.folder)}
        return [number for number in range(len(self.plan.shards)) if number not in there]

    def tokens_in(self, numbers: Iterable[int]) -> int:
        """How many tokens these shards hold."""
        shards = (self.blocks.documents[slice(*self.plan.shards[number])] for number in numbers)
        return sum(int((documents != PADDING).sum()) for documents in shards)

    def capture(self, numbers: Sequence[int], step: Step, processes: Processes = ALONE) -> list[Shard]:
        """Compute and write these shards, in this order; each gets its line in this process's list of shards."""
        own_list = self.folder / (
            SHARDS_FILE if processes.size == 1 else f"shards-{processes.rank:03d}.jsonl"
        )
        written: list[Shard] = []
        pending: list[Future[Shard]] = []

        def batches(number: int) -> Iterator[BlockRange]:
            *earlier, last = self.plan.batches(number)
            yield from earlier
            if pending:
                written.append(pending.pop().result())
            yield last

        with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
            for number in numbers:
                parts = []
                for rows in in_order(self.model.device, self.rows, batches(number)):
                    parts.append(rows)
                    step(len(rows["ids"]))
                pending.append(background.submit(self._write_shard, number, parts, own_list))
            written += [future.result() for future in pending]
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
        if self.plan.counts_by_role(start):
            assert self.blocks.counted is not None
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

    def _write_shard(self, number: int, parts: Sequence[Mapping[str, Tensor]], own_list: Path) -> Shard:
        path = self.folder / shard_name(number)
        sha256 = write_shard(path, {name: [part[name] for part in parts] for name in parts[0]})
        n_rows = sum(len(part["ids"]) for part in parts)
        shard = Shard(number, self.plan.shards[number], n_rows, path.stat().st_size, sha256)
        append_line(own_list, shard.line())
        return shard

    def _write_shard_list(self, shards: Sequence[Shard]) -> None:
        """Write the one list of shards that takes the place of all others."""
        write_bytes(self.folder / SHARDS_FILE, "".join(shard.line() for shard in shards).encode())
        for path in shard_lists(self.folder)[1:]:
            path.unlink()

    def finish(self) -> None:
        """Join the lists of all processes, measure, and write the manifest that says that all is there."""
        self._write_shard_list(listed_shards(self.folder))
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
        places = [tokens_folder(self.folder, split, held.hash) for split, held in self.tokens.items()]
        files = [path for place in places for path in place.iterdir()]
        files += [self.folder / START_FILE, self.folder / STATISTICS_FILE]
        manifest = {
            **self.plan.start(),
            "complete": True,
            "n_tokens": store.n_rows,
            "shard_stops": [shard.blocks[1] for shard in store.shards],
            "statistics": statistics,
            "shards_sha256": hash_file(self.folder / SHARDS_FILE),
            "files": {path.relative_to(self.folder).as_posix(): hash_file(path) for path in sorted(files)},
        }
        write_json(self.folder / MANIFEST, {**manifest, "hash": own_hash(manifest)})


def _found_inputs(folder: Path) -> dict[str, Any] | None:
    """The inputs of the store that is there, if there is one.

    Raises:
        InputError: there is one, and its manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return None
    inputs: dict[str, Any] = whole_manifest(folder)["inputs"]
    return inputs


def _left_over(name: str) -> bool:
    """Whether a file or folder of this name was left by a process that was killed while it wrote."""
    match = _TEMPORARY.fullmatch(name.removesuffix(".old"))
    return match is not None and any(
        (match["name"] in _FILES, _SHARD.fullmatch(match["name"]), _TOKENS.fullmatch(match["name"]))
    )


def _check_replaceable(
    folder: Path, plan: Plan, found: Mapping[str, Any] | None, replace_other: bool
) -> None:
    """Refuse to write into a folder that holds anything but a store, or a store of other activations."""
    if found is not None:
        cut = ("batch_blocks", "shard_blocks")  # follow from the rest
        changed = [n for n, value in plan.inputs.items() if n not in cut and found.get(n) != value]
        if changed and not replace_other:
            raise InputError(
                f"{folder} holds other activations (their {', '.join(changed)} differ): give another --out, or --append"
                " to add text to them."
            )
    elif folder.exists():
        if not folder.is_dir():
            raise InputError(f"{folder} is a file, and a store needs a folder of that name.")
        # Without a manifest it may be one that was only begun: the tokens come first.
        begun = {LOCK, SHARDS_FILE, START_FILE, SHUFFLED}
        inside = [path.name for path in (folder / TOKENS).iterdir()] if (folder / TOKENS).is_dir() else []
        for name in sorted(path.name for path in folder.iterdir()):
            tokens_only = name == TOKENS and all(_TOKENS.fullmatch(n) or _left_over(n) for n in inside)
            if name not in begun and not tokens_only and not _left_over(name):
                raise InputError(
                    f"{folder} holds {name}, which is no part of a {KIND}: give an empty or new folder."
                )


@contextmanager
def only_writer(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Hold the store's lock; the system lets go of it when a process dies."""
    if processes.rank != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
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


def _check_room(folder: Path, plan: Plan, tokens: Mapping[str, TokenBlocks]) -> None:
    needed = plan.bytes(tokens)
    if room_for(folder, freed=folder.glob("shard-*")) < needed:
        raise InputError(_no_space(folder, needed))


def _no_space(folder: Path, needed: int) -> str:
    return (
        f"The disk has too little room for the activations in {folder}, {needed / 1e6:,.0f} MB in all: free some and"
        " run again to continue, or choose a folder on another disk; what is there can be used."
    )
