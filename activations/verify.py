"""Finding damage in a store, and computing again just what is damaged.

Everything is under a hash: the manifest under its own, ``shards.jsonl`` and the tokens under the manifest's, each
shard under its line in ``shards.jsonl``. What can be made from the rest is made from it; shards are captured again.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.blocks import TokenBlocks
from activations.config import CaptureConfig, ExclusionRule
from activations.errors import InputError
from activations.files import MANIFEST, hash_file, read_json, read_manifest, write_bytes, write_json
from activations.plan import Plan
from activations.progress import Progress, silent
from activations.shards import map_shard
from activations.store import KIND, SHARDS_FILE, TOKENS, Shard, own_hash, read_shards, shard_name
from activations.writer import Writer, only_writer

if TYPE_CHECKING:
    from activations.models import LanguageModel


@dataclass(frozen=True)
class Damage:
    """file: its path inside the store. what: what is wrong with it, e.g. "is missing"."""

    file: str
    what: str


def verify_store(folder: Path | str, *, progress: Progress = silent) -> list[Damage]:
    """Every file of a store that is missing or differs in a single bit from what was written.

    Reads everything once. Of an unfinished store only the shards can be told.

    Raises:
        InputError: the folder holds no store.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and not (folder / SHARDS_FILE).is_file():
        raise InputError(f"{folder} is no {KIND}: it has neither {MANIFEST} nor {SHARDS_FILE}.")
    manifest = _manifest(folder)
    found: list[Damage] = []
    if manifest is None:
        found.append(_damage(folder, MANIFEST))
    hashes: dict[str, str] = {}
    if manifest is not None and manifest["complete"]:
        hashes |= manifest["files"]
        if not _is_listed(folder, manifest):
            found.append(_damage(folder, SHARDS_FILE))
    shards = _shard_list(folder, manifest)
    hashes |= {shard.file: shard.sha256 for shard in shards}
    if manifest is not None and manifest["complete"]:
        missing = set(range(len(manifest["shard_stops"]))) - {shard.number for shard in shards}
        found += [_damage(folder, shard_name(number)) for number in sorted(missing)]
    sizes = {name: path.stat().st_size if (path := folder / name).is_file() else 0 for name in hashes}
    with progress("verify", total=sum(sizes.values()), unit="bytes") as step:
        for name, wanted in sorted(hashes.items()):
            if not (folder / name).is_file() or hash_file(folder / name) != wanted:
                found.append(_damage(folder, name))
            step(sizes[name])
    return found


@dataclass(frozen=True)
class Repair:
    """files: what was made again. other_bits: those of them that came out with other bits than they had."""

    files: list[str]
    other_bits: list[str]


def repair_store(
    folder: Path | str,
    model: "LanguageModel",
    text: Callable[[dict[str, Any]], dict[str, TokenBlocks]],
    *,
    progress: Progress = silent,
) -> Repair:
    """Make again whatever of a finished store is missing or damaged, and nothing else.

    Args:
        model: the one that the store was captured with.
        text: gives the token blocks of every split for what the manifest knows of a capture (its ``about``); called
            only if a file below ``tokens/`` is damaged.

    Raises:
        InputError: the store is unfinished, manifest and tokens are both damaged, the model or the text is another.
    """
    folder = Path(folder)
    damaged = [damage.file for damage in verify_store(folder, progress=progress)]
    if not damaged:
        return Repair([], [])
    before = _manifest(folder)
    if before is not None and not before["complete"]:
        raise InputError(
            f"{folder} is unfinished: run the same sae capture again, which captures what is missing."
        )
    start = before or _start_beside_tokens(folder)
    if model.hash != start["inputs"]["model"]:
        raise InputError(
            f"{folder} was captured with another model than {model.name}: give that one with --model."
        )
    with only_writer(folder):
        if any(file.startswith(TOKENS) for file in damaged):
            tokens = _restored_tokens(folder, start, text)
            for split in {Path(file).parts[1] for file in damaged if file.startswith(TOKENS)}:
                shutil.rmtree(folder / TOKENS / split, ignore_errors=True)
        else:
            tokens = {path.name: TokenBlocks.load(path) for path in (folder / TOKENS).iterdir()}
        plan = _plan(model, tokens["train"], start, folder)
        listed = _shard_list(folder, before)
        write_bytes(folder / SHARDS_FILE, "".join(shard.line() for shard in listed).encode())
        write_json(folder / MANIFEST, plan.manifest())
        for file in damaged:
            if file.startswith("shard-"):
                (folder / file).unlink(missing_ok=True)
        writer = Writer(model, tokens.pop("train"), plan, folder)
        writer.begin(tokens)
        numbers = writer.missing()
        with progress("capture", total=writer.tokens_in(numbers), unit="tokens") as step:
            captured = writer.capture(numbers, step)
        writer.finish()
    old = {shard.file: shard.sha256 for shard in listed} | (before["files"] if before else {})
    new = {shard.file: shard.sha256 for shard in captured} | read_manifest(folder, KIND)["files"]
    changed = [file for file in new if file in old and new[file] != old[file]]
    return Repair(sorted({*damaged, *(shard.file for shard in captured)}), sorted(changed))


def captured_with(folder: Path | str) -> CaptureConfig:
    """The configuration that a store was captured with, also where its manifest is damaged.

    Raises:
        InputError: no store, or one that was written from Python without a configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no {KIND}: there is no such folder.")
    about = (_manifest(folder) or _start_beside_tokens(folder))["captures"][0]
    if "config" not in about:
        raise InputError(
            f"{folder} does not say what it was captured from: it was written from Python without a configuration."
        )
    return CaptureConfig.from_json(about["config"])


def _damage(folder: Path, file: str) -> Damage:
    return Damage(file, "was changed" if (folder / file).is_file() else "is missing")


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, if it is what was written."""
    try:
        manifest = read_manifest(folder, KIND)
        whole = not manifest["complete"] or manifest["hash"] == own_hash(manifest)
    except (InputError, KeyError):
        return None
    return manifest if whole else None


def _is_listed(folder: Path, manifest: dict[str, Any]) -> bool:
    path = folder / SHARDS_FILE
    return path.is_file() and hash_file(path) == manifest["shards_sha256"]


def _shard_list(folder: Path, manifest: dict[str, Any] | None) -> list[Shard]:
    """What ``shards.jsonl`` says; where that is damaged, what it said, if the shards themselves still prove it."""
    found = read_shards(folder / SHARDS_FILE)
    if manifest is None or not manifest["complete"] or _is_listed(folder, manifest):
        return found
    made: list[Shard] = []
    start = 0
    for number in range(len(manifest["shard_stops"])):
        path = folder / shard_name(number)
        try:
            rows = len(map_shard(path)["ids"])
        except (InputError, KeyError):
            return found
        stop = manifest["shard_stops"][number]
        made.append(Shard(number, (start, stop), rows, path.stat().st_size, hash_file(path)))
        start = stop
    text = "".join(shard.line() for shard in made)
    return made if hashlib.sha256(text.encode()).hexdigest() == manifest["shards_sha256"] else found


def _start_beside_tokens(folder: Path) -> dict[str, Any]:
    """The manifest as it was when capture began, of which a copy lies with every split's tokens."""
    for path in sorted((folder / TOKENS).glob(f"*/{MANIFEST}")):
        try:
            start: dict[str, Any] = read_json(path)["inputs"]["store"]
        except (InputError, KeyError, TypeError):
            continue
        return start
    raise InputError(
        f"{folder / MANIFEST} and the tokens beside it are damaged: run the sae capture that made {folder} again with"
        " another --out."
    )


def _plan(model: "LanguageModel", blocks: TokenBlocks, start: dict[str, Any], folder: Path) -> Plan:
    inputs, rule = start["inputs"], ExclusionRule(**start["rule"])
    plan = Plan.of(model, blocks, inputs["hook_names"], inputs["stored_as"], rule, start["captures"])
    changed = [name for name, value in plan.inputs.items() if inputs[name] != value]
    if changed:
        raise InputError(
            f"{folder} cannot be repaired here: its {' and '.join(changed)} would not be as it was captured."
        )
    return plan


def _restored_tokens(
    folder: Path, start: dict[str, Any], text: Callable[[dict[str, Any]], dict[str, TokenBlocks]]
) -> dict[str, TokenBlocks]:
    """The token blocks of every split, made from the text again."""
    made = [text(capture) for capture in start["captures"]]
    train = [splits["train"] for splits in made]
    whole = train[0] if len(train) == 1 else TokenBlocks.joined(train)
    if whole.hash != start["inputs"]["tokens"]:
        raise InputError(
            f"The tokens in {folder / TOKENS} are damaged, and the text that they were made from has changed: capture"
            " it again with another --out."
        )
    return {**made[0], "train": whole}
