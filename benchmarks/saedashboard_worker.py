"""SAEDashboard, in the environment of ``peers.py`` (index.py starts this file, nobody else does).

    saedashboard_worker.py '{"model": FOLDER, "folder": FOLDER, "layer": 3, "seconds": 180, "threads": 2}'

makes dashboards of one group of features after the other, with its defaults, until the time is over, and prints one
line of JSON.
"""

import json
import logging
import os
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hooked_llama import hooked_llama
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 256  # features at a time: its default


def tokenizer_folder(model: Path, folder: Path) -> Path:
    """The model's tokenizer under a class that this release of transformers knows."""
    folder.mkdir(exist_ok=True)
    shutil.copy(model / "tokenizer.json", folder)
    said = json.loads((model / "tokenizer_config.json").read_text())
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def main() -> None:
    """Do the job given as JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not get between the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    hf = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(Path(job["model"]), folder / "tokenizer"))
    model = hooked_llama(hf, tokenizer)
    hook = f"blocks.{job['layer']}.hook_resid_post"
    sae = SAE.load_from_disk(str(folder / "sae"))
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < job["seconds"] and done < sae.cfg.d_sae:
        features = list(range(done, done + GROUP))
        SaeVisRunner(SaeVisConfig(hook_point=hook, features=features)).run(
            encoder=sae, model=model, tokens=tokens
        )
        done += GROUP
    answer = {"features": done, "seconds": time.perf_counter() - started, "version": version("sae-dashboard")}
    answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
