"""The bundled model: its files, its loss on held-out text, its card and the script that trained it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_language_model

from activations.blocks import PADDING, TokenBlocks
from activations.builtin.measure_model import measure_loss
from activations.builtin.train_model import PACKAGES, TrainingConfig, learning_rate_factor, make_model
from activations.capture import single_threaded
from activations.corpus import Corpus, CorpusConfig
from activations.errors import InputError
from activations.loading import BUILTIN
from activations.models import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("builtin", device="cpu")


def test_it_is_the_model_the_card_describes(model: LanguageModel) -> None:
    assert (model.n_layers, model.d_model, model.n_heads, model.d_vocab) == (6, 256, 8, 4096)
    assert model.context_length == 256
    assert json.loads((BUILTIN / "config.json").read_text())["max_position_embeddings"] == 256
    weights = load_file(BUILTIN / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert sum(weight.numel() for weight in weights.values()) == pytest.approx(5.9e6, rel=0.01)
    assert (model.tokenizer.separator_id, model.tokenizer.adds_bos) == (0, False)


def test_it_predicts_held_out_python(model: LanguageModel) -> None:
    blocks = Corpus().blocks(model.tokenizer, "test", 5000, model.context_length)
    loss = measure_loss(model, blocks)
    # 2.26 on 100,000 tokens, 2.13 on the first 50 tokens of each file, which are often a licence; a model of
    # the unigram frequencies stands at about 6.
    assert 1.5 < loss.nats_per_token < 2.6
    assert loss.n_documents >= 100
    assert loss.n_predicted == blocks.n_blocks * 255
    assert loss.by_position[0] > 4 > np.mean(loss.by_position[64:])


def test_loss_equals_the_formula_written_out() -> None:
    model = tiny_language_model("llama")
    ids = np.random.default_rng(0).integers(0, 300, (6, 12)).astype(np.uint16)
    documents = np.zeros((6, 12), np.int32)
    ids[5, 7:], documents[5, 7:] = 0, PADDING
    loss = measure_loss(model, TokenBlocks(ids, documents, ["a"], "test", "isolated", bos=False))
    nats, n_bytes = [], 0
    for row, length in zip(ids.astype(int).tolist(), [12] * 5 + [7], strict=True):
        logits = model.logits(torch.tensor([row[:length]]))[0].double()
        for place in range(1, length):
            nats.append(float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, row[place]]))
        n_bytes += len(model.tokenizer.decode([token for token in row[1:length] if token]).encode())
    assert loss.n_predicted == len(nats) == 5 * 11 + 6
    assert loss.nats_per_token == pytest.approx(np.mean(nats), rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(np.sum(nats) / np.log(2) / n_bytes, rel=1e-5)
    assert loss.by_position[10] == pytest.approx(np.mean(nats[10:55:11]), rel=1e-5)


def test_the_card_names_every_package_that_was_read() -> None:
    card = (BUILTIN / "README.md").read_text(encoding="utf-8")
    missing = [package for package in PACKAGES if f"`{package}`" not in card]
    assert missing == []


def test_the_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 40)
    assert factors[40:300] == [1.0] * 260
    assert factors[650] == pytest.approx(0.525)  # half way down the cosine, between 1 and 0.05
    assert factors[-1] == pytest.approx(0.05, abs=1e-3)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    lines = [f"def function_{n}(argument, other={n}):\n    return argument + {n}\n\n" for n in range(400)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(0, 400, 20):
        (folder / f"{number}.txt").write_text("".join(lines[number : number + 20]))
    return Corpus(CorpusConfig(text=(str(folder),)))


def test_the_script_trains_a_model_that_loads(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = TrainingConfig(
        n_tokens=30 * 8 * 32,
        vocab_size=300,
        n_layers=1,
        d_model=32,
        n_heads=2,
        d_mlp=64,
        context_length=32,
        batch_size=8,
        learning_rate=1e-2,
    )
    with single_threaded():  # a model as small as this waits more than it computes on several
        make_model(corpus, config, tmp_path / "model", "cpu")
    losses = [float(line.split(": ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert losses[0] == pytest.approx(np.log(300), abs=0.3)  # knows nothing
    assert losses[-1] < losses[0] - 1.5
    trained = LanguageModel.load(str(tmp_path / "model"), device="cpu")
    assert (trained.context_length, trained.d_vocab) == (32, 300)
    measured = measure_loss(trained, corpus.blocks(trained.tokenizer, "train", 2000, 32))
    assert measured.nats_per_token == pytest.approx(losses[-1], abs=0.5)
    with pytest.raises(InputError, match="is there already and not empty: give a new folder"):
        make_model(corpus, config, tmp_path / "model", "cpu")


def test_a_corpus_of_less_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tiny")
    corpus = Corpus(CorpusConfig(text=(str(tmp_path / "a.txt"),)))
    with pytest.raises(InputError, match="fewer than one window of 256: give more text"):
        make_model(corpus, TrainingConfig(), tmp_path / "model", "cpu")
    assert not (tmp_path / "model").exists()
