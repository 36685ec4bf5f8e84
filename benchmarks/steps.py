"""The training steps that are measured: shapes, batches and trainers."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.config import SELECTING, SPARSITY_WEIGHTS, ArchitectureName, SAEConfig, TrainConfig
from sae.scaling import Scaling
from sae.trainer import Trainer

BATCHES = 4


class Shape(NamedTuple):
    """One size of the problem, and the largest ratio of a TopK step to the bare product that we accept."""

    n: int
    d_in: int
    d_sae: int
    k: int
    limit: float


SHAPES = (Shape(4096, 256, 4096, 32, 2.4), Shape(2048, 512, 8192, 32, 1.8), Shape(4096, 768, 24576, 32, 1.5))


def make_batches(shape: Shape) -> Tensor:
    """``[BATCHES, n, d_in]``: sparse mixtures of fixed directions plus noise, mean ‖x‖² = d_in."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(shape.d_sae, shape.d_in, generator=generator)
    chosen = torch.randint(shape.d_sae, (BATCHES * shape.n, shape.k), generator=generator)
    weights = torch.rand(BATCHES * shape.n, shape.k, generator=generator)
    x = torch.nn.functional.embedding_bag(chosen, directions, mode="sum", per_sample_weights=weights)
    x += torch.randn(x.shape, generator=generator)
    x *= (shape.d_in / x.square().sum(1).mean()).sqrt()
    return x.view(BATCHES, shape.n, shape.d_in)


def make_trainer(
    shape: Shape, architecture: ArchitectureName, batch: Tensor, *, settled: bool = True
) -> Trainer:
    """A trainer before its first step.

    Args:
        batch: ``[n, d_in]``.
        settled: architectures that pay for firing (relu, gated, jumprelu) get encoder biases with which d_sae/64
            features fire per token, as late in a run; otherwise they start as they do, with far more.
    """
    selects = architecture in SELECTING
    chosen = {"k": shape.k} if selects else {"sparsity_weight": SPARSITY_WEIGHTS[architecture]}
    config = TrainConfig(
        tokens=100_000 * shape.n,
        batch_tokens=shape.n,
        learning_rate=1e-6 if settled else 1e-4,
        sae=SAEConfig(architecture=architecture, d_sae=shape.d_sae, **chosen),
    )
    config.check()
    trainer = Trainer(config, Scaling(torch.zeros(shape.d_in), 1.0))
    if settled and not selects:
        with torch.no_grad():
            silence(trainer, batch)
    return trainer


def silence(trainer: Trainer, batch: Tensor) -> None:
    """Lower all encoder biases by one number, so that d_sae/64 features per token fire on ``batch``."""
    weights = trainer.weights
    sample = torch.addmm(weights.b_enc, batch[:256], weights.encoder_rows.t())
    _, finished = trainer.architecture.finished(weights, trainer.architecture_state)
    threshold = 0.0 if finished.threshold is None else finished.threshold
    margin = (sample - threshold).flatten()
    weights.b_enc.sub_(margin.kthvalue(margin.numel() - margin.numel() // 64).values)
