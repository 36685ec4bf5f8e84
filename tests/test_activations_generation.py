"""Our sampling loop against Hugging Face's greedy ``generate`` and against recomputing every step."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    CONTEXT_LENGTH,
    END_OF_TEXT,
    one_thread,
    tiny_hf_model,
    tiny_language_model,
    tiny_tokenizer,
)
from torch import Tensor

from activations.edits import Edit
from activations.errors import InputError
from activations.generation import Sampling
from activations.models import LanguageModel

PROMPTS = ["def read(self", "import os\nimport sys\nfor name in", "#", "naïve café 😀"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def encoded(prompts: list[str]) -> list[list[int]]:
    return [tiny_tokenizer().encode(prompt, add_special_tokens=False) for prompt in prompts]


def steer_even_positions(width: int) -> Edit:
    """Adds a vector at even positions of the prompt and of what is written, not at special tokens."""
    v = torch.randn(width, generator=torch.Generator().manual_seed(3)) * 2

    def apply(x: Tensor, positions: Tensor) -> Tensor:
        return x + v * ((positions >= 0) & (positions % 2 == 0))[..., None]

    return Edit("blocks.1.hook_resid_post", apply)


def greedy_without_cache(model: LanguageModel, ids: list[int], n: int) -> str:
    """The obvious loop: all logits again at every step."""
    sequence = list(ids)
    for _ in range(n):
        token = int(model.logits(torch.tensor([sequence]))[0, -1].argmax())
        if token == END_OF_TEXT:
            break
        sequence.append(token)
    return model.tokenizer.decode(sequence[len(ids) :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_hugging_face_generate(architecture: str) -> None:
    model, hf_model = tiny_language_model(architecture), tiny_hf_model(architecture)
    ours = model.generate(PROMPTS, temperature=0, max_new_tokens=24)
    for text, ids in zip(ours, encoded(PROMPTS), strict=True):
        prompt = torch.tensor([ids])
        theirs = hf_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=END_OF_TEXT,
        )
        new = [token for token in theirs[0, len(ids) :].tolist() if token != END_OF_TEXT]
        assert text == model.tokenizer.decode(new)
        assert len(new) > 4


@pytest.mark.parametrize("path", ["auto", "bridge"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_equals_one_by_one(architecture: str, path: Any) -> None:
    model = tiny_language_model(architecture, path)
    steered = steer_even_positions(model.d_model)
    with model.edited(steered):
        together = model.generate(PROMPTS, temperature=0, max_new_tokens=10)
        alone = [model.generate(p, temperature=0, max_new_tokens=10)[0] for p in PROMPTS]
    assert together == alone
    assert together != model.generate(PROMPTS, temperature=0, max_new_tokens=10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_under_the_cache_equals_recomputing(architecture: str) -> None:
    model = tiny_language_model(architecture)
    with model.edited(steer_even_positions(model.d_model)):
        for prompt, ids in zip(PROMPTS, encoded(PROMPTS), strict=True):
            cached = model.generate(prompt, temperature=0, max_new_tokens=12)[0]
            assert cached == greedy_without_cache(model, ids, 12)


def test_positions_under_the_cache() -> None:
    """Absolute, though the shorter prompt is padded on the left; −1 at padding and special tokens."""
    model = tiny_language_model("llama")
    seen: list[list[list[int]]] = []

    def record(x: Tensor, positions: Tensor) -> Tensor:
        seen.append(positions.tolist())
        return x

    short, long = "<|endoftext|>def", "import os as xyz"
    lengths = [len(ids) for ids in encoded([short, long])]
    assert lengths[0] < lengths[1]
    pad = lengths[1] - lengths[0]
    with model.edited(Edit("blocks.0.hook_resid_pre", record)):
        model.generate([short, long], temperature=0, max_new_tokens=3)
    prompt, *steps = seen
    # The end-of-text token at position 0 is special: −1 as well.
    assert prompt == [[-1] * pad + [-1, *range(1, lengths[0])], list(range(lengths[1]))]
    assert steps == [[[n + i] for n in lengths] for i in range(2)]


def test_sampling_is_reproducible_and_the_first_row_does_not_depend_on_the_batch() -> None:
    model = tiny_language_model("gpt2")

    def options(seed: int) -> dict[str, Any]:
        return {"max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": seed}

    first = model.generate(PROMPTS[0], **options(5))
    torch.manual_seed(99)  # the global generator plays no part
    assert model.generate(PROMPTS[0], **options(5)) == first
    assert model.generate(PROMPTS[0], **options(6)) != first
    same = model.generate([PROMPTS[0]] * 3, **options(5))
    assert same[0] == first[0]
    assert same[1] == model.generate(PROMPTS[0], **options(6))[0]  # row i draws from seed + i
    assert len(set(same)) == 3


def test_sampling_frequencies_follow_the_filtered_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(4000, 4)

    def shares(sampling: Sampling) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(4000)]
        return torch.bincount(sampling.choose(logits, generators), minlength=4) / 4000

    def assert_near(shares: Tensor, expected: list[float]) -> None:
        # Four standard errors of a share of 1/2 among 4,000 draws.
        wanted = torch.tensor(expected, dtype=torch.float32)
        torch.testing.assert_close(shares, wanted, atol=0.032, rtol=0)
        assert ((shares == 0) == (wanted == 0)).all()

    assert_near(shares(Sampling()), [0.5, 0.3, 0.15, 0.05])
    assert_near(shares(Sampling(top_k=2)), [0.625, 0.375, 0, 0])
    # 0.5 + 0.3 = 0.8 is less than 0.81, so the third token is kept too.
    assert_near(shares(Sampling(top_p=0.81)), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert_near(shares(Sampling(top_p=0.4)), [1, 0, 0, 0])
    # Temperature 1/2 squares the probabilities; their squares sum to 0.365.
    assert_near(
        shares(Sampling(temperature=0.5)), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]
    )
    assert_near(shares(Sampling(temperature=0)), [1, 0, 0, 0])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LanguageModel]:
    """A model that writes a given text, whatever it reads, and then the end-of-text token for ever."""

    def make(text: str) -> LanguageModel:
        model = LanguageModel.from_hf(tiny_hf_model("gpt2"), tiny_tokenizer(), "scripted")
        script = iter([*model.tokenizer.encode(text), *[END_OF_TEXT] * 99])
        monkeypatch.setattr(
            Sampling, "choose", lambda self, logits, generators: torch.tensor([next(script)] * len(logits))
        )
        return model

    return make


def test_stream_holds_partial_characters_back(scripted: Callable[[str], LanguageModel]) -> None:
    text = "ab😀é日"
    model = scripted(text)
    steps = [step[0] for step in model.generate_stream("x", max_new_tokens=40)]
    assert "".join(steps) == text
    assert "\ufffd" not in "".join(steps)
    assert {"", "😀"} < set(steps)
    # One step for each token, and one for the end-of-text token, which is no text.
    assert len(steps) == len(model.tokenizer.encode(text)) + 1


def test_stream_cut_inside_a_character_ends_in_a_replacement(
    scripted: Callable[[str], LanguageModel],
) -> None:
    model = scripted("a😀")
    n = len(model.tokenizer.encode("a😀"))
    steps = [step[0] for step in model.generate_stream("x", max_new_tokens=n - 1)]
    assert "".join(steps) == "a\ufffd"


def test_rows_end_at_any_of_several_end_tokens() -> None:
    hf_model = tiny_hf_model("llama")
    plain = tiny_language_model("llama")
    ids = encoded([PROMPTS[1]])[0]
    written = plain.tokenizer.encode_batch(plain.generate(PROMPTS[1], temperature=0, max_new_tokens=8))[0]
    stop = int(plain.logits(torch.tensor([ids]))[0, -1].argmax())
    hf_model.generation_config.eos_token_id = [END_OF_TEXT, stop]
    model = LanguageModel.from_hf(hf_model, tiny_tokenizer(), "tiny")
    assert model.tokenizer.eos_ids == {END_OF_TEXT, stop}
    assert len(written) > 0
    assert model.generate(PROMPTS[1], temperature=0, max_new_tokens=8) == [""]


def test_empty_prompt_starts_from_the_end_of_text_token() -> None:
    model = tiny_language_model("gpt_neox")
    assert model.generate("", temperature=0, max_new_tokens=6) == model.generate(
        "<|endoftext|>", temperature=0, max_new_tokens=6
    )


def test_threads_with_different_edits_do_not_meet() -> None:
    model = tiny_language_model("llama")
    edits = [steer_even_positions(32), Edit("blocks.0.hook_mlp_out", lambda x, positions: -x), None, None]

    def write(edit: Edit | None) -> str:
        if edit is None:
            return model.generate(PROMPTS[1], temperature=0.7, max_new_tokens=10)[0]
        with model.edited(edit):
            return model.generate(PROMPTS[1], temperature=0.7, max_new_tokens=10)[0]

    expected = [write(edit) for edit in edits]
    assert len(set(expected)) == 3
    found: list[list[str]] = [[] for _ in edits]

    def work(index: int) -> None:
        for _ in range(5):
            found[index].append(write(edits[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[text] * 5 for text in expected]


def test_two_streams_side_by_side_keep_their_own_edits() -> None:
    model = tiny_language_model("llama")
    options: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 8, "seed": 1}
    plain_text = model.generate(PROMPTS[0], **options)
    plain = model.generate_stream(PROMPTS[0], **options)
    with model.edited(steer_even_positions(32)):
        steered_text = model.generate(PROMPTS[0], **options)
        steered = model.generate_stream(PROMPTS[0], **options)
        pairs = list(zip(plain, steered, strict=False))
    pairs += [(a, [""]) for a in plain] + [([""], b) for b in steered]
    assert "".join(a[0] for a, _ in pairs) == plain_text[0]
    assert "".join(b[0] for _, b in pairs) == steered_text[0]
    assert plain_text != steered_text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1."),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (greedy) or a positive number."),
        ({"top_k": 0}, "top_k is 0; it must be at least 1."),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1."),
        ({"prompts": []}, "There is no prompt: give at least one text to continue."),
        ({"bos": True}, "The tokenizer has no BOS token to put in front of a text: leave bos off."),
        (
            {"max_new_tokens": CONTEXT_LENGTH},
            "A prompt of 1 tokens and 64 new ones exceed the model's context of 64 tokens: at most 63 new"
            " tokens fit.",
        ),
        (
            {"prompts": "#" * 70, "max_new_tokens": 1},
            "A prompt of 70 tokens and 1 new ones exceed the model's context of 64 tokens: no new token"
            " fits.",
        ),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        tiny_language_model("gpt2").generate_stream(**{"prompts": "#", **options})
    assert str(error.value) == sentence


def test_context_can_be_filled_to_the_last_token() -> None:
    model = tiny_language_model("gpt2")
    steps = list(model.generate_stream("#", temperature=1.0, max_new_tokens=CONTEXT_LENGTH - 1, seed=2))
    assert len(steps) <= CONTEXT_LENGTH
