"""What talking to a model may cost, in tokens and in money."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from activations.errors import InputError
from features.llm.chat import Reply, Request


class BudgetReached(Exception):
    """The next request could exceed the budget; nothing was sent."""


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency; ``into`` for prompts, ``out`` for replies."""

    into: float
    out: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.into + completion_tokens * self.out) / 1e6


class Budget:
    """Counts what was spent, and lets no request begin that could spend more than allowed.

    A request is held to its bound (:attr:`Request.most_prompt_tokens` and the longest reply) until the reply says
    what it was. A server that does not count is taken at the bound.

    Args:
        max_tokens: of prompts and replies together; None for no limit.
        prices: what tokens cost; None if it is not known.
        max_cost: in the currency of the prices; None for no limit.

    Raises:
        InputError: a limit or price below 0, or a limit in money without prices.
    """

    def __init__(
        self, max_tokens: int | None = None, prices: Prices | None = None, max_cost: float | None = None
    ) -> None:
        given = (max_tokens, max_cost, *((prices.into, prices.out) if prices else ()))
        if any(value is not None and not value >= 0 for value in given):
            raise InputError("Limits and prices must be 0 or more.")
        if max_cost is not None and prices is None:
            raise InputError("A limit in money needs prices: give what a million tokens cost, in and out.")
        self.max_tokens, self.prices, self.max_cost = max_tokens, prices, max_cost
        self.prompt_tokens = self.completion_tokens = self.requests = 0
        self._held: list[tuple[int, int]] = []
        self._changed = Condition()

    @property
    def tokens(self) -> int:
        """Spent so far, prompts and replies together."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        """Spent so far; None without prices."""
        return self.prices.cost(self.prompt_tokens, self.completion_tokens) if self.prices else None

    def __str__(self) -> str:
        money = "" if self.cost is None else f", cost {self.cost:.4f}"
        return f"{self.requests:,} requests, {self.tokens:,} tokens{money}"

    @contextmanager
    def request(self, request: Request) -> Iterator[Callable[[Reply | None], None]]:
        """Room for one request, waited for while others hold it.

        Yields:
            to be called with the reply, or None if work may have been done that nobody counted. A request for which
            it is not called costs nothing.

        Raises:
            BudgetReached: there is no room, and no other request will make any.
        """
        bound = (request.most_prompt_tokens, request.max_tokens)
        with self._changed:
            while not self._fits(bound):
                if not self._held:
                    raise BudgetReached(self._sentence())
                self._changed.wait()
            self._held.append(bound)
        spent = (0, 0)

        def settle(reply: Reply | None) -> None:
            nonlocal spent
            counted = (reply.prompt_tokens, reply.completion_tokens) if reply else (None, None)
            spent = tuple(most if n is None else n for n, most in zip(counted, bound, strict=True))  # type: ignore[assignment]

        try:
            yield settle
        finally:
            with self._changed:
                self._held.remove(bound)
                self.requests += 1
                self.prompt_tokens += spent[0]
                self.completion_tokens += spent[1]
                self._changed.notify_all()

    def _fits(self, bound: tuple[int, int]) -> bool:
        prompt = self.prompt_tokens + bound[0] + sum(held[0] for held in self._held)
        completion = self.completion_tokens + bound[1] + sum(held[1] for held in self._held)
        if self.max_tokens is not None and prompt + completion > self.max_tokens:
            return False
        return (
            self.max_cost is None
            or self.prices is None
            or self.prices.cost(prompt, completion) <= self.max_cost
        )

    def _sentence(self) -> str:
        limits = []
        if self.max_tokens is not None:
            limits.append(f"{self.max_tokens:,} tokens")
        if self.max_cost is not None:
            limits.append(f"a cost of {self.max_cost:g}")
        return f"the next request could exceed the budget of {' and '.join(limits)}"
