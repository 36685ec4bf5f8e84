"""Every kind of source gives the same documents as a plain reading of it, or one sentence."""

import bz2
import gzip
import json
import lzma
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.corpus import Corpus, CorpusConfig, split_of
from activations.errors import InputError
from activations.sources import copies, documents, hub
from activations.sources.reading import Piece, read_pieces
from activations.sources.spec import SourceSpec, parse_source

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    # Two frames: parallel compressors write many.
    ".zst": lambda data: b"".join(zstandard.compress(half) for half in (data[:50], data[50:])),
}
TEXTS = [f"Text {number}: naïve 😀 \r\n".ljust(60, "y") for number in range(400)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache of this test"
    monkeypatch.setenv("SAESCOPE_CACHE", str(folder))
    return folder


def texts(*sources: object, **settings: Any) -> dict[str, str]:
    """{name: text} of all documents."""
    corpus = Corpus(CorpusConfig(text=tuple(map(str, sources)), **settings))
    found = [document for split in ("train", "score", "test") for document in corpus.documents(split)]
    assert len({document.name for document in found}) == len(found)
    return {document.name: document.text for document in found}


def refusal(*sources: object, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        texts(*sources, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_file_of_rows_is_the_same_however_it_is_compressed(tmp_path: Path, suffix: str) -> None:
    data = jsonl([{"id": number, "body": text} for number, text in enumerate(TEXTS)])
    path = tmp_path / f"news.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](data) if suffix else data)
    expected = {f"news.jsonl{suffix}:{number}": text for number, text in enumerate(TEXTS, start=1)}
    assert texts(path, column="body") == expected
    assert texts(f"{path}?column=body") == expected  # from the cache, where there is a copy


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_texts_are_read_as_plain_ones(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(TEXTS[:20]):
        (tmp_path / f"{number}.md{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert texts(tmp_path) == {
        f"{n}.md{suffix}": text.replace("\r\n", "\n") for n, text in enumerate(TEXTS[:20])
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_gives_the_texts_of_its_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"id": list(range(402)), "body": [*TEXTS, None, " "]})
    pq.write_table(table, path, row_group_size=100)
    if suffix:
        (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "rows.parquet.gz"
    assert texts(f"{path}?column=body") == {f"{path.name}:{n}": text for n, text in enumerate(TEXTS, start=1)}
    corpus = Corpus(CorpusConfig(text=(f"{path}?column=body",)))
    assert corpus.left_out == {"empty": 2}


def test_sources_and_options_are_read_from_one_string() -> None:
    assert parse_source("data/*.parquet?column=body", "text") == SourceSpec(
        "data/*.parquet?column=body", "data/*.parquet", "text", "body"
    )
    assert parse_source("hf:org/name?config=en&split=train&revision=a%2Fb&tokens=ids", "text") == SourceSpec(
        "hf:org/name?config=en&split=train&revision=a%2Fb&tokens=ids",
        "hf:org/name",
        "tokens",
        "ids",
        "en",
        "train",
        "a/b",
    )
    assert parse_source("part-?.txt", "text").location == "part-?.txt"
    assert parse_source("part-?.jsonl?messages=chat", "text").location == "part-?.jsonl"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "a.jsonl?field=b",
            "Source a.jsonl?field=b has an option 'field': the options of a source are column, tokens, messages,"
            " config, split, revision.",
        ),
        ("a.jsonl?split=", "Source a.jsonl?split= must give its option 'split' once, with a value."),
        (
            "a.jsonl?column=b&tokens=c",
            "Source a.jsonl?column=b&tokens=c names more than one column: give one of column, tokens, messages.",
        ),
    ],
)
def test_wrong_options_are_refused(source: str, sentence: str) -> None:
    assert refusal(source) == sentence


def test_a_large_file_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "INDEX_KEPT_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl([{"text": text} for text in TEXTS]))
    first = Corpus(CorpusConfig(text=(str(path),)))
    before = first.hash
    monkeypatch.setattr(documents, "index_jsonl", None)
    assert Corpus(CorpusConfig(text=(str(path),))).hash == before
    monkeypatch.undo()


def test_a_damaged_copy_is_made_again(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([{"text": text} for text in TEXTS])))
    before = texts(path)
    (copy,) = own_cache.rglob(copies.ROWS_FILE)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert texts(path) == before
    assert copy.read_bytes() != data


def test_a_copy_is_standard_compressed_jsonl(tmp_path: Path, own_cache: Path) -> None:
    long = ["z" * 100_000, *TEXTS]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": long}), path)
    assert set(texts(path).values()) == set(long)
    (copy,) = own_cache.rglob(copies.ROWS_FILE)
    with copy.open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    assert [json.loads(line)["text"] for line in data.splitlines()] == long


@given(
    rows=st.lists(
        st.one_of(
            st.text(max_size=200),
            st.builds(str.__mul__, st.text(min_size=1, max_size=3), st.integers(0, 300)),
            st.none(),
        ),
        max_size=30,
    ),
    frame=st.sampled_from([1, 100, copies.FRAME_BYTES]),
)
@settings(max_examples=200, deadline=None)
def test_rows_come_back_from_a_copy(rows: list[str | None], frame: int) -> None:
    """Texts are read at random, in any order, as they were written."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "FRAME_BYTES", frame)
        new = Path(folder) / "copy"
        copies.write_copy(new, [(n, {"text": row}) for n, row in enumerate(rows)], "text", "text", "rows")
        found = copies.open_copy(new)
        places = [(int(row["start"]), int(row["inner"]), int(row["length"])) for row in found.rows]
        pieces = [
            Piece(str(new / copies.ROWS_FILE), "frames", *place, "text", "text") for place in places[::-1]
        ]
        kept = {n: row for n, row in enumerate(rows) if row is not None and row.strip()}
        assert dict(zip(found.rows["row"].tolist()[::-1], read_pieces(pieces), strict=True)) == kept
        assert sum(found.left_out.values()) == len(rows) - len(kept)


def test_what_cannot_be_decoded_is_counted(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}',
        '{"text": "café"}'.encode("latin-1"),
        b"",
        b'{"text": null}',
        b'{"text": "two"}',
    ]
    for name, data in (("a.jsonl", b"\n".join(lines)), ("b.jsonl.gz", gzip.compress(b"\n".join(lines)))):
        (tmp_path / name).write_bytes(data)
        corpus = Corpus(CorpusConfig(text=(str(tmp_path / name),)))
        assert corpus.left_out == {"unreadable": 1, "empty": 1}
        assert texts(tmp_path / name) == {f"{name}:1": "one", f"{name}:5": "two"}
    strings = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    )
    pq.write_table(pa.table({"text": strings}), tmp_path / "c.parquet")
    corpus = Corpus(CorpusConfig(text=(str(tmp_path / "c.parquet"),)))
    assert corpus.left_out == {"unreadable": 1}
    assert texts(tmp_path / "c.parquet") == {"c.parquet:1": "a", "c.parquet:3": "b"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = COMPRESS[suffix](jsonl([{"text": text} for text in TEXTS]))
    path.write_bytes(whole[:-20])
    assert refusal(path) == f"{path} is truncated: its compressed data end too early, copy it again."
    path.write_bytes(b"this is not compressed in any way")
    assert refusal(path).startswith(f"{path} is no sound {suffix} file (")
    assert refusal(path).endswith("): copy it again.")


def test_what_is_no_parquet_and_missing_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet at all")
    assert refusal(path).startswith(f"{path} is no sound parquet file (")
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    assert refusal(path) == f"{path} has no column 'text': name the column to read (there are: id, body)."
    assert refusal(f"{path}?column=id") == f"{path} row 1 has no text in column 'id': name one that does."
    lines = tmp_path / "rows.jsonl.gz"
    lines.write_bytes(gzip.compress(jsonl([{"text": "a"}, {"id": 1}])))
    assert refusal(lines) == (
        f"{lines} row 2 has no column 'text': name the column that holds the text (there are: id)."
    )
    note = tmp_path / "note.txt"
    note.write_text("a note")
    assert refusal(f"{note}?tokens=ids") == (
        f"{note} is text and has no tokens: give .jsonl or .parquet files."
    )


def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl([{"text": text} for text in TEXTS]))
    corpus = Corpus(CorpusConfig(text=(str(path),)))
    assert corpus.left_out == {}
    path.write_bytes(b"\n" * 30)
    with pytest.raises(InputError) as error:
        corpus.documents("train")
    assert str(error.value) == f"{path} has changed since it was looked through: run again."


def test_several_sources_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": text} for text in TEXTS[:50]]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"body": text} for text in TEXTS[40:90]]))
    corpus = Corpus(CorpusConfig(text=(str(tmp_path / "a.jsonl"), f"{tmp_path / 'b.jsonl'}?column=body")))
    found = [document.text for split in ("train", "score", "test") for document in corpus.documents(split)]
    assert sorted(found) == sorted(TEXTS[:90])
    assert corpus.left_out == {"exact copy": 10}
    assert corpus.describe()["sources"][1] == {
        "source": f"{tmp_path / 'b.jsonl'}?column=body",
        "content": "text",
        "column": "body",
    }


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"id": list(range(400)), "body": TEXTS})
    rows.save_to_disk(str(tmp_path / "plain"))
    expected = {f"plain:{number}": text for number, text in enumerate(TEXTS, start=1)}
    assert texts(f"{tmp_path / 'plain'}?column=body") == expected
    both = datasets.DatasetDict({"train": rows, "validation": rows.select(range(5))})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(texts(f"{tmp_path / 'both'}?column=body")) == 400
    assert len(texts(f"{tmp_path / 'both'}?column=body&split=validation")) == 5
    assert refusal(f"{tmp_path / 'both'}?split=test") == (
        f"{tmp_path / 'both'} has no split 'test': there are train, validation."
    )
    assert refusal(tmp_path / "plain") == (
        f"{tmp_path / 'plain'} has no column 'text': name the column to read (there are: id, body)."
    )


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of 1,200 rows in three files, copied in parts of 5 kB: some 80 rows each."""
    monkeypatch.setattr(hub, "PART_BYTES", 5000)
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number in range(3):
        rows = [{"body": f"Row {number} {row} ".ljust(50, "w"), "n": row} for row in range(400)]
        (folder / f"part{number}.jsonl").write_bytes(jsonl(rows))
    return folder


class Bytes:
    """One token per byte."""

    separator_id, bos_id, vocab_size, adds_bos, definition = 0, None, 257, False, None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]


def test_a_streamed_dataset_is_read_as_far_as_needed_and_kept(
    streamed: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(text=(f"hf:{streamed}?column=body",))
    few = Corpus(config).blocks(Bytes(), "train", 2000, 100)  # type: ignore[arg-type]
    n_parts = len(list(own_cache.rglob(copies.ROWS_FILE)))
    assert n_parts == 1
    more = Corpus(config).blocks(Bytes(), "train", 10_000, 100)  # type: ignore[arg-type]
    assert len(list(own_cache.rglob(copies.ROWS_FILE))) == 4  # 1 and 2 parts hold too few
    assert more.n_tokens == 10_000

    calls = []
    monkeypatch.setattr(hub.StreamedDataset, "_open", lambda *arguments: calls.append(arguments))
    assert Corpus(config).blocks(Bytes(), "train", 2000, 100).hash == few.hash  # type: ignore[arg-type]
    assert Corpus(config).blocks(Bytes(), "train", 10_000, 100).hash == more.hash  # type: ignore[arg-type]
    assert not calls  # without the hub
    monkeypatch.undo()
    monkeypatch.setenv("SAESCOPE_CACHE", str(own_cache))
    monkeypatch.setattr(hub, "PART_BYTES", 5000)

    found = texts(f"hf:{streamed}?column=body")  # goes on where the copy ends, to the end
    rows = [json.loads(line)["body"] for n in range(3) for line in (streamed / f"part{n}.jsonl").open()]
    assert found == {f"{streamed}:{number}": row for number, row in enumerate(rows, start=1)}


def test_a_streamed_dataset_gives_the_same_whatever_is_there_already(streamed: Path, own_cache: Path) -> None:
    config = CorpusConfig(text=(f"hf:{streamed}?column=body",))
    texts(f"hf:{streamed}?column=body")
    after = Corpus(config).blocks(Bytes(), "train", 10_000, 100)  # type: ignore[arg-type]
    hash_after = Corpus(config).hash
    shutil.rmtree(own_cache)
    before = Corpus(config)
    hash_before = before.hash
    assert before.blocks(Bytes(), "train", 10_000, 100).hash == after.hash  # type: ignore[arg-type]
    assert hash_before == before.hash == hash_after


def test_a_stream_that_breaks_off_goes_on(
    streamed: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = texts(f"hf:{streamed}?column=body")
    shutil.rmtree(own_cache)
    config = CorpusConfig(text=(f"hf:{streamed}?column=body",))
    written = hub.write_copy

    def breaks(folder: Path, *arguments: Any, **options: Any) -> None:
        written(folder, *arguments, **options)
        if len(list(own_cache.rglob(copies.ROWS_FILE))) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub, "write_copy", breaks)
    corpus = Corpus(config)
    with pytest.raises(KeyboardInterrupt):
        corpus.documents("train")
    monkeypatch.setattr(hub, "write_copy", written)
    assert len(list(own_cache.rglob(copies.ROWS_FILE))) == 3
    corpus.documents("train")  # the same object
    assert texts(f"hf:{streamed}?column=body") == whole


def test_a_stream_describes_what_was_read(streamed: Path) -> None:
    source = f"hf:{streamed}?column=body&split=train"
    (facts,) = Corpus(CorpusConfig(text=(source,))).describe()["sources"]
    revision = facts.pop("revision")
    assert facts == {
        "source": source,
        "content": "text",
        "column": "body",
        "dataset": str(streamed),
        "config": None,
        "split": "train",
    }
    before = Corpus(CorpusConfig(text=(source,))).hash
    with (streamed / "part2.jsonl").open("a") as file:
        file.write('{"body": "one more", "n": 0}\n')
    assert Corpus(CorpusConfig(text=(source,))).describe()["sources"][0]["revision"] != revision
    assert Corpus(CorpusConfig(text=(source,))).hash != before


def test_a_local_dataset_that_changed_is_read_anew(streamed: Path) -> None:
    source = f"hf:{streamed}?column=body"
    assert len(texts(source)) == 1200
    path = streamed / "part0.jsonl"
    path.write_text('{"body": "a new first row", "n": 0}\n' + path.read_text())
    found = texts(source)
    assert len(found) == 1201
    assert found[f"{streamed}:1"] == "a new first row"


def test_a_damaged_part_is_streamed_again_in_its_place(streamed: Path, own_cache: Path) -> None:
    source = f"hf:{streamed}?column=body"
    before = texts(source)
    parts = sorted(own_cache.rglob(copies.ROWS_FILE))
    for damaged, missing in ((2, len(parts) - 1), (4, len(parts) - 1)):
        parts[damaged].write_bytes(parts[damaged].read_bytes()[:-1])
        shutil.rmtree(parts[missing].parent)
        assert texts(source) == before


def test_what_a_stream_lacks_is_said(streamed: Path) -> None:
    assert refusal(f"hf:{streamed}") == (
        f"Dataset {streamed} has no column 'text': name the column to read (there are: body, n)."
    )
    assert refusal(f"hf:{streamed}?split=nope") == (
        f"Dataset {streamed} cannot be read (Bad split: nope. Available splits: ['train']): check its name, config,"
        " split and revision and the connection to the hub, or give a local copy."
    )


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_hub_out_of_reach_is_one_sentence_within_ten_seconds(
    hangs: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*arguments: object, **options: object) -> None:
        if hangs:
            time.sleep(5)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "HUB_SECONDS", 1)
    if known:  # the revision is, from an earlier call, and nothing of the text
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha="0123abcd")
        )
        assert Corpus(CorpusConfig(("hf:org/name",))).hash
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    began = time.monotonic()
    reason = "no answer within 1 seconds" if hangs else "Name or service not known"
    assert refusal("hf:org/name") == (
        f"Dataset org/name cannot be read ({reason}): check its name, config, split and revision and the connection to"
        " the hub, or give a local copy."
    )
    assert time.monotonic() - began < 3


def test_the_revision_of_a_dataset_is_found_out_once(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def info(self: object, name: str, *, revision: str | None, timeout: float) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(sha="0123abcd")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    source = "hf:org/name?config=en&revision=v1"
    for _ in range(2):
        (facts,) = Corpus(CorpusConfig(text=(source,))).describe()["sources"]
        assert (facts["dataset"], facts["config"], facts["revision"]) == ("org/name", "en", "0123abcd")
    assert asked == [("org/name", "v1")]


def test_splits_do_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.parquet")
    corpus = Corpus(CorpusConfig(text=(str(tmp_path / "rows.parquet"),)))
    for split in ("train", "score", "test"):
        assert {document.text for document in corpus.documents(split)} == {
            t for t in TEXTS if split_of(t) == split
        }
