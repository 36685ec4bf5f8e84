"""Run by torchrun: trains SAEs on several processes, for tests that look at what they end in.

usage: distributed_worker.py compare OUT SHARDS,SHARDS,… CASE …
       distributed_worker.py killed|finished FOLDER
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import Terminated
from sae.config import SAEConfig, TrainConfig
from sae.mesh import ALONE, Mesh
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.train import Run
from sae.train import train as train_run
from sae.trainer import Trainer

D_IN, ROWS = 16, 32  # rows of a whole batch
CPU = torch.device("cpu")
SINGLE = ("topk", "batch_topk", "jumprelu")  # compared in float32 as well
Trained = tuple[SparseAutoencoder, list[dict[str, float]]]

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of SAEConfig, fields of TrainConfig
    "topk": ({"k": 3, "d_sae": 96, "auxk": 0.5}, {}),
    "topk, dead on one shard": ({"k": 8, "d_sae": 32, "auxk": 0.5}, {}),
    "multi topk": ({"k": 2, "multi_topk": 0.125, "k_start": 10}, {"clip_norm": 1.0}),
    "geometric median": ({"k": 4}, {"init_b_dec": "geometric_median", "ema": 0.9}),
    "aligned": ({"k": 4, "aligned": True}, {}),
    "transcoder": ({"k": 4, "skip": True}, {"hook_out": "blocks.3.hook_mlp_out", "clip_norm": 0.5}),
    "batch_topk": ({"architecture": "batch_topk", "k": 3, "d_sae": 96, "auxk": 0.5}, {}),
    "batch_topk few": ({"architecture": "batch_topk", "k": 2, "d_sae": 32}, {}),
    "matryoshka": ({"architecture": "matryoshka", "k": 4, "levels": (6, 20, 50)}, {}),
    "jumprelu": ({"architecture": "jumprelu"}, {}),
    "jumprelu, few": ({"architecture": "jumprelu", "target_l0": 4.0, "bandwidth": 0.5}, {}),
    "relu": ({"architecture": "relu", "p_end": 0.5, "target_l0": 6.0}, {}),
    "gated": ({"architecture": "gated", "target_l0": 6.0}, {"clip_norm": 1.0}),
}


def config_of(case: str, steps: int, shards: int) -> TrainConfig:
    sae, train = CASES[case]
    return TrainConfig(
        sae=SAEConfig(**({"d_sae": 64} | sae)),
        tokens=steps * ROWS,
        batch_tokens=ROWS,
        learning_rate=1e-2,
        shards=shards,
        **train,
    )


def batches(steps: int, config: TrainConfig) -> list[Tensor]:
    """Sums of a few of 40 directions, with noise."""
    generator = torch.Generator().manual_seed(7)
    width = D_IN * len(config.hook_names)
    directions = torch.randn(40, width, generator=generator)
    made = []
    for _ in range(steps):
        chosen = (torch.rand(ROWS, 40, generator=generator) < 0.1) * torch.rand(ROWS, 40, generator=generator)
        made.append(chosen @ directions + 0.1 * torch.randn(ROWS, width, generator=generator))
    return made


def train(case: str, steps: int, mesh: Mesh) -> Trained:
    """The SAE after so many steps, and the terms of the loss, L0 and dead features of each of them."""
    config = config_of(case, steps, mesh.n_shards)
    zeros = torch.zeros(D_IN)
    scaling = Scaling(zeros, 1.0, *((zeros, 1.0) if config.hook_out else ()))
    trainer = Trainer(config, scaling, mesh)
    if "dead" in case:
        silence = torch.zeros(config.sae.d_sae)
        silence[:5] = 100.0
        trainer.weights.b_enc.data -= mesh.own(silence)
    part = ROWS // mesh.n_data
    history = []
    for batch in batches(steps, config):
        x, y = scaling.apply(batch[mesh.data_rank * part :][:part])
        loss = trainer.step(x, y, measure=True)
        history.append(
            {
                "loss": float(loss.total.detach()),
                **{name: float(value) for name, value in loss.terms.items()},
                "entries": float(loss.entries),
                "norm": float(trainer.gradient_norm),
                "dead": float(trainer.dead.mask().sum()),
            }
        )
    return trainer.folded({}), history


def apart(found: Trained, alone: Trained) -> dict[str, Any]:
    """How far several processes and one end apart.

    Returns:
        weights: the largest difference of any. numbers: of any number of a step, relative to its size. loss: likewise.
        terms, dead: what the loss was made of, and the most features that were dead.
    """
    (sae, history), (expected_sae, expected) = found, alone
    steps = list(zip(history, expected, strict=True))
    numbers = [
        abs(now[name] - then[name]) / max(abs(then[name]), 1.0) for now, then in steps for name in then | now
    ]
    weights = expected_sae.weights.tensors()
    return {
        "weights": max(
            float((tensor - weights[name]).abs().max()) for name, tensor in sae.weights.tensors().items()
        ),
        "numbers": max(numbers),
        "loss": max(abs(now["loss"] / then["loss"] - 1) for now, then in steps),
        "terms": sorted(set().union(*expected)),
        "dead": max(step["dead"] for step in expected),
    }


def compare(out: Path, all_shards: list[int], cases: list[str]) -> None:
    """Write ``{number format: {case: {shards: how far apart}}}``."""
    meshes = [Mesh.started(shards, CPU) for shards in all_shards]
    results: dict[str, dict[str, dict[int, Any]]] = {}
    for kind, steps in (("float64", 50), ("float32", 200)):
        torch.set_default_dtype(getattr(torch, kind))
        for case in cases if kind == "float64" else [case for case in SINGLE if case in cases]:
            alone = train(case, steps, ALONE) if meshes[0].rank == 0 else None
            for mesh in meshes:
                found = train(case, steps, mesh)
                if alone is not None:
                    results.setdefault(kind, {}).setdefault(case, {})[mesh.n_shards] = apart(found, alone)
    if meshes[0].rank == 0:
        out.write_text(json.dumps(results))


class Parts:
    """This process's part of every batch; ``before`` hears the number of each batch before it is given."""

    def __init__(self, config: TrainConfig, mesh: Mesh, before: Callable[[int], None]) -> None:
        n = ROWS // mesh.size
        self._batches = [batch[mesh.rank * n :][:n] for batch in batches(config.n_steps(), config)]
        self._before, self._done = before, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self._done < len(self._batches):
            self._before(self._done)
            self._done += 1
            yield self._batches[self._done - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = state["done"]


def train_into(folder: Path, mesh: Mesh, before: Callable[[int], None] = lambda step: None) -> None:
    config = config_of("topk", 60, mesh.n_shards)
    config = replace(config, checkpoint_every=10 * ROWS, ema=0.9)
    held_out = batches(1, config)[0]
    scaling = Scaling(torch.zeros(D_IN), 1.0)
    train_run(Run(config, folder), Parts(config, mesh, before), scaling, held_out=held_out, mesh=mesh)


def killed(folder: Path) -> None:
    """Begin a training in which process 1 is killed."""
    mesh = Mesh.started(2, CPU)

    def before(step: int) -> None:
        if step == 37 and mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train_into(folder / "2 shards, killed", mesh, before)


def finished(folder: Path) -> None:
    """End it, train as it would be trained at one go, and stop another training by a signal that one process hears."""
    for shards in (1, 2):
        mesh = Mesh.started(shards, CPU)
        train_into(folder / f"{shards} shards", mesh)

        def before(step: int, mesh: Mesh = mesh) -> None:
            if step == 23 and mesh.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped = folder / f"{shards} shards, stopped"
        try:
            train_into(stopped, mesh, before)
        except Terminated:
            newest = max((stopped / "checkpoints").iterdir())
            assert int(newest.name) == 24 * ROWS
            assert len(list(newest.glob("state*"))) == shards
            mesh.wait()
            train_into(stopped, mesh)
    train_into(folder / "2 shards, killed", mesh)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    mode, path, *words = sys.argv[1:]
    if mode == "compare":
        compare(Path(path), [int(shards) for shards in words[0].split(",")], words[1:])
    else:
        {"killed": killed, "finished": finished}[mode](Path(path))
