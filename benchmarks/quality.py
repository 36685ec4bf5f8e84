"""How good are the SAEs: every architecture at three sparsities, three seeds, and two peers on the same activations.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/quality.py [--folder FOLDER] [--tokens 2000000] [--d-sae 4096]

Captures the bundled model once (``blocks.3.hook_resid_post``) into a store; trains, in one sweep for each L0, every
architecture at L0 16, 32 and 64 (TopK, BatchTopK, JumpReLU and Matryoshka at 32 with three seeds; TopK at 32 also
with the presets ``fast`` and ``faithful``); trains TopK and BatchTopK at 32 with SAELens and dictionary_learning, on
the same activations in the same order, with their recipe and with ours (``quality_worker.py`` says what theirs is).
Everything is measured on the test split by ``sae.evaluate``, and every finished run is a row of ``FOLDER/rows.jsonl``:
the same command goes on where it stopped, and a row that is there is not made again. Prints the table as Markdown.

"Dead" is the share of features that did not fire on the last fifth of the run's tokens; for the peers, which count
otherwise, the share that never fires on the test split stands in its place, marked †.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from peers import peer_python

from activations.config import CaptureConfig
from activations.job import CaptureJob
from activations.store import ActivationStore
from activations.store_stream import StoreStream
from features.sweep import Sweep
from sae.config import SAEConfig, TrainConfig
from sae.evaluate import Evaluation, evaluate_many
from sae.model import SparseAutoencoder
from sae.scaling import Scaling
from sae.sweep import SweepConfig

SPARSITIES = (16, 32, 64)
COMPARED = 32  # the sparsity of seeds, presets and peers
SEEDS = (0, 1, 2)
SELECTING, PAYING = ("topk", "batch_topk", "matryoshka"), ("jumprelu", "gated", "relu")
SEEDED = ("topk", "batch_topk", "matryoshka", "jumprelu")
PEERS = ("sae-lens", "dictionary-learning")
RECIPES = ("theirs", "ours")


@dataclass(frozen=True)
class Bench:
    """The benchmark's folder and what all runs have in common."""

    folder: Path
    tokens: int
    d_sae: int

    @property
    def rows(self) -> Path:
        """One line for every finished run."""
        return self.folder / "rows.jsonl"

    def done(self) -> dict[str, dict[str, Any]]:
        """The rows that are there, by name."""
        if not self.rows.exists():
            return {}
        return {row["name"]: row for row in map(json.loads, self.rows.read_text().splitlines())}

    def keep(self, name: str, evaluation: Evaluation, **facts: Any) -> None:
        """Write a row, unless it is there."""
        if name in self.done():
            return
        figures = ("l0", "explained_variance", "ce_loss_recovered", "kl", "dead_fraction", "alive_fraction")
        row = {"name": name, **facts, **{key: getattr(evaluation, key) for key in figures}}
        row["intervals"] = {key: evaluation.intervals[key] for key in figures[:3]}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def config(self) -> TrainConfig:
        """What every run of ours starts from."""
        return TrainConfig(
            store=str(self.folder / "store"), tokens=self.tokens, sae=SAEConfig(d_sae=self.d_sae)
        )

    def sweep(self, l0: int) -> Sweep:
        """All SAEs of one sparsity."""
        seeds = SEEDS if l0 == COMPARED else SEEDS[:1]
        grids: list[dict[str, tuple[Any, ...]]] = []
        for names, field in ((SELECTING, "k"), (PAYING, "target_l0")):
            for name in names:
                grids.append(
                    {"architecture": (name,), field: (l0,), "seed": seeds if name in SEEDED else SEEDS[:1]}
                )
        presets = ("fast", "faithful") if l0 == COMPARED else ()
        runs = tuple({"architecture": "topk", "k": l0, "preset": preset} for preset in presets)
        return Sweep(self.folder / f"l0-{l0}", SweepConfig(self.config(), tuple(grids), runs))


def ours(bench: Bench, l0: int) -> Sweep:
    """Train and measure our SAEs of one sparsity."""
    sweep = bench.sweep(l0)
    if all(f"l0-{l0}/{name}" in bench.done() for name in sweep.runs):
        return sweep
    started = time.monotonic()
    sweep.start()
    sweep.train(announce=lambda names: print("training", *names, flush=True))
    trained = time.monotonic()
    evaluations = sweep.evaluate()
    print(
        f"L0 {l0}: {len(sweep.runs)} SAEs trained in {trained - started:.0f} s, measured in"
        f" {time.monotonic() - trained:.0f} s",
        flush=True,
    )
    for name, evaluation in evaluations.items():
        config = sweep.runs[name].config
        facts = {
            "library": "saescope",
            "architecture": config.sae.architecture,
            "wanted": l0,
            "seed": config.seed,
        }
        bench.keep(f"l0-{l0}/{name}", evaluation, recipe=config.preset, **facts)
    return sweep


def peers(bench: Bench, sweep: Sweep) -> None:
    """Train and measure the peers' SAEs; ``sweep`` holds ours of the same sparsity."""
    names = [
        (library, architecture, recipe)
        for library in PEERS
        for architecture in ("topk", "batch_topk")
        for recipe in RECIPES
    ]
    missing = [parts for parts in names if "/".join(("peers", *parts)) not in bench.done()]
    if not missing:
        return
    run = next(pipeline for pipeline in sweep.runs.values() if pipeline.config.preset == "default")
    held = ActivationStore.open(bench.folder / "store").at(run.config.hook_name)
    scaling = Scaling(held.statistics.mean, held.statistics.scale)
    files = _rows_in_training_order(bench, held, run.config, scaling)
    example = run.sae()
    for library, architecture, recipe in missing:
        out = bench.folder / "peers" / f"{library}-{architecture}-{recipe}"
        started = time.monotonic()
        words = {
            "library": library,
            "architecture": architecture,
            "recipe": recipe,
            "rows": str(files[recipe]),
            "d_sae": bench.d_sae,
            "k": COMPARED,
            "seed": 0,
            "threads": torch.get_num_threads(),
            "batch": run.config.resolved_batch_tokens(),
            "learning_rate": run.config.resolved_learning_rate(),
            "warmup": run.config.resolved_warmup(),
            "decay": run.config.resolved_decay(),
            "out": str(out),
        }
        worker = Path(__file__).with_name("quality_worker.py")
        command = [str(peer_python(library)), str(worker), json.dumps(words)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        loaded = SparseAutoencoder.load(out)
        weights = scaling.folded(loaded.weights) if recipe == "ours" else loaded.weights
        sae = SparseAutoencoder(loaded.config, weights, {**example.metadata, "dead": None})
        reference = run.reference(example)
        evaluation = evaluate_many(run.model, {"peer": sae}, run.test_blocks, reference=reference)["peer"]
        facts = {
            "library": library,
            "architecture": architecture,
            "wanted": COMPARED,
            "seed": 0,
            "recipe": recipe,
        }
        bench.keep(f"peers/{library}/{architecture}/{recipe}", evaluation, seconds=seconds, **facts)


def _rows_in_training_order(
    bench: Bench, held: Any, config: TrainConfig, scaling: Scaling
) -> dict[str, Path]:
    """Files of activations in the order in which our runs read them: raw, and in the units we train in."""
    files = {recipe: bench.folder / f"rows-{recipe}.npy" for recipe in RECIPES}
    if all(path.exists() for path in files.values()):
        return files
    size, n = config.resolved_batch_tokens(), config.n_steps()
    stream = StoreStream.exact(
        held, batch_size=size, n_batches=n, seed=config.order_seed, device=torch.device("cpu")
    )
    shape = (n * size, scaling.d_in)
    unfinished = {recipe: path.with_suffix(".part") for recipe, path in files.items()}
    out = {
        recipe: np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for recipe, path in unfinished.items()
    }
    for i, batch in enumerate(stream):
        place = slice(i * size, (i + 1) * size)
        out["theirs"][place] = batch.numpy()
        out["ours"][place] = scaling.apply(batch)[0].numpy()
    for recipe, path in unfinished.items():
        out[recipe].flush()
        path.rename(files[recipe])
    return files


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown, by sparsity."""
    yield "| SAE | recipe | seed | L0 | explained variance | CE loss recovered | KL | dead |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows.values(), key=lambda row: (row["wanted"], row["library"] != "saescope")):
        low_high = {key: "[{:.4f}, {:.4f}]".format(*row["intervals"][key]) for key in row["intervals"]}
        dead = row["dead_fraction"]
        yield (
            "| "
            + " | ".join(
                [
                    f"{row['architecture']}"
                    + ("" if row["library"] == "saescope" else f" ({row['library']})"),
                    str(row["recipe"]),
                    str(row["seed"]),
                    f"{row['l0']:.2f}",
                    f"{row['explained_variance']:.4f} {low_high['explained_variance']}",
                    f"{row['ce_loss_recovered']:.4f} {low_high['ce_loss_recovered']}",
                    f"{row['kl']:.4f}",
                    f"{1 - row['alive_fraction']:.2%} †" if dead is None else f"{dead:.2%}",
                ]
            )
            + " |"
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="rows, runs and activations"
    )
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens")
    parser.add_argument("--d-sae", type=int, default=4096, help="features")
    parser.add_argument("--sparsities", type=int, nargs="+", default=SPARSITIES, help="L0s of our SAEs")
    parser.add_argument("--no-peers", action="store_true", help="leave out the other libraries")
    given = parser.parse_args()
    started = time.monotonic()
    bench = Bench(given.folder, given.tokens, given.d_sae)
    given.folder.mkdir(parents=True, exist_ok=True)
    CaptureJob.prepare(CaptureConfig(tokens=given.tokens)).write(given.folder / "store")
    print(f"activations after {time.monotonic() - started:.0f} s", flush=True)
    sweeps = {l0: ours(bench, l0) for l0 in given.sparsities}
    if not given.no_peers:
        peers(bench, sweeps.get(COMPARED) or bench.sweep(COMPARED))
    print(f"\n{len(bench.done())} SAEs; this call took {(time.monotonic() - started) / 60:.1f} minutes\n")
    print("\n".join(table(bench.done())))


if __name__ == "__main__":
    main()
