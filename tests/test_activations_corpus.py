"""Documents, splits and token blocks."""

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from activations import corpus as corpus_module
from activations.blocks import PADDING, TokenBlocks
from activations.corpus import Corpus, CorpusConfig, split_of
from activations.errors import InputError
from activations.sources import python as python_module

SEPARATOR, BOS = 0, 300


class ByteTokenizer:
    """One token per byte (its value + 1): simple enough to write down what every block must hold."""

    separator_id = SEPARATOR
    vocab_size = 301
    definition = None

    def __init__(self, bos_id: int | None = None, adds_bos: bool = False):
        self.bos_id, self.adds_bos = bos_id, adds_bos
        self.n_encoded = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.n_encoded += len(texts)
        return [[byte + 1 for byte in text.encode()] for text in texts]


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def texts_of(split: str, count: int, length: int = 40) -> list[str]:
    """``count`` texts that fall into ``split``."""
    found, number = [], 0
    while len(found) < count:
        text = f"text {number} ".ljust(length, "x")
        if split_of(text) == split:
            found.append(text)
        number += 1
    return found


def as_texts(blocks: TokenBlocks) -> list[str]:
    """What each document's tokens spell, in the order of names, separators and BOS left out."""
    ids, owners = blocks.ids.ravel(), blocks.documents.ravel()
    kept = (ids != SEPARATOR) & (ids != BOS) & (owners != PADDING)
    return [
        bytes((ids[kept & (owners == n)] - 1).astype(np.uint8)).decode() for n in range(len(blocks.names))
    ]


@pytest.mark.parametrize(
    ("key", "split"),
    # Worked out with the sha1sum command: its hexadecimal number modulo 50 is 1, 0, 4, 5 and 49.
    [
        ("decimal.py", "score"),
        ("contextlib.py", "test"),
        ("codeop.py", "score"),
        ("netrc.py", "train"),
        ("timeit.py", "train"),
    ],
)
def test_splits_follow_the_sha1_of_the_key(key: str, split: str) -> None:
    assert split_of(key) == split


def test_a_folder_of_texts_falls_into_splits_by_text_and_is_shuffled_by_seed(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(300)]
    folder = write_texts(tmp_path / "texts", texts)
    orders = {}
    for seed in (0, 1):
        corpus = Corpus(CorpusConfig(text=(str(folder),), shuffle_seed=seed))
        orders[seed] = {split: corpus.documents(split) for split in ("train", "score", "test")}
        assert sorted(d.text for split in orders[seed].values() for d in split) == sorted(texts)
        assert all(split_of(d.text) == split for split in orders[seed] for d in orders[seed][split])
    names = [[d.name for d in orders[seed]["train"]] for seed in (0, 1)]
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])
    again = Corpus(CorpusConfig(text=(str(folder),), shuffle_seed=0))
    assert again.documents("train") == orders[0]["train"]


def test_texts_are_left_out_for_a_reason_that_is_counted(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, ["one", "one", "two", "  \n", ""])
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    corpus = Corpus(CorpusConfig(text=(str(folder),)))
    assert corpus.left_out == {"empty": 2, "unreadable": 1, "exact copy": 1}
    documents = [d for split in ("train", "score", "test") for d in corpus.documents(split)]
    assert {(d.name, d.text) for d in documents} == {("0000.txt", "one"), ("0002.txt", "two")}


def test_a_glob_and_a_file_name_their_documents_briefly(tmp_path: Path) -> None:
    write_texts(tmp_path / "a" / "b", ["deep"])
    write_texts(tmp_path / "a", ["shallow"])
    by_glob = Corpus(CorpusConfig(text=(str(tmp_path / "a" / "**" / "*.txt"),)))
    names = {d.name for split in ("train", "score", "test") for d in by_glob.documents(split)}
    assert names == {"b/0000.txt", "0000.txt"}
    by_file = Corpus(CorpusConfig(text=(str(tmp_path / "a" / "0000.txt"),)))
    documents = [d for split in ("train", "score", "test") for d in by_file.documents(split)]
    assert [(d.name, d.text) for d in documents] == [("0000.txt", "shallow")]


def test_jsonl_lines_are_documents_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    rows = [{"body": "première"}, {"body": "second\r\n"}, {"body": ""}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    corpus = Corpus(CorpusConfig(text=(str(path),), column="body"))
    documents = {d.name: d.text for split in ("train", "score", "test") for d in corpus.documents(split)}
    assert documents == {"news.jsonl:1": "première", "news.jsonl:2": "second\r\n"}
    assert corpus.left_out == {"empty": 1}


def test_half_characters_in_jsonl_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    path.write_text('{"text": "whole 😀 \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    corpus = Corpus(CorpusConfig(text=(str(path),)))
    documents = [d.text for split in ("train", "score", "test") for d in corpus.documents(split)]
    assert documents == ["whole 😀 😀"]
    assert corpus.left_out == {"unreadable": 1}


@pytest.fixture
def python_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files, two packages, one of which the toolkit depends on."""
    stdlib, packages = tmp_path / "lib", tmp_path / "packages"
    body = "".join(f"def function_{n}(argument):\n    return argument + {n}\n\n\n" for n in range(20))
    files = {
        stdlib / "copy.py": body,  # sha1 mod 50 = 30: train
        stdlib / "color.py": "# one\n" + body,  # 0: test
        stdlib / "tools" / "copy.py": "# two\n" + body,
        stdlib / "tools" / "again.py": body,  # an exact copy of copy.py, in whatever split
        stdlib / "short.py": "x = 1\n",
        stdlib / "table.py": '"""Codec generated from MAPPINGS."""\n' + body,
        stdlib / "_sysconfigdata_linux.py": body,
        stdlib / "wide.py": body + "x = '" + "y" * 400 + "'\n",
        stdlib / "large.py": body * 500,
        stdlib / "site-packages" / "other.py": "# three\n" + body,
        stdlib / "notes.txt": body,
        packages / "ours" / "copy.py": "# four\n" + body,
        packages / "ours" / "color.py": "# five\n" + body,
        packages / "ours" / "tests" / "color.py": "# six\n" + body,
        packages / "asked" / "copy.py": "# seven\n" + body,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (stdlib / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + body.encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(python_module, "TOOLKIT_PACKAGES", ("ours", "not_installed"))
    return stdlib


@pytest.mark.usefixtures("python_sources")
def test_python_sources_split_by_base_name_and_leave_out_what_is_not_code() -> None:
    corpus = Corpus()
    names = {split: {d.name for d in corpus.documents(split)} for split in ("train", "score", "test")}
    assert names["train"] == {"copy.py", "tools/copy.py"}
    # Of the toolkit's own packages, only what is held out, and not their tests.
    assert names["test"] == {"color.py", "ours/color.py"}
    assert names["score"] == set()
    assert corpus.documents("test")[0].key == "color.py"
    assert corpus.left_out == {
        "under 400 bytes": 1,
        "over 400,000 bytes": 1,
        "a line over 400 characters": 1,
        "generated": 2,
        "unreadable": 1,
        "exact copy": 1,
    }


@pytest.mark.usefixtures("python_sources")
def test_other_packages_are_read_when_asked_for() -> None:
    corpus = Corpus(CorpusConfig(packages=("asked", "ours")))
    names = {d.name for d in corpus.documents("train")}
    assert names == {"copy.py", "tools/copy.py", "asked/copy.py", "ours/copy.py"}
    with pytest.raises(InputError) as error:
        Corpus(CorpusConfig(packages=("absent",))).documents("train")
    assert str(error.value) == (
        "Package 'absent' is not installed here as a folder of Python files: install it, or give the name"
        " that it is imported by."
    )


def test_hash_changes_with_a_text_and_with_the_configuration(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, ["one", "two"])
    config = CorpusConfig(text=(str(folder),))
    before = Corpus(config).hash
    assert Corpus(config).hash == before
    assert Corpus(CorpusConfig(text=(str(folder),), shuffle_seed=1)).hash != before
    (folder / "0001.txt").write_text("three", encoding="utf-8")
    assert Corpus(config).hash != before


def test_concatenated_blocks_are_the_stream_of_documents_cut_in_windows(tmp_path: Path) -> None:
    texts = texts_of("train", 30)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),)))
    blocks = corpus.blocks(ByteTokenizer(), "train", n_tokens=500, context_length=32)
    stream: list[int] = []
    owners: list[int] = []
    for number, document in enumerate(corpus.documents("train")):
        ids = [SEPARATOR, *(byte + 1 for byte in document.text.encode())]
        stream += ids
        owners += [number] * len(ids)
    assert blocks.ids.shape == (16, 32)  # 500 tokens need 15.6 blocks
    assert blocks.ids.ravel().tolist() == stream[: 16 * 32]
    assert blocks.documents.ravel().tolist() == owners[: 16 * 32]
    assert blocks.names == [d.name for d in corpus.documents("train")][: len(blocks.names)]
    assert owners[16 * 32 - 1] == len(blocks.names) - 1
    assert (blocks.ids.dtype, blocks.split, blocks.packing, blocks.bos) == (
        np.uint16,
        "train",
        "concatenated",
        False,
    )
    assert blocks.n_tokens == 512
    assert blocks.attention_mask(0, 16) is None


def test_a_corpus_with_less_text_gives_all_of_it_and_pads_the_last_block(tmp_path: Path) -> None:
    texts = texts_of("train", 3, length=40)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),)))
    blocks = corpus.blocks(ByteTokenizer(), "train", n_tokens=10_000, context_length=50)
    assert blocks.n_tokens == 3 * 41
    assert blocks.ids.shape == (3, 50)
    assert blocks.documents[2, 23:].tolist() == [PADDING] * 27
    assert blocks.ids[2, 23:].tolist() == [SEPARATOR] * 27
    mask = blocks.attention_mask(2, 3)
    assert mask is not None
    assert mask.tolist() == [[1] * 23 + [0] * 27]
    assert blocks.attention_mask(0, 2) is None
    assert sorted(as_texts(blocks)) == sorted(texts)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_isolated_blocks_hold_one_document_each(tmp_path: Path, adds_bos: bool) -> None:
    texts = texts_of("train", 4, length=40) + texts_of("train", 2, length=7 * 9)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),), packing="isolated"))
    tokenizer = ByteTokenizer(bos_id=BOS, adds_bos=adds_bos)
    blocks = corpus.blocks(tokenizer, "train", n_tokens=10_000, context_length=16)
    for row in blocks.documents:
        real = row[row != PADDING]
        assert len(real)
        assert (real == real[0]).all()  # one document
        assert (row[: len(real)] == real).all()  # padding on the right
    assert sorted(as_texts(blocks)) == sorted(texts)
    assert (blocks.ids[:, 0] == BOS).all() == adds_bos
    assert blocks.bos == adds_bos
    per_block = 15 if adds_bos else 16
    assert blocks.n_blocks == 4 * -(-40 // per_block) + 2 * -(-63 // per_block)
    assert blocks.n_tokens == sum(map(len, texts)) + adds_bos * blocks.n_blocks


def test_bos_in_concatenated_blocks_belongs_to_the_document_behind_it(tmp_path: Path) -> None:
    texts = texts_of("train", 5)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),), bos=True))
    blocks = corpus.blocks(ByteTokenizer(bos_id=BOS), "train", n_tokens=64, context_length=16)
    assert blocks.ids.shape == (4, 16)
    assert blocks.ids[:, 0].tolist() == [BOS] * 4
    assert (blocks.documents[:, 0] == blocks.documents[:, 1]).all()
    stream = [t for d in corpus.documents("train") for t in (SEPARATOR, *(b + 1 for b in d.text.encode()))]
    assert blocks.ids[:, 1:].ravel().tolist() == stream[:60]


def test_only_as_many_documents_are_tokenised_as_needed(tmp_path: Path) -> None:
    texts = texts_of("train", 20, length=200_000)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),)))
    tokenizer = ByteTokenizer()
    corpus.blocks(tokenizer, "train", n_tokens=1000, context_length=100)
    assert tokenizer.n_encoded <= 3


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
@pytest.mark.parametrize(("n_tokens", "most"), [(1000, 10), (150_000, 1024)])
def test_the_test_split_spreads_over_a_hundred_documents(
    tmp_path: Path, packing: corpus_module.Packing, n_tokens: int, most: int
) -> None:
    texts = texts_of("test", 101, length=2000)
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts)),), packing=packing))
    blocks = corpus.blocks(ByteTokenizer(), "test", n_tokens, context_length=64)
    tokens = np.bincount(blocks.documents[blocks.documents != PADDING])
    assert len(tokens) >= 100
    assert tokens.max() <= most + 1  # a separator stands in front of the document
    assert blocks.n_tokens >= min(n_tokens, 100 * most) * 0.9
    documents = corpus.documents("test")[: len(blocks.names)]
    for start_of_text, document in zip(as_texts(blocks), documents, strict=True):
        assert document.text.startswith(start_of_text)


def test_blocks_are_saved_and_loaded(tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path / "t", texts_of("train", 5))),)))
    blocks = corpus.blocks(ByteTokenizer(), "train", 100, 32)
    blocks.save(tmp_path / "blocks", {"corpus": corpus.hash})
    loaded = TokenBlocks.load(tmp_path / "blocks")
    assert (loaded.ids == blocks.ids).all()
    assert (loaded.documents == blocks.documents).all()
    assert (loaded.names, loaded.split, loaded.packing, loaded.bos, loaded.hash) == (
        blocks.names,
        blocks.split,
        blocks.packing,
        blocks.bos,
        blocks.hash,
    )
    assert TokenBlocks.is_finished(tmp_path / "blocks", {"corpus": corpus.hash})
    assert not TokenBlocks.is_finished(tmp_path / "blocks", {"corpus": "another"})
    ids = loaded.ids_tensor(1, 3)
    assert ids.dtype == torch.int64
    assert (ids.numpy() == blocks.ids[1:3]).all()


def test_damaged_blocks_are_refused(tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path / "t", texts_of("train", 5))),)))
    corpus.blocks(ByteTokenizer(), "train", 100, 32).save(tmp_path / "blocks")
    path = tmp_path / "blocks" / "ids.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"does not match the hash in its manifest\.json"):
        TokenBlocks.load(tmp_path / "blocks")
    path.write_bytes(data[:50])
    with pytest.raises(InputError, match="cannot be read"):
        TokenBlocks.load(tmp_path / "blocks")


def test_the_hash_sees_every_token_and_document() -> None:
    ids, owners = np.ones((2, 4), np.uint16), np.zeros((2, 4), np.int32)

    def blocks(**changes: object) -> TokenBlocks:
        facts = {"ids": ids, "documents": owners, "names": ["a"], "split": "train", "packing": "isolated"}
        return TokenBlocks(**{**facts, "bos": False, **changes})  # type: ignore[arg-type]

    other_ids, other_owners = ids.copy(), owners.copy()
    other_ids[1, 3] = 2
    other_owners[1, 3] = PADDING
    changed = [{"ids": other_ids}, {"documents": other_owners}, {"names": ["b"]}, {"split": "test"}]
    hashes = {blocks().hash, *(blocks(**change).hash for change in changed)}
    assert len(hashes) == 5
    assert blocks(ids=ids.astype(np.int32)).hash == blocks().hash


@pytest.mark.parametrize(
    ("n_sources", "name"),
    [(1, "{0}"), (2, "{0} {1}"), (3, "{0} {1} and 1 more"), (300, "{0} {1} and 298 more")],
)
def test_sentences_name_two_sources_at_most(n_sources: int, name: str, tmp_path: Path) -> None:
    """A shell gives hundreds where a glob is not quoted."""
    write_texts(tmp_path, texts_of("train", n_sources))
    files = tuple(map(str, sorted(tmp_path.iterdir())))
    corpus = Corpus(CorpusConfig(text=files))
    name = name.format(*files)
    assert corpus.config.name == name
    with pytest.raises(InputError) as error:
        corpus.blocks(ByteTokenizer(), "test", 1000, 32)
    assert str(error.value) == (
        f"The test split of corpus '{name}' has 0 documents, and metrics need at least 100: give more documents"
        " (about one in 50 is held out)."
    )
    with pytest.raises(InputError) as error:
        corpus.blocks(ByteTokenizer(), "score", 1000, 32)
    assert str(error.value) == (
        f"The score split of corpus '{name}' is empty (documents in all splits: {n_sources}): give a source that holds"
        " more text."
    )


def test_a_large_vocabulary_takes_int32(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 128_256
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts_of("train", 2))),)))
    assert corpus.blocks(tokenizer, "train", 20, 10).ids.dtype == np.int32


@pytest.mark.parametrize(
    ("config", "split", "sentence"),
    [
        (
            {"text": "{folder}"},
            "score",
            "The score split of corpus '{folder}' is empty (documents in all splits: 3, 1 left out: empty):"
            " give a source that holds more text.",
        ),
        (
            {"text": "{folder}"},
            "test",
            "The test split of corpus '{folder}' has 0 documents, and metrics need at least 100: give more"
            " documents (about one in 50 is held out).",
        ),
        (
            {"text": "{folder}/nothing"},
            "train",
            'Corpus {folder}/nothing does not exist: give "python", a file, folder or glob of .txt, .md, .py, .jsonl,'
            " .parquet files, or hf: and the name of a Hugging Face dataset.",
        ),
        (
            {"text": "{folder}/*.md"},
            "train",
            "Corpus {folder}/*.md holds no .txt, .md, .py, .jsonl, .parquet file: give a file, folder or"
            " glob that does.",
        ),
        (
            {"text": "{folder}/rows.jsonl_"},
            "train",
            "Corpus file {folder}/rows.jsonl_ is not one of .txt, .md, .py, .jsonl, .parquet, plain or"
            " compressed (.gz, .bz2, .xz, .zst): convert it to one of these.",
        ),
        (
            {"text": "{folder}/rows/rows.jsonl", "column": "body"},
            "train",
            "{folder}/rows/rows.jsonl line 1 has no column 'body': name the column that holds the text"
            " (there are: text, id).",
        ),
        (
            {"text": "{folder}/rows/broken.jsonl"},
            "train",
            "{folder}/rows/broken.jsonl line 2 is not JSON: each line must be one JSON object.",
        ),
        (
            {"text": "{folder}", "packages": ("json",)},
            "train",
            'packages are read with source "python" only: leave packages out.',
        ),
        (
            {"text": "{folder}", "bos": True},
            "train",
            "bos is on, but the tokenizer has no beginning-of-text token: leave bos off.",
        ),
        (
            {"text": "{folder}"},
            "validation",
            "There is no split 'validation': it is one of train, score, test.",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(
    tmp_path: Path, config: dict, split: corpus_module.Split, sentence: str
) -> None:
    write_texts(tmp_path, [*texts_of("train", 3), ""])
    (tmp_path / "rows.jsonl_").write_text("{}")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.jsonl").write_text('{"text": "a", "id": 1}\n')
    (rows / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    config = {
        key: (value.format(folder=tmp_path),) if key == "text" else value for key, value in config.items()
    }
    if config["text"] == (str(tmp_path),):  # the text files only
        config["text"] = (str(tmp_path / "*.txt"),)
        sentence = sentence.replace("'{folder}'", f"'{tmp_path}/*.txt'")
    with pytest.raises(InputError) as error:
        Corpus(CorpusConfig(**config)).blocks(ByteTokenizer(), split, 100, 10)
    assert str(error.value) == sentence.format(folder=tmp_path)


def test_an_unknown_packing_is_refused() -> None:
    with pytest.raises(InputError) as error:
        CorpusConfig(packing="loose")  # type: ignore[arg-type]
    assert str(error.value) == "Packing 'loose' does not exist: it is one of concatenated, isolated."


def test_a_long_document_gives_no_more_than_half_as_much_again_as_its_even_share(tmp_path: Path) -> None:
    texts = [*texts_of("train", 2, length=20_000), *texts_of("train", 18, length=900)]
    corpus = Corpus(CorpusConfig((str(write_texts(tmp_path, texts)),)))
    blocks = corpus.blocks(ByteTokenizer(), "train", 10_000, context_length=64)
    sizes = np.bincount(blocks.documents[blocks.documents >= 0])
    assert sizes.max() <= 10_000 * 3 // (2 * 20) + 1  # and its separator
    assert len(blocks.names) > 10
    everything = corpus.blocks(ByteTokenizer(), "train", 10**6, context_length=64)
    assert sorted(as_texts(everything)) == sorted(texts)


def test_what_was_cut_off_follows_where_even_shares_are_not_enough(tmp_path: Path) -> None:
    texts = [*texts_of("train", 2, length=20_000), *texts_of("train", 18, length=900)]
    corpus = Corpus(CorpusConfig((str(write_texts(tmp_path, texts)),)))
    blocks = corpus.blocks(
        ByteTokenizer(), "train", 30_000, context_length=64
    )  # even shares hold about 21,000
    assert 30_000 <= blocks.n_tokens < 30_064
    assert len(blocks.names) == 21  # the rest of one long text is enough
    assert (
        sum(text in blocks_text for blocks_text in [" ".join(as_texts(blocks))] for text in texts[2:]) == 18
    )


def test_too_few_test_tokens_are_refused(tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig(text=(str(write_texts(tmp_path, texts_of("test", 100))),)))
    with pytest.raises(InputError) as error:
        corpus.blocks(ByteTokenizer(), "test", 199, 64)
    assert str(error.value) == (
        "The test split was asked for 199 tokens, and metrics need at least 200, from 100 documents."
    )
