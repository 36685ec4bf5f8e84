"""Run by torchrun: trains SAEs on a grid of processes and on one, and writes how far apart they end.

usage: distributed_worker.py OUT SHARDS
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.config import SAEConfig, TrainConfig
from sae.mesh import ALONE, Mesh
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.trainer import Trainer

D_IN, ROWS = 16, 32  # rows of a whole batch

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of SAEConfig, fields of TrainConfig
    "topk": ({"k": 3, "d_sae": 96, "auxk": 0.5}, {}),
    "topk, dead on one shard": ({"k": 8, "d_sae": 32, "auxk": 0.5}, {}),
    "multi topk": ({"k": 2, "multi_topk": 0.125, "k_start": 10}, {"clip_norm": 1.0}),
    "geometric median": ({"k": 4}, {"init_b_dec": "geometric_median", "ema": 0.9}),
    "aligned": ({"k": 4, "aligned": True}, {}),
    "transcoder": ({"k": 4, "skip": True}, {"hook_out": "blocks.3.hook_mlp_out", "clip_norm": 0.5}),
    "batch_topk": ({"architecture": "batch_topk", "k": 3, "d_sae": 96, "auxk": 0.5}, {}),
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


def train(case: str, steps: int, shards: int, mesh: Mesh) -> tuple[SparseAutoencoder, list[dict[str, float]]]:
    """The SAE after so many steps, and the terms of the loss, L0 and dead features of each of them."""
    config = config_of(case, steps, shards)
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


def apart(case: str, steps: int, mesh: Mesh) -> dict[str, Any]:
    """The largest difference of any weight, and of any number of a step relative to its size."""
    sae, history = train(case, steps, mesh.n_shards, mesh)
    if mesh.rank:
        return {}
    alone, expected = train(case, steps, 1, ALONE)
    numbers = [
        abs(now[name] - then[name]) / max(abs(then[name]), 1.0)
        for now, then in zip(history, expected, strict=True)
        for name in then | now
    ]
    loss = [abs(now["loss"] / then["loss"] - 1) for now, then in zip(history, expected, strict=True)]
    weights = alone.weights.tensors()
    return {
        "weights": max(
            float((tensor - weights[name]).abs().max()) for name, tensor in sae.weights.tensors().items()
        ),
        "numbers": max(numbers),
        "loss": max(loss),
        "terms": sorted(set().union(*expected)),
        "dead": max(step["dead"] for step in expected),
        "l0": expected[-1]["entries"] / ROWS,
    }


if __name__ == "__main__":
    out, shards = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    mesh = Mesh.started(shards, torch.device("cpu"))
    cases = sys.argv[3:] or list(CASES)
    torch.set_default_dtype(torch.float64)
    found = {case: apart(case, 50, mesh) for case in cases}
    torch.set_default_dtype(torch.float32)
    single = {case: apart(case, 200, mesh) for case in cases if case in ("topk", "batch_topk", "jumprelu")}
    if mesh.rank == 0:
        out.write_text(json.dumps({"float64": found, "float32": single}))
