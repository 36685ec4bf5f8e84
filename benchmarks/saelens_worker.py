"""SAELens' side of ``train_step.py``: ``SAETrainer.step`` (see ``worker.py``)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from worker import Job, Run, serve

CLASSES: dict[str, tuple[type, type]] = {
    "topk": (TopKTrainingSAEConfig, TopKTrainingSAE),
    "batch_topk": (BatchTopKTrainingSAEConfig, BatchTopKTrainingSAE),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAE),
    "jumprelu": (JumpReLUTrainingSAEConfig, JumpReLUTrainingSAE),
    "relu": (StandardTrainingSAEConfig, StandardTrainingSAE),
}
ANTHROPIC = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_ste_to_input": True,
    "pre_act_loss_coefficient": 3e-6,
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
}


class SAELensRun:
    """One SAELens training run over fixed batches."""

    def __init__(self, job: Job, flags: dict[str, Any], compile_sae: bool = False) -> None:
        make_config, make_sae = CLASSES[job.architecture]
        sae = make_sae(make_config(d_in=job.d_in, d_sae=job.d_sae, **flags))
        if compile_sae:  # as SAELens' own runner does it for compile_sae=True
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        config = SAETrainerConfig(
            total_training_samples=100_000 * job.n, train_batch_size_samples=job.n, lr=1e-4, lr_end=1e-4
        )
        self.trainer, self.n_dead = SAETrainer(config, sae, data_provider=iter(())), job.n_dead

    def step(self, x: torch.Tensor) -> None:
        """See :class:`worker.Run`."""
        self.trainer.n_forward_passes_since_fired[: self.n_dead] = self.trainer.cfg.dead_feature_window + 1
        self.trainer.step(x)
        self.trainer.n_training_steps += 1


def settings(job: Job) -> dict[str, Callable[[], Run]]:
    """Documented settings that keep the step in float32.

    Sparse activations cannot be combined with rescaling: their backward pass raises.
    """
    flags: dict[str, Any] = {"k": job.k} if job.architecture in ("topk", "batch_topk", "matryoshka") else {}
    if job.architecture == "matryoshka":
        flags["matryoshka_widths"] = job.widths
    if job.architecture == "jumprelu":
        flags = ANTHROPIC
    found: dict[str, Callable[[], Run]] = {
        "default": partial(SAELensRun, job, flags),
        "compile_sae": partial(SAELensRun, job, flags, compile_sae=True),
    }
    if "k" in flags:
        plain = {**flags, "rescale_acts_by_decoder_norm": False}
        found["no rescaling"] = partial(SAELensRun, job, plain)
        found["sparse activations, no rescaling"] = partial(
            SAELensRun, job, {**plain, "use_sparse_activations": True}
        )
    return found


if __name__ == "__main__":
    serve(settings, "sae-lens")
