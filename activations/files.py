"""Writing to disk so that a crash leaves either the old file or the new one, and saying what is there.

Every folder the toolkit writes holds a ``manifest.json`` with ``format_version``, ``kind`` and ``inputs``: the
hashes and settings of what it was derived from. A stage is finished exactly when its manifest matches its
inputs (:func:`is_finished`).
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from activations.errors import InputError

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview
_AT_ONCE = 512  # buffers to a call; systems allow 1,024 and more
_BYTES_AT_ONCE = 8 << 20

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_RETIRED = ".old"


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: temporary file, fsync, rename."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[Buffer]) -> None:
    """Write ``parts`` one after the other to ``path`` atomically, without joining them in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for some in _some_at_a_time(parts):
                _write_all(file, some)
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _some_at_a_time(parts: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """Lists of parts that hold a few megabytes each, so that parts made on the way need not all be in memory."""
    some: list[memoryview] = []
    size = 0
    for part in parts:
        some.append(memoryview(part).cast("B"))
        size += len(some[-1])
        if size >= _BYTES_AT_ONCE:
            yield some
            some, size = [], 0
    yield some


def _write_all(file: BinaryIO, parts: Sequence[memoryview]) -> None:
    """Write the parts one after the other, many with one call where the system can."""
    waiting = [part for part in reversed(parts) if len(part)]
    while waiting:
        if hasattr(os, "writev"):
            written = os.writev(file.fileno(), waiting[: -_AT_ONCE - 1 : -1])
        else:
            written = file.write(waiting[-1])
        while waiting and written >= len(waiting[-1]):
            written -= len(waiting.pop())
        if written:  # the system took a part only
            waiting[-1] = waiting[-1][written:]


def _umask() -> int:
    """The permissions that new files lack; mkstemp and mkdtemp give none to others whatever it says."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once: it can only be read by setting it, which two threads at a time would do in between


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for lack of room: on the disk, in the quota, or for a file of that size."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def room_needed(sentence: str) -> Iterator[None]:
    """Turn a full disk inside the block into ``InputError(sentence)``."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise InputError(sentence) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder, then put it in the place of ``path`` in one rename.

    An exception inside the block leaves whatever was at ``path`` untouched. What a process left that was killed is
    cleared away; if that was between putting the old folder aside and the rename, the old one is put back first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    for left_over in list(path.parent.glob(f"{glob.escape(prefix)}*")):
        if "." in left_over.name.removeprefix(prefix).removesuffix(_RETIRED):
            continue  # of a folder whose name goes on
        if left_over.suffix == _RETIRED and not path.exists():
            os.replace(left_over, path)
        else:
            shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            retired = temporary.with_name(temporary.name + _RETIRED)
            os.replace(path, retired)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(retired, path)
                raise
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link_folder(source: Path, target: Path) -> None:
    """Put the files of ``source`` into a new folder ``target`` without copying them, where the disk allows that.

    Files are never changed in place, so two folders can share them.
    """
    with new_folder(target) as new:
        for file in source.iterdir():
            try:
                os.link(file, new / file.name)
            except OSError:
                shutil.copyfile(file, new / file.name)


def write_manifest(folder: Path, kind: str, inputs: Mapping[str, Any], **facts: Any) -> None:
    """Write ``folder/manifest.json``; a folder without one counts as unfinished, so this comes last."""
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, "inputs": dict(inputs), **facts}
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read ``folder/manifest.json`` and check that it is of this kind and of a version we know.

    Raises:
        InputError: no manifest, another kind, or a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a finished {kind}: it has no {MANIFEST}.")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else None
        raise InputError(f"{folder} holds {found or 'something else'}, not a {kind}.")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{folder} was written in format {version}, and this saescope reads up to format {FORMAT_VERSION}:"
            " install a newer saescope."
        )
    return manifest


def is_finished(folder: Path, kind: str, inputs: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds a finished stage of this kind made from exactly these inputs."""
    try:
        manifest = read_manifest(folder, kind)
    except InputError:
        return False
    return manifest.get("inputs") == json.loads(json.dumps(dict(inputs)))


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and wait until it is on disk; a crash may cut the last line short."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def room_for(folder: Path, freed: Iterable[Path] = ()) -> int:
    """Bytes free on the disk of ``folder`` (which need not exist), those of the files ``freed`` among them."""
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(disk).free + sum(path.stat().st_size for path in freed)


def hash_file(path: Path) -> str:
    """sha256 of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over the contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """sha256 over tensors in the order of their names: name, dtype, shape, bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
