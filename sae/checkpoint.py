"""Checkpoints of an unfinished run: everything that the rest of it depends on, in one folder for each.

``checkpoints/<tokens>/`` holds ``state.safetensors`` and a manifest with its hash, written in this order and each
atomically: a folder without a manifest, or whose state does not have the hash, is none. The two newest are kept, so
that a crash while one is written leaves another. Where features are sharded (:mod:`sae.mesh`), every shard has a state
of its own, ``state-1.safetensors`` and so on, in a folder that all processes can reach.
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
from sae.mesh import ALONE, Mesh

KEPT = 2
_KIND = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name. plain: numbers of the trainer. stream: where the activations stand. All of one process."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    stream: dict[str, Any]


def checkpoint_folders(folder: Path) -> list[Path]:
    """What lies below ``folder``, the newest first, whole or not."""
    return sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []


def write_checkpoint(
    folder: Path, tokens: int, checkpoint: Checkpoint, inputs: dict[str, Any], mesh: Mesh = ALONE
) -> None:
    """Write a checkpoint below ``folder`` and delete all but the two newest; all processes together."""
    target = folder / f"{tokens:012d}"
    data = save({k: v.contiguous() for k, v in checkpoint.tensors.items()})
    if mesh.data_rank == 0:
        write_bytes(target / _state_file(mesh.shard), data)
    facts = mesh.told_by_all((_hash(data), checkpoint.stream))
    if mesh.rank == 0:
        hashes = [found for found, _ in facts[: mesh.n_shards]]  # of the first part of the batch
        streams = [stream for _, stream in facts]
        write_manifest(target, _KIND, inputs, state_hashes=hashes, trainer=checkpoint.plain, streams=streams)
        for old in checkpoint_folders(folder)[KEPT:]:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path, inputs: dict[str, Any], mesh: Mesh = ALONE) -> Checkpoint | None:
    """The newest whole checkpoint below ``folder`` that was made from these inputs, as process 0 finds it.

    Raises:
        InputError: it was written by another number of processes or shards.
    """
    path, manifest = mesh.agreed(_newest(folder, inputs) if mesh.rank == 0 else (folder, {}))
    if not manifest:
        return None
    n_shards, n_processes = len(manifest["state_hashes"]), len(manifest["streams"])
    if (n_shards, n_processes) != (mesh.n_shards, mesh.size):
        raise InputError(
            f"{path} was written by {_grid(n_processes, n_shards)}, and this training has"
            f" {_grid(mesh.size, mesh.n_shards)}: continue with those that it was begun with."
        )
    data = (path / _state_file(mesh.shard)).read_bytes()
    return Checkpoint(load(data), manifest["trainer"], manifest["streams"][mesh.rank])


def _newest(folder: Path, inputs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of the newest whole checkpoint; an empty manifest where there is none."""
    wanted = json.loads(json.dumps(inputs))
    for path in checkpoint_folders(folder):
        try:
            manifest = read_manifest(path, _KIND)
            hashes = manifest.get("state_hashes", [])
            found = [_hash((path / _state_file(shard)).read_bytes()) for shard in range(len(hashes))]
        except (InputError, OSError):
            continue
        if manifest["inputs"] == wanted and found and found == hashes:
            return path, manifest
    return folder, {}


def _state_file(shard: int) -> str:
    return f"state-{shard}.safetensors" if shard else "state.safetensors"


def _grid(n_processes: int, n_shards: int) -> str:
    processes = "1 process" if n_processes == 1 else f"{n_processes} processes"
    return processes if n_shards == 1 else f"{processes} with {n_shards} shards"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
