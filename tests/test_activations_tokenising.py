"""Token ids are those of the tokenizer alone, whoever computes them: this process, others, the cache."""

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from activations import tokenising
from activations.cache import Cache
from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.token_worker import WorkerProcess
from activations.tokenising import Tokenising
from activations.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    hf = copy.deepcopy(tiny_tokenizer())
    hf.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.chat_template = template
    return hf


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_texts(path: Path, n: int = 300) -> str:
    return rows_file(
        path, [{"text": f"Text {i}: naïve 😀 " + "def f(x): return x\n" * (i % 20)} for i in range(n)]
    )


def all_ids(corpus: Corpus, tokenizer: Tokenizer, **options: Any) -> list[tuple[int, list[int]]]:
    found = corpus._documents
    with Tokenising(found, tokenizer, 10**9, **options) as tokens:
        return [(place, ids.tolist()) for place, ids, _ in tokens.read(corpus._order(found, "train"))]


def test_processes_give_the_ids_of_one_process_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "FIRST_BATCH_BYTES", 2000)
    monkeypatch.setattr(tokenising, "BATCH_BYTES", 8000)
    corpus, tokenizer = Corpus(CorpusConfig((some_texts(tmp_path / "a.jsonl"),))), Tokenizer(tiny_tokenizer())
    expected = [tokenizer.encode(document.text) for document in corpus.documents("train")]
    results = []
    for n_processes in (1, 2, 3):
        monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / f"cache {n_processes}"))
        results.append(all_ids(corpus, tokenizer, n_processes=n_processes))
    assert [ids for _, ids in results[0]] == expected
    assert results[1] == results[2] == results[0]


def test_a_worker_loads_no_torch_and_tells_what_is_wrong(tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig((some_texts(tmp_path / "a.jsonl"),)))
    found = corpus._documents
    pieces = [found.piece(place) for place in range(3)]
    definition = Tokenizer(tiny_tokenizer()).definition
    assert definition is not None
    worker = WorkerProcess(definition)
    try:
        ids, ends = worker.tokenise(pieces)
        assert len(ends) == 3
        assert ends[-1] == len(ids)
        maps = Path(f"/proc/{worker._process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        (tmp_path / "a.jsonl").write_text("\n")
        with pytest.raises(InputError, match="has changed since it was looked through"):
            worker.tokenise(pieces)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(InputError) as error:
            worker.tokenise(pieces)
        assert str(error.value) == "A tokenising process ended early (status -9): free memory and run again."
    finally:
        worker.kill()
        worker.close()


def test_an_error_in_a_process_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(tokenising, "PARALLEL_CORES", 1)
    monkeypatch.setattr(tokenising, "n_cores", lambda: 2)
    corpus = Corpus(CorpusConfig((some_texts(tmp_path / "a.jsonl"),)))
    assert corpus.left_out == {}
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has changed since it was looked through"):
        corpus.blocks(Tokenizer(tiny_tokenizer()), "train", 10**6, 32)


def test_what_was_tokenised_once_is_not_tokenised_again(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig((some_texts(tmp_path / "a.jsonl"),))
    tokenizer = Tokenizer(tiny_tokenizer())
    first = Corpus(config).blocks(tokenizer, "train", 5000, 32).hash
    # The same texts under another name and as other files.
    moved = CorpusConfig((some_texts(tmp_path / "b.jsonl"),))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", None)
        assert Corpus(config).blocks(tokenizer, "train", 5000, 32).hash == first
        Corpus(moved).blocks(tokenizer, "train", 5000, 64)
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["return"])
    assert Corpus(config).blocks(Tokenizer(other), "train", 5000, 32).hash != first

    for item in own_cache.glob("tokens/*/*"):  # damaged: tokenised again, to the same
        data = bytearray(item.read_bytes())
        data[len(data) // 2] ^= 1
        item.write_bytes(data)
    assert Corpus(config).blocks(tokenizer, "train", 5000, 32).hash == first
    for item in own_cache.glob("tokens/*/*"):
        item.write_bytes(item.read_bytes()[:10])
    assert Corpus(config).blocks(tokenizer, "train", 5000, 32).hash == first


def test_the_cache_forgets_what_was_used_longest_ago(own_cache: Path) -> None:
    cache = Cache("things", max_bytes=250)
    for number, key in enumerate(("aa1", "ab2", "ac3")):
        with cache.new(key) as path:
            path.write_bytes(b"x" * 100)
        os.utime(cache.folder / key[:2] / key, (number + 1000, number + 1000))
    os.utime(cache.folder / "aa" / "aa1", (5000, 5000))
    cache.trim()
    assert [cache.find(key) is not None for key in ("aa1", "ab2", "ac3")] == [True, False, True]
    with pytest.raises(ZeroDivisionError), cache.new("ad4") as path:
        path.write_bytes(b"half")
        _ = 1 / 0
    assert cache.find("ad4") is None
    assert not list(cache.folder.rglob(".unfinished*"))


def test_a_cache_that_cannot_be_written_does_not_stop_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "a file" / "cache"))
    corpus = Corpus(CorpusConfig((some_texts(tmp_path / "a.jsonl"),)))
    assert corpus.blocks(Tokenizer(tiny_tokenizer()), "train", 1000, 32).n_tokens >= 1000


@pytest.mark.parametrize("parallel", [False, True])
def test_given_token_ids_are_taken_as_they_are(
    tmp_path: Path, parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(tokenising, "n_cores", lambda: tokenising.PARALLEL_CORES - (not parallel))
    tokenizer = Tokenizer(chat_tokenizer())
    bos = tokenizer.bos_id
    rows = [
        {"input_ids": [bos, 5, n % 200, bos, 7]} if n % 2 else {"input_ids": [n % 100] * 3}
        for n in range(100)
    ]
    rows += [{"input_ids": []}, {"input_ids": [bos]}]
    corpus = Corpus(CorpusConfig((rows_file(tmp_path / "ids.jsonl", rows) + "?tokens=input_ids",), bos=True))
    blocks = corpus.blocks(tokenizer, "train", 10**5, 16)
    assert corpus.left_out["empty"] == 1
    assert (blocks.ids[:, 0] == bos).all()
    kept = np.delete(blocks.ids, 0, axis=1)[np.delete(blocks.documents, 0, axis=1) >= 0]
    documents = [
        part[1:] for part in np.split(kept, np.flatnonzero(kept == tokenizer.separator_id)) if len(part) > 1
    ]
    unique = {tuple(row["input_ids"][1:] if n % 2 else row["input_ids"]) for n, row in enumerate(rows[:100])}
    assert {tuple(part.tolist()) for part in documents} <= unique
    assert len(documents) > 0.8 * len(unique)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    for wrong in (tokenizer.vocab_size, -1):
        source = rows_file(tmp_path / "ids.jsonl", [{"ids": [1, 2, n, wrong]} for n in range(20)])
        with pytest.raises(InputError) as error:
            Corpus(CorpusConfig((f"{source}?tokens=ids",))).blocks(tokenizer, "train", 1000, 8)
        assert str(error.value) == (
            f"{source} holds token id {wrong} in column 'ids', and the model's vocabulary has {tokenizer.vocab_size}:"
            " give ids that were made with its tokenizer."
        )
    source = rows_file(tmp_path / "ids.jsonl", [{"ids": ["a"]}])
    with pytest.raises(InputError) as error:
        Corpus(CorpusConfig((f"{source}?tokens=ids",))).blocks(tokenizer, "train", 1000, 8)
    assert (
        str(error.value) == f"{source} line 1 has no list of token ids in column 'ids': name one that does."
    )


def chats(n: int = 60) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "system", "content": f"Be brief {i}."},
            {"role": "user", "content": "What is\n\n1 + 1?"},
            {"role": "assistant", "content": "Two." * (i % 5 + 1)},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": " Because."},
        ][: 5 if i % 3 else 3]
        for i in range(n)
    ]


def test_chats_are_rendered_as_the_template_does_without_a_second_bos(tmp_path: Path) -> None:
    hf = chat_tokenizer()
    tokenizer = Tokenizer(hf)
    source = (
        rows_file(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats()]) + "?messages=messages"
    )
    corpus = Corpus(CorpusConfig((source,), packing="isolated", bos=True))
    blocks = corpus.blocks(tokenizer, "train", 10**6, 256)
    expected = {tuple(hf.apply_chat_template(chat, return_dict=False)) for chat in chats()}
    assert blocks.n_blocks > 40
    for row, owners in zip(blocks.ids, blocks.documents, strict=True):
        assert tuple(row[owners >= 0].tolist()) in expected  # which begin with BOS, once
    assert blocks.counted is None


def test_only_chosen_roles_count(tmp_path: Path) -> None:
    tokenizer = Tokenizer(chat_tokenizer())
    source = (
        rows_file(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats()]) + "?messages=messages"
    )
    texts = rows_file(tmp_path / "texts.jsonl", [{"text": f"plain text {n}"} for n in range(50)])
    config = CorpusConfig((source, texts), packing="isolated", roles=("assistant",))
    blocks = Corpus(config).blocks(tokenizer, "train", 10**6, 256)
    assert blocks.counted is not None
    n_chats = 0
    for row, owners, counted in zip(blocks.ids, blocks.documents, blocks.counted, strict=True):
        real = row[owners >= 0].tolist()
        assert not counted[owners < 0].any()
        if blocks.names[owners[0]].startswith("texts"):
            assert counted[owners >= 0].all()
            continue
        n_chats += 1
        text = tokenizer.decode(real)
        spans = "".join(
            f"<|im_start|>{part}" for part in text.split("<|im_start|>") if part.startswith("assistant")
        )
        assert tokenizer.decode(row[counted].tolist()) == spans
    assert n_chats > 40


@pytest.mark.parametrize(
    ("template", "roles", "sentence"),
    [
        (
            None,
            (),
            "The model's tokenizer has no chat template: take an instruction-tuned model, or give a column of text.",
        ),
        (
            "{{ raise_exception('System role not supported') }}",
            (),
            "The model's chat template does not render a chat of system → user → assistant (System role not"
            " supported): leave such chats out.",
        ),
        (
            "{{ messages | length }}" + CHAT_TEMPLATE,
            ("user",),
            "The chat template writes the first 1 of 3 messages differently when others follow, so that tokens of a"
            " role cannot be told: leave roles out.",
        ),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(
    tmp_path: Path, template: str | None, roles: tuple[str, ...], sentence: str
) -> None:
    source = rows_file(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats(60)[::3]])
    config = CorpusConfig((f"{source}?messages=messages",), roles=roles)
    with pytest.raises(InputError) as error:
        Corpus(config).blocks(Tokenizer(chat_tokenizer(template)), "train", 1000, 64)
    assert str(error.value) == sentence


def test_what_is_no_chat_is_refused(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "chats.jsonl", [{"messages": [{"from": "human", "value": "Hi"}]}])
    with pytest.raises(InputError) as error:
        Corpus(CorpusConfig((f"{source}?messages=messages",))).left_out  # noqa: B018
    assert str(error.value) == (
        f"{source} line 1 has no list of messages, each with role and content, in column 'messages': name one"
        " that does."
    )
    with pytest.raises(InputError) as error:
        config = CorpusConfig((some_texts(tmp_path / "a.jsonl"),), roles=("user",))
        Corpus(config).blocks(Tokenizer(chat_tokenizer()), "train", 100, 16)
    assert str(error.value) == (
        "roles chooses among the messages of chats, and no source has them: give one with ?messages=COLUMN."
    )
