"""What a chat model is asked, what it answers, and how it may fail to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Protocol

from activations.files import hash_json

_FRAME_TOKENS = 64
"""More than any chat template puts around one message."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Request:
    """Everything that decides a reply.

    Attributes:
        model: name of the model.
        messages: the conversation so far.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling.
        max_tokens: most tokens of the reply.
        endpoint: where the model is asked: two servers may give different models one name. Empty for a model whose name
            says all.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float
    seed: int
    max_tokens: int
    endpoint: str = ""

    @cached_property
    def key(self) -> str:
        """sha256 of the request."""
        return hash_json(asdict(self))

    @property
    def most_prompt_tokens(self) -> int:
        """A bound on the tokens of the prompt, whatever the tokenizer: none is shorter than a byte."""
        return sum(len(message.content.encode()) + _FRAME_TOKENS for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer; empty when there is none.
        ended: why it ended, in the words of the OpenAI API: "stop", "length" (cut off), "content_filter" …
        refusal: what the model said when it refused, if it says so in a field of its own.
        prompt_tokens, completion_tokens: what it cost; None if the server does not count.
    """

    text: str
    ended: str = "stop"
    refusal: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class NoReply(Exception):
    """A request that got no reply.

    Attributes:
        reason: a phrase that says why.
        again: whether the same request may succeed later.
        wait_seconds: how long the server asks to wait before; None if it does not say.
        paid: whether the server may have done, and charged for, the work.
    """

    def __init__(
        self, reason: str, *, again: bool, wait_seconds: float | None = None, paid: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait_seconds, self.paid = reason, again, wait_seconds, paid


class Chat(Protocol):
    """A language model that can be talked to, from several threads at once."""

    @property
    def name(self) -> str:
        """What labels and scores name as their author."""

    @property
    def endpoint(self) -> str:
        """Where it is asked; see :attr:`Request.endpoint`."""

    def reply(self, request: Request) -> Reply:
        """Ask once.

        Raises:
            NoReply: this request failed; others may not.
            InputError: no request can succeed: wrong key, unknown model, nobody there.
        """


def system_and_user(system: str, user: str) -> Sequence[Message]:
    """A conversation of one question."""
    return (Message("system", system), Message("user", user))
