"""How many features can be told by a pattern? Labels without a language model, beside neurons and random directions.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/labels.py RUN [--markdown FILE]

Takes a finished run, fits a label to every feature on the text of its index and scores it on the score split
(:mod:`features.explain`); does the same to MLP neurons of the layer and to random directions, thresholded to fire as
often (:mod:`features.label_controls`). "Live" fire on the text that labels are fitted to. A label counts from
F1 0.5 (0.8) on if it beats its shuffled control; a feature that never fires on the score split has no score, and counts
as one without a label. "Distinct" are the texts among the labels that count.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from features.explain import Evidence, fitted_blocks, gather, make_labels
from features.label_controls import control_evidence, mlp_neurons, random_directions
from features.labels import Label
from features.pipeline import Pipeline
from features.score import counts

COLUMNS = (
    "",
    "live",
    "scored",
    "F1 ≥ 0.5",
    "F1 ≥ 0.8",
    "upper half ≥ 0.5",
    "mean F1",
    "mean control",
    "distinct",
)


def row(name: str, evidence: Evidence, labels: list[Label]) -> str:
    """A line of the table."""
    live = evidence.train.count > 0
    scores = [label.score for label, fires in zip(labels, live, strict=True) if fires]
    found = [score for score in scores if score is not None]
    good = [label.text for label in labels if counts(label.score)]
    shares = (
        len(good),
        sum(counts(score, 0.8) for score in found),
        sum((score.upper or 0) >= 0.5 and counts(score, 0.0) for score in found),
    )
    means = (
        np.mean([score.value for score in found]),
        np.mean([score.control or 0 for score in found]),
    )
    cells = [
        name,
        f"{live.sum():,}",
        f"{len(found):,}",
        *(f"{share / live.sum():.1%}" for share in shares),
        *(f"{mean:.3f}" for mean in means),
        f"{len(set(good)):,}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--markdown", type=Path, help="a file to write the table to")
    arguments = parser.parse_args()
    pipeline = Pipeline(arguments.run)
    model, sae = pipeline.model, pipeline.sae()
    index = pipeline.index(sae)
    score_blocks = pipeline.tokens("score", pipeline.sizes.score_tokens)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]

    def measure(name: str, evidence: Evidence) -> None:
        start = time.perf_counter()
        labels = make_labels(evidence)
        lines.append(row(name, evidence, labels))
        print(f"{lines[-1]}  {time.perf_counter() - start:.0f} s for fitting and scoring", flush=True)

    evidence = gather(index, model, sae, score_blocks)
    measure("features", evidence)
    sample = fitted_blocks(index)
    for name, make in (("MLP neurons", mlp_neurons), ("random directions", random_directions)):
        control = make(model, sae, sample, evidence.train.count)
        measure(name, control_evidence(model, control, sample, score_blocks))
    print("\n".join(lines))
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
