"""A person's label with a pattern: how patterns are written, and that they are scored as any other."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import END_OF_TEXT, VOCABULARY, one_thread, tiny_language_model

from activations.blocks import TokenBlocks
from activations.errors import InputError
from activations.models import LanguageModel
from activations.tokenizer import Tokenizer
from features.build import build_index
from features.labels import Label, Score
from features.own_label import give_label, not_scored_because, read_pattern, score_own_label, write_pattern
from features.patterns import Pattern
from features.run import Run
from sae.architectures.base import Weights
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder
from sae.run import RunFolder

HOOK = "blocks.1.hook_resid_post"
D_SAE, DEAD, CONTEXT = 40, 1, 20


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def text(seed: int, split: str) -> TokenBlocks:
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (40, CONTEXT))
    ids[:, 7] = END_OF_TEXT
    ids[::3, 5] = 70
    documents = np.tile(np.arange(len(ids), dtype=np.int32)[:, None], (1, CONTEXT))
    names = [f"{split} {n}" for n in range(len(ids))]
    return TokenBlocks(ids.astype(np.uint16), documents, names, split, "isolated", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    model = tiny_language_model("llama")
    rows = torch.randn(D_SAE, 32, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(D_SAE)
    bias[DEAD] = -1e4
    sae = SparseAutoencoder(
        SAEConfig(d_sae=D_SAE, k=3), Weights(rows, bias, rows.clone(), torch.zeros(32)), {"hook_name": HOOK}
    )
    build_index(model, sae, text(1, "train"), folder.index)
    text(2, "score").save(folder.tokens / "score", {})
    return Run(folder, TrainConfig(hook_name=HOOK, sae=sae.config), model, sae=sae)


@pytest.fixture
def run(made: Run) -> Iterator[Run]:
    """The run without labels."""
    yield made
    for feature in made.labels.all("person"):
        made.labels.set(feature, "")


@cache
def words() -> Tokenizer:
    return LanguageModel.load("builtin").tokenizer


def test_a_pattern_is_what_it_is_about() -> None:
    tokenizer = words()
    assert read_pattern("self", tokenizer) == Pattern.of_tokens(["self"])
    assert (
        read_pattern("␣self", tokenizer) == read_pattern(" self", tokenizer) == Pattern.of_tokens([" self"])
    )
    assert read_pattern("⏎", tokenizer) == Pattern.of_tokens(["\n"])
    assert read_pattern("/[0-9]+/", tokenizer) == Pattern.of_regex("[0-9]+")
    assert read_pattern("/", tokenizer) == Pattern.of_tokens(["/"])
    several = [tokenizer.vocabulary()[i] for i in tokenizer.encode("import os")]
    assert len(several) > 1
    assert read_pattern("import os", tokenizer) == Pattern.of_ngrams([several])
    for written, sentence in (
        ("", "The pattern is empty: give a token, up to four tokens in a row, or /a regex/."),
        ("/(/", "/(/ is no regular expression"),
        ("one two three four five six", "and at most 4 in a row can be matched: write it as /a regex/."),
    ):
        with pytest.raises(InputError) as caught:
            read_pattern(written, tokenizer)
        assert sentence in str(caught.value)


@settings(deadline=None)
@given(st.text(alphabet="ab _\n\t(/{", min_size=1, max_size=6))
def test_what_was_written_is_shown_and_read_again(written: str) -> None:
    tokenizer = words()
    try:
        found = read_pattern(written, tokenizer)
    except InputError:
        return
    assert read_pattern(write_pattern(found.to_json()), tokenizer) == found


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "no JSON",
        '{"any_of": [{}]}',
        '{"any_of": [{"token": ["a", "b"]}]}',
        '{"any_of": [{"line": ["def"]}]}',
    ],
)
def test_other_patterns_are_shown_as_they_are(pattern: str) -> None:
    assert write_pattern(pattern) == pattern


def test_its_score_is_that_of_the_definition(run: Run) -> None:
    blocks = TokenBlocks.load(run.folder.tokens / "score")
    feature = int(np.argmax(run.index.count))
    token = run.model.tokenizer.vocabulary()[70]
    fires = []
    for n in range(blocks.n_blocks):
        ids = blocks.ids_tensor(n, n + 1)
        x = run.model.capture(ids, [HOOK], attention_mask=blocks.attention_mask(n, n + 1))[HOOK][0]
        fires.append((run.sae.encode(x).to_dense() > 0).numpy()[:, feature])
    kept = blocks.ids != END_OF_TEXT
    fired, says = np.array(fires) & kept, (blocks.ids == 70) & kept
    run.labels.put_automatic(
        [Label(feature, "x", "automatic", scores=(Score("tokens", 0.3, 9, control=0.2),))], {}
    )
    give_label(run, feature, "the token 70", token)
    score = score_own_label(run, feature)
    assert score is not None
    assert score.value == pytest.approx(2 * (fired & says).sum() / (fired.sum() + says.sum()))
    assert (score.n, score.control) == (fired.sum(), 0.2)
    shown = run.labels.get(feature)
    assert shown is not None
    assert (shown.text, shown.source, shown.score) == ("the token 70", "person", score)
    change = run.labels.change()
    assert score_own_label(run, feature) == score  # scored once
    assert run.labels.change() == change


def test_what_cannot_be_scored_says_why(run: Run) -> None:
    give_label(run, 3, "free text")
    give_label(run, DEAD, "nothing", "/x/")
    for feature, why in ((3, "it has no pattern"), (DEAD, "the feature does not fire on the score split")):
        assert score_own_label(run, feature) is None
        label = run.labels.all("person")[feature]
        assert label.summary.endswith(" · not scored")
        assert not_scored_because(label) == why
    assert score_own_label(run, 4) is None
    for arguments in ((99, "x"), (3, " ", "x")):
        with pytest.raises(InputError):
            give_label(run, *arguments)  # type: ignore[arg-type]
