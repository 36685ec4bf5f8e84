"""The Python sources of this interpreter: its standard library, and installed packages.

The split of a file is decided by its base name (``abc.py``): the rule under which the bundled model was trained, so
that it has not seen *test* either.
"""

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from activations.errors import InputError
from activations.sources.rows import LeftOut, decode_text
from activations.sources.splits import SPLITS, split_number

MIN_BYTES, MAX_BYTES, MAX_LINE = 400, 400_000, 400
"""Bounds on a Python source: shorter files say little, larger ones and long lines are mostly data."""

TOOLKIT_PACKAGES = (
    "accelerate", "altair", "beartype", "click", "datasets", "fsspec", "huggingface_hub", "jaxtyping",
    "jinja2", "networkx", "numpy", "packaging", "pandas", "plotly", "pyarrow", "pydantic", "pydeck",
    "pygments", "requests", "rich", "safetensors", "streamlit", "sympy", "tokenizers", "torch", "tornado",
    "tqdm", "transformer_lens", "transformers", "typeguard", "typer", "tyro", "urllib3", "wandb", "yaml",
)  # fmt: skip
"""Packages that installing the toolkit brings along; the test split of source "python" reads them too."""

_NOT_ENTERED = {"__pycache__", "site-packages", "dist-packages"}
_NOT_ENTERED_IN_PACKAGES = {*_NOT_ENTERED, "test", "tests", "testing", "_vendor", "locale"}
_GENERATED = re.compile(
    r"\bauto(matically|-)? ?generated|generated (from|by|on)\b|do not edit", re.IGNORECASE
)
_HEAD_CHARACTERS = 500


class PythonFile(NamedTuple):
    """A source file: root / relative, called prefix / relative.

    text: its content; split: place in ``SPLITS``; fills_up: read only so that the test split has enough documents.
    """

    root: Path
    prefix: str
    relative: str
    n_bytes: int
    sha1: bytes
    split: int
    fills_up: bool

    @property
    def name(self) -> str:
        return str(PurePosixPath(self.prefix, self.relative))


def python_files(packages: Sequence[str], left_out: Counter[str]) -> list[PythonFile]:
    """The standard library and the named packages; then, to fill up the test split, the toolkit's own packages.

    Sorted by name. What is left out is counted in ``left_out``.

    Raises:
        InputError: a package is not installed.
    """
    found = list(_files(Path(sysconfig.get_paths()["stdlib"]), "", _NOT_ENTERED, left_out))
    for package in packages:
        folder = _package_folder(package)
        if folder is None:
            raise InputError(
                f"Package {package!r} is not installed here as a folder of Python files: install it, or give"
                " the name that it is imported by."
            )
        found += _files(folder, package, _NOT_ENTERED_IN_PACKAGES, left_out)
    for package in sorted(set(TOOLKIT_PACKAGES) - set(packages)):
        if (folder := _package_folder(package)) is not None:
            found += _files(folder, package, _NOT_ENTERED_IN_PACKAGES, left_out, fills_up=True)
    return sorted(found, key=lambda file: file.name)


def _package_folder(package: str) -> Path | None:
    """Where an installed top-level package lies, found without importing it."""
    spec = PathFinder.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _files(
    root: Path, prefix: str, not_entered: set[str], left_out: Counter[str], *, fills_up: bool = False
) -> Iterator[PythonFile]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in not_entered]
        for file in files:
            if not file.endswith(".py"):
                continue
            split = split_number(hashlib.sha1(file.encode()).digest())
            if fills_up and SPLITS[split] != "test":
                continue
            path = Path(folder, file)
            try:
                n_bytes, text = _read(path)
            except LeftOut as reason:
                left_out[str(reason)] += 1
            else:
                relative = path.relative_to(root).as_posix()
                sha1 = hashlib.sha1(text.encode()).digest()
                yield PythonFile(root, prefix, relative, n_bytes, sha1, split, fills_up)


def _read(path: Path) -> tuple[int, str]:
    if path.name.startswith("_sysconfigdata"):
        raise LeftOut("generated")
    try:
        data = path.read_bytes()
    except OSError:
        raise LeftOut("unreadable") from None
    text = decode_text(data)
    if len(data) < MIN_BYTES:
        raise LeftOut(f"under {MIN_BYTES} bytes")
    if len(data) > MAX_BYTES:
        raise LeftOut(f"over {MAX_BYTES:,} bytes")
    if _GENERATED.search(text, 0, _HEAD_CHARACTERS):
        raise LeftOut("generated")
    if max(map(len, text.split("\n"))) > MAX_LINE:
        raise LeftOut(f"a line over {MAX_LINE} characters")
    return len(data), text
