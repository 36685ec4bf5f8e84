"""SAELens' side of ``train_step.py``: trains its TopK SAE one step at a time, as told over pipes.

Runs in the environment that ``peers.py`` makes, and knows nothing of our packages. One JSON object per line:

    {"open": FILE, "d_sae": 4096, "k": 32, "n_dead": 0, "threads": 2}   answers the setting it found fastest
    {"step": I}                                  one step on batch I of FILE; answers the seconds it took
"""

import json
import logging
import os
import statistics
import sys
import time
import warnings
from typing import Any

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

# Every documented setting that keeps the step in float32 (sparse activations cannot be combined with rescaling:
# their backward pass raises).
SETTINGS: dict[str, dict[str, bool]] = {
    "default": {},
    "no rescaling": {"rescale_acts_by_decoder_norm": False},
    "sparse activations, no rescaling": {
        "rescale_acts_by_decoder_norm": False,
        "use_sparse_activations": True,
    },
    "compile_sae": {"compile_sae": True},
}


class Run:
    """One SAELens training run over fixed batches."""

    def __init__(
        self,
        batches: list[torch.Tensor],
        d_sae: int,
        k: int,
        n_dead: int,
        compile_sae: bool = False,
        **flags: bool,
    ) -> None:
        n, d_in = batches[0].shape
        self.batches, self.n_dead = batches, n_dead
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **flags))
        if compile_sae:  # as SAELens' own runner does it for compile_sae=True
            sae.training_forward_pass = torch.compile(sae.training_forward_pass)
        config = SAETrainerConfig(
            total_training_samples=100_000 * n, train_batch_size_samples=n, lr=1e-4, lr_end=1e-4
        )
        self.trainer = SAETrainer(config, sae, data_provider=iter(batches))

    def step(self, batch: int) -> float:
        """Seconds of one training step in which the first ``n_dead`` features count as dead."""
        self.trainer.n_forward_passes_since_fired[: self.n_dead] = self.trainer.cfg.dead_feature_window + 1
        started = time.perf_counter()
        self.trainer.step(self.batches[batch])
        self.trainer.n_training_steps += 1
        return time.perf_counter() - started


def fastest(
    batches: list[torch.Tensor], d_sae: int, k: int, n_dead: int
) -> tuple[Run, str, dict[str, float | str]]:
    """The run with the quickest setting, its name, and what each setting took (or why it could not run)."""
    tried: dict[str, float | str] = {}
    runs: dict[str, Run] = {}
    for name, flags in SETTINGS.items():
        try:
            run = Run(batches, d_sae, k, n_dead, **flags)
            tried[name] = statistics.median([run.step(i % len(batches)) for i in range(7)][2:])
            runs[name] = run
        except Exception as error:
            tried[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)
            )
    if not runs:
        raise SystemExit(f"SAELens ran with none of its settings: {tried}")
    best = min(runs, key=lambda name: float(tried[name]))
    return runs[best], best, tried


def main() -> None:
    """Answer commands until the pipe closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not get between the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torch.compile explains every graph break
    run: Run | None = None
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if "open" in command:
            torch.set_num_threads(command["threads"])
            torch.manual_seed(0)
            batches = list(load_file(command["open"])["batches"])
            run, setting, tried = fastest(batches, command["d_sae"], command["k"], command["n_dead"])
            versions = {"sae-lens": sae_lens.__version__, "torch": torch.__version__}
            answer: dict[str, Any] = {"setting": setting, "tried": tried, "versions": versions}
        else:
            assert run is not None
            answer = {"seconds": run.step(command["step"])}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
