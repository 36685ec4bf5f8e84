"""Trainings that are killed, at any moment, and resumed: they repeat little and end in the same bits."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Resumable, ended, forked, kill_at
from store_helpers import HOOK, SECOND_HOOK, contents, make_blocks
from tiny_models import tiny_language_model
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.exclusion import Exclusion
from activations.models import LanguageModel
from activations.store import ActivationStore
from activations.store_stream import StoreStream
from activations.stream import ActivationStream
from activations.writer import write_store
from sae import train as train_module
from sae.architectures.registry import ARCHITECTURES
from sae.config import SELECTING, SAEConfig, TrainConfig
from sae.scaling import Scaling
from sae.train import Batches, Run, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")

BATCH, STEPS, INTERVAL = 32, 60, 5
EVERYTHING: dict[str, Any] = {
    "moments": "8bit",
    "ema": 0.9,
    "clip_norm": 1.0,
    "init_b_dec": "geometric_median",
    "resample_every": 10 * BATCH,
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model("llama")


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return make_blocks(40, padded=5)


@pytest.fixture(scope="module")
def store(model: LanguageModel, blocks: TokenBlocks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(model, blocks, [HOOK, SECOND_HOOK], folder)
    return folder


@pytest.fixture(autouse=True)
def _frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "CHECKPOINT_EVERY_LINES", INTERVAL)


def settings(architecture: str = "topk", **changes: Any) -> TrainConfig:
    kind: dict[str, Any] = {"k": 4} if architecture in SELECTING else {"target_l0": 6.0}
    sae = SAEConfig(architecture=architecture, d_sae=64, **kind)  # type: ignore[arg-type]
    return TrainConfig(hook_name=HOOK, tokens=STEPS * BATCH, batch_tokens=BATCH, sae=sae, **changes)


class Recorded:
    """Batches that write down in a file which of them were given out."""

    def __init__(self, batches: Batches, record: Path) -> None:
        self.batches, self.record = batches, record

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            handle = os.open(self.record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(handle, f"{self.batches.state_dict()['batches_done']}\n".encode())
            os.close(handle)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


@dataclass(frozen=True)
class Training(Resumable):
    """A training that can be begun again and again, each time in a process of its own."""

    config: TrainConfig
    batches: Callable[[], Batches]
    width: int
    held_out: Tensor = field(
        default_factory=lambda: torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    )

    def __call__(self, folder: Path, record: Path) -> None:
        """Train, or go on."""
        scaling = Scaling(torch.full((self.width,), 0.1), 2.0)
        if self.config.hook_out is not None:
            scaling = replace(scaling, mean_out=torch.full((72,), 0.1), scale_out=3.0)
        held_out = self.held_out if self.config.hook_out is None else None
        train(Run(self.config, folder), Recorded(self.batches(), record), scaling, held_out=held_out)

    def resume(self, folder: Path, before: Path, whole: dict[str, bytes]) -> None:
        """Finish what was killed, and compare; the steps done twice are no more than one interval."""
        after = before.with_name(before.name + "-after")
        assert ended(forked(lambda: self(folder, after))) == 0
        assert contents(folder) == whole
        assert not [path for path in folder.rglob(".*") if path.is_file()]
        first, second = _numbers(before), _numbers(after)
        assert len(set(first) & set(second)) <= INTERVAL


def _numbers(record: Path) -> list[int]:
    return [int(line) for line in record.read_text().split()] if record.exists() else []


def live(model: LanguageModel, blocks: TokenBlocks, config: TrainConfig) -> Training:
    def batches() -> Batches:
        return ActivationStream.live(
            model,
            blocks,
            HOOK,
            Exclusion(frozenset({0}), float("inf")),
            batch_size=BATCH,
            n_batches=STEPS,
            seed=0,
            buffer_rows=200,
        )

    return Training(config, batches, 32)


def stored(store: Path, config: TrainConfig) -> Training:
    def batches() -> Batches:
        opened = ActivationStore.open(store)
        also = [] if config.hook_out is None else [opened.at(config.hook_out)]
        return StoreStream.exact(opened.at(HOOK), also=also, batch_size=BATCH, n_batches=STEPS, seed=0)

    return Training(config, batches, 32)


def test_topk_live_killed_at_eight_random_moments(
    model: LanguageModel, blocks: TokenBlocks, tmp_path: Path
) -> None:
    assert live(model, blocks, settings()).killed_at_random(tmp_path, times=8) >= 2


def test_topk_from_a_store_killed_at_eight_random_moments(store: Path, tmp_path: Path) -> None:
    """With everything that has a state of its own: 8-bit moments, EMA, resampling."""
    assert stored(store, settings(**EVERYTHING)).killed_at_random(tmp_path, times=8) >= 2


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "topk"])
def test_every_other_architecture_killed_once(
    model: LanguageModel, blocks: TokenBlocks, tmp_path: Path, architecture: str
) -> None:
    live(model, blocks, settings(architecture)).killed_at_random(tmp_path, times=1)


def test_a_transcoder_killed_once(store: Path, tmp_path: Path) -> None:
    config = replace(settings(), hook_out=SECOND_HOOK)
    config = replace(config, sae=replace(config.sae, skip=True))
    stored(store, config).killed_at_random(tmp_path, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_killed_at_fifty_random_moments(
    model: LanguageModel, blocks: TokenBlocks, store: Path, tmp_path: Path, architecture: str
) -> None:
    assert live(model, blocks, settings(architecture)).killed_at_random(tmp_path / "live", times=50) >= 15
    assert stored(store, settings(architecture)).killed_at_random(tmp_path / "stored", times=50) >= 15


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_killed_in_each_of_its_writes_fsyncs_and_renames(store: Path, tmp_path: Path, call: str) -> None:
    """The last good checkpoint survives a crash while the next is written, whatever part of it was done."""
    training = stored(store, replace(settings(), tokens=12 * BATCH))
    training = replace(training, batches=lambda: StoreStream.exact(
        ActivationStore.open(store).at(HOOK), batch_size=BATCH, n_batches=12, seed=0
    ))  # fmt: skip
    whole, _ = training.whole(tmp_path / "whole")
    number = 0
    done = False
    while not done:
        number += 1
        folder, record = tmp_path / f"{number}", tmp_path / f"record-{number}"

        def killed(folder: Path = folder, record: Path = record, number: int = number) -> None:
            kill_at(call, number)
            training(folder, record)

        done = ended(forked(killed)) == 0
        if done:
            assert contents(folder) == whole
        else:
            training.resume(folder, record, whole)
    assert number > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_saves_the_step_at_which_it_stands(store: Path, tmp_path: Path, number: int) -> None:
    training = stored(store, settings())
    whole, _ = training.whole(tmp_path / "whole")
    folder, record = tmp_path / "run", tmp_path / "record"

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            training(folder, record)
        except KeyboardInterrupt:
            os._exit(0)
        os._exit(3)

    process = forked(interrupted)
    while len(_numbers(record)) < 8:
        time.sleep(0.001)
    os.kill(process, number)
    assert ended(process) == 0
    newest = max((folder / "checkpoints").iterdir())
    assert int(newest.name) == _numbers(record)[-1] * BATCH
    again = tmp_path / "again"
    assert ended(forked(lambda: training(folder, again))) == 0
    assert contents(folder) == whole
    assert not set(_numbers(record)) & set(_numbers(again))  # not one step is repeated


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path / "state.safetensors", 1000),
    "empty": lambda path: os.truncate(path / "state.safetensors", 0),
    "one bit": lambda path: _flip(path / "state.safetensors"),
    "no state": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: os.truncate(path / "manifest.json", 100),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    store: Path, tmp_path: Path, damage: str
) -> None:
    training = stored(store, settings())
    whole, _ = training.whole(tmp_path / "whole")
    folder, record = tmp_path / "run", tmp_path / "record"

    def dies() -> None:
        given = 0
        original = Recorded.__iter__

        def counted(self: Recorded) -> Iterator[Tensor]:
            nonlocal given
            for batch in original(self):
                given += 1
                if given == 3 * INTERVAL + 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        Recorded.__iter__ = counted  # type: ignore[method-assign]
        training(folder, record)

    assert ended(forked(dies)) == signal.SIGKILL
    newest, before = sorted((folder / "checkpoints").iterdir(), reverse=True)
    DAMAGE[damage](newest)
    after = tmp_path / "after"
    assert ended(forked(lambda: training(folder, after))) == 0
    assert _numbers(after)[0] == int(before.name) // BATCH + 1
    assert contents(folder) == whole
