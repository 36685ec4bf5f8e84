"""Talking to a model: what is sent, kept, counted and retried, and one sentence for everything that goes wrong."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_llm import FakeLLM, Response, as_json, completion, error, fake_llm
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import InputError
from features.llm import prompts
from features.llm.budget import Budget, BudgetReached, Prices
from features.llm.cache import ReplyCache
from features.llm.chat import Message, NoReply, Reply, Request
from features.llm.endpoint import Endpoint
from features.llm.session import FAILURES_IN_A_ROW, NoAnswer, Session
from features.llm.threads import in_threads

QUESTION = (Message("system", "Say a LABEL: please"), Message("user", "what is it?"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with fake_llm() as running:
        yield running


def session(server: FakeLLM, folder: Path, budget: Budget | None = None, **settings: float) -> Session:
    chat = Endpoint("fake", server.url, timeout_seconds=settings.pop("timeout_seconds", 5.0))
    cache = ReplyCache(folder / "replies.sqlite")
    return Session(chat, cache, budget, **{"back_off_seconds": 0.01, **settings})  # type: ignore[arg-type]


def ask(server: FakeLLM, folder: Path, **settings: float) -> str:
    return session(server, folder, **settings).ask(QUESTION, prompts.read_label)


def refusal(server: FakeLLM, folder: Path, **settings: float) -> str:
    with pytest.raises(InputError) as caught:
        ask(server, folder, **settings)
    return str(caught.value)


def no_answer(server: FakeLLM, folder: Path, **settings: float) -> str:
    with pytest.raises(NoAnswer) as caught:
        ask(server, folder, **settings)
    return str(caught.value)


def test_a_request_says_what_was_asked_for(server: FakeLLM, tmp_path: Path) -> None:
    assert ask(server, tmp_path, seed=3, max_tokens=77) == "words about files"
    (body,) = server.requests
    assert body == {
        "model": "fake",
        "messages": [{"role": m.role, "content": m.content} for m in QUESTION],
        "temperature": 0.0,
        "seed": 3,
        "max_tokens": 77,
    }


def test_the_key_comes_from_the_environment(
    server: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    chat = Endpoint("fake")
    assert chat.url == server.url
    Session(chat, ReplyCache(tmp_path / "r")).ask(QUESTION, prompts.read_label)
    assert server.headers[0]["authorization"] == "Bearer sk-mine"


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError) as caught:
        Endpoint("gpt")
    assert str(caught.value) == (
        "OPENAI_API_KEY is not set: set it to your key, or give the URL of a local server with --endpoint."
    )
    with pytest.raises(InputError) as caught:
        Endpoint("gpt", "localhost:8000")
    assert str(caught.value) == (
        "The endpoint 'localhost:8000' is not a URL: give one such as http://localhost:8000/v1."
    )


def test_what_was_asked_before_is_not_asked_again(server: FakeLLM, tmp_path: Path) -> None:
    first = session(server, tmp_path)
    first.ask(QUESTION, prompts.read_label)
    again = session(server, tmp_path)
    assert again.ask(QUESTION, prompts.read_label) == "words about files"
    assert len(server.requests) == 1
    assert (first.budget.tokens, again.budget.tokens) == (110, 0)
    session(server, tmp_path, seed=1).ask(QUESTION, prompts.read_label)  # another request
    assert len(server.requests) == 2


def test_two_servers_may_give_different_models_one_name(server: FakeLLM, tmp_path: Path) -> None:
    ask(server, tmp_path)
    with fake_llm() as other:
        other.answer = lambda body: "LABEL: something else"
        assert ask(other, tmp_path) == "something else"
        other.url += "/"
        assert ask(other, tmp_path) == "something else"
        assert len(other.requests) == 1
    assert ask(server, tmp_path) == "words about files"
    assert len(server.requests) == 1


@given(
    a=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)), max_size=3),
    b=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)), max_size=3),
)
def test_two_requests_have_one_key_only_if_they_are_the_same(
    a: list[tuple[str, str]], b: list[tuple[str, str]]
) -> None:
    def request(said: list[tuple[str, str]]) -> Request:
        return Request("m", tuple(Message(*each) for each in said), 0.0, 0, 100)

    assert (request(a).key == request(b).key) == (a == b)


def _write_replies(path: Path, first: int) -> None:
    cache = ReplyCache(path)
    for number in range(first, first + 40):
        request = Request("m", (Message("user", f"{number % 50}"),), 0.0, 0, 100)
        cache.put(request, Reply(f"{number % 50}"))


def test_eight_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_replies, args=(path, 10 * n)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    cache = ReplyCache(path)
    for number in range(50):
        assert cache.get(Request("m", (Message("user", f"{number}"),), 0.0, 0, 100)) == Reply(f"{number}")


def test_of_two_replies_to_one_request_the_first_stays(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "r")
    request = Request("m", QUESTION, 0.0, 0, 100)
    assert cache.put(request, Reply("one", prompt_tokens=3)) == Reply("one", prompt_tokens=3)
    assert cache.put(request, Reply("two")) == Reply("one", prompt_tokens=3)


def test_a_file_of_something_else_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(InputError) as caught:
        ReplyCache(tmp_path / "replies.sqlite")
    assert str(caught.value) == (
        f"{tmp_path / 'replies.sqlite'} is not a readable file of replies (file is not a database): move it away to"
        " start a new one."
    )


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(server: FakeLLM, tmp_path: Path, status: int) -> None:
    server.script = [error(status, "later"), error(status, "later")]
    assert ask(server, tmp_path) == "words about files"
    assert len(server.requests) == 3


def test_a_server_that_says_how_long_to_wait_is_obeyed(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [error(429, "slow down", Retry_After="0.4")]
    begun = time.monotonic()
    ask(server, tmp_path)
    assert 0.4 <= time.monotonic() - begun < 3
    server.script = [error(429, "slow down", Retry_After="7200")]
    assert (
        refusal(server, tmp_path / "b")
        == f"{server.url} asks to wait for 7,200 seconds (429: slow down): come back then."
    )


def test_what_does_not_pass_ends_with_its_reason(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [error(503, "overloaded")] * 9
    assert no_answer(server, tmp_path, retries=2) == "the server answered 503: overloaded"
    assert len(server.requests) == 3
    server.script = [error(400, "the context is too long")]
    assert no_answer(server, tmp_path) == "the server answered 400: the context is too long"
    assert len(server.requests) == 4  # asking the same again would not help


def test_a_timeout_is_told(server: FakeLLM, tmp_path: Path) -> None:
    server.delay_seconds = 0.5
    assert no_answer(server, tmp_path, retries=1, timeout_seconds=0.1) == "no reply within 0.1 s"
    assert len(server.requests) == 2


def test_a_reply_that_drips_is_not_waited_for(server: FakeLLM, tmp_path: Path) -> None:
    server.drip_seconds = 0.05  # never a pause as long as the timeout, and 15 seconds for the whole
    begun = time.monotonic()
    assert no_answer(server, tmp_path, retries=1, timeout_seconds=0.3) == "no reply within 0.3 s"
    assert 0.6 <= time.monotonic() - begun < 3
    server.drip_seconds = 0.0
    assert ask(server, tmp_path, timeout_seconds=5.0) == "words about files"


def test_nobody_there(tmp_path: Path) -> None:
    with fake_llm() as gone:
        pass
    begun = time.monotonic()
    said = refusal(gone, tmp_path, back_off_seconds=10)
    assert said.startswith(f"Nobody answers at {gone.url} (")
    assert said.endswith("): start the server, or check --endpoint.")
    assert time.monotonic() - begun < 5  # no use in waiting


def test_a_wrong_key_and_an_unknown_model(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [error(401, "bad key")]
    assert refusal(server, tmp_path).startswith(
        f"{server.url} does not accept the key in OPENAI_API_KEY (401: "
    )
    server.script = [error(404, "no such model")]
    assert refusal(server, tmp_path) == (
        f"{server.url} has no model 'fake' (404: no such model): check --model, and that the URL ends where the API"
        " begins, often in /v1."
    )
    server.script = [error(429, "pay first", "insufficient_quota")]
    assert "has no credit left" in refusal(server, tmp_path)
    assert len(server.requests) == 3


def test_what_a_server_forbids_is_about_one_question(server: FakeLLM, tmp_path: Path) -> None:
    """Moderation of what a text says, mostly; in a second run the good questions are answered from the cache."""
    server.script = [error(403, "content moderated")]
    assert no_answer(server, tmp_path) == "the server answered 403: content moderated"
    assert len(server.requests) == 1  # asking the same again would not help
    server.script = [error(403, "no")] * FAILURES_IN_A_ROW
    talk = session(server, tmp_path / "b")
    said = ""
    for number in range(FAILURES_IN_A_ROW):
        with pytest.raises((NoAnswer, InputError)) as caught:
            talk.ask((Message("user", f"LABEL: {number}"),), prompts.read_label)
        said = str(caught.value)
    assert "got no usable answer (the last: the server answered 403: no)" in said


def test_half_of_a_surrogate_pair_is_no_label(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [completion("LABEL: files \ud83d"), completion("LABEL: files")]
    assert ask(server, tmp_path) == "files"
    assert [m["content"] for m in server.requests[1]["messages"][2:]] == [
        "LABEL: files ?",
        "The label holds half of a surrogate pair, which is no character. Answer again, in exactly the form that was"
        " asked for.",
    ]
    server.script = [completion("LABEL: \ud83d"), completion("LABEL: \udc4d")]
    for _ in range(2):  # from the cache too
        said = no_answer(server, tmp_path / "b")
        assert said.startswith("The label holds half of a surrogate pair")
        said.encode()
    assert len(server.requests) == 4


def test_a_model_that_takes_other_parameters_gets_them(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [
        *_other_name(),
        error(400, "Only the default (1) is supported.", "unsupported_value", "temperature"),
    ]
    assert ask(server, tmp_path, max_tokens=90) == "words about files"
    assert server.requests[-1].keys() == {"model", "messages", "seed", "max_completion_tokens"}
    assert server.requests[-1]["max_completion_tokens"] == 90
    too_large = error(400, "max_completion_tokens is too large", None, "max_completion_tokens")
    server.script = [*_other_name(), too_large]
    assert no_answer(server, tmp_path / "b") == "the server answered 400: max_completion_tokens is too large"


def _other_name() -> list[Response]:
    return [error(400, "Use 'max_completion_tokens' instead.", "unsupported_parameter", "max_tokens")]


def test_an_error_in_the_place_of_a_completion_is_told(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [as_json(200, {"error": {"message": "upstream is gone"}})]
    assert "upstream is gone" in no_answer(server, tmp_path, retries=0)


def test_nonsense_is_sent_back_once_with_the_complaint(server: FakeLLM, tmp_path: Path) -> None:
    server.script = [completion("Sure! It is about files."), completion("LABEL: files")]
    assert ask(server, tmp_path) == "files"
    assert server.requests[1]["messages"][2:] == [
        {"role": "assistant", "content": "Sure! It is about files."},
        {
            "role": "user",
            "content": "There must be one line that begins with LABEL:, and there is none. Answer again, in exactly"
            " the form that was asked for.",
        },
    ]
    server.script = [completion("hm"), completion("files,\nI think")]
    assert no_answer(server, tmp_path / "b") == (
        "There must be one line that begins with LABEL:, and there is none; the model said 'files, I think'"
    )
    assert len(server.requests) == 4
    no_answer(server, tmp_path / "b")
    assert len(server.requests) == 4  # nonsense was paid for too


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(None, refusal="I cannot."), "You refused to answer; the model said 'I cannot.'"),
        (completion("", finish="content_filter"), "You refused to answer; the model said ''"),
        (
            completion("LABEL", finish="length"),
            "The reply was cut off because it was too long; the model said 'LABEL'",
        ),
        (completion("LABEL: "), "Nothing stands after LABEL:; the model said 'LABEL:'"),
        (
            completion("LABEL: a\nLABEL: b"),
            "There must be one line that begins with LABEL:, and there are several;",
        ),
        (completion("LABEL: " + "x" * 300), "The label has 300 characters, and at most 200 are allowed;"),
    ],
)
def test_replies_that_cannot_be_used(server: FakeLLM, tmp_path: Path, reply: Response, reason: str) -> None:
    server.script = [reply, reply]
    assert no_answer(server, tmp_path).startswith(reason)


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Type": "application/json"}, b'{"choices": [{"mess'),
        (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
        as_json(200, {"choices": []}),
        as_json(200, {"hello": 1}),
        as_json(200, [1, 2]),
        as_json(200, {"choices": [{"message": {"content": 5}}]}),
        as_json(200, None),
    ],
)
def test_what_is_no_completion_is_tried_again_and_told(
    server: FakeLLM, tmp_path: Path, reply: Response
) -> None:
    server.script = [reply]
    assert ask(server, tmp_path) == "words about files"
    server.script = [reply] * 2
    said = no_answer(server, tmp_path / "b", retries=1)
    assert said in ("the reply was no chat completion", "the reply was no valid JSON")


def test_many_failures_in_a_row_end_the_work(server: FakeLLM, tmp_path: Path) -> None:
    server.answer = lambda body: "no idea"
    talk = session(server, tmp_path)

    def question(number: int) -> str:
        return talk.ask((Message("user", f"LABEL: {number}"),), prompts.read_label)

    outcomes = [outcome for _, outcome in in_threads(question, range(FAILURES_IN_A_ROW), 1)]
    assert [type(outcome) for outcome in outcomes] == [NoAnswer] * (FAILURES_IN_A_ROW - 1) + [InputError]
    assert str(outcomes[-1]).startswith(
        f"The last {FAILURES_IN_A_ROW} questions to fake got no usable answer (the last:"
    )


def request(n_bytes: int, max_tokens: int = 100) -> Request:
    return Request("m", (Message("user", "x" * n_bytes),), 0.0, 0, max_tokens)


def test_a_budget_lets_no_request_begin_that_could_exceed_it() -> None:
    budget = Budget(1000)
    for _ in range(3):
        with budget.request(request(300)) as settle:  # at most 300 + 64 + 100 = 464
            settle(Reply("", prompt_tokens=150, completion_tokens=50))
    assert budget.tokens == 600
    with pytest.raises(BudgetReached) as caught, budget.request(request(300)):
        pass
    assert str(caught.value) == "the next request could exceed the budget of 1,000 tokens"
    with budget.request(request(200)) as settle:
        settle(None)  # nobody counted: the bound is taken
    assert budget.tokens == 964
    with pytest.raises(KeyError), budget.request(request(0, 30 - 64 + 0)):
        raise KeyError  # a request that was never made costs nothing
    assert budget.tokens == 964


def test_a_request_waits_for_the_room_that_others_hold() -> None:
    budget = Budget(1000)

    def spend(number: int) -> int:
        with budget.request(request(436)) as settle:  # 600 at most: never two at once
            time.sleep(0.02)
            settle(Reply("", prompt_tokens=50, completion_tokens=50))
        return number

    outcomes = [outcome for _, outcome in in_threads(spend, range(20), 4)]
    assert sum(isinstance(outcome, int) for outcome in outcomes) == 5
    assert budget.tokens == 500  # a sixth could have come to 1,100


def test_a_budget_in_money() -> None:
    budget = Budget(prices=Prices(2.0, 8.0), max_cost=0.01)
    with budget.request(request(936, 1000)) as settle:  # at most (1000 · 2 + 1000 · 8) / 1e6 = 0.01
        settle(Reply("", prompt_tokens=500, completion_tokens=250))
    assert budget.cost == pytest.approx((500 * 2 + 250 * 8) / 1e6)
    assert str(budget) == "1 requests, 750 tokens, cost 0.0030"
    with pytest.raises(BudgetReached), budget.request(request(936, 1000)):
        pass


@pytest.mark.parametrize(
    "arguments", [(-1,), (None, Prices(-1, 0)), (None, None, 3.0), (None, Prices(1, 1), float("nan"))]
)
def test_impossible_budgets(arguments: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        Budget(*arguments)  # type: ignore[arg-type]


def test_a_session_spends_within_its_budget(server: FakeLLM, tmp_path: Path) -> None:
    talk = session(server, tmp_path, Budget(2000))
    done = 0
    with pytest.raises(BudgetReached):
        for number in range(100):
            talk.ask((Message("system", "LABEL:"), Message("user", f"{number}")), prompts.read_label)
            done += 1
    assert talk.budget.tokens == 110 * done <= 2000
    assert (
        110 * done
        + Request("fake", (Message("system", "LABEL:"), Message("user", "9")), 0, 0, 400).most_prompt_tokens
        + 400
        > 2000
    )


def test_a_request_that_timed_out_may_have_been_charged(server: FakeLLM, tmp_path: Path) -> None:
    server.delay_seconds = 0.3
    talk = session(server, tmp_path, timeout_seconds=0.1, retries=0)
    with pytest.raises(NoAnswer):
        talk.ask(QUESTION, prompts.read_label)
    assert talk.budget.tokens == talk.request(QUESTION).most_prompt_tokens + 400


def test_threads_take_items_as_they_are_free() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    def call(number: int) -> float:
        time.sleep(0.002)
        return 1 / (number - 3)

    for number, outcome in in_threads(call, items(), 3):
        if number == 3:
            assert isinstance(outcome, ZeroDivisionError)
            break
    begun = len(taken)
    time.sleep(0.1)
    assert len(taken) <= begun + 3


def test_an_error_in_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("no more")

    with pytest.raises(InputError):
        list(in_threads(lambda n: n, items(), 4))


def test_unreached_replies_keep_their_reason() -> None:
    failure = NoReply("why", again=True)
    assert (failure.reason, failure.paid, failure.wait_seconds) == ("why", False, None)


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("LABEL: file paths", "file paths"),
        ("**LABEL:** file paths.", "file paths"),
        ('label: "file paths"', "file paths"),
        ("<think>LABEL: x? no</think>\nLABEL: file paths\n", "file paths"),
        ("LABEL: a\nLABEL: a", "a"),
    ],
)
def test_labels_are_read(server: FakeLLM, tmp_path: Path, reply: str, label: str) -> None:
    server.script = [completion(reply)]
    assert ask(server, tmp_path) == label


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.sampled_from([", ", ",", " ", "; "]))
def test_answers_are_read(answers: list[bool], separator: str) -> None:
    words = separator.join("Yes" if answer else "no" for answer in answers)
    assert prompts.read_answers(f"Well.\n**ANSWERS:** {words}.", len(answers)) == answers
    for wrong in (f"ANSWERS: {words}{separator}yes", f"ANSWERS: {words}{separator}maybe", words):
        with pytest.raises(prompts.Unusable):
            prompts.read_answers(wrong, len(answers))
