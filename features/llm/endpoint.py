"""A model behind an OpenAI-compatible endpoint: hosted, or a local vLLM, llama.cpp or Ollama server."""

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from activations.errors import InputError
from features.llm.chat import NoReply, Reply, Request

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_WAIT_SECONDS = 600.0
"""A server that asks to wait longer than this is not waited for."""
_OPTIONAL = ("temperature", "seed", "max_tokens")
_NEWER_NAME = "max_completion_tokens"
_TRANSIENT = (408, 409, 425, 429)


class Endpoint:
    """Asks one model through the ``openai`` client.

    Args:
        model: its name at the endpoint.
        url: where the API begins, often ``…/v1``; by default the environment's ``OPENAI_BASE_URL``, else OpenAI's own.
            The key is read from ``OPENAI_API_KEY``; only OpenAI itself must have one.
        timeout_seconds: of one request, from its beginning to the end of its reply.

    Raises:
        InputError: the URL is none, OpenAI is asked without a key, or the time is not above 0.
    """

    def __init__(self, model: str, url: str | None = None, *, timeout_seconds: float = 60.0) -> None:
        from openai import OpenAI

        self.url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        if not self.url.startswith(("http://", "https://")):
            raise InputError(
                f"The endpoint {self.url!r} is not a URL: give one such as http://localhost:8000/v1."
            )
        if not timeout_seconds > 0:
            raise InputError(f"A timeout of {timeout_seconds:g} seconds is none: give more than 0.")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and self.url.startswith(OPENAI_URL):
            raise InputError(
                "OPENAI_API_KEY is not set: set it to your key, or give the URL of a local server with --endpoint."
            )
        self._model = model
        self._timeout_seconds = timeout_seconds
        # Retries are the session's, which knows the budget.
        self._client = OpenAI(
            base_url=self.url, api_key=key or "none", timeout=timeout_seconds, max_retries=0
        )
        self._parameters = {name: name for name in _OPTIONAL}
        self._has_answered = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model

    @property
    def endpoint(self) -> str:
        """The URL."""
        return self.url.rstrip("/")

    def reply(self, request: Request) -> Reply:
        """Ask once; see :class:`features.llm.chat.Chat`."""
        import openai

        messages: Any = [{"role": m.role, "content": m.content} for m in request.messages]
        while True:
            parameters = dict(self._parameters)
            given: Any = {sent: getattr(request, name) for name, sent in parameters.items()}

            def create(given: Any = given) -> Any:
                return self._client.chat.completions.create(model=request.model, messages=messages, **given)

            try:
                found = _within(self._timeout_seconds, create)
            except openai.BadRequestError as error:
                if not self._adapt(error, parameters):
                    raise self._failure(error) from None
            except (openai.OpenAIError, ValueError, TimeoutError) as error:
                raise self._failure(error) from None
            else:
                self._has_answered = True
                return _read(found)

    def _adapt(self, error: Any, sent: Mapping[str, str]) -> bool:
        """Leave out a parameter that this model refuses, or call it by its newer name; False if that is not it."""
        name = next((name for name, word in sent.items() if word == error.param), None)
        if name is None:
            return False
        changed = {other: word for other, word in sent.items() if other != name}
        if name == "max_tokens":  # never left out: the bound of the budget rests on it
            if sent[name] == _NEWER_NAME or _NEWER_NAME not in error.message:
                return False
            changed[name] = _NEWER_NAME
        self._parameters = changed
        return True

    def _failure(self, error: Exception) -> Exception:
        """What the caller raises for an exception of the client."""
        import openai

        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return NoReply(f"no reply within {self._timeout_seconds:g} s", again=True, paid=True)
        if isinstance(error, openai.APIConnectionError):
            if not self._has_answered:
                return InputError(
                    f"Nobody answers at {self.url} ({_cause(error)}): start the server, or check --endpoint."
                )
            return NoReply(f"the connection to {self.url} was lost", again=True, paid=True)
        if isinstance(error, openai.APIStatusError):
            return self._refused(error.status_code, error)
        return NoReply("the reply was no valid JSON", again=True, paid=True)

    def _refused(self, status: int, error: Any) -> Exception:
        said = f"{status}: {_said(error)}"
        if status == 401:
            return InputError(f"{self.url} does not accept the key in OPENAI_API_KEY ({said}).")
        if status == 404:
            return InputError(
                f"{self.url} has no model {self._model!r} ({said}): check --model, and that the URL ends where the API"
                " begins, often in /v1."
            )
        if error.code == "insufficient_quota":
            return InputError(f"The account at {self.url} has no credit left ({said}).")
        wait = _wait_seconds(error.response.headers)
        if wait is not None and wait > LONGEST_WAIT_SECONDS:
            return InputError(f"{self.url} asks to wait for {wait:,.0f} seconds ({said}): come back then.")
        return NoReply(
            f"the server answered {said}", again=status in _TRANSIENT or status >= 500, wait_seconds=wait
        )


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises, or TimeoutError if that takes longer.

    The client's own timeout is of every read from the connection, and a server may send a byte now and then for ever.
    A call that is given up ends in its thread, a daemon, whenever the server lets it.
    """
    done: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        found, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


def _read(found: Any) -> Reply:
    """A completion as a reply; the client hands on whatever JSON, or text, came back."""
    try:
        choice = found.choices[0]
        message, usage = choice.message, getattr(found, "usage", None)
        text = message.content or ""
        if not isinstance(text, str):
            raise TypeError
        return Reply(
            text=text,
            ended=str(choice.finish_reason or "stop"),
            refusal=str(getattr(message, "refusal", None) or ""),
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
        )
    except (AttributeError, IndexError, TypeError):
        said = getattr(found, "error", None)  # some gateways put errors where the completion should be
        why = f"the server answered {_short(str(said))}" if said else "the reply was no chat completion"
        raise NoReply(why, again=True, paid=True) from None


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value >= 0 else None


def _wait_seconds(headers: Mapping[str, str]) -> float | None:
    """What a Retry-After header says, in seconds or as a date (RFC 9110, 10.2.3)."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def _said(error: Any) -> str:
    """What a server says of an error, without what the client puts around it."""
    body = error.body if isinstance(error.body, dict) else {}
    words = next(
        (body[name] for name in ("message", "detail", "error") if isinstance(body.get(name), str)), None
    )
    return _short(words or error.message)


def _cause(error: Exception) -> str:
    return _short(str(error.__cause__ or error)).rstrip(".")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:159] + "…"
