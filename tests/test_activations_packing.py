"""Packing: every token of every document exactly once, in order, under every setting; and in bounded memory."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations import corpus as corpus_module
from activations.blocks import PADDING, TokenBlocks
from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.mixing import mixed
from activations.packing import FLUSH_TOKENS, Packer, TokenDocument
from activations.strings import StringTable

ROOT = Path(__file__).parents[1]
SEPARATOR, BOS = 0, 1
PACKINGS = ("concatenated", "isolated")


class GivenIds:
    """A tokenizer for texts that are token ids: "17 4 9"."""

    separator_id = SEPARATOR
    definition = None

    def __init__(self, vocab_size: int = 100, bos: bool = False):
        self.vocab_size, self.adds_bos = vocab_size, bos
        self.bos_id = BOS if bos else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


def plain_packing(
    documents: Sequence[Sequence[int]], packing: str, capacity: int, bos: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, documents) of every block, written down token by token."""
    blocks: list[list[tuple[int, int]]] = []
    stream: list[tuple[int, int]] = []
    for number, ids in enumerate(documents):
        tokens = [(token, number) for token in ids]
        if packing == "concatenated":
            stream += [(SEPARATOR, number), *tokens]
        else:
            blocks += [tokens[at : at + capacity] for at in range(0, len(tokens), capacity)]
    blocks += [stream[at : at + capacity] for at in range(0, len(stream), capacity)]
    rows = [block + [(SEPARATOR, PADDING)] * (capacity - len(block)) for block in blocks]
    if bos:
        rows = [[(BOS, row[0][1]), *row] for row in rows]
    return [[token for token, _ in row] for row in rows], [[owner for _, owner in row] for row in rows]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    context_length=st.integers(2, 17),
    packing=st.sampled_from(PACKINGS),
    bos=st.booleans(),
    vocab_size=st.sampled_from([1000, 70_000]),
    flush=st.sampled_from([1, 7, FLUSH_TOKENS]),
)
@settings(max_examples=300, deadline=None)
def test_every_token_is_packed_once_in_order(
    lengths: list[int], context_length: int, packing: str, bos: bool, vocab_size: int, flush: int
) -> None:
    numbers = itertools.count(2)
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    packer = Packer(context_length, SEPARATOR, BOS if bos else None, vocab_size, "train", with_counted=True)
    given_documents = [
        TokenDocument(f"d{n}", ids, np.arange(len(ids)) % 3 == 0 if n % 2 else None)
        for n, ids in enumerate(documents)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("activations.packing.FLUSH_TOKENS", flush)
        blocks = getattr(packer, packing)(given_documents, 10**6)
    ids, owners = plain_packing(documents, packing, context_length - bos, bos)
    assert blocks.ids.tolist() == ids
    assert blocks.documents.tolist() == owners
    assert list(blocks.names) == [f"d{n}" for n in range(len(documents))]
    # What counts: tokens of even documents, every third of the others; no separator, BOS or padding.
    assert blocks.counted is not None
    counted_ids = blocks.ids[blocks.counted].tolist()
    expected = [ids if n % 2 == 0 else ids[::3] for n, ids in enumerate(documents)]
    assert counted_ids == [token for document in expected for token in document]


@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=3),
    context_length=st.integers(2, 17),
    packing=st.sampled_from(PACKINGS),
    bos=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 3),
    exactly=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_corpus_gives_every_token_once_in_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[list[int]],
    context_length: int,
    packing: corpus_module.Packing,
    bos: bool,
    weighted: bool,
    seed: int,
    exactly: bool,
) -> None:
    """From files to blocks; asked for just all there is, long documents come in two pieces."""
    monkeypatch.setattr("activations.sources.rows.split_number", lambda sha1: 0)  # all in train
    numbers = itertools.count(2)
    documents = [[[next(numbers) for _ in range(length)] for length in source] for source in lengths]
    sources = []
    for number, source in enumerate(documents):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": " ".join(map(str, ids))}) + "\n" for ids in source))
        sources.append(str(path))
    weights = tuple(float(n + 1) for n in range(len(sources))) if weighted else ()
    corpus = Corpus(CorpusConfig(tuple(sources), weights=weights, packing=packing, shuffle_seed=seed))
    everything = [ids for source in documents for ids in source]
    n_tokens = sum(map(len, everything)) if exactly else 10**6
    if exactly and packing == "concatenated":
        n_tokens += 2 * len(everything)  # a separator before each piece of a document
    if exactly and bos:
        n_tokens *= 2  # one in front of each block, of at least two tokens
    blocks = corpus.blocks(GivenIds(2000, bos), "train", n_tokens, context_length)  # type: ignore[arg-type]
    if exactly and packing == "isolated":
        assert blocks.n_tokens >= min(n_tokens, sum(map(len, everything)))
    pieces: dict[str, list[int]] = {}
    for token, owner in zip(blocks.ids.ravel().tolist(), blocks.documents.ravel().tolist(), strict=True):
        if owner != PADDING and token not in (SEPARATOR, BOS):
            pieces.setdefault(blocks.names[owner], []).append(token)
    found = sorted(pieces.values())
    assert found == sorted(everything)


@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=30, max_size=60), min_size=2, max_size=4),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_weighted_sources_keep_their_shares_within_a_document(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(lengths), max_size=len(lengths)))
    streams = [
        iter([TokenDocument(str(source), [2] * length) for length in source_lengths])
        for source, source_lengths in enumerate(lengths)
    ]
    ended: list[int] = []
    given_tokens = [0] * len(lengths)
    for document in mixed(streams, weights, 1, lambda source, n: ended.append(source)):
        if ended:
            break
        given_tokens[int(document.name)] += len(document.ids) + 1
        for source, weight in enumerate(weights):
            share = weight / sum(weights) * sum(given_tokens)
            # At most one document ahead, and so behind by no more than the others are ahead.
            assert given_tokens[source] - share <= 51
            assert share - given_tokens[source] <= 51 * (len(weights) - 1)


def test_shares_hold_in_the_blocks_and_a_source_that_ends_is_told(tmp_path: Path) -> None:
    for name, count in (("a", 600), ("b", 600), ("few", 20)):
        rows = [
            {"text": " ".join([str(2 + ord(name[0]) % 50)] * (5 + n % 7) + [str(n + 2)])}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def tokens(n_tokens: int, **weights: float) -> tuple[dict[str, int], list[str]]:
        sources = tuple(str(tmp_path / f"{name}.jsonl") for name in weights)
        corpus = Corpus(CorpusConfig(sources, weights=tuple(weights.values())))
        blocks = corpus.blocks(GivenIds(1000), "train", n_tokens, 16)  # type: ignore[arg-type]
        owners = np.bincount(blocks.documents[blocks.documents != PADDING])
        counts = dict.fromkeys(weights, 0)
        for document, name in enumerate(blocks.names):
            counts[name.partition(".")[0]] += int(owners[document])
        return counts, corpus.notes

    counts, notes = tokens(1600, a=3, b=1)
    assert notes == []
    assert abs(counts["a"] - 1200) <= 13
    assert abs(counts["b"] - 400) <= 13
    counts, notes = tokens(1600, a=1, few=1)
    assert sum(counts.values()) == 1600
    assert notes == [
        f"Source {tmp_path / 'few.jsonl'} ran out of train text after {counts['few']} tokens: the other sources"
        " filled up its share."
    ]


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"weights": (1.0,)}, "There are 1 weights for 2 sources: give one for each, or none."),
        ({"weights": (1.0, 0.0)}, "Weights are 1.0, 0.0, and each must be above 0."),
        ({"text": ()}, 'A corpus needs at least one source of text, for example "python".'),
    ],
)
def test_weights_that_do_not_fit_are_refused(settings_: dict, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        CorpusConfig(**{"text": ("a", "b"), **settings_})
    assert str(error.value) == sentence


def test_joined_blocks_are_those_of_all_parts(tmp_path: Path) -> None:
    parts = []
    for number, counted in ((0, False), (1, True)):
        packer = Packer(8, SEPARATOR, None, 100, "train", with_counted=counted)
        documents = [TokenDocument(f"{number} {n}", [2 + n] * n, np.zeros(n, bool)) for n in range(12)]
        parts.append(packer.concatenated(documents, 1000))
    joined = TokenBlocks.joined(parts)
    assert joined.ids.tolist() == parts[0].ids.tolist() + parts[1].ids.tolist()
    owners = parts[1].documents
    assert (
        joined.documents[parts[0].n_blocks :].tolist()
        == np.where(owners == PADDING, PADDING, owners + 12).tolist()
    )
    assert list(joined.names) == [*parts[0].names, *parts[1].names]
    assert joined.counted is not None
    assert joined.counted.sum() == parts[0].ids.size
    joined.save(tmp_path / "blocks")
    loaded = TokenBlocks.load(tmp_path / "blocks")
    assert loaded.hash == joined.hash
    assert loaded.counted is not None
    assert (loaded.counted == joined.counted).all()
    with pytest.raises(InputError) as error:
        TokenBlocks.joined(
            [parts[0], Packer(9, SEPARATOR, None, 100, "train").isolated([TokenDocument("a", [2])], 9)]
        )
    assert str(error.value) == "Token blocks with context_length 8 and 9 cannot be joined."


def test_the_hash_and_counts_are_those_of_whole_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (50, 8)).astype(np.uint16)
    documents = np.repeat(np.arange(50, dtype=np.int32), 8).reshape(50, 8)
    documents[:, 6:] = PADDING
    names = [f"n{n}" for n in range(50)]
    whole = TokenBlocks(ids, documents, names, "train", "isolated", False)
    expected = whole.hash, whole.n_tokens, [whole.first_tokens(n).n_blocks for n in (1, 6, 7, 100, 10**6)]
    monkeypatch.setattr("activations.blocks.CHUNK", 24)
    again = TokenBlocks(ids, documents, names, "train", "isolated", False)
    assert (again.hash, again.n_tokens) == expected[:2] == (whole.hash, 300)
    assert [again.first_tokens(n).n_blocks for n in (1, 6, 7, 100, 10**6)] == expected[2] == [1, 1, 2, 17, 50]


@pytest.mark.parametrize("pack", [Packer.concatenated, Packer.isolated])
def test_the_first_blocks_do_not_depend_on_what_follows(
    pack: Callable[..., TokenBlocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activations.blocks.CHUNK", 24)
    documents = [TokenDocument(f"näme {n}", list(range(2, 4 + n % 23))) for n in range(60)]
    long = pack(Packer(8, SEPARATOR, None, 100, "train"), documents, 10**6)
    short = pack(Packer(8, SEPARATOR, None, 100, "train"), documents[:30], 10**6)
    in_memory = replace(long, names=list(long.names))
    long.save(tmp_path / "long")
    mapped = TokenBlocks.load(tmp_path / "long")
    for n in (0, 1, 2, 7, short.n_blocks - 1):  # the last one of the short ones may be padded
        owners = long.documents[:n]
        expected = [f"näme {i}" for i in range(len(set(owners[owners != PADDING].tolist())))]
        firsts = [blocks.first(n) for blocks in (short, long, mapped, in_memory)]
        assert [list(first.names) for first in firsts] == [expected] * 4
        assert len({first.hash for first in firsts}) == 1
    assert short.first_tokens(100).hash == mapped.first_tokens(100).hash
    assert long.first(long.n_blocks).hash == long.hash
    names = mapped.first(7).names
    assert isinstance(names, StringTable)
    assert np.shares_memory(names.text, mapped.names.text)  # still in the file
    assert np.shares_memory(names.offsets, mapped.names.offsets)
    mapped.first(7).save(tmp_path / "first")
    assert TokenBlocks.load(tmp_path / "first").names == firsts[3].names[: len(names)]


def test_blocks_are_believed_unless_they_are_to_be_verified(tmp_path: Path) -> None:
    packer = Packer(8, SEPARATOR, None, 100, "train")
    blocks = packer.concatenated([TokenDocument("a", list(range(2, 60)))], 100)
    blocks.save(tmp_path / "blocks")
    path = tmp_path / "blocks" / "ids.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert TokenBlocks.load(tmp_path / "blocks", verify=False).hash == blocks.hash
    with pytest.raises(InputError, match="does not match the hash"):
        TokenBlocks.load(tmp_path / "blocks")


MEMORY = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from activations.corpus import Corpus, CorpusConfig

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024

backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()

class Words:
    separator_id, bos_id, adds_bos, vocab_size, definition = 2, None, False, 3, backend.to_str()

    def encode_batch(self, texts):
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

blocks = Corpus(CorpusConfig((sys.argv[1],))).blocks(Words(), "train", int(sys.argv[2]), 128)
blocks.save(sys.argv[3] + "/blocks")
assert blocks.n_tokens >= int(sys.argv[2])
print(anonymous())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """RssAnon after packing 1 and 10 million tokens from corpora of these sizes."""
    memory = []
    for millions in (1, 10):
        path = tmp_path / f"{millions}.jsonl"
        with path.open("w") as file:
            for number in range(millions * 1100):
                file.write(json.dumps({"text": f"{number} " + "a b " * 510}) + "\n")
        words = [
            sys.executable,
            "-c",
            MEMORY,
            str(path),
            str(millions * 10**6),
            str(tmp_path / str(millions)),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        memory.append(int(done.stdout))
    print(memory)
    assert memory[1] - memory[0] < 20, memory
