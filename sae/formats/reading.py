"""Tensors out of files that others wrote: safetensors, torch pickles, numpy archives. Nothing here runs their code."""

import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from activations.errors import InputError

SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")


def read_content(path: Path) -> dict[str, Any]:
    """What a file of weights holds, by name: tensors, and in a pickle whatever else lies beside them.

    Raises:
        InputError: the file is damaged, is of no kind we read, or is a pickle with more than data in it.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is no file of weights: those end in {', '.join(SUFFIXES)}.")
    return {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix, _read_pickle)(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, json.JSONDecodeError, struct.error, OSError):
        raise InputError(f"{path} is corrupt: it is not a readable safetensors file.") from None


def _read_pickle(path: Path) -> dict[str, Any]:
    corrupt = InputError(f"{path} is corrupt: it is not a readable torch file.")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's about pickles of other protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise corrupt from None
        raise InputError(
            f"{path} is refused: it is a pickle that asks for more than tensors and plain values, and reading it could"
            " run code; ask its author for safetensors."
        ) from None
    except Exception:  # a damaged pickle can make its reader stumble over anything
        raise corrupt from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds no SAE: its content is not a dictionary of tensors.")
    return dict(content)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path} is refused: it holds Python objects, and reading them could run code; only arrays of numbers"
                " are read."
            ) from None
        raise InputError(f"{path} is corrupt: it is not a readable numpy archive.") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ):
        raise InputError(f"{path} is corrupt: it is not a readable numpy archive.") from None


def check_tensors(
    path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], promised_by: str
) -> dict[str, Tensor]:
    """The tensors in float32, once they are known to have the right names, shapes and finite values.

    Args:
        path: where they lie. shapes: what must be there, and nothing else. promised_by: what says so.

    Raises:
        InputError: names the file, what it holds and what was promised.
    """
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    numeric = all(isinstance(tensor, Tensor) and not tensor.is_complex() for tensor in tensors.values())
    if found != dict(shapes) or not numeric:
        raise InputError(f"{path} holds {found}, where {promised_by} promises {dict(shapes)}.")
    plain = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in plain.values()):
        raise InputError(f"{path} is corrupt: it holds values that are not finite.")
    return plain


def matrix_shape(path: Path, content: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The two sizes of a matrix that says how large the rest is.

    Raises:
        InputError: it is no matrix, or empty.
    """
    shape = tuple(getattr(content[name], "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path} holds a {name} of shape {shape}, which must be a matrix.")
    return shape[0], shape[1]


def as_table(value: object) -> dict[str, Any]:
    """A table of a configuration; what is none has no keys."""
    return dict(value) if isinstance(value, dict) else {}


def number(path: Path, table: Mapping[str, Any], name: str) -> float:
    """A positive, finite number of a JSON table.

    Raises:
        InputError: it is missing or something else.
    """
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{path} says {name} = {value!r}, and it must be a number above 0.")
    return value


def whole(path: Path, table: Mapping[str, Any], name: str) -> int:
    """A positive whole number of a JSON table.

    Raises:
        InputError: it is missing or something else.
    """
    value = number(path, table, name)
    if value != int(value):
        raise InputError(f"{path} says {name} = {value!r}, and it must be a whole number.")
    return int(value)
