"""What the number format of a store costs: the same SAE trained on the same activations in every format.

Captures the bundled model once in each format, trains the default SAE with several seeds on each, and measures every
SAE on the model's own activations of the test split (never on stored ones). Usage::

    OMP_WAIT_POLICY=PASSIVE python benchmarks/store_formats.py --tokens 1000000 --seeds 3

Prints bytes a token, explained variance and CE recovered, and the difference from the first format by seed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from activations.config import CaptureConfig
from activations.job import CaptureJob
from features.pipeline import Pipeline
from sae.config import SAEConfig, TrainConfig

FORMATS = ("float32", "bfloat16", "float16", "int8")


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens")
    parser.add_argument("--seeds", type=int, default=3, help="trainings in each format")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="those to compare")
    parser.add_argument("--d-sae", type=int, default=4096, help="features")
    given = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = None
        for stored_as in dict.fromkeys(given.formats):
            job = CaptureJob.prepare(CaptureConfig(tokens=given.tokens, stored_as=stored_as), model=model)
            model = job.model
            store = job.write(folder / stored_as)
            sizes[stored_as] = sum(shard.bytes for shard in store.shards) / store.n_rows
            for seed in range(given.seeds):
                config = TrainConfig(
                    store=str(store.folder), seed=seed, sae=SAEConfig(d_sae=given.d_sae), tokens=given.tokens
                )
                pipeline = Pipeline(folder / f"{stored_as}-{seed}", config, model=model)
                pipeline.start()
                figures = pipeline.evaluate(pipeline.train()).to_json()
                measured.setdefault(stored_as, []).append(
                    (figures["explained_variance"], figures["ce_loss_recovered"])
                )
                print(stored_as, seed, *(f"{x:.5f}" for x in measured[stored_as][-1]), flush=True)
            store.delete()
    print(
        f"\n{'format':<10}{'bytes/token':>12}{'EV':>10}{'CE rec.':>10}{'EV − that of the first, by seed':>40}"
    )
    for stored_as, runs in measured.items():
        ev, ce = (statistics.mean(run[i] for run in runs) for i in range(2))
        differences = (a[0] - b[0] for a, b in zip(runs, measured[given.formats[0]], strict=True))
        print(
            f"{stored_as:<10}{sizes[stored_as]:>12.1f}{ev:>10.4f}{ce:>10.4f}"
            f"{'  '.join(f'{d:+.5f}' for d in differences):>40}"
        )


if __name__ == "__main__":
    main()
