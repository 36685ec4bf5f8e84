"""What the workers of ``train_step.py`` share: the protocol, and the choice of a library's fastest setting.

A worker trains one library's SAE, one step at a time, as told over pipes. It runs in the environment that ``peers.py``
makes, and knows nothing of our packages. One JSON object per line:

    {"open": FILE, "architecture": "topk", "d_sae": 4096, "k": 32, "n_dead": 0, "threads": 2}
                         answers the setting it found fastest, what each took, and versions
    {"step": I}          one step on batch I of FILE; answers the seconds it took, by the clock and of processor time
"""

import importlib.metadata
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

# What a library prints, be it while it is imported, must not get between the answers.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
TRIAL, WARM_UP = 7, 2  # steps for each setting, of which the first do not count


@dataclass(frozen=True)
class Job:
    """What to train: batches of ``[n, d_in]``; the first ``n_dead`` features count as dead in every step."""

    architecture: str
    n: int
    d_in: int
    d_sae: int
    k: int
    n_dead: int

    @property
    def widths(self) -> list[int]:
        """Matryoshka's nested dictionaries."""
        return [self.d_sae // part for part in (16, 8, 4, 2, 1)]


class Run(Protocol):
    """A training run of one library."""

    def step(self, x: torch.Tensor) -> None:
        """One training step on ``[n, d_in]``."""


def timed(run: Run, batch: torch.Tensor) -> dict[str, float]:
    """One step: seconds by the clock, and of processor time on all threads."""
    started, used = time.perf_counter(), time.process_time()
    run.step(batch)
    return {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}


def fastest(
    settings: dict[str, Callable[[], Run]], batches: list[torch.Tensor]
) -> tuple[Run, str, dict[str, float | str]]:
    """The run with the quickest setting, its name, and what each setting took (or why it could not run)."""
    tried: dict[str, float | str] = {}
    runs: dict[str, Run] = {}
    for name, make in settings.items():
        try:
            run = make()
            steps = [timed(run, batches[i % len(batches)])["seconds"] for i in range(TRIAL)]
            tried[name], runs[name] = statistics.median(steps[WARM_UP:]), run
        except Exception as error:
            tried[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not runs:
        raise SystemExit(f"It ran with none of its settings: {tried}")
    best = min(runs, key=lambda name: float(tried[name]))
    return runs[best], best, tried


def serve(settings: Callable[[Job], dict[str, Callable[[], Run]]], package: str) -> None:
    """Answer commands until the pipe closes.

    Args:
        settings: every documented setting of the library that trains this in float32, by name.
        package: the library's distribution.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torch.compile explains every graph break
    run: Run | None = None
    batches: list[torch.Tensor] = []
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        if "open" in command:
            torch.set_num_threads(command.pop("threads"))
            torch.manual_seed(0)
            run = None  # its memory is needed
            batches = list(load_file(command.pop("open"))["batches"])
            job = Job(n=len(batches[0]), d_in=batches[0].shape[1], **command)
            run, setting, tried = fastest(settings(job), batches)
            versions = {package: importlib.metadata.version(package), "torch": torch.__version__}
            answer: dict[str, Any] = {"setting": setting, "tried": tried, "versions": versions}
        else:
            assert run is not None
            answer = timed(run, batches[command["step"]])
        ANSWERS.write(json.dumps(answer) + "\n")
