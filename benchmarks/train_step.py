"""One training step, against the bare encoder product and against other libraries.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/train_step.py [--repeats 15] [--threads N] [--architectures topk ...]

Timed in turn, on the same batches, so that a change in the machine's speed meets all alike. Each takes two steps in its
turn, of which the second counts: in training a step follows a step, and finds its own weights in the cache.

* **product**: ``x @ W_enc`` in float32 into a tensor that is there already, whole or in tiles of rows, whichever is
  faster. No SAE can encode with less, so this is the floor.
* **saescope**: ``sae.trainer.Trainer.step``: forward, backward, unit-norm decoder, fused Adam, AuxK's bookkeeping.
* **SAELens, dictionary_learning, sparsify**, each in a virtual environment of its own (made on first use, see
  ``peers.py``) and with the fastest of its documented float32 settings (see their ``*_worker.py``). All losses of TopK
  hold AuxK; no feature is dead in so short a run, so nobody computes its term (``--dead 0.05`` declares that share of
  features dead for everyone).

relu and jumprelu are measured twice: as they begin, and with d_sae/64 features firing per token, as late in a run. What
the others take does not depend on it. Times are by the clock; behind them, in brackets, processor time on all threads,
which other work on the machine disturbs less. Exit status 1 if a library is missing.
"""

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import PEERS, peer_python
from safetensors.torch import save_file
from steps import BATCHES, SHAPES, Shape, make_batches, make_trainer
from torch import Tensor
from worker_process import WorkerProcess

from sae.memory import keep_freed_memory

WARM_UP = 2
PAUSE = 0.05  # seconds: long enough for the other process' idle threads to stop spinning
TILES = (256, 512, 1024)
WORKERS = {
    "sae-lens": "saelens_worker.py",
    "dictionary-learning": "dictionary_learning_worker.py",
    "eai-sparsify": "sparsify_worker.py",
}
# How many times slower than we are each has to be, at least.
TOPK_LIMITS = {"sae-lens": 4.5, "dictionary-learning": 3.3, "eai-sparsify": 1.5}
OTHER_LIMITS = {"sae-lens": 4.0, "dictionary-learning": 4.0}
PAYING = ("relu", "jumprelu")
ARCHITECTURES = ("topk", "batch_topk", "matryoshka", *PAYING)
OURS, BEGINNING = "saescope", "saescope at the start"

Times = tuple[float, float]  # seconds by the clock, and of processor time


def products(shape: Shape, encoder_rows: Tensor) -> dict[str, Callable[[Tensor], None]]:
    """The bare encoder product, whole and tiled, as functions of a batch."""
    whole = torch.empty(shape.n, shape.d_sae)

    def tiled(rows: int) -> Callable[[Tensor], None]:
        def product(x: Tensor) -> None:
            for start in range(0, shape.n, rows):
                torch.mm(x[start : start + rows], encoder_rows.t(), out=whole[:rows])

        return product

    return {"whole": tiled(shape.n), **{f"tiles of {rows}": tiled(rows) for rows in TILES if rows < shape.n}}


def our_steps(
    shape: Shape, architecture: str, batch: Tensor, n_dead: int
) -> dict[str, Callable[[Tensor], None]]:
    """Our training steps by name, as functions of a batch."""

    def stepper(settled: bool) -> Callable[[Tensor], None]:
        trainer = make_trainer(shape, architecture, batch, settled=settled)
        dead = torch.arange(n_dead)

        def step(x: Tensor) -> None:
            if n_dead:
                trainer.dead.silent_tokens[dead] = trainer.dead.window + 1
                trainer.dead.refresh()
            trainer.step(*trainer.scaling.apply(x))

        return step

    steps = {OURS: stepper(True)}
    return steps | {BEGINNING: stepper(False)} if architecture in PAYING else steps


def clocked(run: Callable[[Tensor], None], x: Tensor) -> Times:
    """What the second of two calls takes."""
    run(x)
    started, used = time.perf_counter(), time.process_time()
    run(x)
    return time.perf_counter() - started, time.process_time() - used


def clocked_there(worker: WorkerProcess, batch: int) -> Times:
    """What the second of two steps of another library takes."""
    worker.ask(step=batch)
    answer = worker.ask(step=batch)
    return answer["seconds"], answer["processor"]


def measure(
    shape: Shape,
    architecture: str,
    workers: dict[str, WorkerProcess],
    repeats: int,
    threads: int,
    dead: float,
) -> tuple[dict[str, Times], dict[str, dict[str, Any]]]:
    """Medians of every contestant by name, and what each library answered when it was set up."""
    batches = make_batches(shape)
    n_dead = round(dead * shape.d_sae)
    opened = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.safetensors"
        save_file({"batches": batches}, file)
        for peer, worker in workers.items():
            opened[peer] = worker.ask(
                open=str(file),
                architecture=architecture,
                d_sae=shape.d_sae,
                k=shape.k,
                threads=threads,
                n_dead=n_dead,
            )
    ours = our_steps(shape, architecture, batches[0], n_dead)
    ours = {**products(shape, torch.randn(shape.d_sae, shape.d_in)), **ours}
    times: dict[str, list[Times]] = {name: [] for name in [*ours, *workers]}
    for i in range(WARM_UP + repeats):
        for name, run in ours.items():
            time.sleep(PAUSE)
            times[name].append(clocked(run, batches[i % BATCHES]))
        for peer, worker in workers.items():
            time.sleep(PAUSE)
            times[peer].append(clocked_there(worker, i % BATCHES))
    medians = {}
    for name, pairs in times.items():
        clock, processor = zip(*pairs[WARM_UP:], strict=True)
        medians[name] = (statistics.median(clock), statistics.median(processor))
    return medians, opened


def report(
    shape: Shape, architecture: str, medians: dict[str, Times], opened: dict[str, dict[str, Any]]
) -> list[str]:
    """The lines of one shape and architecture."""
    steps = {name: medians.pop(name) for name in (OURS, BEGINNING) if name in medians}
    theirs = {peer: medians.pop(peer) for peer in opened}
    form = min(medians, key=lambda name: medians[name][0])
    product, ours = medians[form], steps[OURS]
    most = shape.limit if architecture == "topk" else None
    lines = [
        f"{architecture}, (n, d_in, d_sae, k) = ({shape.n:,}, {shape.d_in:,}, {shape.d_sae:,}, {shape.k})",
        f"  {'product':22s} {_milliseconds(product)}   {form}",
        f"  {OURS:22s} {_milliseconds(ours)}   {_ratio(ours, product)} the product{_verdict(ours, product, most=most)}",
    ]
    if BEGINNING in steps:
        lines.append(f"  {BEGINNING:22s} {_milliseconds(steps[BEGINNING])}")
    for peer, taken in theirs.items():
        least = (TOPK_LIMITS if architecture == "topk" else OTHER_LIMITS)[peer]
        told = f"{_ratio(taken, ours)} saescope{_verdict(taken, ours, least=least)}"
        if BEGINNING in steps:
            begun = steps[BEGINNING]
            told += f"; at the start {_ratio(taken, begun)}{_verdict(taken, begun, least=1.0)}"
        tried = ", ".join(
            f"{name} {1000 * value:.0f} ms" if isinstance(value, float) else f"{name}: {value}"
            for name, value in opened[peer]["tried"].items()
        )
        lines += [
            f"  {peer:22s} {_milliseconds(taken)}   {told}",
            f"      {opened[peer]['setting']} (tried: {tried})",
        ]
    return lines


def _milliseconds(times: Times) -> str:
    return f"{1000 * times[0]:8.1f} ms [{1000 * times[1]:8.1f}]"


def _ratio(left: Times, right: Times) -> str:
    return f"{left[0] / right[0]:.2f} [{left[1] / right[1]:.2f}] ×"


def _verdict(left: Times, right: Times, *, most: float | None = None, least: float | None = None) -> str:
    ratio = left[0] / right[0]
    if most is not None:
        return f" (at most {most}: {'met' if ratio <= most else 'MISSED'})"
    return "" if least is None else f" (at least {least}: {'met' if ratio >= least else 'MISSED'})"


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed steps per contestant (medians are reported)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads for all contestants"
    )
    parser.add_argument("--dead", type=float, default=0.0, help="share of features declared dead, 0 to 1")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=["topk"])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=int,
        choices=range(len(SHAPES)),
        default=range(len(SHAPES)),
        help="by number",
    )
    arguments = parser.parse_args()
    try:
        for peer in PEERS:
            peer_python(peer)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"A library could not be installed: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")} | PEERS
    print(
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ";",
        f"{arguments.threads} threads, medians of {arguments.repeats} after {WARM_UP} warm-up steps, float32",
    )
    for architecture in arguments.architectures:
        for i in arguments.shapes:
            limits = TOPK_LIMITS if architecture == "topk" else OTHER_LIMITS
            workers = {peer: WorkerProcess(peer, WORKERS[peer]) for peer in limits}
            found = measure(
                SHAPES[i], architecture, workers, arguments.repeats, arguments.threads, arguments.dead
            )
            for worker in workers.values():
                worker.close()
            print("\n".join(report(SHAPES[i], architecture, *found)), flush=True)
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as sae.train does
    sys.exit(main())
