"""Finding damage in a store, and computing again just what is damaged.

Everything is under a hash: the manifest and ``start.json`` under their own, ``shards.jsonl`` and the tokens under the
manifest's, each shard under its line in ``shards.jsonl``. What can be made from the rest is made from it; shards are
captured again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.blocks import TokenBlocks
from activations.config import CaptureConfig, ExclusionRule
from activations.errors import InputError
from activations.files import FORMAT_VERSION, MANIFEST, hash_file, write_bytes, write_json
from activations.plan import Plan
from activations.progress import Progress, silent
from activations.shards import map_shard
from activations.store import (
    KIND,
    SHARDS_FILE,
    SHUFFLED,
    START_FILE,
    TOKENS,
    Shard,
    listed_shards,
    own_hash,
    shard_name,
    tokens_folder,
    whole_manifest,
)
from activations.writer import Writer, only_writer

if TYPE_CHECKING:
    from activations.models import LanguageModel


@dataclass(frozen=True)
class Damage:
    """file: its path inside the store. what: what is wrong with it, e.g. "is missing"."""

    file: str
    what: str


@dataclass(frozen=True)
class Repair:
    """files: what was made again. other_bits: those of them that came out with other bits than they had."""

    files: list[str]
    other_bits: list[str]


def verify_store(folder: Path | str, *, progress: Progress = silent) -> list[Damage]:
    """Every file of a store that is missing or differs in a single bit from what was written.

    Reads everything once. What an unfinished store does not list yet is not missing.

    Raises:
        InputError: the folder holds no store, or one of a newer saescope.
    """
    folder = Path(folder)
    manifest, start = _whole(folder, MANIFEST), _whole(folder, START_FILE)
    if not any((folder / name).is_file() for name in (MANIFEST, START_FILE, SHARDS_FILE)):
        raise InputError(f"{folder} is no {KIND}: it has no {MANIFEST}.")
    found = [] if manifest is not None else [_damage(folder, MANIFEST)]
    hashes: dict[str, str] = {}
    complete = manifest is not None and manifest["complete"]
    if manifest is not None and complete:
        hashes |= manifest["files"]
        if not _is_listed(folder, manifest):
            found.append(_damage(folder, SHARDS_FILE))
    else:
        found += [] if start is not None else [_damage(folder, START_FILE)]
        found += _damaged_tokens(folder, manifest or start or {"tokens": {}})
    shards = _shard_list(folder, manifest)
    hashes |= {shard.file: shard.sha256 for shard in shards}
    if manifest is not None and complete:
        missing = set(range(len(manifest["shard_stops"]))) - {shard.number for shard in shards}
        found += [_damage(folder, shard_name(number)) for number in sorted(missing)]
    sizes = {name: path.stat().st_size if (path := folder / name).is_file() else 0 for name in hashes}
    with progress("verify", total=sum(sizes.values()), unit="bytes") as step:
        for name, wanted in sorted(hashes.items()):
            if not (folder / name).is_file() or hash_file(folder / name) != wanted:
                found.append(_damage(folder, name))
            step(sizes[name])
    return found


def repair_store(
    folder: Path | str,
    model: "LanguageModel",
    text: Callable[[dict[str, Any]], dict[str, TokenBlocks]],
    *,
    progress: Progress = silent,
) -> Repair:
    """Make again whatever of a store is missing or damaged, and nothing else; an unfinished store is finished.

    Args:
        model: the one that the store was captured with.
        text: gives the token blocks of every split for what the manifest knows of a capture (its ``about``); called
            only if a file below ``tokens/`` is damaged.

    Raises:
        InputError: manifest and ``start.json`` are both damaged, the model or the text is another, or another
            process is writing the store.
    """
    folder = Path(folder)
    damaged = [damage.file for damage in verify_store(folder, progress=progress)]
    before = _whole(folder, MANIFEST)
    if not damaged and before is not None and before["complete"]:
        return Repair([], [])
    start = _start(folder)
    if model.hash != start["inputs"]["model"]:
        raise InputError(
            f"{folder} was captured with another model than {model.name}: give that one with --model."
        )
    with only_writer(folder):
        tokens = _tokens(folder, start, damaged, text)
        plan = _plan(model, tokens, start, folder)
        listed = _shard_list(folder, before)
        write_bytes(folder / SHARDS_FILE, "".join(shard.line() for shard in listed).encode())
        if before is None:
            write_json(folder / MANIFEST, plan.start())
        writer = Writer(model, tokens, plan, folder)
        writer.begin(damaged)
        numbers = writer.missing()
        with progress("capture", total=writer.tokens_in(numbers), unit="tokens") as step:
            captured = writer.capture(numbers, step)
        writer.finish()
        if any(file.startswith("shard-") for file in damaged):
            shutil.rmtree(folder / SHUFFLED, ignore_errors=True)  # what was copied may have been the damage
    old = {shard.file: shard.sha256 for shard in listed} | ((before or {}).get("files") or {})
    new = {shard.file: shard.sha256 for shard in captured} | whole_manifest(folder)["files"]
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
    about = _start(folder)["captures"][0]
    if "config" not in about:
        raise InputError(
            f"{folder} does not say what it was captured from: it was written from Python without a configuration."
        )
    return CaptureConfig.from_json(about["config"])


def _damage(folder: Path, file: str) -> Damage:
    return Damage(file, "was changed" if (folder / file).exists() else "is missing")


def _whole(folder: Path, file: str) -> dict[str, Any] | None:
    """``manifest.json`` or ``start.json``, if it is what was written.

    Raises:
        InputError: it is what a newer saescope wrote.
    """
    try:
        found = json.loads((folder / file).read_bytes())
        whole = isinstance(found, dict) and found["kind"] == KIND and found["hash"] == own_hash(found)
    except (OSError, ValueError, KeyError):
        return None
    if whole and found["format_version"] > FORMAT_VERSION:
        whole_manifest(folder)  # says so
    return found if whole else None


def _start(folder: Path) -> dict[str, Any]:
    """What was known when the last capture began, from the manifest or from ``start.json``."""
    found = _whole(folder, MANIFEST) or _whole(folder, START_FILE)
    if found is None:
        if not (folder / MANIFEST).is_file() and not (folder / START_FILE).is_file():
            raise InputError(f"{folder} is no {KIND}: it has no {MANIFEST}.")
        raise InputError(
            f"{folder / MANIFEST} and {START_FILE} are both damaged: capture again with another --out."
        )
    return found


def _is_listed(folder: Path, manifest: Mapping[str, Any]) -> bool:
    path = folder / SHARDS_FILE
    return path.is_file() and hash_file(path) == manifest["shards_sha256"]


def _shard_list(folder: Path, manifest: Mapping[str, Any] | None) -> list[Shard]:
    """What ``shards.jsonl`` says; where that is damaged, what it said, if the shards themselves still prove it."""
    found = listed_shards(folder)
    if manifest is None or not manifest["complete"] or _is_listed(folder, manifest):
        return found
    made: list[Shard] = []
    start = 0
    for number, stop in enumerate(manifest["shard_stops"]):
        path = folder / shard_name(number)
        try:
            rows = len(map_shard(path)["ids"])
        except (InputError, KeyError):
            return found
        made.append(Shard(number, (start, stop), rows, path.stat().st_size, hash_file(path)))
        start = stop
    text = "".join(shard.line() for shard in made)
    return made if hashlib.sha256(text.encode()).hexdigest() == manifest["shards_sha256"] else found


def _damaged_tokens(folder: Path, start: Mapping[str, Any]) -> list[Damage]:
    """The splits whose tokens are not what they were, told by their own hash."""
    found = []
    for split, wanted in start["tokens"].items():
        place = tokens_folder(folder, split, wanted)
        try:
            whole = TokenBlocks.load(place).hash == wanted
        except InputError:
            whole = False
        if not whole:
            found.append(_damage(folder, place.relative_to(folder).as_posix()))
    return found


def _tokens(
    folder: Path,
    start: Mapping[str, Any],
    damaged: list[str],
    text: Callable[[dict[str, Any]], dict[str, TokenBlocks]],
) -> dict[str, TokenBlocks]:
    """The token blocks of every split; those that are damaged are made from the text again."""
    places = {split: tokens_folder(folder, split, wanted) for split, wanted in start["tokens"].items()}
    names = {split: place.relative_to(folder).as_posix() for split, place in places.items()}
    lost = {split for split, name in names.items() if any(file.startswith(name) for file in damaged)}
    tokens = {split: TokenBlocks.load(place) for split, place in places.items() if split not in lost}
    if lost:
        made = [text(capture) for capture in start["captures"]]
        train = [splits["train"] for splits in made]
        again = {**made[0], "train": train[0] if len(train) == 1 else TokenBlocks.joined(train)}
        for split in sorted(lost):
            if split not in again or again[split].hash != start["tokens"][split]:
                raise InputError(
                    f"The tokens in {folder / TOKENS} are damaged, and the text that they were made from has changed:"
                    " capture it again with another --out."
                )
            shutil.rmtree(places[split], ignore_errors=True)
            tokens[split] = again[split]
    return {split: tokens[split] for split in start["tokens"]}


def _plan(
    model: "LanguageModel", tokens: Mapping[str, TokenBlocks], start: Mapping[str, Any], folder: Path
) -> Plan:
    inputs, rule = start["inputs"], ExclusionRule(**start["rule"])
    hook_names, stored_as = inputs["hook_names"], inputs["stored_as"]
    plan = Plan.of(model, tokens, hook_names, stored_as, rule, start["captures"], like=inputs)
    changed = [name for name, value in plan.inputs.items() if inputs[name] != value]
    if changed:
        raise InputError(
            f"{folder} cannot be repaired here: its {' and '.join(changed)} would not be as it was captured."
        )
    return plan
