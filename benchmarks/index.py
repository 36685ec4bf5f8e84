"""The feature index: how long one pass takes, in how much memory and disk, how fast a page opens, and SAEDashboard.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/index.py [--folder FOLDER] [--only PART …]

Bundled model, ``blocks.3.hook_resid_post``, 2 million tokens, captured once into FOLDER. The SAE of 4,096 features is
trained there by the defaults (k = 32, 500,000 tokens); those of other widths are copies of it with noise, so that
firings are spread as in a trained one.

* **speed**: the index from the store against ``sae.encode`` in float32 of the same activations, which lie in memory.
* **memory**: RssAnon of a process that indexes half a million and five million tokens, 32,768 features.
* **page**: everything that a feature's page shows, in a fresh process, the files dropped from the page cache; of that
  index and of one of 1,000,000 features, which the same writer wrote.
* **peer**: SAEDashboard with its defaults on the same SAE and tokens, as many features as it manages in three minutes,
  and ours on all of them.

Linux only. Prints Markdown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from memory import PeakMemory
from peers import peer_python
from safetensors.torch import save_file

from activations.blocks import TokenBlocks
from activations.config import CaptureConfig
from activations.corpus import Corpus
from activations.job import CaptureJob
from activations.loading import BUILTIN
from activations.models import LanguageModel
from activations.store import ActivationStore, HookActivations
from features.build import build_index
from features.index import FeatureIndex
from features.records import write_records
from features.weights import weight_record
from sae.architectures.base import Weights
from sae.config import SAEConfig, TrainConfig
from sae.model import SparseAutoencoder

PARTS = ("speed", "memory", "page", "peer")
HOOK = "blocks.3.hook_resid_post"
TOKENS = 2_000_000
WIDTHS = (4096, 32_768)
ENCODED_AT_ONCE = 8192
MOST_FEATURES = 1_000_000
PEER_SECONDS = 180


class Bench:
    """The folder and what all parts need of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = LanguageModel.load("builtin")

    @property
    def store(self) -> HookActivations:
        """The activations, captured the first time."""
        folder = self.folder / "store"
        if not folder.is_dir():
            CaptureJob.prepare(CaptureConfig(hook_names=(HOOK,), tokens=TOKENS), model=self.model).write(
                folder
            )
        return ActivationStore.open(folder).at(HOOK)

    def sae(self, d_sae: int) -> SparseAutoencoder:
        """An SAE of this width; see the module."""
        folder = self.folder / "run"
        if not (folder / "sae").is_dir():
            from features.pipeline import Pipeline

            pipeline = Pipeline(folder, TrainConfig(tokens=500_000, sae=SAEConfig(d_sae=WIDTHS[0], k=32)))
            pipeline.start()
            pipeline.train()
        trained = SparseAutoencoder.load(folder / "sae")
        if d_sae == trained.d_sae:
            return trained
        generator = torch.Generator().manual_seed(0)
        weights, copies = trained.weights, d_sae // trained.d_sae

        def noisy(rows: torch.Tensor) -> torch.Tensor:
            scale = 0.5 * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
            return torch.cat(
                [rows + scale * torch.randn(rows.shape, generator=generator) for _ in range(copies)]
            )

        wide = Weights(
            noisy(weights.encoder_rows), weights.b_enc.repeat(copies), noisy(weights.W_dec), weights.b_dec
        )
        return SparseAutoencoder(SAEConfig(d_sae=d_sae, k=32), wide, trained.metadata)

    def index(self, d_sae: int, *, anew: bool = False) -> FeatureIndex:
        """The index over all stored tokens."""
        folder = self.folder / f"index-{d_sae}"
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        store = self.store
        return build_index(self.model, self.sae(d_sae), store.blocks, folder / "train", activations=store)


def speed(bench: Bench, repeats: int) -> None:
    """Index against encode, in turns."""
    store = bench.store
    blocks = store.blocks
    print("| d_sae | encode | index | ratio (wanted: at most 1.5) | bytes per feature (at most 6,144) |")
    print("|---|---|---|---|---|")
    for d_sae in WIDTHS:
        sae = bench.sae(d_sae)
        encoding, indexing = [], []
        for _ in range(repeats):
            seconds = 0.0
            for start in range(0, blocks.n_blocks, 32):
                x = store.read(start, min(start + 32, blocks.n_blocks)).reshape(-1, sae.d_in).float()
                for part in x.split(ENCODED_AT_ONCE):
                    started = time.perf_counter()
                    sae.encode(part)
                    seconds += time.perf_counter() - started
            encoding.append(seconds)
            started = time.perf_counter()
            index = bench.index(d_sae, anew=True)
            indexing.append(time.perf_counter() - started)
        encode, built = statistics.median(encoding), statistics.median(indexing)
        ratio = statistics.median(b / a for a, b in zip(encoding, indexing, strict=True))
        print(
            f"| {d_sae:,} | {encode:.1f} s | {built:.1f} s | **{ratio:.2f}** | {bytes_per_feature(index):,.0f} |",
            flush=True,
        )


def bytes_per_feature(index: FeatureIndex) -> float:
    """Disk of an index without its text, which does not grow with the features."""
    files = [
        index.folder / "features.npy",
        index.folder / "columns.npy",
        index.folder / "weights" / "weights.npy",
    ]
    return sum(path.stat().st_size for path in files) / index.d_sae


def memory(bench: Bench) -> None:
    """In processes of their own: a text grows, and the memory of a pass over it should not."""
    print("| tokens | d_sae | RssAnon at most (wanted: 1,500 MB, the same for both) |\n|---|---|---|")
    for tokens in (500_000, 5_000_000):
        command = [sys.executable, __file__, "--folder", str(bench.folder), "--one-memory", str(tokens)]
        grown = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"| {tokens:,} | {WIDTHS[1]:,} | {grown / 1e6:,.0f} MB |", flush=True)


def one_memory(bench: Bench, tokens: int) -> None:
    """Index so many tokens, live, in this process."""
    sae = bench.sae(WIDTHS[1])
    blocks = blocks_of(bench, tokens)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, PeakMemory() as watched:
        build_index(bench.model, sae, blocks, Path(folder) / "train")
    print(watched.highest)


def blocks_of(bench: Bench, tokens: int) -> TokenBlocks:
    """Text of the train split; where the machine has too little, it is read again."""
    blocks = Corpus(CaptureConfig().corpus).blocks(bench.model.tokenizer, "train", min(tokens, TOKENS), 256)
    times = -(-tokens // blocks.n_tokens)
    return TokenBlocks.joined([blocks] * times).first_tokens(tokens) if times > 1 else blocks


def page(bench: Bench) -> None:
    """Milliseconds to everything about a feature, cold; medians over features."""
    print("| features | milliseconds, median and highest of 20 (wanted: 10) |\n|---|---|")
    real = bench.index(WIDTHS[0])
    for folder in (real.folder, synthetic(bench, real)):
        d_sae = FeatureIndex.open(folder).d_sae
        times = []
        for feature in np.random.default_rng(0).integers(d_sae, size=20).tolist():
            drop(folder)
            command = [sys.executable, __file__, "--one-page", str(folder), str(feature)]
            times.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(f"| {d_sae:,} | {statistics.median(times):.1f}, {max(times):.1f} |", flush=True)


def one_page(folder: Path, feature: int) -> None:
    """Open an index and read what a page shows, in this process."""
    started = time.perf_counter()
    index = FeatureIndex.open(folder)
    index.fetch(feature)  # as open_run(...).feature(...) does
    for column in ("count", "mean", "std", "max", "entropy"):
        float(index.column(column)[feature])
    index.histogram(feature), index.quantile(feature, 0.5)
    index.top_examples(feature), index.range_examples(feature), index.near_misses(feature)
    index.top_tokens(feature), index.next_tokens(feature), index.coactive(feature), index.tags(feature)
    index.promoted(feature), index.suppressed(feature)
    if index.weights.has_neighbours:
        index.neighbours(feature)
    print(1e3 * (time.perf_counter() - started))


def drop(folder: Path) -> None:
    """Have the system forget what it has read of the files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def synthetic(bench: Bench, real: FeatureIndex) -> Path:
    """An index of many features: those of a real one over and over, written as it was."""
    folder = bench.folder / "index-many" / "train"
    if folder.is_dir():
        return folder
    shutil.copytree(
        real.folder, folder, ignore=shutil.ignore_patterns("features.npy", "columns.npy", "weights")
    )
    (folder / "weights").mkdir()
    times = -(-MOST_FEATURES // real.d_sae)
    n = times * real.d_sae
    narrow = weight_record(real.weights.has_logit_lens, False)
    lens = real.weights.records[list(narrow.names or ())]
    own = {
        "features.npy": np.load(real.folder / "features.npy"),
        "columns.npy": np.load(real.folder / "columns.npy"),
        "weights/weights.npy": np.rec.fromarrays([lens[name] for name in narrow.names or ()], dtype=narrow),
    }
    for name, records in own.items():
        write_records(folder / name, records.dtype, (n,), (records for _ in range(times)))
    for path, facts in ((folder, {}), (folder / "weights", {"neighbours": False})):
        source = real.folder if path == folder else real.weights.folder
        manifest = json.loads((source / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "d_sae": n, **facts}))
    return folder


def peer(bench: Bench) -> None:
    """Features per minute with the content that a dashboard has."""
    sae, store = bench.sae(WIDTHS[0]), bench.store
    ids = torch.from_numpy(store.blocks.ids.astype(np.int64))
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        sae.save(folder / "sae")
        save_file({"tokens": ids}, folder / "tokens.safetensors")
        job = {"model": str(BUILTIN), "folder": name, "layer": 3, "seconds": PEER_SECONDS}
        job["threads"] = torch.get_num_threads()
        command = [
            str(peer_python("sae-dashboard")),
            str(Path(__file__).with_name("saedashboard_worker.py")),
            json.dumps(job),
        ]
        theirs: dict[str, Any] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    started = time.perf_counter()
    bench.index(WIDTHS[0], anew=True)
    ours = WIDTHS[0] / (time.perf_counter() - started) * 60
    rate = theirs["features"] / theirs["seconds"] * 60
    print("| | features | seconds | features per minute |\n|---|---|---|---|")
    print(
        f"| SAEDashboard {theirs['version']} | {theirs['features']:,} | {theirs['seconds']:.0f} | {rate:,.0f} |"
    )
    print(f"| SAEscope | {WIDTHS[0]:,} | | {ours:,.0f}: **{ours / rate:.0f}×** (wanted: 50) |", flush=True)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/index-benchmark"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="of the speed part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-page", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one_page:
        one_page(Path(arguments.one_page[0]), int(arguments.one_page[1]))
        return
    bench = Bench(arguments.folder)
    if arguments.one_memory:
        one_memory(bench, arguments.one_memory)
        return
    parts = {"speed": lambda: speed(bench, arguments.repeats), "memory": lambda: memory(bench)}
    parts |= {"page": lambda: page(bench), "peer": lambda: peer(bench)}
    for name in arguments.only:
        print(f"\n## {name}\n", flush=True)
        parts[name]()


if __name__ == "__main__":
    main()
