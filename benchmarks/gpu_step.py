"""One TopK training step on a GPU in bfloat16, against the bare encoder product and against others.

    python benchmarks/gpu_step.py [--rounds 15] [--steps 10]

Every contestant takes its turn in every round, with the same batches, and makes some steps in a row between two CUDA
events, as in training, where no step waits for the one before. Milliseconds of one step, medians over the rounds:

* **product**: ``x @ W_enc`` of bfloat16 copies into a tensor that is there already. No SAE can encode with less.
* **without optimiser**: our loss and its gradients, product and gathered rows in bfloat16, weights in float32.
* **step**: ``Trainer.step``, with the unit-norm decoder, Adam in float32 and the count of dead features; with Triton
  kernels, and with PyTorch's operators.
* **dense**: the formula as one writes it down, under autocast, with PyTorch's fused Adam; as it is, and compiled.
* **SAELens, sparsify**: their steps under autocast, where ``peers.py`` has made their environments
  (``python benchmarks/peers.py sae-lens eai-sparsify``); left out where it has not.

Exit status 2 where there is no GPU.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peers import CACHE, PEERS
from safetensors.torch import save_file
from steps import make_batches
from torch import Tensor
from worker_process import WorkerProcess

from sae.architectures.base import Moment
from sae.config import SAEConfig, TrainConfig
from sae.kernels.choice import using
from sae.scaling import Scaling
from sae.trainer import Trainer

WARM_UP = 3  # rounds
AT_LEAST = {"sae-lens": 4.0, "eai-sparsify": 2.0}  # times slower than we are

Step = Callable[[Tensor], None]


class Shape(NamedTuple):
    """One size of the problem, and the largest ratios to the bare product that we accept."""

    n: int
    d_in: int
    d_sae: int
    k: int
    limit_without_optimiser: float
    limit: float


SHAPES = (Shape(8192, 768, 32_768, 32, 1.8, 2.5), Shape(4096, 2304, 65_536, 64, 1.8, 3.2))


def product(shape: Shape, batch: Tensor) -> Step:
    """The bare encoder product."""
    rows = torch.randn(shape.d_sae, shape.d_in, device=batch.device, dtype=torch.bfloat16)
    out = torch.empty(shape.n, shape.d_sae, device=batch.device, dtype=torch.bfloat16)
    narrow = batch.bfloat16()
    return lambda x: torch.mm(narrow, rows.t(), out=out)


def trainer_of(shape: Shape, kernels: Literal["torch", "triton"], device: torch.device) -> Trainer:
    """Our trainer before its first step."""
    config = TrainConfig(
        tokens=100_000 * shape.n,
        batch_tokens=shape.n,
        learning_rate=1e-4,
        kernels=kernels,
        product="bfloat16",
        sae=SAEConfig(d_sae=shape.d_sae, k=shape.k),
    )
    return Trainer(config, Scaling(torch.zeros(shape.d_in, device=device), 1.0))


def without_optimiser(trainer: Trainer) -> Step:
    """Loss and gradients alone."""
    moment = Moment(0.5, torch.empty(0, dtype=torch.int64, device=trainer.device))

    def run(x: Tensor) -> None:
        with using(trainer.config.kernels, trainer.config.product):
            loss = trainer.architecture.loss(trainer.weights, x, x, moment)
        loss.total.backward()
        for weight in trainer.weights.tensors().values():
            weight.grad = None

    return run


def dense(shape: Shape, device: torch.device, *, compiled: bool) -> Step:
    """A TopK SAE in whole tensors."""
    generator = torch.Generator(device).manual_seed(0)
    decoder = torch.randn(shape.d_sae, shape.d_in, device=device, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    weights = [
        decoder.t().clone(),
        torch.zeros(shape.d_sae, device=device),
        decoder,
        torch.zeros(shape.d_in, device=device),
    ]
    encoder, b_enc, decoder, b_dec = (weight.requires_grad_() for weight in weights)
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            top = ((x - b_dec) @ encoder + b_enc).relu().topk(shape.k, sorted=False)
            codes = torch.zeros(len(x), shape.d_sae, device=device, dtype=top.values.dtype)
            output = codes.scatter(1, top.indices, top.values) @ decoder + b_dec
        return (output - x).square().sum(1).mean()

    take = torch.compile(loss) if compiled else loss

    def step(x: Tensor) -> None:
        take(x).backward()
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            optimizer.step()
            decoder.div_(decoder.norm(dim=1, keepdim=True))
        optimizer.zero_grad()

    return step


def milliseconds(step: Step, batches: Iterator[Tensor], n: int) -> float:
    """Of one step, on average over n in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        step(next(batches))
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / n


def measure(shape: Shape, rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds of one step, by contestant."""
    device = torch.device("cuda")
    on_host = make_batches(shape)
    batches = on_host.to(device)
    ours = trainer_of(shape, "triton", device)
    contestants = {
        "product": product(shape, batches[0]),
        "without optimiser": without_optimiser(ours),
        "step": lambda x: ours.step(x, x),
        "step, PyTorch's operators": _step(trainer_of(shape, "torch", device)),
        "dense": dense(shape, device, compiled=False),
        "dense, compiled": dense(shape, device, compiled=True),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peers = [WorkerProcess(name, "gpu_step_worker.py", name) for name in AT_LEAST if environment_exists(name)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.safetensors"
        save_file({"batches": on_host}, file)
        for peer in peers:
            peer.ask(open=str(file), d_sae=shape.d_sae, k=shape.k)
            times[peer.peer] = []
    endless = itertools.cycle(batches)
    for _ in range(WARM_UP + rounds):
        for name, step in contestants.items():
            times[name].append(milliseconds(step, endless, steps))
        for peer in peers:
            times[peer.peer].append(peer.ask(steps=steps)["milliseconds"])
    for peer in peers:
        peer.close()
    return {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}


def _step(trainer: Trainer) -> Step:
    return lambda x: trainer.step(x, x) and None


def environment_exists(peer: str) -> bool:
    """Whether ``peers.py`` has made the environment of this library."""
    return any(CACHE.glob(f"{peer}-{PEERS[peer]}-*/finished"))


def report(shape: Shape, medians: dict[str, float]) -> str:
    """One shape's result."""
    bare, ours = medians["product"], medians["step"]
    limits = {"without optimiser": shape.limit_without_optimiser, "step": shape.limit}
    lines = [f"(n, d_in, d_sae, k) = ({shape.n:,}, {shape.d_in:,}, {shape.d_sae:,}, {shape.k})"]
    for name, median in medians.items():
        line = f"  {name:26} {median:8.3f} ms  {median / bare:6.2f} × product  {median / ours:6.2f} × step"
        if name in limits:
            line += f"   {_verdict(median / bare <= limits[name])}: at most {limits[name]} × product"
        if name in AT_LEAST:
            line += f"   {_verdict(median / ours >= AT_LEAST[name])}: at least {AT_LEAST[name]} × step"
        lines.append(line)
    lines += [f"  {name:26} has no environment" for name in AT_LEAST if name not in medians]
    return "\n".join(lines)


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> int:
    """Run the benchmark and print its page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="medians are over so many")
    parser.add_argument("--steps", type=int, default=10, help="steps in a row in every round")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step.py measures on a CUDA device, and this machine has none.", file=sys.stderr)
        return 2
    versions = ", ".join(f"{peer} {version}" for peer, version in PEERS.items() if peer in AT_LEAST)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {versions};")
    print(f"bfloat16, medians of {arguments.rounds} rounds of {arguments.steps} steps after {WARM_UP}\n")
    for shape in SHAPES:
        print(report(shape, measure(shape, arguments.rounds, arguments.steps)), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
