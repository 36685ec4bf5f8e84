"""Another library's side of ``gpu_step.py``: trains its TopK SAE on a GPU, some steps at a time, as told over pipes.

Runs in the environment that ``peers.py`` makes, and knows nothing of our packages. Both libraries keep float32 weights
and compute under bfloat16 autocast, their own setting for it, with Adam at float32 moments.

    python gpu_step_worker.py sae-lens|eai-sparsify [DEVICE]

One JSON object per line: ``{"open": FILE, "d_sae": 4096, "k": 32}`` answers the library's version;
``{"steps": N}`` answers the milliseconds that a step took, on average over N.
"""

import importlib.metadata
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

Step = Callable[[torch.Tensor], None]


def sae_lens_step(batch: torch.Tensor, d_sae: int, k: int) -> Step:
    """One step of SAELens' trainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n, d_in = batch.shape
    device = str(batch.device)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=device))
    config = SAETrainerConfig(
        total_training_samples=100_000 * n,
        train_batch_size_samples=n,
        lr=1e-4,
        lr_end=1e-4,
        device=device,
        autocast=True,
    )
    trainer = SAETrainer(config, sae, data_provider=itertools.repeat(batch))

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def sparsify_step(batch: torch.Tensor, d_sae: int, k: int) -> Step:
    """What sparsify's trainer does with one batch: its trainer itself wants a language model."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(
        batch.shape[1], SparseCoderConfig(num_latents=d_sae, k=k), batch.device, dtype=torch.float32
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
    silent = torch.zeros(d_sae, dtype=torch.int64, device=batch.device)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(x.device.type, torch.bfloat16):
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return step


LIBRARIES = {"sae-lens": sae_lens_step, "eai-sparsify": sparsify_step}


def milliseconds(step: Step, batches: Iterator[torch.Tensor], n: int, device: str) -> float:
    """Of one step, on average over n in a row."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(n):
        step(next(batches))
    synchronize()
    return 1000 * (time.perf_counter() - started) / n


def main() -> None:
    """Answer commands until the pipe closes."""
    library, device = sys.argv[1], (sys.argv[2:] or ["cuda"])[0]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not get between the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    step: Step | None = None
    batches: Iterator[torch.Tensor] = iter(())
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if "open" in command:
            torch.manual_seed(0)
            loaded = load_file(command["open"], device=device)["batches"]
            batches = itertools.cycle(loaded)
            step = LIBRARIES[library](loaded[0], command["d_sae"], command["k"])
            answer: dict[str, Any] = {"version": importlib.metadata.version(library)}
        else:
            assert step is not None
            answer = {"milliseconds": milliseconds(step, batches, command["steps"], device)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
