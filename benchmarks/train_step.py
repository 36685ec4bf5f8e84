"""One TopK training step, against the bare encoder product and against SAELens.

    python benchmarks/train_step.py [--repeats 15] [--threads N]

Timed in turn, on the same batches, so that a change in the machine's speed meets all alike:

* **product**: ``x @ W_enc`` in float32 into a tensor that is there already, whole or in tiles of rows, whichever is
  faster. No SAE can encode with less, so this is the floor.
* **saescope**: ``sae.trainer.Trainer.step``: forward, backward, unit-norm decoder, fused Adam, AuxK's bookkeeping.
* **SAELens**: ``SAETrainer.step`` in a virtual environment of its own (made on first use, see ``peers.py``), with
  the fastest of its documented float32 settings. Both losses hold AuxK; no feature is dead in so short a run, so
  neither computes its term (``--dead 0.05`` declares that share of features dead in ours and in theirs).

Exit status 1 if SAELens cannot be installed.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import peer_python
from safetensors.torch import save_file
from torch import Tensor

from sae.config import SAEConfig, TrainConfig
from sae.scaling import Scaling
from sae.trainer import Trainer

WARM_UP = 2
PAUSE = 0.05  # seconds: long enough for the other process' idle threads to stop spinning
BATCHES = 4
TILES = (256, 512, 1024)


class Shape(NamedTuple):
    """One size of the problem, and the largest ratio to the bare product that we accept."""

    n: int
    d_in: int
    d_sae: int
    k: int
    limit: float


SHAPES = (Shape(4096, 256, 4096, 32, 2.4), Shape(2048, 512, 8192, 32, 1.8))
SAELENS_LIMIT = 4.0  # times slower than we are, at least


class Worker:
    """SAELens in its own process and environment."""

    def __init__(self, python: Path) -> None:
        script = Path(__file__).with_name("saelens_worker.py")
        self.process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command, wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("SAELens' process ended early; what it said stands above.")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


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


def products(shape: Shape, encoder_rows: Tensor) -> dict[str, Callable[[Tensor], None]]:
    """The bare encoder product, whole and tiled, as functions of a batch."""
    whole = torch.empty(shape.n, shape.d_sae)

    def tiled(rows: int) -> Callable[[Tensor], None]:
        def product(x: Tensor) -> None:
            for start in range(0, shape.n, rows):
                torch.mm(x[start : start + rows], encoder_rows.t(), out=whole[:rows])

        return product

    return {"whole": tiled(shape.n), **{f"tiles of {rows}": tiled(rows) for rows in TILES if rows < shape.n}}


def measure(shape: Shape, worker: Worker, repeats: int, threads: int, dead: float) -> dict[str, Any]:
    """Medians in seconds of every contestant, by name, and the setting SAELens ran with."""
    batches = make_batches(shape)
    n_dead = round(dead * shape.d_sae)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.safetensors"
        save_file({"batches": batches}, file)
        opened = worker.ask(open=str(file), d_sae=shape.d_sae, k=shape.k, threads=threads, n_dead=n_dead)
    tokens = 100_000 * shape.n
    config = TrainConfig(
        tokens=tokens, batch_tokens=shape.n, learning_rate=1e-4, sae=SAEConfig(d_sae=shape.d_sae, k=shape.k)
    )
    trainer = Trainer(config, Scaling(torch.zeros(shape.d_in), 1.0))

    def step(x: Tensor) -> None:
        trainer.dead.silent_tokens[:n_dead] = trainer.dead.window + 1
        trainer.dead.refresh()
        trainer.step(*trainer.scaling.apply(x))

    ours = {**products(shape, trainer.weights.encoder_rows.detach()), "saescope": step}
    seconds: dict[str, list[float]] = {name: [] for name in [*ours, "SAELens"]}
    for i in range(WARM_UP + repeats):
        for name, run in ours.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            run(batches[i % BATCHES])
            seconds[name].append(time.perf_counter() - started)
        time.sleep(PAUSE)
        seconds["SAELens"].append(worker.ask(step=i % BATCHES)["seconds"])
    return {
        **opened,
        "medians": {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()},
    }


def report(shape: Shape, result: dict[str, Any]) -> str:
    """One shape's result, in milliseconds."""
    medians = {name: 1000 * value for name, value in result["medians"].items()}
    ours, theirs = medians.pop("saescope"), medians.pop("SAELens")
    form = min(medians, key=lambda name: medians[name])
    product = medians[form]
    tried = ", ".join(
        f"{k} {1000 * v:.0f} ms" if isinstance(v, float) else f"{k}: {v}" for k, v in result["tried"].items()
    )
    return "\n".join(
        [
            f"(n, d_in, d_sae, k) = ({shape.n:,}, {shape.d_in:,}, {shape.d_sae:,}, {shape.k})",
            f"  product   {product:8.1f} ms   ({form}; {', '.join(f'{k} {v:.1f}' for k, v in medians.items())})",
            f"  saescope  {ours:8.1f} ms   {_verdict(ours / product, shape.limit, 'the product', most=True)}",
            f"  SAELens   {theirs:8.1f} ms   {_verdict(theirs / ours, SAELENS_LIMIT, 'saescope', most=False)}",
            f"            setting: {result['setting']} (tried: {tried})",
        ]
    )


def _verdict(ratio: float, limit: float, reference: str, *, most: bool) -> str:
    met = ratio <= limit if most else ratio >= limit
    return f"{ratio:.2f} × {reference} ({'at most' if most else 'at least'} {limit}: {'met' if met else 'MISSED'})"


def main() -> int:
    """Run the benchmark and print its table."""
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
    arguments = parser.parse_args()
    try:
        python = peer_python("sae-lens")
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"SAELens could not be installed: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    worker = Worker(python)
    for i, shape in enumerate(SHAPES):
        result = measure(shape, worker, arguments.repeats, arguments.threads, arguments.dead)
        if i == 0:
            versions = {"saescope": _version(), "torch": torch.__version__}
            theirs = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            print(
                ", ".join(f"{name} {version}" for name, version in versions.items()),
                f"against {theirs};",
                end=" ",
            )
            print(
                f"{arguments.threads} threads, medians of {arguments.repeats} after {WARM_UP} warm-up steps, float32"
            )
        print(report(shape, result), flush=True)
    worker.close()
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("saescope")
    except importlib.metadata.PackageNotFoundError:
        return "(checkout)"


if __name__ == "__main__":
    sys.exit(main())
