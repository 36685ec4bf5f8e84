"""Capturing activations, writing them to disk and reading them back, against the bare forward pass and SAELens.

    python benchmarks/capture.py [--repeats 15] [--threads N] [--only PART …]

The model is a Llama of random weights: six layers of width 256, float32, the bundled tokenizer. Contestants take
turns, so that a change in the machine's speed meets all alike; figures are medians, and limits are on their ratios.

* **forward**: one hook in the middle into a buffer of the caller's, against the plain Hugging Face model cut off behind
  that layer (SDPA) and ``TransformerBridge.run_with_cache(names_filter, stop_at_layer)``; three hooks against one.
* **live**: raw text to shuffled batches, against SAELens' ``ActivationsStore`` in a virtual environment of its own
  (made on first use, see ``peers.py``), with the fastest of its models and batch sizes. Each in a fresh process;
  memory is what grows beyond the loaded model.
* **writing**: shards of a store against writing and fsyncing the same bytes.
* **reading**: a store of 50 shards in both orders, from the page cache and with the page cache dropped.
* **memory**: anonymous memory of the whole road, at two sizes of the text.

Linux only. Exit status 1 if SAELens cannot be installed.
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from peers import peer_python
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from activations.blocks import TokenBlocks
from activations.models import LanguageModel
from activations.shards import write_shard
from activations.writer import write_store

PARTS = ("forward", "live", "writing", "reading", "memory")
WARM_UP = 2
PAUSE = 0.02  # seconds: lets the threads of the contestant before stop spinning
LAYER = 2
HOOK = f"blocks.{LAYER}.hook_resid_post"
THREE_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", HOOK)
SHAPES = {(16, 128): 1.05, (1, 2048): 4.0}  # batch and length: how many times the bridge's speed is wanted
CONTEXT, BATCH = 128, 4096
BUFFERS = {1 << 16: 3, 1 << 19: 1}  # activations (a small buffer, and our default for this width): rounds
SHARD_ROWS, N_SHARDS = 1 << 16, 50

Run = Callable[[], object]


def make_model(folder: Path, *, layers: int = 6, width: int = 256, heads: int = 8, mlp: int = 688) -> None:
    """Save a Llama of random weights with the bundled tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(__file__).parents[1] / "activations" / "builtin"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def in_turn(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, all timed once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP + repeats):
        for name, run in runs.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}


def job(script: str, python: Path | str = sys.executable, **settings: Any) -> dict[str, Any]:
    """What a worker in a fresh process answers; no text is tokenised in its cache yet."""
    path = Path(__file__).with_name(script)
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [str(python), str(path), json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SAESCOPE_CACHE": cache},
        )
    if done.returncode:
        raise SystemExit(f"{script} ended early; what it said stands above.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# Forward


def cut_off(hf_model: Any) -> Any:
    """A copy of the Llama without unembedding that computes what its layer ``LAYER`` gives out, and no more."""
    base = copy.deepcopy(hf_model.base_model)
    base.layers = base.layers[: LAYER + 1]
    base.config.num_hidden_layers = LAYER + 1
    base.norm = torch.nn.Identity()
    return base


def forward(folder: Path, repeats: int) -> None:
    """Print tokens per second of every contestant."""
    plain = cut_off(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    model = LanguageModel.load(str(folder), device="cpu")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    print("forward: tokens per second")
    for (batch, length), wanted in SHAPES.items():
        ids = torch.randint(model.d_vocab, (batch, length))
        buffers = {name: torch.empty(batch, length, model.d_model) for name in THREE_HOOKS}

        def run_plain(ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                x: Tensor = plain(input_ids=ids, use_cache=False).last_hidden_state
            return x

        def run_bridge(ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter=[HOOK], stop_at_layer=LAYER + 1)
            x: Tensor = cache[HOOK]
            return x

        def run_one(ids: Tensor = ids, buffers: dict[str, Tensor] = buffers) -> Tensor:
            return model.capture(ids, [HOOK], out={HOOK: buffers[HOOK]})[HOOK]

        def run_three(ids: Tensor = ids, buffers: dict[str, Tensor] = buffers) -> Tensor:
            return model.capture(ids, THREE_HOOKS, out=buffers)[HOOK]

        runs: dict[str, Callable[[], Tensor]] = {
            "plain Hugging Face": run_plain,
            "saescope": run_one,
            "saescope, 3 hooks": run_three,
            "TransformerBridge": run_bridge,
        }
        x = run_plain()
        apart = max(float((run() - x).abs().max()) for run in runs.values())
        seconds = in_turn(runs, repeats)
        speed = {name: batch * length / value for name, value in seconds.items()}
        print(f"  {batch} x {length} (activations of all agree to {apart:.1e})")
        print(f"    plain Hugging Face {speed['plain Hugging Face']:10,.0f}")
        for name, other, limit in [
            ("saescope", "plain Hugging Face", 0.93),
            ("saescope, 3 hooks", "saescope", 0.9),
        ]:
            print(f"    {name:18} {speed[name]:10,.0f}   {verdict(speed[name] / speed[other], limit, other)}")
        print(
            f"    TransformerBridge  {speed['TransformerBridge']:10,.0f}   saescope is"
            f" {verdict(speed['saescope'] / speed['TransformerBridge'], wanted, 'that')}",
            flush=True,
        )


# Live


def write_text(path: Path) -> None:
    """The standard library's sources as JSONL."""
    library = Path(sysconfig.get_paths()["stdlib"])
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(library.rglob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore")
            if "site-packages" not in source.parts and 400 < len(text) < 400_000:
                file.write(json.dumps({"text": text}) + "\n")


def live(folder: Path, work: Path, tokens: int, threads: int, python: Path) -> None:
    """Print tokens per second and memory of both sides."""
    write_text(work / "text.jsonl")
    tokenizer = LanguageModel.load(str(folder), device="cpu").tokenizer
    settings = {
        "model": str(folder),
        "text": str(work / "text.jsonl"),
        "layer": LAYER,
        "width": 256,
        "context": CONTEXT,
        "batch": BATCH,
        "tokens": tokens,
        "bos": tokenizer.adds_bos,
        "special_ids": sorted(tokenizer.special_ids),
        "threads": threads,
        "ids": torch.randint(len(tokenizer.vocabulary()), (2, CONTEXT)).tolist(),
    }
    tried = job("saelens_store_worker.py", python, buffer=1 << 16, answer=str(work / "theirs"), **settings)
    speeds = {name: value for name, value in tried["tried"].items() if isinstance(value, float)}
    best = max(speeds, key=lambda name: speeds[name])
    kind, prompts = best.removesuffix(" prompts").split(", ")
    versions = ", ".join(f"{name} {version}" for name, version in tried["versions"].items())
    print(f"live: raw text to shuffled batches of {BATCH:,}, {tokens:,} tokens; {versions}")
    print(f"  SAELens with {best}; tokens per second on little text:")
    for name, value in tried["tried"].items():
        print(f"    {name:33}{f'{value:10,.0f}' if isinstance(value, float) else value}")
    for buffer, rounds in BUFFERS.items():
        results: dict[str, list[dict[str, Any]]] = {"saescope": [], "SAELens": []}
        for _ in range(rounds):
            results["saescope"].append(
                job("capture_worker.py", job="live", buffer=buffer, answer=str(work / "ours"), **settings)
            )
            theirs = {"kind": kind, "prompts": int(prompts), "answer": str(work / "theirs")}
            results["SAELens"].append(
                job("saelens_store_worker.py", python, buffer=buffer, **theirs, **settings)
            )
        x, y = (load_file(work / name)["activations"] for name in ("ours", "theirs"))
        print(
            f"  buffer of {buffer:,} activations, medians of {rounds}"
            f" (both models agree to {float((x - y).abs().max()):.1e})"
        )
        speed, growth = {}, {}
        for name, runs in results.items():
            speed[name] = statistics.median(run["tokens"] / run["seconds"] for run in runs)
            growth[name] = statistics.median(run["growth"] for run in runs)
            peak = statistics.median(run["peak"] for run in runs)
            print(
                f"    {name:9} {speed[name]:9,.0f} tokens/s, {growth[name] / 1e6:6,.0f} MB more than the model,"
                f" {peak / 1e6:6,.0f} MB in all"
            )
        print(
            f"    saescope is {verdict(speed['saescope'] / speed['SAELens'], 1.5, 'SAELens')}, with"
            f" {verdict(growth['saescope'] / growth['SAELens'], 1.0, 'its memory', most=True)}",
            flush=True,
        )


# Writing


def writing(work: Path, repeats: int) -> None:
    """Print megabytes per second of shards against bare files of the same bytes."""
    pieces = [torch.randn(1024, 256).bfloat16() for _ in range(SHARD_ROWS // 1024)]
    column = [torch.arange(1024, dtype=torch.int32)] * len(pieces)
    tensors = {
        "ids": column,
        "positions": column,
        "documents": column,
        f"activations/{HOOK}": pieces,
        f"norm/{HOOK}": [piece.float().norm(dim=1) for piece in pieces],
    }
    shard, bare = work / "shard.safetensors", work / "bare"
    write_shard(shard, tensors)
    data = shard.read_bytes()

    def write_bare() -> None:
        with bare.open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        bare.unlink()

    def write_ours() -> None:
        write_shard(shard, tensors)
        shard.unlink()

    seconds = in_turn({"bare": write_bare, "ours": write_ours}, repeats)
    speed = {name: len(data) / value / 1e6 for name, value in seconds.items()}
    print(f"writing: shards of {len(data) / 1e6:.1f} MB, MB per second")
    print(f"  written and fsynced {speed['bare']:6,.0f}")
    print(
        f"  shards, hashed      {speed['ours']:6,.0f}   {verdict(speed['ours'] / speed['bare'], 0.7, 'that')}",
        flush=True,
    )


# Reading


def make_store(work: Path) -> Path:
    """A store of about 50 shards of 256-wide bfloat16: what the model's embedding gives for random tokens."""
    make_model(work / "embedding", layers=1)
    model = LanguageModel.load(str(work / "embedding"), device="cpu")
    n_blocks = N_SHARDS * SHARD_ROWS // CONTEXT
    generator = np.random.default_rng(0)
    blocks = TokenBlocks(
        ids=generator.integers(16, model.d_vocab, (n_blocks, CONTEXT), dtype=np.uint16),
        documents=np.repeat(np.arange(n_blocks, dtype=np.int32)[:, None] // 8, CONTEXT, axis=1),
        names=[f"document {i}" for i in range(-(-n_blocks // 8))],
        split="train",
        packing="concatenated",
        bos=False,
    )
    started = time.perf_counter()
    store = write_store(model, blocks, ["blocks.0.hook_resid_pre"], work / "store")
    seconds = time.perf_counter() - started
    n_bytes = sum(shard.bytes for shard in store.shards)
    print(
        f"reading: {store.n_rows:,} rows of 256 bfloat16 in {len(store.shards)} shards"
        f" (embedded and written at {n_bytes / seconds / 1e6:,.0f} MB/s)"
    )
    return store.folder


def reading(work: Path, epochs: int, threads: int) -> None:
    """Print rows per second in both orders, and what an epoch reads when nothing is in the page cache."""
    store = str(make_store(work))
    settings = {"job": "read", "store": store, "batch": BATCH, "threads": threads}
    for order in ("exact", "external"):
        result = job("capture_worker.py", order=order, epochs=epochs + 1, drop=False, **settings)
        speeds = [epoch["tokens"] / epoch["seconds"] / 1e6 for epoch in result["epochs"]]
        median = statistics.median(speeds[1:])
        shuffled = f", shuffled in {result['made']:.1f} s" if order == "external" else ""
        print(
            f"  {order:9} {verdict(median, 3.0, 'million rows/s', unit=True)}"
            f" (first epoch {speeds[0]:.2f}, others {min(speeds[1:]):.2f} to {max(speeds[1:]):.2f}{shuffled})"
        )
    result = job("capture_worker.py", order="external", epochs=2, drop=True, **settings)
    for number, epoch in enumerate(result["epochs"]):
        share = epoch["from_disk"] / result["bytes"]
        speed = epoch["tokens"] / epoch["seconds"] / 1e6
        print(
            f"  external, page cache dropped, epoch {number}: read"
            f" {verdict(share, 1.1, 'the bytes of the activations', most=True)}; {speed:.2f} million rows/s",
            flush=True,
        )


# Memory


def write_words(path: Path, n_tokens: int) -> None:
    """Documents of random words that give a little more than ``n_tokens`` tokens in the train split."""
    tokenizer = LanguageModel.load().tokenizer
    source = random.Random(0)
    words = sorted({piece for piece in tokenizer.vocabulary() if piece.strip().isalpha() and len(piece) > 3})
    with path.open("w", encoding="utf-8") as file:
        while n_tokens > 0:
            text = "".join(source.choices(words, k=1000))
            file.write(json.dumps({"text": text}) + "\n")
            n_tokens -= 800  # a tenth belongs to other splits, and some words merge


def memory(work: Path, sizes: list[int], threads: int) -> None:
    """Print the peak of anonymous memory in each stage, at two sizes of the text."""
    make_model(work / "narrow", layers=1, width=32, heads=4, mlp=64)
    results = []
    for size in sizes:
        write_words(work / f"{size}.jsonl", size)
        settings = {"model": str(work / "narrow"), "text": str(work / f"{size}.jsonl"), "tokens": size}
        folder = work / f"memory-{size}"
        results.append(
            job("capture_worker.py", job="memory", folder=str(folder), threads=threads, **settings)
        )
    print("memory: peak RssAnon in MB, imports and model included (one layer of width 32)")
    print(f"  {'':18}" + "".join(f"{result['tokens']:>14,} tokens" for result in results))
    for stage in results[0]["peaks"]:
        print(f"  {stage:18}" + "".join(f"{result['peaks'][stage] / 1e6:>21,.0f}" for result in results))


def verdict(value: float, limit: float, reference: str, *, most: bool = False, unit: bool = False) -> str:
    """ "0.95 x REFERENCE (at least 0.93: met)"."""
    met = value <= limit if most else value >= limit
    bound = f"at {'most' if most else 'least'} {limit:g}: {'met' if met else 'MISSED'}"
    return f"{value:.2f} {'' if unit else 'x '}{reference} ({bound})"


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed runs per contestant (medians are reported)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for all contestants")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--tokens", type=int, default=600_000, help="text of the live part")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="tokens of the memory part"
    )
    parser.add_argument("--folder", type=Path, help="where files are written and deleted (8 GB)")
    arguments = parser.parse_args()
    python = Path()
    if "live" in arguments.only:
        try:
            python = peer_python("sae-lens")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"SAELens could not be installed: {error}", file=sys.stderr)
            return 1
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.repeats} runs")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = Path(folder)
        make_model(work / "model")
        if "forward" in arguments.only:
            forward(work / "model", arguments.repeats)
        if "live" in arguments.only:
            live(work / "model", work, arguments.tokens, arguments.threads, python)
        if "writing" in arguments.only:
            writing(work, arguments.repeats)
        if "reading" in arguments.only:
            reading(work, 3, arguments.threads)
        if "memory" in arguments.only:
            memory(work, arguments.sizes, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
