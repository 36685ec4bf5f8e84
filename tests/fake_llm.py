"""An OpenAI-compatible server on this machine that answers, or misbehaves, as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Response = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def sensible(body: Body) -> str:
    """A label to who asks for one, and "yes" to every text."""
    question = body["messages"][1]["content"]
    if "LABEL:" in body["messages"][0]["content"]:
        return "LABEL: words about files"
    n = int(question.split(" texts:")[0].rsplit(maxsplit=1)[-1])
    return "ANSWERS: " + ", ".join(["yes"] * n)


def particular(body: Body) -> str:
    """As :func:`sensible`, but with a label of its own for each feature."""
    question = body["messages"][1]["content"].encode()
    if "LABEL:" in body["messages"][0]["content"]:
        return f"LABEL: what {len(question)} and {sum(question) % 997} do"
    return sensible(body)


def completion(
    text: str | None,
    *,
    finish: str = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] | None = (100, 10),
) -> Response:
    """What a server sends that works."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body: Body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return as_json(200, body)


def as_json(status: int, body: Any, **headers: str) -> Response:
    """A response with a JSON body; underscores in header names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json", **named}, json.dumps(body).encode()


def error(
    status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
) -> Response:
    """An error as OpenAI words it."""
    return as_json(status, {"error": {"message": message, "code": code, "param": param}}, **headers)


class FakeLLM:
    """What the server was asked, and what it will answer.

    Attributes:
        answer: the text of a reply to a request. usage: the tokens of prompt and reply that it reports.
        script: responses to the next requests, first come first served; then ``answer`` answers.
        delay_seconds: before every response. drip_seconds: after every byte of its body.
        requests: bodies, in the order of their arrival. headers: those that came with them, names in lower case.
        most_at_once: most requests that were ever open at the same time.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answer: Callable[[Body], str] = sensible
        self.usage: tuple[int, int] | None = (100, 10)
        self.script: list[Response] = []
        self.delay_seconds = self.drip_seconds = 0.0
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()

    def respond(self, body: Body, headers: dict[str, str]) -> Response:
        """The response to a request."""
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            scripted = self.script.pop(0) if self.script else None
        try:
            time.sleep(self.delay_seconds)
            return scripted or completion(self.answer(body), usage=self.usage)
        finally:
            with self._lock:
                self._open -= 1


@contextmanager
def fake_llm() -> Iterator[FakeLLM]:
    """A server that runs in threads of this process while the block does."""
    state = FakeLLM()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = {name.lower(): value for name, value in self.headers.items()}
            status, headers, content = state.respond(body, sent)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not state.drip_seconds:
                    self.wfile.write(content)
                    return
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(state.drip_seconds)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, *about: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
