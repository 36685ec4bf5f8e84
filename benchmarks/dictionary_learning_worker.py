"""dictionary_learning's side of ``train_step.py``: its trainers' ``update`` (see ``worker.py``).

That is loss, gradient projection, clipping, Adam, schedule, unit-norm decoder, as its ``trainSAE`` calls it.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from worker import Job, Run, serve

sys.modules["nnsight"] = ModuleType("nnsight")  # how it reads language models; see peers.py
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

TRAINERS: dict[str, type] = {
    "topk": TopKTrainer,
    "batch_topk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "relu": StandardTrainerAprilUpdate,
}


class DictionaryLearningRun:
    """One training run of dictionary_learning."""

    def __init__(self, job: Job) -> None:
        chosen: dict[str, Any] = (
            {"k": job.k} if job.architecture in ("topk", "batch_topk", "matryoshka") else {}
        )
        if job.architecture == "matryoshka":
            bands = [b - a for a, b in zip([0, *job.widths[:-1]], job.widths, strict=True)]
            chosen["group_fractions"] = [band / job.d_sae for band in bands]
        self.trainer = TRAINERS[job.architecture](
            steps=100_000,
            activation_dim=job.d_in,
            dict_size=job.d_sae,
            layer=0,
            lm_name="none",
            lr=1e-4,
            device="cpu",
            **chosen,
        )
        self.steps, self.n_dead = 0, job.n_dead

    def step(self, x: torch.Tensor) -> None:
        """See :class:`worker.Run`; the first one also computes a geometric median."""
        if self.n_dead:
            silent = self.trainer.num_tokens_since_fired
            silent[: self.n_dead] = self.trainer.dead_feature_threshold + 1
        self.trainer.update(self.steps, x)
        self.steps += 1


def settings(job: Job) -> dict[str, Callable[[], Run]]:
    """It has one way to train in float32."""
    return {"default": lambda: DictionaryLearningRun(job)}


if __name__ == "__main__":
    serve(settings, "dictionary-learning")
