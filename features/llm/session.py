"""Asking a model: from the cache if it was asked before, within the budget, again after a failure."""

import random
from collections.abc import Callable, Sequence
from threading import Event, Lock
from typing import TypeVar

from activations.errors import InputError
from features.llm.budget import Budget
from features.llm.cache import ReplyCache
from features.llm.chat import Chat, Message, NoReply, Reply, Request

T = TypeVar("T")

LONGEST_BACK_OFF_SECONDS = 30.0
FAILURES_IN_A_ROW = 20
"""So many questions without a usable answer, one after the other, end the work: something is wrong with all of them."""
_SHOWN = 80  # characters of a reply in a complaint


class Unusable(Exception):
    """A reply that cannot be read; the message is a sentence that can be said to the model."""


class NoAnswer(Exception):
    """A question that got no usable answer; the message is a phrase that says why."""


class Session:
    """A conversation partner with a memory and a purse.

    Args:
        chat: the model.
        cache: of its replies.
        budget: what may be spent.
        temperature, seed: of sampling; 0 takes the likeliest token.
        max_tokens: most tokens of a reply; a model that thinks before it answers needs thousands.
        retries: how often a request that failed is made again.
        back_off_seconds: the first wait, doubled at every further one; half of it at random, so that many who
            failed together do not come back together. A server that says how long to wait is obeyed.

    Raises:
        InputError: a setting that cannot be.
    """

    def __init__(
        self,
        chat: Chat,
        cache: ReplyCache,
        budget: Budget | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 400,
        retries: int = 4,
        back_off_seconds: float = 1.0,
    ) -> None:
        if temperature < 0:
            raise InputError(f"The temperature is {temperature:g}; it must be 0 or more.")
        if max_tokens < 16:
            raise InputError(
                f"Replies of {max_tokens} tokens are too short to say anything: allow 16 or more."
            )
        if retries < 0:
            raise InputError(f"{retries} retries are impossible: give 0 or more.")
        self.chat, self.cache, self.budget = chat, cache, budget or Budget()
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self.retries, self.back_off_seconds = retries, back_off_seconds
        self._closed = Event()
        self._lock = Lock()
        self._failures = 0

    @property
    def model(self) -> str:
        """The model's name."""
        return self.chat.name

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *about: object) -> None:
        """Begin no further request, not even in threads that wait to try again."""
        self._closed.set()

    def request(self, messages: Sequence[Message]) -> Request:
        """What would be sent."""
        settings = (self.temperature, self.seed, self.max_tokens)
        return Request(self.model, tuple(messages), *settings, endpoint=self.chat.endpoint)

    def ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        """The answer as ``read`` understands it; a reply that it does not is sent back once, with its complaint.

        Args:
            read: the text of a reply → the answer; raises :class:`Unusable`.

        Raises:
            NoAnswer: the model cannot be reached, refuses, or answers nonsense twice.
            BudgetReached: this question could cost more than is left.
            InputError: no question can be answered, or the last :data:`FAILURES_IN_A_ROW` were not.
        """
        try:
            found = self._ask(messages, read)
        except NoAnswer as error:
            self._count_failure(str(error))
            raise
        with self._lock:
            self._failures = 0
        return found

    def _ask(self, messages: Sequence[Message], read: Callable[[str], T]) -> T:
        first = self._reply(self.request(messages))
        try:
            return _read(first, read)
        except Unusable as complaint:
            again = (
                *messages,
                Message("assistant", _sendable(first.text) or "(nothing)"),
                Message("user", f"{complaint} Answer again, in exactly the form that was asked for."),
            )
            second = self._reply(self.request(again))
        try:
            return _read(second, read)
        except Unusable as complaint:
            said = " ".join((second.refusal or second.text).split())
            said = said if len(said) <= _SHOWN else said[: _SHOWN - 1] + "…"
            raise NoAnswer(f"{str(complaint).rstrip('.')}; the model said {said!r}") from None

    def _reply(self, request: Request) -> Reply:
        """From the cache, or from the model and into the cache."""
        known = self.cache.get(request)
        if known is not None:
            return known
        for attempt in range(self.retries + 1):
            if self._closed.is_set():
                break
            try:
                with self.budget.request(request) as settle:
                    try:
                        reply = self.chat.reply(request)
                    except NoReply as failure:
                        if failure.paid:
                            settle(None)
                        raise
                    settle(reply)
                    # Inside, so that what was paid for is kept before anything else can happen.
                    return self.cache.put(request, reply)
            except NoReply as failure:
                if not failure.again or attempt == self.retries:
                    raise NoAnswer(failure.reason) from None
                wait = failure.wait_seconds
                if wait is None:
                    longest = min(self.back_off_seconds * 2**attempt, LONGEST_BACK_OFF_SECONDS)
                    wait = longest * (0.5 + random.random() / 2)
                self._closed.wait(wait)
        raise NoAnswer("the work was stopped")

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= FAILURES_IN_A_ROW:
            self._closed.set()
            raise InputError(
                f"The last {failures} questions to {self.model} got no usable answer (the last: {reason}). What was"
                " done before is kept; try another model, temperature or seed."
            )


def _sendable(text: str) -> str:
    """The text with a question mark for every half of a surrogate pair, which cannot be encoded."""
    return text.encode(errors="replace").decode()


def _read(reply: Reply, read: Callable[[str], T]) -> T:
    """``read`` on what stands behind the thoughts of a model that thinks aloud."""
    if reply.refusal or reply.ended == "content_filter":
        raise Unusable("You refused to answer.")
    text = reply.text.rsplit("</think>", 1)[-1]
    try:
        return read(text)
    except Unusable:
        if reply.ended == "length":
            raise Unusable("The reply was cut off because it was too long.") from None
        raise
