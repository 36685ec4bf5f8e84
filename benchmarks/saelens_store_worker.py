"""SAELens' ActivationsStore, in the environment of ``peers.py`` (capture.py starts this file, nobody else does).

    saelens_store_worker.py '{"model": FOLDER, "text": FILE.jsonl, ...}'

reads the text, makes shuffled batches of activations and prints one line of JSON. Without ``"kind"`` it tries every
class of model and size of batch on little text, and says how many tokens a second each took.
"""

import itertools
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import transformers
from hooked_llama import hooked_llama
from memory import PeakMemory, peak
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")
PROMPTS = (4, 16, 32)  # sequences per forward pass; 32 is SAELens' default
TRIAL_TOKENS = 60_000


def load(kind: str, folder: str, layer: int) -> tuple[Any, str]:
    """The Llama in ``folder`` as a model of this kind, and what its residual stream behind ``layer`` is called."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hook = f"blocks.{layer}.hook_resid_post"
    if kind == "TransformerBridge":
        return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32), hook
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "AutoModelForCausalLM":
        return HookedProxyLM(hf, tokenizer, hook_names=[f"model.layers.{layer}"]), f"model.layers.{layer}"
    return hooked_llama(hf, tokenizer), hook


def store_of(model: Any, hook: str, job: dict[str, Any], prompts: int, buffer: int, cache: str) -> Any:
    """A store over the raw text with room for ``buffer`` activations."""
    return ActivationsStore(
        model=model,
        dataset=datasets.Dataset.from_json(job["text"], cache_dir=cache),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=job["context"],
        d_in=job["width"],
        n_batches_in_buffer=buffer // job["context"],
        total_training_tokens=job["tokens"],
        store_batch_size_prompts=prompts,
        train_batch_size_tokens=job["batch"],
        prepend_bos=job["bos"],
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        exclude_special_tokens=torch.tensor(job["special_ids"]),
    )


def run(job: dict[str, Any], kind: str, prompts: int) -> dict[str, Any]:
    """Seconds from raw text to the last batch, and memory beyond what the loaded model took."""
    model, hook = load(kind, job["model"], job["layer"])
    with tempfile.TemporaryDirectory() as cache, PeakMemory() as memory:
        started = time.perf_counter()
        store = store_of(model, hook, job, prompts, job["buffer"], cache)
        n_tokens = sum(len(store.next_batch()) for _ in range(job["tokens"] // job["batch"]))
        seconds = time.perf_counter() - started
        ids = torch.tensor(job["ids"])
        save_file({"activations": store.get_activations(ids)}, job["answer"])
    return {"tokens": n_tokens, "seconds": seconds, "growth": memory.growth, "peak": peak()}


def trials(job: dict[str, Any]) -> dict[str, float | str]:
    """Tokens per second of every class of model and size of batch, the better of two, or why it could not run."""
    tried: dict[str, float | str] = {}
    small = {**job, "tokens": TRIAL_TOKENS, "buffer": 4 * job["batch"]}
    for kind, prompts in 2 * list(itertools.product(KINDS, PROMPTS)):
        name = f"{kind}, {prompts} prompts"
        try:
            result = run(small, kind, prompts)
            speed = result["tokens"] / result["seconds"]
            tried[name] = max(speed, float(tried.get(name, 0)))
        except Exception as error:
            tried[name] = f"{type(error).__name__}: {str(error)[:100]}"
    return tried


def main() -> None:
    """Do the job given as JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not get between the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    result = run(job, job["kind"], job["prompts"]) if "kind" in job else {"tried": trials(job)}
    result["versions"] = {name: version(name) for name in ("sae-lens", "transformer-lens", "torch")}
    answers.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
