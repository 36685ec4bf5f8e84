"""Several processes train an SAE as one does; checkpoints, signals and refusals under torchrun."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import environment
from distributed_worker import CASES, SINGLE

from activations.errors import InputError
from features.index import FeatureIndex
from features.labels import Labels
from features.layout import COLUMNS
from sae.config import SAEConfig, TrainConfig
from sae.global_select import nth_largest, winners_of_batch
from sae.mesh import ALONE, Mesh
from sae.scaling import Scaling
from sae.trainer import Trainer

ON_FOUR = ("topk", "batch_topk few", "matryoshka", "jumprelu, few")
GRIDS = [  # processes, shards of the features, cases
    *((2, shards, case) for shards in (1, 2) for case in CASES),
    *((4, shards, case) for shards in (1, 2, 4) for case in ON_FOUR),
]
SINGLE_GRIDS = [
    *((2, shards, case) for shards in (1, 2) for case in SINGLE),
    *((4, shards, "topk") for shards in (1, 2, 4)),
]


def torchrun(n_processes: int, *words: str | Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run something on so many processes."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        n_processes,
    ]
    return subprocess.run(
        [str(word) for word in (*launcher, *words)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """How far trainings on 2 and on 4 processes end from that on one."""
    results = {}
    for n_processes, shards, cases in ((2, "1,2", tuple(CASES)), (4, "1,2,4", ON_FOUR)):
        out = tmp_path_factory.mktemp("compared") / "results.json"
        done = torchrun(n_processes, WORKER, "compare", out, shards, *cases)
        assert done.returncode == 0, done.stderr
        results[n_processes] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize(("n_processes", "shards", "case"), GRIDS)
def test_in_float64_several_processes_train_what_one_trains(
    n_processes: int, shards: int, case: str, compared: dict[int, Any]
) -> None:
    """The same global batches, 50 steps: every weight, every term of the loss, L0, dead features, gradient norm."""
    found = compared[n_processes]["float64"][case][str(shards)]
    assert found["weights"] < 1e-10
    assert found["numbers"] < 1e-10


@pytest.mark.parametrize(("n_processes", "shards", "case"), SINGLE_GRIDS)
def test_in_float32_the_loss_stays_within_a_thousandth_over_200_steps(
    n_processes: int, shards: int, case: str, compared: dict[int, Any]
) -> None:
    assert compared[n_processes]["float32"][case][str(shards)]["loss"] < 1e-3


def test_features_died_in_the_trainings_that_were_compared(compared: dict[int, Any]) -> None:
    for case in ("topk", "topk, dead on one shard", "batch_topk", "matryoshka", "multi topk"):
        found = compared[2]["float64"][case]["1"]
        assert found["dead"] > 0
        assert "auxk" in found["terms"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of two processes: one of them killed, a signal heard by one of them, and left alone."""
    folder = tmp_path_factory.mktemp("interrupted")
    assert torchrun(2, WORKER, "killed", folder).returncode != 0
    checkpoints = sorted(path.name for path in (folder / "2 shards, killed" / "checkpoints").iterdir())
    assert checkpoints == ["000000000640", "000000000960"]  # after 20 and 30 steps of 32 tokens
    done = torchrun(2, WORKER, "finished", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["1 shards, stopped", "2 shards, stopped", "2 shards, killed"])
def test_interrupted_processes_go_on_to_the_same_bits(name: str, interrupted: Path) -> None:
    whole, other = interrupted / name.split(",")[0], interrupted / name
    for file in ("sae/sae_weights.safetensors", "metrics.jsonl"):
        assert (other / file).read_bytes() == (whole / file).read_bytes()
    assert not (other / "checkpoints").exists()
    held_out = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert "held_out_l0" in held_out[-1]


def sae_command(*words: str | Path) -> tuple[str | Path, ...]:
    return "--no-python", sys.executable, "-m", "app.cli", *words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that two processes trained, and what they said."""
    folder = tmp_path_factory.mktemp("trained")
    texts, run = folder / "texts", folder / "run"
    texts.mkdir()
    for number in range(6000):
        (texts / f"{number}.txt").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 3)
    words = ["--out", run, "--text", texts, "--tokens", "8000", "--d-sae", "64", "--k", "4", "--shards", "2"]
    done = torchrun(2, *sae_command("train", *words, "--batch-tokens", "128"))
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_sae_train_under_torchrun(trained: tuple[Path, str]) -> None:
    """One process writes and shows; the folder is that of any run."""
    run, said = trained
    assert said.count("Training on") == said.count("The SAE is in") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == 8000 // 128 * 128
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert (run / "evaluation.json").is_file()


def test_sae_index_under_torchrun(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Two processes share the text, one writes; index and labels are those that a single process makes."""
    alone, together = (shutil.copytree(trained[0], tmp_path / name) for name in ("alone", "together"))
    for n_processes, run in ((1, alone), (2, together)):
        done = torchrun(n_processes, *sae_command("index", run, "--tokens", "6000", "--score-tokens", "1500"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Labelling") == done.stdout.count("The index is in") == 1
        assert not (run / "features" / "train.partial").exists()
    one, two = (FeatureIndex.open(run / "features" / "train") for run in (alone, together))
    assert one.n_tokens == two.n_tokens > 5000
    assert one.count.any()
    for name in COLUMNS.names or ():
        np.testing.assert_allclose(one.column(name), two.column(name), rtol=1e-5, err_msg=name)
    for name in ("histogram", "token_id", "next_count", "coactive_count", "top_position", "range_window"):
        np.testing.assert_array_equal(one.array(name), two.array(name), err_msg=name)
    labels = [
        {
            feature: (label.text, label.f1)
            for feature, label in Labels.open(run / "labels.sqlite").all().items()
        }
        for run in (alone, together)
    ]
    assert labels[0] == labels[1]
    assert labels[0]


def test_the_nth_largest_and_the_winners_are_those_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for size in (1, 5, 1000):
            values = torch.randn(size, dtype=dtype, generator=generator).relu_()
            values = torch.cat([values, values[: size // 2]])  # with ties
            order = values.sort(descending=True, stable=True)
            for n in (1, 3, 50, 700, 5000):
                nth = order.values[n - 1] if n <= len(values) else 0
                assert nth_largest(values, n, ALONE) == nth
                won = np.flatnonzero(winners_of_batch(values, n, ALONE).numpy())
                assert won.tolist() == sorted(order.indices[:n].tolist())


def test_a_nan_wins() -> None:
    values = torch.tensor([1.0, torch.nan, -torch.nan, 2.0])
    assert winners_of_batch(values, 2, ALONE).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("config", "mesh", "said"),
    [
        (TrainConfig(shards=2), ALONE, "--nproc-per-node 2 sae train"),
        (TrainConfig(batch_tokens=1000), Mesh(3), "must be a multiple of the number of processes, 3"),
        (TrainConfig(batch_tokens=1024, resample_every=9), Mesh(2), "resample_every is for one process"),
    ],
)
def test_what_processes_cannot_do_is_refused(config: TrainConfig, mesh: Mesh, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Trainer(config, Scaling(torch.zeros(4), 1.0), mesh)


def test_shards_are_checked_before_a_process_is_asked_for() -> None:
    with pytest.raises(InputError, match="must be a multiple of shards, 3"):
        TrainConfig(sae=SAEConfig(d_sae=64), shards=3).check()
    with pytest.raises(InputError, match="shards is 0"):
        TrainConfig(shards=0).check()
    with pytest.raises(InputError, match="no multiple of it"):
        Mesh.started(2, torch.device("cpu"))
