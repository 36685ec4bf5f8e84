"""Text to token ids and back, exactly.

We own tokenisation: no special token is ever added unasked, a BOS is put in front only on request and never
twice, and a token that holds a part of a UTF-8 character is shown as what it is.
"""

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from activations.errors import InputError


def _byte_table() -> dict[str, int]:
    """Character → byte: how GPT-2's byte-level BPE (Radford et al. 2019) writes each byte as a character.

    Printable bytes stand for themselves, the others are numbered from U+0100.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    table.update(
        {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in set(printable))}
    )
    return table


BYTE_OF_CHARACTER = _byte_table()


def _hex_bytes(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: bytes that are no UTF-8 show as ``<0xE2>``."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("saescope.hex", _hex_bytes)


def byte_pieces(tokens: Sequence[bytes]) -> list[str]:
    """The text of each of a sequence of tokens that are bytes; joined, they are the text of the joined bytes.

    A character that is spread over several tokens stands at the first of them, the others are ``""``. Bytes
    that are no UTF-8 become U+FFFD.
    """
    pieces = [""] * len(tokens)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    begun: int | None = None  # the token in which a character began that is not complete yet
    for index, token_bytes in enumerate(tokens):
        for offset in range(len(token_bytes)):
            if begun is None:
                try:
                    pieces[index] += token_bytes[offset:].decode()
                    break
                except UnicodeDecodeError:
                    begun = index
            text = utf8.decode(token_bytes[offset : offset + 1])
            if text:
                pieces[begun] += text[0]
                pieces[index] += text[1:]
                begun = index if utf8.getstate()[0] else None
    if begun is not None:
        pieces[begun] += utf8.decode(b"", final=True)
    return pieces


class Tokenizer:
    """A Hugging Face tokenizer with an explicit policy for special tokens and exact text for every token.

    Args:
        hf_tokenizer: the tokenizer, as ``AutoTokenizer`` gives it; it is not changed.
        eos_ids: the tokens that end a generation (a generation config may name several); the tokenizer's own
            end-of-text token when None or empty.
        vocab_size: how many ids the model has, when that is more than the tokenizer knows.
        adds_bos: whether texts for the model begin with BOS; None means as the tokenizer does by default.

    Attributes:
        bos_id: the beginning-of-text token, or None.
        separator_id: the end-of-text token, which joins documents.
        eos_ids: tokens that end a generation.
        special_ids: tokens that stand for no text.
        vocab_size: number of token ids.
        adds_bos: see above.

    Raises:
        InputError: the tokenizer is empty or has no end-of-text token.
    """

    def __init__(
        self,
        hf_tokenizer: Any,
        eos_ids: Sequence[int] | None = None,
        *,
        vocab_size: int | None = None,
        adds_bos: bool | None = None,
    ):
        self._hf = hf_tokenizer
        n_tokens = max(hf_tokenizer.get_vocab().values(), default=-1) + 1
        if n_tokens == 0:
            raise InputError("The tokenizer is empty: its files are missing beside the model's.")
        self.vocab_size: int = max(n_tokens, vocab_size or 0)
        self.bos_id: int | None = hf_tokenizer.bos_token_id
        eos_id: int | None = hf_tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids or ([] if eos_id is None else [eos_id]))
        separator = eos_id if eos_id is not None else min(self.eos_ids, default=self.bos_id)
        if separator is None:
            raise InputError(
                "The tokenizer has no end-of-text token to separate documents: name one as eos_token in its"
                " tokenizer_config.json."
            )
        self.separator_id: int = separator
        added = hf_tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {int(i): token.content for i, token in added.items()}
        special = {*hf_tokenizer.all_special_ids, *(int(i) for i, token in added.items() if token.special)}
        special |= {*self.eos_ids, separator, *([] if self.bos_id is None else [self.bos_id])}
        self.special_ids = frozenset(special)
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is not None and (backend.truncation is not None or backend.padding is not None):
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        if adds_bos is None:
            default_ids = hf_tokenizer("a")["input_ids"] if backend is None else backend.encode("a").ids
            adds_bos = self.bos_id is not None and default_ids[:1] == [self.bos_id]
        self.adds_bos: bool = adds_bos
        self._is_byte_level = backend is not None and type(backend.decoder).__name__ == "ByteLevel"

    @cached_property
    def hash(self) -> str:
        """sha256 over everything that decides which ids a text becomes."""
        if self._backend is not None:
            definition = self._backend.to_str()
        else:
            definition = json.dumps([type(self._hf).__name__, sorted(self._hf.get_vocab().items())])
        policy = json.dumps([self.bos_id, self.adds_bos, self.separator_id, sorted(self.special_ids)])
        return hashlib.sha256((definition + policy).encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of ``text``; with ``bos``, BOS in front unless the text begins with it already.

        The text of a special token (``<|endoftext|>``) becomes that token.

        Raises:
            InputError: ``bos`` was asked for and the tokenizer has none.
        """
        ids = self.encode_batch([text])[0]
        if bos and self.bos_id is None:
            raise InputError("The tokenizer has no BOS token to put in front of a text: leave bos off.")
        if bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            ids.insert(0, self.bos_id)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS; several texts at once are encoded on all cores."""
        if self._backend is not None:
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [list(self._hf.encode(text, add_special_tokens=False)) for text in texts]

    @property
    def definition(self) -> str | None:
        """JSON for ``tokenizers.Tokenizer.from_str``; None for a tokenizer that is written in Python."""
        return None if self._backend is None else str(self._backend.to_str())

    def encode_chats(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], roles: Sequence[str] = ()
    ) -> list[tuple[list[int], np.ndarray | None]]:
        """Token ids of each chat (messages of role and content), rendered through the model's chat template.

        With ``roles``, also which tokens belong to messages of these roles (bool ``[n_tokens]``), what the template
        puts around a message included. Where a span ends is found by rendering the messages up to there: their ids
        must be the first of the whole chat's.

        Raises:
            InputError: the tokenizer has no chat template, or the template does not render a chat or its beginning.
        """
        if not self._hf.chat_template:
            raise InputError(
                "The model's tokenizer has no chat template: take an instruction-tuned model, or give a column of text."
            )
        ends = [_role_ends(chat, roles) for chat in chats]
        beginnings = [
            self._render(chat[:n]) for chat, chat_ends in zip(chats, ends, strict=True) for n in chat_ends
        ]
        encoded = iter(self.encode_batch(beginnings))
        found: list[tuple[list[int], np.ndarray | None]] = []
        for chat, chat_ends in zip(chats, ends, strict=True):
            chat_ids = [next(encoded) for _ in chat_ends]
            counted = _counted(chat, chat_ends, chat_ids, roles) if roles else None
            found.append((chat_ids[-1], counted))
        return found

    def _render(self, chat: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(self._hf.apply_chat_template(list(chat), tokenize=False))
        except Exception as error:  # a template raises what it likes
            found = " → ".join(str(message["role"]) for message in chat)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"The model's chat template does not render a chat of {found} ({reason}): leave such chats out."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        if self._is_byte_level:
            return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")
        known = [int(i) for i in ids if self._token(i) is not None]
        text: str = self._hf.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token in its place: one string per token, ``"".join(pieces(ids)) == decode(ids)``.

        A character that is spread over several tokens stands at the first of them; the others are ``""``.
        """
        if self._is_byte_level:
            return byte_pieces([self._bytes(token_id) for token_id in ids])
        return self._window_pieces(ids)

    def _window_pieces(self, ids: Sequence[int]) -> list[str]:
        pieces = [""] * len(ids)
        decoder = _WindowDecoder(self, ())
        begun = 0
        for index, token_id in enumerate(ids):
            text = decoder.step(int(token_id))
            if text:
                pieces[begun] += text
            if not decoder.holds_back:
                begun = index + 1
        if begun < len(ids):
            pieces[begun] += decoder.finish()
        return pieces

    def vocabulary(self) -> list[str]:
        """Display text of each of the ``vocab_size`` ids; a partial UTF-8 byte shows as ``<0xE2>``."""
        return self._vocabulary

    def text_decoder(self, context: Sequence[int] = ()) -> "TextDecoder":
        """A decoder for the continuation of ``context`` that takes one token at a time."""
        return _ByteDecoder(self) if self._is_byte_level else _WindowDecoder(self, context)

    @cached_property
    def _vocabulary(self) -> list[str]:
        tokens = [self._token(i) for i in range(self.vocab_size)]
        if self._is_byte_level:
            return [
                f"<unused {i}>" if token is None else self._bytes(i).decode("utf-8", errors="saescope.hex")
                for i, token in enumerate(tokens)
            ]
        return [
            f"<unused {i}>" if token is None else token.replace("▁", " ") for i, token in enumerate(tokens)
        ]

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self._hf.get_vocab().items()}

    def _token(self, token_id: int) -> str | None:
        return self._tokens.get(int(token_id))

    @cached_property
    def _byte_strings(self) -> dict[int, bytes]:
        """Byte-level BPE only: the bytes of every token."""
        strings = {}
        for token_id, token in self._tokens.items():
            if token_id in self._added or not all(c in BYTE_OF_CHARACTER for c in token):
                strings[token_id] = self._added.get(token_id, token).encode()
            else:
                strings[token_id] = bytes(BYTE_OF_CHARACTER[c] for c in token)
        return strings

    def _bytes(self, token_id: int) -> bytes:
        return self._byte_strings.get(int(token_id), b"")


def _role_ends(chat: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[int]:
    """How many messages there are up to each place where tokens begin or cease to count; all of them last."""
    counts = [message["role"] in roles for message in chat]
    return [n for n in range(1, len(chat)) if counts[n] != counts[n - 1]] + [len(chat)]


def _counted(
    chat: Sequence[Mapping[str, Any]],
    ends: Sequence[int],
    beginnings: Sequence[list[int]],
    roles: Sequence[str],
) -> np.ndarray:
    """Which tokens belong to messages of ``roles``; beginnings: the ids of the first messages up to each end."""
    ids = beginnings[-1]
    counted = np.zeros(len(ids), dtype=bool)
    start = 0
    for n, beginning in zip(ends, beginnings, strict=True):
        if len(beginning) < start or ids[: len(beginning)] != beginning:
            raise InputError(
                f"The chat template writes the first {n} of {len(chat)} messages differently when others follow, so"
                " that tokens of a role cannot be told: leave roles out."
            )
        counted[start : len(beginning)] = chat[n - 1]["role"] in roles
        start = len(beginning)
    return counted


class TextDecoder(Protocol):
    """Decodes a growing sequence and gives out whole characters only."""

    def step(self, token_id: int) -> str:
        """Take one token; the text that is complete now."""

    def finish(self) -> str:
        """The text held back, bytes that are no UTF-8 as U+FFFD."""


class _ByteDecoder:
    """For byte-level BPE: tokens are bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer._bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other tokenizer: the text of a token is what it adds to the text of the tokens just before it.

    Decoding the window since the last whole character (and one stretch before it, on which a leading space
    may depend) keeps the cost of a step constant.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]):
        self._decode = tokenizer.decode
        self._before = list(context)[-8:]
        self._held: list[int] = []

    @property
    def holds_back(self) -> bool:
        return bool(self._held)

    def step(self, token_id: int) -> str:
        self._held.append(token_id)
        before, text = self._decode(self._before), self._decode(self._before + self._held)
        if text.endswith("\ufffd"):
            return ""
        return self._release(text[len(before) :])

    def finish(self) -> str:
        before, text = self._decode(self._before), self._decode(self._before + self._held)
        return self._release(text[len(before) :])

    def _release(self, text: str) -> str:
        self._before, self._held = self._held, []
        return text
