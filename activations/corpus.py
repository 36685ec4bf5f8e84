"""Which text: Python sources, text files or JSONL → documents → three splits → token blocks.

**Splits** are decided once, by ``int(sha1(key), 16) % 50`` of each document: 0 is *test* (every metric), 1 to
4 *score* (labels and patterns are judged here), the rest *train*. The key of a Python source is its base name
(``abc.py``: the rule under which the bundled model was trained, so that it has not seen *test* either), of
any other document its text. Exact copies are read once.

**Packing** is *concatenated* (documents joined by the end-of-text token and cut into blocks anywhere, as most
models were trained) or *isolated* (documents never see each other).
"""

import hashlib
import json
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.machinery import PathFinder
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from activations.errors import InputError
from activations.files import hash_json

if TYPE_CHECKING:
    from activations.blocks import TokenBlocks
    from activations.tokenizer import Tokenizer

Split = Literal["train", "score", "test"]
Packing = Literal["concatenated", "isolated"]

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
MIN_BYTES, MAX_BYTES, MAX_LINE = 400, 400_000, 400
"""Bounds on a Python source: shorter files say little, larger ones and long lines are mostly data."""

TEST_DOCUMENTS = 100
TEST_TOKENS_PER_DOCUMENT = 1024
"""The test split has at least so many documents and at most so many tokens of each: its figures come with
intervals over documents."""

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
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEAD_CHARACTERS = 500
_BATCH_CHARACTERS = 500_000


@dataclass(frozen=True)
class CorpusConfig:
    """What to read and how to cut it into token blocks."""

    text: tuple[str, ...] = ("python",)
    """Sources: "python" (this interpreter's standard library), or files, folders or globs of .txt, .md, .py or
    .jsonl files."""
    packages: tuple[str, ...] = ()
    """Installed packages to read as well, by import name (with source "python" only)."""
    column: str = "text"
    """Field of a .jsonl line that holds the text."""
    shuffle_seed: int = 0
    """Order of the documents."""
    packing: Packing = "concatenated"
    """"concatenated": documents joined by the end-of-text token, cut anywhere; "isolated": one document per
    block."""
    bos: bool | None = None
    """Begin every block with the beginning-of-text token; by default where the tokenizer puts one."""

    def __post_init__(self) -> None:
        if self.packing not in get_args(Packing):
            raise InputError(
                f"Packing {self.packing!r} does not exist: it is one of {', '.join(get_args(Packing))}."
            )

    @property
    def name(self) -> str:
        """The sources in one line."""
        return " ".join(self.text)


@dataclass(frozen=True)
class Document:
    """name: short and readable, e.g. "asyncio/tasks.py"; key: decides the split; text: the whole text."""

    name: str
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a document lies: its text does not stay in memory."""

    name: str
    path: Path
    start: int
    n_bytes: int
    """−1: to the end of the file."""
    split: Split
    digest: str
    is_python: bool = False
    fills_up: bool = False
    """Not of the corpus that was asked for: read only so that the test split has enough documents."""


def split_of(key: str) -> Split:
    """The split that the document with this key belongs to."""
    remainder = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 50
    return "test" if remainder == 0 else "score" if remainder < 5 else "train"


@dataclass
class Corpus:
    """The documents of a source.

    The source is looked through once, when first asked; texts are read again when they are needed, so a
    corpus takes little memory.

    Raises (on first use):
        InputError: the source or a package does not exist, or a .jsonl line lacks the column.
    """

    config: CorpusConfig = field(default_factory=CorpusConfig)

    def documents(self, split: Split) -> list[Document]:
        """The documents of a split in the order of the seed."""
        return [self._read(entry) for entry in self._order(split)]

    @property
    def left_out(self) -> dict[str, int]:
        """How many files (or lines of .jsonl) were left out, by reason."""
        return self._scan.left_out

    @cached_property
    def hash(self) -> str:
        """sha256 over the configuration and over every document's name, text and split."""
        entries = [(entry.name, entry.digest, entry.split) for entry in self._scan.entries]
        return hash_json([asdict(self.config), entries])

    def blocks(
        self, tokenizer: "Tokenizer", split: Split, n_tokens: int, context_length: int
    ) -> "TokenBlocks":
        """Token blocks of a split that hold ``n_tokens`` tokens, or all there are where there are fewer.

        Documents are shuffled before tokens are cut, and only as many are tokenised as are needed. Where there is
        more text than is asked for, every document first gives at most half as much again as its even share (or
        four contexts, if that is more), since the beginnings of many documents say more than a few long ones
        whole; what was cut off follows, as documents of its own, where that is not enough.
        ``test`` takes at most 1,024 tokens of a document, fewer where that is needed for 100 documents to take
        part.

        Raises:
            InputError: the split is empty, or ``test`` has fewer than 100 documents or is asked for fewer than 200
            tokens.
        """
        from activations.blocks import Packer

        config = self.config
        if config.bos and tokenizer.bos_id is None:
            raise InputError("bos is on, but the tokenizer has no beginning-of-text token: leave bos off.")
        with_bos = tokenizer.adds_bos if config.bos is None else config.bos
        entries = self._order(split)
        limit = max(4 * context_length, 3 * n_tokens // (2 * max(len(entries), 1)))
        if split == "test":
            if len(entries) < TEST_DOCUMENTS:
                raise InputError(
                    f"The test split of corpus {config.name!r} has {len(entries)} documents, and metrics"
                    f" need at least {TEST_DOCUMENTS}: give more documents (about one in 50 is held out)."
                )
            if n_tokens < 2 * TEST_DOCUMENTS:
                raise InputError(
                    f"The test split was asked for {n_tokens} tokens, and metrics need at least"
                    f" {2 * TEST_DOCUMENTS}, from {TEST_DOCUMENTS} documents."
                )
            # The separator or the beginning of the text counts too: hence the − 1.
            limit = min(TEST_TOKENS_PER_DOCUMENT, n_tokens // TEST_DOCUMENTS - 1)
        if not entries:
            raise InputError(
                f"The {split} split of corpus {config.name!r} is empty"
                f" ({self._count()}): give a source that holds more text."
            )
        packer = Packer(
            context_length=context_length,
            separator_id=tokenizer.separator_id,
            bos_id=tokenizer.bos_id if with_bos else None,
            vocab_size=tokenizer.vocab_size,
            split=split,
        )
        pack = packer.concatenated if config.packing == "concatenated" else packer.isolated
        return pack(self._tokenised(entries, tokenizer, limit, rests=split != "test"), n_tokens)

    def _count(self) -> str:
        left_out = "".join(f", {count} left out: {reason}" for reason, count in self.left_out.items())
        return f"documents in all splits: {len(self._scan.entries)}{left_out}"

    def _tokenised(
        self, entries: Sequence[_Entry], tokenizer: "Tokenizer", limit: int, *, rests: bool
    ) -> Iterator[tuple[str, list[int]]]:
        """(name, ids) of each document up to ``limit`` tokens; with ``rests``, then what was cut off of them."""
        cut = []
        for entry, ids in self._read_tokens(entries, tokenizer):
            yield entry.name, ids[:limit]
            if len(ids) > limit:
                cut.append(entry)
        if rests:
            for entry, ids in self._read_tokens(cut, tokenizer):
                yield entry.name, ids[limit:]

    def _read_tokens(
        self, entries: Sequence[_Entry], tokenizer: "Tokenizer"
    ) -> Iterator[tuple[_Entry, list[int]]]:
        """The ids of each document, tokenised half a megabyte or so at a time."""
        batch: list[_Entry] = []
        texts: list[str] = []
        for entry in entries:
            batch.append(entry)
            texts.append(self._read(entry).text)
            if sum(map(len, texts)) >= _BATCH_CHARACTERS:
                yield from zip(batch, tokenizer.encode_batch(texts), strict=True)
                batch, texts = [], []
        if batch:
            yield from zip(batch, tokenizer.encode_batch(texts), strict=True)

    def _order(self, split: Split) -> list[_Entry]:
        if split not in get_args(Split):
            raise InputError(f"There is no split {split!r}: it is one of {', '.join(get_args(Split))}.")
        entries = sorted((e for e in self._scan.entries if e.split == split), key=lambda entry: entry.name)
        random.Random(self.config.shuffle_seed).shuffle(entries)
        return sorted(entries, key=lambda entry: entry.fills_up)

    def _read(self, entry: _Entry) -> Document:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.n_bytes)
        is_row = entry.path.suffix == ".jsonl"
        text = json.loads(data)[self.config.column] if is_row else _decode(data)
        return Document(entry.name, entry.path.name if entry.is_python else text, text)

    @cached_property
    def _scan(self) -> "_Scan":
        left_out: Counter[str] = Counter()
        if self.config.packages and "python" not in self.config.text:
            raise InputError('packages are read with source "python" only: leave packages out.')
        found: list[_Entry] = []
        for source in self.config.text:
            if source == "python":
                found.extend(_python_entries(self.config.packages, left_out))
            else:
                found.extend(_text_entries(source, self.config.column, left_out))
        # Of exact copies the one in train stays before score before test: test holds nothing that was seen.
        rank = {split: place for place, split in enumerate(get_args(Split))}
        ordered = sorted(found, key=lambda e: (e.digest, rank[e.split], e.name))
        entries = [next(copies) for _, copies in groupby(ordered, key=lambda entry: entry.digest)]
        if len(entries) < len(ordered):
            left_out["exact copy"] = len(ordered) - len(entries)
        return _Scan(sorted(entries, key=lambda entry: entry.name), dict(left_out))


class _Scan(NamedTuple):
    """Every document by name, and how many were left out for which reason."""

    entries: list[_Entry]
    left_out: dict[str, int]


class _LeftOut(Exception):
    """The reason why a file is not a document."""


def _decode(data: bytes) -> str:
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _python_entries(packages: Sequence[str], left_out: Counter[str]) -> Iterator[_Entry]:
    """The standard library and the named packages; then, to fill up the test split, the toolkit's own packages."""
    yield from _python_files(Path(sysconfig.get_paths()["stdlib"]), "", _NOT_ENTERED, left_out)
    for package in packages:
        folder = _package_folder(package)
        if folder is None:
            raise InputError(
                f"Package {package!r} is not installed here as a folder of Python files: install it, or give"
                " the name that it is imported by."
            )
        yield from _python_files(folder, package, _NOT_ENTERED_IN_PACKAGES, left_out)
    for package in sorted(set(TOOLKIT_PACKAGES) - set(packages)):
        if (folder := _package_folder(package)) is not None:
            yield from _python_files(folder, package, _NOT_ENTERED_IN_PACKAGES, left_out, only="test")


def _package_folder(package: str) -> Path | None:
    """Where an installed top-level package lies, found without importing it."""
    spec = PathFinder.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _python_files(
    root: Path, prefix: str, not_entered: set[str], left_out: Counter[str], only: Split | None = None
) -> Iterator[_Entry]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in not_entered]
        for file in files:
            if not file.endswith(".py"):
                continue
            split = split_of(file)
            if only is not None and split != only:
                continue
            path = Path(folder, file)
            try:
                text = _python_text(path)
            except _LeftOut as reason:
                left_out[str(reason)] += 1
            else:
                name = (Path(prefix) / path.relative_to(root)).as_posix()
                yield _Entry(
                    name, path, 0, -1, split, _digest(text), is_python=True, fills_up=only is not None
                )


def _python_text(path: Path) -> str:
    if path.name.startswith("_sysconfigdata"):
        raise _LeftOut("generated")
    try:
        data = path.read_bytes()
        text = _decode(data)
    except (OSError, UnicodeDecodeError):
        raise _LeftOut("unreadable") from None
    if len(data) < MIN_BYTES:
        raise _LeftOut(f"under {MIN_BYTES} bytes")
    if len(data) > MAX_BYTES:
        raise _LeftOut(f"over {MAX_BYTES:,} bytes")
    if _GENERATED.search(text, 0, _HEAD_CHARACTERS):
        raise _LeftOut("generated")
    if max(map(len, text.split("\n"))) > MAX_LINE:
        raise _LeftOut(f"a line over {MAX_LINE} characters")
    return text


def _text_entries(source: str, column: str, left_out: Counter[str]) -> Iterator[_Entry]:
    for path, name in _text_files(source):
        if path.suffix == ".jsonl":
            yield from _jsonl_entries(path, name, column, left_out)
            continue
        try:
            text = _decode(path.read_bytes())
        except (OSError, UnicodeDecodeError):
            left_out["unreadable"] += 1
            continue
        if text.strip():
            yield _Entry(name, path, 0, -1, split_of(text), _digest(text))
        else:
            left_out["empty"] += 1


def _text_files(source: str) -> list[tuple[Path, str]]:
    """(path, short name) of the files that ``source`` means."""
    kinds = ", ".join(TEXT_SUFFIXES)
    path = Path(source)
    if path.is_file():
        if path.suffix not in TEXT_SUFFIXES:
            raise InputError(f"Corpus file {source} is not one of {kinds}: convert it to one of these.")
        return [(path, path.name)]
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif any(character in source for character in "*?["):
        parts = path.parts
        fixed = next(place for place, part in enumerate(parts) if any(c in part for c in "*?["))
        root = Path(*parts[:fixed])
        found = root.glob("/".join(parts[fixed:]))
    else:
        raise InputError(
            f'Corpus {source} does not exist: give "python", or a file, folder or glob of {kinds} files.'
        )
    files = sorted(file for file in found if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"Corpus {source} holds no {kinds} file: give a file, folder or glob that does.")
    return [(file, file.relative_to(root).as_posix()) for file in files]


def _jsonl_entries(path: Path, name: str, column: str, left_out: Counter[str]) -> Iterator[_Entry]:
    """One document per line; documents are named by file and line, e.g. "news.jsonl:12"."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _jsonl_text(line, f"{path} line {number}", column)
                if _SURROGATE.search(text):  # half a character, which JSON can hold and no text can
                    left_out["unreadable"] += 1
                elif text.strip():
                    yield _Entry(f"{name}:{number}", path, start, len(line), split_of(text), _digest(text))
                else:
                    left_out["empty"] += 1
            start += len(line)


def _jsonl_text(line: bytes, place: str, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise InputError(f"{place} is not JSON: each line must be one JSON object.") from None
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        columns = ", ".join(row) if isinstance(row, dict) else "none"
        raise InputError(
            f"{place} has no text in column {column!r}: name the column that holds it (there are: {columns})."
        )
    return text
