"""Text to ids and back, exactly, for byte-level BPE and for SentencePiece-like tokenizers."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import END_OF_TEXT, VOCABULARY, tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from activations.errors import InputError
from activations.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizer())


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """The layout of Llama 2's tokenizer: spaces as ▁, one put in front, byte fallback, BOS by default."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(c) for c in range(33, 127)]
    merges = [("▁", "a"), ("d", "e"), ("▁", "de"), ("▁de", "f")]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


LLAMA2 = Tokenizer(llama2_tokenizer())


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_join_to_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    pieces = BYTE_LEVEL.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids) == text


@given(st.lists(st.integers(0, VOCABULARY - 1)))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_hugging_face_does_and_pieces_join(ids: list[int]) -> None:
    text = BYTE_LEVEL.decode(ids)
    assert text == tiny_tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(BYTE_LEVEL.pieces(ids)) == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd"), min_size=1))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_pieces_join_to_the_text(text: str) -> None:
    ids = LLAMA2.encode(text)
    pieces = LLAMA2.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == LLAMA2.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA2], ids=["byte_level", "llama2"])
@given(prompt=st.text("ab de😀é", min_size=1), text=st.text("ab de😀é"))
@settings(max_examples=100, deadline=None)
def test_decoding_token_by_token_gives_the_text(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids, start = tokenizer.encode(prompt + "|" + text), len(tokenizer.encode(prompt + "|"))
    decoder = tokenizer.text_decoder(ids[:start])
    steps = [decoder.step(i) for i in ids[start:]]
    assert "".join(steps) + decoder.finish() == tokenizer.decode(ids)[len(prompt) + 1 :] == text
    assert "\ufffd" not in "".join(steps)


def test_a_character_over_several_tokens_stands_at_the_first() -> None:
    # 😀 is four bytes; the tiny vocabulary has merged none of them with the letters beside it.
    emoji = BYTE_LEVEL.encode("😀")
    ids = [*BYTE_LEVEL.encode("x"), *emoji, *BYTE_LEVEL.encode("y")]
    assert BYTE_LEVEL.pieces(ids) == ["x", "😀", *[""] * (len(emoji) - 1), "y"]
    assert LLAMA2.pieces(LLAMA2.encode("a😀b")) == ["a", "😀", "", "", "", "b"]


def byte_token(byte: int) -> int:
    """The id of a single-byte token of the tiny tokenizer, by its display text."""
    return BYTE_LEVEL.vocabulary().index(f"<0x{byte:02X}>")


def test_broken_characters_show_as_replacements_in_their_place() -> None:
    a = BYTE_LEVEL.encode("a")[0]
    # F0 9F begin a four-byte character that never ends; E2 alone begins another.
    ids = [byte_token(0xF0), byte_token(0x9F), a, byte_token(0xE2)]
    assert BYTE_LEVEL.pieces(ids) == ["\ufffd", "", "a", "\ufffd"]
    # 98 continues nothing: one replacement each.
    assert BYTE_LEVEL.pieces([byte_token(0x98), byte_token(0x98)]) == ["\ufffd", "\ufffd"]


def test_vocabulary_shows_every_token() -> None:
    vocabulary = BYTE_LEVEL.vocabulary()
    assert len(vocabulary) == BYTE_LEVEL.vocab_size == VOCABULARY
    assert vocabulary[END_OF_TEXT] == "<|endoftext|>"
    assert vocabulary[BYTE_LEVEL.encode("a")[0]] == "a"
    assert vocabulary[BYTE_LEVEL.encode(" ")[0]] == " "
    assert "<0xE2>" in vocabulary
    assert not any("\ufffd" in text for text in vocabulary)
    assert vocabulary is BYTE_LEVEL.vocabulary()
    assert LLAMA2.vocabulary()[3 + 0xE2] == "<0xE2>"
    assert LLAMA2.vocabulary()[-1] == " def"


def test_ids_that_only_the_model_has() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), vocab_size=VOCABULARY + 4)
    assert tokenizer.vocab_size == VOCABULARY + 4
    assert tokenizer.vocabulary()[-1] == f"<unused {VOCABULARY + 3}>"
    assert tokenizer.pieces([VOCABULARY, tokenizer.encode("a")[0]]) == ["", "a"]


def test_special_tokens_of_a_tokenizer_without_bos() -> None:
    assert BYTE_LEVEL.bos_id is None
    assert not BYTE_LEVEL.adds_bos
    assert BYTE_LEVEL.separator_id == END_OF_TEXT
    assert BYTE_LEVEL.eos_ids == BYTE_LEVEL.special_ids == {END_OF_TEXT}
    assert Tokenizer(tiny_tokenizer(), [5, 7]).eos_ids == {5, 7}
    assert Tokenizer(tiny_tokenizer(), [5, 7]).special_ids == {END_OF_TEXT, 5, 7}


def test_bos_is_added_on_request_only_and_never_twice() -> None:
    assert (LLAMA2.bos_id, LLAMA2.separator_id, LLAMA2.adds_bos) == (1, 2, True)
    assert LLAMA2.special_ids == {0, 1, 2}
    plain = LLAMA2.encode("def a")
    assert LLAMA2.decode(plain) == "def a"
    assert 1 not in plain
    assert LLAMA2.encode("def a", bos=True) == [1, *plain]
    assert LLAMA2.encode("<s>a", bos=True).count(1) == 1
    assert LLAMA2.encode_batch(["def a", ""]) == [plain, []]
    assert Tokenizer(llama2_tokenizer(), adds_bos=False).adds_bos is False


def test_long_texts_are_not_cut_and_the_given_tokenizer_is_not_changed() -> None:
    given_tokenizer = llama2_tokenizer()
    given_tokenizer.backend_tokenizer.enable_truncation(4)
    given_tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer = Tokenizer(given_tokenizer)
    assert len(tokenizer.encode("a" * 50)) == 50
    assert len(tokenizer.encode("a")) == 1
    assert given_tokenizer.backend_tokenizer.truncation["max_length"] == 4


def test_hash_depends_on_what_decides_the_ids() -> None:
    trained = tiny_tokenizer()
    assert Tokenizer(trained).hash == Tokenizer(copy.deepcopy(trained)).hash
    assert len({Tokenizer(trained).hash, LLAMA2.hash, Tokenizer(trained, [5]).hash}) == 3


def test_tokenizers_that_cannot_be_used() -> None:
    with pytest.raises(InputError) as error:
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE())))
    assert str(error.value) == "The tokenizer is empty: its files are missing beside the model's."
    backend = Backend(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(InputError) as error:
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert str(error.value) == (
        "The tokenizer has no end-of-text token to separate documents: name one as eos_token in its"
        " tokenizer_config.json."
    )
    with pytest.raises(InputError) as error:
        BYTE_LEVEL.encode("a", bos=True)
    assert str(error.value) == "The tokenizer has no BOS token to put in front of a text: leave bos off."
