"""sparsify's side of ``train_step.py`` (see ``worker.py``).

Its trainer cannot be had without a language model, so the steps are those of ``Trainer.fit`` for one SAE, in their
order: unit-norm decoder, ``SparseCoder.forward`` with AuxK on each micro-batch, backward, gradient projection,
optimiser.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from worker import Job, Run, serve

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder for processors

from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

AUXK_ALPHA = 1 / 32
DEAD_FEATURE_THRESHOLD = 10_000_000


class SparsifyRun:
    """One training run of sparsify."""

    def __init__(self, job: Job, optimizer: str, micro_acc_steps: int) -> None:
        self.sae = SparseCoder(
            job.d_in, SparseCoderConfig(num_latents=job.d_sae, k=job.k), dtype=torch.float32
        )
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=1e-4)
        else:
            self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=1e-4), momentum=0.95)
            self.optimizer.train()
        self.micro_acc_steps, self.n_dead = micro_acc_steps, job.n_dead
        self.since_fired = torch.zeros(job.d_sae, dtype=torch.long)

    def step(self, x: torch.Tensor) -> None:
        """See :class:`worker.Run`."""
        self.since_fired[: self.n_dead] = DEAD_FEATURE_THRESHOLD + 1
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.since_fired > DEAD_FEATURE_THRESHOLD
        did_fire = torch.zeros_like(dead)
        variance = (x - x.mean(0)).pow(2).sum()
        for part in x.chunk(self.micro_acc_steps):
            out = self.sae(part, dead_mask=dead, total_variance=variance)
            did_fire[out.latent_indices.flatten()] = True
            loss = out.fvu + AUXK_ALPHA * out.auxk_loss
            loss.div(self.micro_acc_steps).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[did_fire] = 0


def settings(job: Job) -> dict[str, Callable[[], Run]]:
    """Its optimisers for single SAEs (signum is its default), with and without micro-batches."""
    return {
        f"{optimizer}, micro_acc_steps {steps}": partial(SparsifyRun, job, optimizer, steps)
        for optimizer in ("signum", "adam")
        for steps in (1, 8)
    }


if __name__ == "__main__":
    serve(settings, "eai-sparsify")
