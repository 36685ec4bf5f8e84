"""Which text: sources → documents → three splits → token blocks.

**Sources** are ``"python"``, files, folders and globs, and Hugging Face datasets; options follow a question mark:
``data/*.parquet?column=body``, ``hf:org/name?config=en&split=train&revision=abc``. A column holds text, token ids
(``?tokens=input_ids``) or chats (``?messages=messages``).

**Splits** are decided once, by ``int(sha1(key), 16) % 50`` of each document: 0 is *test* (every metric), 1 to
4 *score* (labels and patterns are judged here), the rest *train*. The key of a Python source is its base name
(``abc.py``: the rule under which the bundled model was trained, so that it has not seen *test* either), of
any other document its content. Exact copies are read once.

**Packing** is *concatenated* (documents joined by the end-of-text token and cut into blocks anywhere, as most
models were trained) or *isolated* (documents never see each other).

A dataset that is streamed is read as far as a split needs: the first 1, 2, 4, … parts of 16 MB, until the split holds
the tokens that are asked for. So the same call gives the same blocks, however much of the dataset is there by then.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from activations.errors import InputError
from activations.files import hash_json
from activations.sources.splits import SPLITS, split_number

if TYPE_CHECKING:
    import numpy as np

    from activations.blocks import TokenBlocks
    from activations.sources.documents import Documents
    from activations.sources.hub import StreamedDataset
    from activations.sources.spec import SourceSpec
    from activations.tokenizer import Tokenizer

Split = Literal["train", "score", "test"]
Packing = Literal["concatenated", "isolated"]

TEST_DOCUMENTS = 100
TEST_TOKENS_PER_DOCUMENT = 1024
"""The test split has at least so many documents and at most so many tokens of each: its figures come with
intervals over documents."""


@dataclass(frozen=True)
class CorpusConfig:
    """What to read and how to cut it into token blocks."""

    text: tuple[str, ...] = ("python",)
    """Sources: "python" (this interpreter's standard library); files, folders or globs of .txt, .md, .py, .jsonl or
    .parquet, plain or compressed; hf:NAME. Options: "data.jsonl?column=body", "hf:NAME?config=en&split=train"."""
    packages: tuple[str, ...] = ()
    """Installed packages to read as well, by import name (with source "python" only)."""
    column: str = "text"
    """Column that holds the text, where a source names none."""
    weights: tuple[float, ...] = ()
    """Shares of the tokens, one for each source; by default all documents are read as they are."""
    roles: tuple[str, ...] = ()
    """Roles of a chat whose tokens count in training and metrics; by default all. The model reads the whole chat."""
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
        if isinstance(self.text, str):
            raise InputError(f"text is a tuple of sources: give ({self.text!r},).")
        if not self.text:
            raise InputError('A corpus needs at least one source of text, for example "python".')
        if self.weights and len(self.weights) != len(self.text):
            raise InputError(
                f"There are {len(self.weights)} weights for {len(self.text)} sources: give one for each, or none."
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"Weights are {', '.join(map(str, self.weights))}, and each must be above 0.")

    @property
    def name(self) -> str:
        """The first two sources, and how many more there are, in one line."""
        named, more = self.text[:2], len(self.text) - 2
        return " ".join(named) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Document:
    """name: short and readable, e.g. "asyncio/tasks.py"; key: decides the split; text: the whole text."""

    name: str
    key: str
    text: str


def split_of(key: str) -> Split:
    """The split that the document with this key belongs to."""
    return get_args(Split)[split_number(hashlib.sha1(key.encode()).digest())]


@dataclass
class Corpus:
    """The documents of one or several sources.

    They are looked through once, when first asked; contents are read again when they are needed, so a
    corpus takes some tens of bytes of memory for each document.

    Attributes:
        notes: what happened on the way, in sentences: a source ran out before its share was full.

    Raises (on first use):
        InputError: a source or a package does not exist, a column is missing, a file is damaged.
    """

    config: CorpusConfig = field(default_factory=CorpusConfig)
    notes: list[str] = field(default_factory=list, init=False)
    _n_parts: int = field(default=1, init=False)

    def documents(self, split: Split) -> list[Document]:
        """The documents of a split in the order of the seed; a streamed dataset is read to its end.

        Raises:
            InputError: a source holds token ids or chats instead of text.
        """
        from activations.sources.reading import read_pieces

        found = self._documents
        while not found.complete:
            self._n_parts *= 2
            found = self._documents
        if any(group.content != "text" for group in found.groups):
            raise InputError(f"Corpus {self.config.name!r} holds token ids or chats: documents are texts.")
        read = []
        for place in self._order(found, split).tolist():
            piece = found.piece(place)
            text = read_pieces([piece])[0]
            key = piece.path.replace("\\", "/").rpartition("/")[2] if found.group(place).key_is_name else text
            read.append(Document(found.name(place), key, text))
        return read

    @property
    def left_out(self) -> dict[str, int]:
        """How many files (or rows) were left out, by reason."""
        return self._documents.left_out

    @cached_property
    def hash(self) -> str:
        """sha256 over the configuration and every document's name, content and split; of a stream, its revision."""
        from activations.sources.documents import find_documents

        streams = {source: stream.describe() for source, stream in self._streams.items()}
        local = (
            self._documents
            if not streams
            else find_documents(self._specs, self.config.packages, self._streams, 0)
        )
        return hash_json([asdict(self.config), streams, local.hash()])

    def describe(self) -> dict[str, Any]:
        """Where the text comes from, for manifests: every source, with config, split and revision of a dataset."""
        sources = []
        for source, spec in enumerate(self._specs):
            facts: dict[str, Any] = {"source": spec.given, "content": spec.content}
            if spec.location != "python":
                facts["column"] = spec.column
            if spec.split is not None:
                facts["split"] = spec.split
            if source in self._streams:
                facts |= self._streams[source].describe()
            sources.append(facts)
        config = self.config
        return {
            "sources": sources,
            "packages": list(config.packages),
            "weights": list(config.weights),
            "roles": list(config.roles),
            "shuffle_seed": config.shuffle_seed,
            "packing": config.packing,
        }

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
                tokens; ids beyond the vocabulary, or chats that the model's template does not render.
        """
        self._check(tokenizer, split)
        self._n_parts = 1
        while True:
            found = self._documents
            n_documents = found.count(SPLITS.index(split))
            if n_documents >= (TEST_DOCUMENTS if split == "test" else 1):
                _check_size(split, n_tokens)
                blocks, ran_out = self._packed(found, tokenizer, split, n_tokens, context_length)
                if found.complete or (blocks.n_tokens >= n_tokens and not ran_out):
                    self.notes.extend(note for note in ran_out if note not in self.notes)
                    return blocks
            elif found.complete:
                raise self._too_few(split, n_documents)
            self._n_parts *= 2

    def _packed(
        self, found: "Documents", tokenizer: "Tokenizer", split: Split, n_tokens: int, context_length: int
    ) -> tuple["TokenBlocks", list[str]]:
        """The blocks, and a sentence for every weighted source that ran out."""
        from activations.mixing import capped, expected_bytes, first_share, mixed
        from activations.packing import Packer
        from activations.tokenising import Tokenising

        config = self.config
        with_bos = tokenizer.adds_bos if config.bos is None else config.bos
        packer = Packer(
            context_length=context_length,
            separator_id=tokenizer.separator_id,
            bos_id=tokenizer.bos_id if with_bos else None,
            vocab_size=tokenizer.vocab_size,
            split=split,
            with_counted=bool(config.roles),
        )
        pack = packer.concatenated if config.packing == "concatenated" else packer.isolated
        parts = self._parts(found, split)
        limits = [first_share(int(share * n_tokens), len(order), context_length) for share, order in parts]
        if split == "test":
            # The separator or the beginning of the text counts too: hence the − 1.
            limits = [min(TEST_TOKENS_PER_DOCUMENT, n_tokens // TEST_DOCUMENTS - 1)] * len(parts)
        expected = sum(
            expected_bytes(found, order, limit, int(share * n_tokens))
            for (share, order), limit in zip(parts, limits, strict=True)
        )
        ran_out: list[str] = []
        with Tokenising(found, tokenizer, expected, config.roles) as tokenising:
            streams = [
                capped(found, tokenising, order, limit, rests=split != "test")
                for (_, order), limit in zip(parts, limits, strict=True)
            ]
            documents = streams[0]
            if config.weights:
                overhead = int(config.packing == "concatenated")  # the separator
                documents = mixed(
                    streams, config.weights, overhead, lambda s, n: ran_out.append(self._ran_out(split, s, n))
                )
            return pack(documents, n_tokens), ran_out

    def _parts(self, found: "Documents", split: Split) -> list[tuple[float, "np.ndarray"]]:
        """(share of the tokens, documents in order) of each source where they are weighted, else of all together."""
        weights = self.config.weights
        if not weights:
            return [(1.0, self._order(found, split))]
        return [
            (weight / sum(weights), self._order(found, split, source))
            for source, weight in enumerate(weights)
        ]

    def _order(self, found: "Documents", split: Split, source: int | None = None) -> "np.ndarray":
        return found.order(SPLITS.index(split), self.config.shuffle_seed, source)

    def _check(self, tokenizer: "Tokenizer", split: Split) -> None:
        config = self.config
        if split not in SPLITS:
            raise InputError(f"There is no split {split!r}: it is one of {', '.join(SPLITS)}.")
        if config.bos and tokenizer.bos_id is None:
            raise InputError("bos is on, but the tokenizer has no beginning-of-text token: leave bos off.")
        if config.roles and all(spec.content != "messages" for spec in self._specs):
            raise InputError(
                "roles chooses among the messages of chats, and no source has them: give one with ?messages=COLUMN."
            )

    def _too_few(self, split: Split, n_documents: int) -> InputError:
        if split == "test":
            return InputError(
                f"The test split of corpus {self.config.name!r} has {n_documents} documents, and metrics"
                f" need at least {TEST_DOCUMENTS}: give more documents (about one in 50 is held out)."
            )
        left_out = "".join(f", {count} left out: {reason}" for reason, count in self.left_out.items())
        return InputError(
            f"The {split} split of corpus {self.config.name!r} is empty (documents in all splits:"
            f" {len(self._documents.table)}{left_out}): give a source that holds more text."
        )

    def _ran_out(self, split: Split, source: int, n_tokens: int) -> str:
        return (
            f"Source {self.config.text[source]} ran out of {split} text after {n_tokens:,} tokens: the other sources"
            " filled up its share."
        )

    @property
    def _documents(self) -> "Documents":
        """All documents, of streams those of the first ``_n_parts`` parts."""
        if self._n_parts not in self._found:
            from activations.sources.documents import find_documents

            self._found.clear()
            self._found[self._n_parts] = find_documents(
                self._specs, self.config.packages, self._streams, self._n_parts
            )
        return self._found[self._n_parts]

    @cached_property
    def _found(self) -> dict[int, "Documents"]:
        return {}

    @cached_property
    def _specs(self) -> list["SourceSpec"]:
        from activations.sources.spec import parse_source

        specs = [parse_source(source, self.config.column) for source in self.config.text]
        if self.config.packages and all(spec.location != "python" for spec in specs):
            raise InputError('packages are read with source "python" only: leave packages out.')
        return specs

    @cached_property
    def _streams(self) -> dict[int, "StreamedDataset"]:
        from activations.sources.hub import StreamedDataset
        from activations.sources.spec import HUB

        return {
            n: StreamedDataset(spec) for n, spec in enumerate(self._specs) if spec.location.startswith(HUB)
        }


def _check_size(split: Split, n_tokens: int) -> None:
    if split == "test" and n_tokens < 2 * TEST_DOCUMENTS:
        raise InputError(
            f"The test split was asked for {n_tokens} tokens, and metrics need at least {2 * TEST_DOCUMENTS}, from"
            f" {TEST_DOCUMENTS} documents."
        )
