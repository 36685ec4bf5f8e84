"""Files, folders and globs."""

import os
from collections.abc import Iterator
from pathlib import Path

from activations.errors import InputError
from activations.files import hash_files, hash_json
from activations.sources.compressed import COMPRESSIONS

TEXT_KINDS = (".txt", ".md", ".py")
ROW_KINDS = (".jsonl", ".parquet")
KINDS = ", ".join((*TEXT_KINDS, *ROW_KINDS))


def kind_of(path: Path) -> str:
    """The suffix of a file, that of its compression left out: ".txt" for ``notes.txt.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``datasets.save_to_disk``."""
    is_one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_one or (path / "dataset_dict.json").is_file()


def find_files(location: str) -> Iterator[tuple[Path, str]]:
    """(folder, path within it) of every file that ``location`` means, in a fixed order.

    Raises:
        InputError: nothing is there, or nothing of a kind that can be read.
    """
    path = Path(location)
    if path.is_file():
        if not _is_readable(path):
            raise InputError(
                f"Corpus file {location} is not one of {KINDS}, plain or compressed ({', '.join(COMPRESSIONS)}):"
                " convert it to one of these."
            )
        yield path.parent, path.name
        return
    if path.is_dir():
        found = _walk(path, path)
    elif any(character in location for character in "*?["):
        parts = path.parts
        fixed = next(place for place, part in enumerate(parts) if any(c in part for c in "*?["))
        root = Path(*parts[:fixed])
        matches = sorted(match.relative_to(root).as_posix() for match in root.glob("/".join(parts[fixed:])))
        found = ((root, match) for match in matches)
    else:
        raise InputError(
            f'Corpus {location} does not exist: give "python", a file, folder or glob of {KINDS} files, or hf: and the'
            " name of a Hugging Face dataset."
        )
    n_found = 0
    for root, relative in found:
        if _is_readable(Path(relative)) and (root / relative).is_file():
            n_found += 1
            yield root, relative
    if not n_found:
        raise InputError(f"Corpus {location} holds no {KINDS} file: give a file, folder or glob that does.")


def folder_hash(folder: Path) -> str:
    """sha256 over the names and contents of all files below a folder."""
    return hash_json([[relative, hash_files([root / relative])] for root, relative in _walk(folder, folder)])


def _walk(root: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below ``folder``, without a list of all of them."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from _walk(root, path)
        else:
            yield root, path.relative_to(root).as_posix()


def _is_readable(path: Path) -> bool:
    return kind_of(path) in (*TEXT_KINDS, *ROW_KINDS)
