"""A Hugging Face chat model in this process: its template, its sampling, and what it cannot do."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread, tiny_config, tiny_hf_model, tiny_tokenizer

from activations.errors import InputError
from features.llm.cache import ReplyCache
from features.llm.chat import Message, NoReply, Request
from features.llm.local import LocalModel
from features.llm.session import Session

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
)
QUESTION = (Message("system", "be short"), Message("user", "def read"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def save(folder: Path, template: str | None = TEMPLATE, seed: int = 0, limit: int = 512) -> Path:
    """A random chat model."""
    config = tiny_config("llama")
    config.max_position_embeddings = limit
    tiny_hf_model("llama", seed=seed, config=config).save_pretrained(folder)
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat") / "tiny")


def request(temperature: float = 0.0, seed: int = 0, max_tokens: int = 12) -> Request:
    return Request("m", QUESTION, temperature, seed, max_tokens)


def test_the_reply_is_the_likeliest_text_behind_the_template(folder: Path) -> None:
    model = LocalModel(str(folder))
    reply = model.reply(request())
    tokenizer = tiny_tokenizer()
    ids = tokenizer("<system>be short\n<user>def read\n<assistant>")["input_ids"]
    assert reply.prompt_tokens == len(ids)
    config = tiny_config("llama")
    config.max_position_embeddings = 512
    oracle, said = tiny_hf_model("llama", config=config), []
    for _ in range(12):
        with torch.no_grad():
            said.append(int(oracle(torch.tensor([ids + said])).logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    assert reply.text == tokenizer.decode(said, skip_special_tokens=True)
    assert reply.completion_tokens == len(said)
    assert reply.ended == ("length" if len(said) == 12 else "stop")
    assert model.reply(request()) == reply


def test_the_seed_decides_what_is_sampled(folder: Path) -> None:
    model = LocalModel(str(folder))
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    warm = [model.reply(request(1.5, seed)).text for seed in (0, 0, 1, 2)]
    assert warm[0] == warm[1]
    assert len(set(warm)) == 3
    assert torch.equal(torch.rand(1), before)  # nobody else's random numbers change


def test_a_template_without_a_system_role_gets_one_question(tmp_path: Path, folder: Path) -> None:
    model = LocalModel(str(save(tmp_path / "m", NO_SYSTEM)))
    ids = tiny_tokenizer()("<user>be short\n\ndef read\n<assistant>")["input_ids"]
    assert model.reply(request()).prompt_tokens == len(ids)


def test_its_name_says_which_weights(tmp_path: Path, folder: Path) -> None:
    names = [LocalModel(str(save(tmp_path / f"{seed}" / "tiny", seed=seed))).name for seed in (0, 1)]
    assert LocalModel(f"{folder}/").name == names[0] != names[1]
    assert all(name.startswith("tiny@") and len(name) == 13 for name in names)


def test_a_session_with_it_remembers(folder: Path, tmp_path: Path) -> None:
    def ask() -> tuple[str, int]:
        session = Session(LocalModel(str(folder)), ReplyCache(tmp_path / "r"), max_tokens=16)
        return session.ask(QUESTION, lambda text: text), session.budget.tokens

    first, again = ask(), ask()
    assert first[0] == again[0]
    assert first[1] > again[1] == 0


def test_what_it_cannot_do_is_told(tmp_path: Path) -> None:
    small = LocalModel(str(save(tmp_path / "small", limit=16)))
    with pytest.raises(NoReply) as failure:
        small.reply(request())
    assert failure.value.reason.endswith("and a reply of 12 do not fit into the 16 of the model")
    assert not failure.value.again
    bare = save(tmp_path / "bare", None)
    with pytest.raises(InputError) as caught:
        LocalModel(str(bare))
    assert str(caught.value) == (
        f"{bare} has no chat template: give a model that was trained to follow instructions."
    )
    with pytest.raises(InputError) as caught:
        LocalModel(str(tmp_path))
    assert "has no config.json" in str(caught.value)
