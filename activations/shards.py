"""One shard of a store: its number formats, and its safetensors file, written straight from the tensors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activations.config import StoredAs
from activations.errors import InputError
from activations.files import Buffer, write_parts

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
}
_ALIGNMENT = 64


def write_shard(path: Path, tensors: Mapping[str, Sequence[Tensor]]) -> str:
    """Write a safetensors file atomically; returns the sha256 of its bytes.

    The bytes are hashed while the disk is busy, and never copied into one buffer.

    Args:
        tensors: for each name the parts of a tensor ``[n, ...]`` on the CPU, which are joined along their first
            dimension.
    """
    parts = _parts(tensors)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(_sha256, parts)
        write_parts(path, parts)
        return hashing.result()


def _parts(tensors: Mapping[str, Sequence[Tensor]]) -> list[Buffer]:
    """Header and data of a safetensors file; wide types come first, so that every tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1][0].dtype.itemsize, item[0]))
    header, offset = {}, 0
    data: list[Buffer] = []
    for name, pieces in ordered:
        pieces = [piece.contiguous() for piece in pieces]
        n_bytes = sum(piece.nbytes for piece in pieces)
        header[name] = {
            "dtype": _NAMES[pieces[0].dtype],
            "shape": [sum(map(len, pieces)), *pieces[0].shape[1:]],
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
        data.extend(piece.reshape(-1).view(torch.uint8).numpy().data for piece in pieces if piece.numel())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *data]


def _sha256(parts: Sequence[Buffer]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def map_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of a memory map, which lives as long as they do.

    Raises:
        InputError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): run sae store repair {path.parent}.") from None


def to_stored(x: Tensor, stored_as: StoredAs) -> tuple[Tensor, Tensor | None]:
    """Rows ``x [n, width]`` in a number format; with int8 also what each row is to be multiplied by, float32 [n].

    int8: value = round(x / scale) with scale = max |x| / 127 of the row, so that no value is off by more than half of
    it. float16: what lies beyond ±65,504 is cut off.
    """
    if stored_as == "int8":
        scale = x.float().abs().amax(dim=1) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return (x.float() / scale[:, None]).round().to(torch.int8), scale
    dtype: torch.dtype = getattr(torch, stored_as)
    if stored_as == "float16":
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype), None
