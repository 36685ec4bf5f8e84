"""One measured job in a process of its own (capture.py starts this file, nobody else does).

    capture_worker.py '{"job": "live" | "read" | "memory", ...}'

prints one line of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from memory import PeakMemory, peak
from safetensors.torch import save_file

from activations.corpus import Corpus, CorpusConfig
from activations.exclusion import Exclusion
from activations.models import LanguageModel
from activations.store import ActivationStore, HookActivations
from activations.store_stream import StoreStream
from activations.stream import ActivationStream
from activations.writer import write_store


def live(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds from raw text to the last shuffled batch, and memory beyond what the loaded model took."""
    model = LanguageModel.load(job["model"], device="cpu")
    hook = f"blocks.{job['layer']}.hook_resid_post"
    with PeakMemory() as memory:
        started = time.perf_counter()
        blocks = Corpus(CorpusConfig(text=(job["text"],))).blocks(
            model.tokenizer, "train", job["tokens"], job["context"]
        )
        exclusion = Exclusion(frozenset(job["special_ids"]), float("inf"))
        n_batches = job["tokens"] // job["batch"]
        batches = ActivationStream.live(
            model,
            blocks,
            hook,
            exclusion,
            batch_size=job["batch"],
            n_batches=n_batches,
            buffer_rows=job["buffer"],
        )
        n_tokens = sum(len(batch) for batch in batches)
        seconds = time.perf_counter() - started
    save_file({"activations": model.capture(torch.tensor(job["ids"]), [hook])[hook]}, job["answer"])
    return {"tokens": n_tokens, "seconds": seconds, "growth": memory.growth, "peak": peak()}


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each epoch and what came from the disk; with ``drop``, the page cache is emptied before each."""
    held = ActivationStore.open(job["store"]).at()
    copy = Path(job["store"]).with_name("shuffled")
    n_batches = held.n_kept // job["batch"]
    result: dict[str, Any] = {"bytes": sum(held.values(i).nbytes for i in range(len(held.starts) - 1))}
    started = time.perf_counter()
    stream = _stream(job, held, copy)
    result["made"] = time.perf_counter() - started
    epochs = []
    for epoch in range(job["epochs"]):
        if job["drop"]:
            state = stream.state_dict()
            stream = _stream(job, held, copy)  # maps nothing yet: mapped pages would stay
            stream.load_state_dict({**state, "epoch": epoch, "position": 0})
            _drop(Path(job["store"]))
            _drop(copy)
        from_disk, started = _bytes_read(), time.perf_counter()
        n_tokens = sum(len(batch) for batch in islice(stream, n_batches))
        seconds = time.perf_counter() - started
        epochs.append({"tokens": n_tokens, "seconds": seconds, "from_disk": _bytes_read() - from_disk})
    return {**result, "epochs": epochs}


def memory_of(job: dict[str, Any]) -> dict[str, Any]:
    """The most anonymous memory while text becomes a store, and while the store is read in either order."""
    model = LanguageModel.load(job["model"], device="cpu")
    folder = Path(job["folder"])
    peaks = {}
    with PeakMemory() as memory:
        blocks = Corpus(CorpusConfig(text=(job["text"],))).blocks(
            model.tokenizer, "train", job["tokens"], 128
        )
    peaks["text to tokens"] = memory.highest
    with PeakMemory() as memory:
        held = write_store(model, blocks, ["blocks.0.hook_resid_post"], folder / "store").at()
    peaks["capture to store"] = memory.highest
    del blocks
    n_tokens = held.n_rows
    for order in ("exact", "external"):
        with PeakMemory() as memory:
            settings: dict[str, Any] = {"batch_size": 4096, "n_batches": n_tokens // 4096}
            if order == "exact":
                stream = StoreStream.exact(held, **settings)
            else:
                stream = StoreStream.external(held, folder / "shuffled", memory_bytes=1 << 26, **settings)
            for _ in stream:
                pass
            del stream
        peaks[f"{order} reading"] = memory.highest
    return {"tokens": n_tokens, "peaks": peaks}


def _stream(job: dict[str, Any], held: HookActivations, copy: Path) -> StoreStream:
    settings: dict[str, Any] = {"batch_size": job["batch"], "n_batches": 1 << 30}
    if job["order"] == "exact":
        return StoreStream.exact(held, **settings)
    return StoreStream.external(held, copy, **settings)


def _drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _bytes_read() -> int:
    """What this process has had fetched from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def main() -> None:
    """Do the job given as JSON."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps({"live": live, "read": read, "memory": memory_of}[job["job"]](job)))


if __name__ == "__main__":
    main()
