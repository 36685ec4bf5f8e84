"""Checkpoints of an unfinished run: everything that the rest of it depends on, in one folder for each.

``checkpoints/<tokens>/`` holds ``state.safetensors`` and a manifest with its hash, written in this order and each
atomically: a folder without a manifest, or whose state does not have the hash, is none. The two newest are kept, so
that a crash while one is written leaves another.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from activations.errors import InputError
from activations.files import read_manifest, write_bytes, write_manifest

KEPT = 2
_STATE = "state.safetensors"
_KIND = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name. plain: numbers of the trainer. stream: where the activations stand."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    stream: dict[str, Any]


def checkpoint_folders(folder: Path) -> list[Path]:
    """What lies below ``folder``, the newest first, whole or not."""
    return sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []


def write_checkpoint(folder: Path, tokens: int, checkpoint: Checkpoint, inputs: dict[str, Any]) -> None:
    """Write a checkpoint below ``folder`` and delete all but the two newest."""
    target = folder / f"{tokens:012d}"
    data = save({k: v.contiguous() for k, v in checkpoint.tensors.items()})
    write_bytes(target / _STATE, data)
    write_manifest(
        target, _KIND, inputs, state_hash=_hash(data), trainer=checkpoint.plain, stream=checkpoint.stream
    )
    for old in checkpoint_folders(folder)[KEPT:]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path, inputs: dict[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint below ``folder`` that was made from these inputs."""
    wanted = json.loads(json.dumps(inputs))
    for path in checkpoint_folders(folder):
        try:
            manifest = read_manifest(path, _KIND)
            data = (path / _STATE).read_bytes()
        except (InputError, OSError):
            continue
        if manifest["inputs"] == wanted and manifest.get("state_hash") == _hash(data):
            return Checkpoint(load(data), manifest["trainer"], manifest["stream"])
    return None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
