"""How long a contrast of 2 × 1,000 texts takes, and what one finds: unsafe against safe Python.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/contrast.py [--texts 1000] [--tokens 128] [--d-sae 4096]
    OMP_WAIT_POLICY=PASSIVE python benchmarks/contrast.py --run RUN

The first reads texts of so many tokens, cut from the standard library, with the bundled model and a random SAE (what is
computed does not depend on what it has learned), and prints the seconds of each part, probes included. The second
contrasts the two classes of ``unsafe_python.csv``, 104 pairs of pieces of code that do the same, one of them unsafely,
with the SAE of a run; probes are judged on pairs that they have not seen. Prints Markdown.
"""

import argparse
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from activations.models import LanguageModel
from features.contrast import contrast
from features.labelled_texts import read_labelled
from features.run import open_run
from features.tables import score_text
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

HOOK = "blocks.3.hook_resid_post"
FEATURES_SHOWN = 8


def random_sae(model: LanguageModel, d_sae: int, folder: Path) -> None:
    """A TopK SAE, k = 32, of random directions."""
    rows = torch.randn(d_sae, model.d_model, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=1)
    weights = Weights(rows, torch.zeros(d_sae), rows.clone(), torch.zeros(model.d_model))
    metadata = {"hook_name": HOOK, "model_hash": model.hash, "context_size": 256}
    SparseAutoencoder(SAEConfig(d_sae=d_sae, k=32), weights, metadata).save(folder)


def library_texts(model: LanguageModel, n: int, n_tokens: int) -> tuple[list[str], list[str]]:
    """n texts of so many tokens from modules of even number in the alphabet, and n from odd ones."""
    sets: tuple[list[str], list[str]] = ([], [])
    library = Path(sysconfig.get_paths()["stdlib"])
    for number, path in enumerate(sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))):
        if "site-packages" in path.parts or len(sets[number % 2]) >= n:
            continue
        ids = model.tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        pieces = [ids[start : start + n_tokens] for start in range(0, len(ids) - n_tokens, n_tokens)]
        sets[number % 2].extend(model.tokenizer.decode(piece) for piece in pieces[:40])
    a, b = sets[0][:n], sets[1][:n]
    assert len(a) == len(b) == n
    return a, b


class Timing:
    """A progress that remembers how long each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, description: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda done: None
        self.seconds[description] = time.perf_counter() - start


def measure(n: int, n_tokens: int, d_sae: int) -> None:
    """Print the seconds of a contrast and of its parts."""
    import sklearn.linear_model  # noqa: F401 (loaded once by a program, and no part of a contrast)

    model = LanguageModel.load("builtin")
    with tempfile.TemporaryDirectory() as folder:
        random_sae(model, d_sae, Path(folder))
        run = open_run(folder, model=model)
        a, b = library_texts(model, n, n_tokens)
        _ = run.sae
        timing = Timing()
        start = time.perf_counter()
        table = contrast(run, a, b, progress=timing)
        seconds = time.perf_counter() - start
    print(f"2 × {n:,} texts of {n_tokens} tokens, {d_sae:,} features, {torch.get_num_threads()} threads\n")
    print("| part | s |\n|---|---|")
    for part, taken in timing.seconds.items():
        print(f"| {part} | {taken:.1f} |")
    print(f"| all, {table.attrs['tested']:,} features tested | {seconds:.1f} |")


def unsafe_python(path: Path) -> None:
    """Print the features that tell unsafe from safe Python, and the probes."""
    sets = read_labelled(Path(__file__).with_name("unsafe_python.csv"), group_column="pair")
    table = contrast(open_run(path), sets.a, sets.b, names=sets.names, groups=sets.groups)
    print("\n".join([table.title, *table.remarks]) + "\n")
    print("| feature | label | score | fires in unsafe | in safe | AUC | q | strongest place |")
    print("|---|---|---|---|---|---|---|---|")
    for row in table.head(FEATURES_SHOWN).to_dict("records"):
        place = row["example"].replace("\n", "⏎").replace("|", "\\|")
        score = score_text(row["label"], row["score"], row["score_kind"])
        print(
            f"| {row['feature']} | {row['label']} | {score} | {row['rate_a']:.0%} | {row['rate_b']:.0%}"
            f" | {row['auc']:.2f} | {row['q']:.2g} | `{place}` |"
        )
    assert table.probes is not None
    print("\n| probe | AUC | 95% | accuracy | 95% |\n|---|---|---|---|---|")
    for row in table.probes.to_dict("records"):
        print(
            f"| {row['probe']} | {row['auc']:.2f} | {row['auc_low']:.2f}–{row['auc_high']:.2f}"
            f" | {row['accuracy']:.2f} | {row['accuracy_low']:.2f}–{row['accuracy_high']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--run", type=Path, help="contrast unsafe with safe Python, with the SAE of this run")
    given = parser.parse_args()
    if given.run:
        unsafe_python(given.run)
    else:
        measure(given.texts, given.tokens, given.d_sae)


if __name__ == "__main__":
    main()
