"""What 20 training steps add to the memory of a fresh process, beyond parameters, gradients and optimiser state.

    python benchmarks/step_memory.py [--architectures topk relu ...]

RssAnon is read every 2 ms while the steps run. The growth is the highest reading less one gradient per parameter and
what it was before the first step, when parameters and both moments of Adam are there. Each case has a process of its
own. Exit status 1 if a limit is exceeded.
"""

import argparse
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from steps import BATCHES, SHAPES, Shape, make_batches, make_trainer

from sae.architectures.registry import ARCHITECTURES
from sae.memory import keep_freed_memory

STEPS = 20
MEGABYTE = 1 << 20
DENSE = ("relu", "gated")  # these may take 256 MB more


def limit(shape: Shape, architecture: str) -> int:
    """Bytes that a case may add."""
    return (64 + 256 * (architecture in DENSE)) * MEGABYTE + 3 * shape.n * shape.d_in * 4


def rss_anon() -> int:
    """Anonymous memory of this process that is resident, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("This system does not tell RssAnon.")


class Highest(threading.Thread):
    """Reads RssAnon until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.finished = 0, threading.Event()

    def run(self) -> None:
        """Every 2 ms."""
        while not self.finished.wait(0.002):
            self.highest = max(self.highest, rss_anon())


def growth(shape: Shape, architecture: str) -> int:
    """Bytes that the steps add in this process."""
    batches = make_batches(shape)
    trainer = make_trainer(shape, architecture, batches[0], settled=architecture not in DENSE)
    for state in trainer.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # which makes it resident
    gradients = sum(4 * tensor.numel() for tensor in trainer.weights.tensors().values())
    watch = Highest()
    before = rss_anon()
    watch.start()
    for i in range(STEPS):
        trainer.step(*trainer.scaling.apply(batches[i % BATCHES]))
    watch.finished.set()
    watch.join()
    return max(watch.highest, rss_anon()) - before - gradients


def main() -> int:
    """Run the cases, print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # the case that this process measures
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(growth(SHAPES[int(arguments.one[0])], arguments.one[1]))
        return 0
    exceeded = 0
    for i, shape in enumerate(SHAPES):
        print(f"(n, d_in, d_sae, k) = ({shape.n:,}, {shape.d_in:,}, {shape.d_sae:,}, {shape.k})")
        for architecture in arguments.architectures:
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--one",
                str(i),
                architecture,
            ]
            grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            most = limit(shape, architecture)
            exceeded += grown > most
            verdict = "met" if grown <= most else "EXCEEDED"
            print(
                f"  {architecture:12s} {grown / MEGABYTE:7.0f} MB (at most {most / MEGABYTE:.0f}: {verdict})",
                flush=True,
            )
    return int(exceeded > 0)


if __name__ == "__main__":
    keep_freed_memory()  # as sae.train does
    sys.exit(main())
