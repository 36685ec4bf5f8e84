"""Train one SAE with SAELens or dictionary_learning, for ``quality.py``.

Runs in the peer's own environment (``peers.py``) and knows nothing of our packages. Its one word is a JSON object:

* ``library`` (sae-lens, dictionary-learning), ``architecture`` (topk, batch_topk), ``d_sae``, ``k``, ``seed`` and
  ``threads``;
* ``rows``: a ``.npy`` file of float32 activations ``[n, d_in]`` in training order;
* ``out``: a folder for the SAE, which is written in the library's own format;
* ``recipe``: ``theirs`` or ``ours``. With ours, ``rows`` holds activations that are centred and scaled already, and
  ``batch``, ``learning_rate``, ``warmup`` and ``decay`` (fractions of the run) are ours.

The recipe ``theirs``:

* SAELens: the defaults of its runner (batches of 4,096, Adam at 3e-4, constant) with its input scaling
  ``expected_average_only_in``; dead after 1,000 batches.
* dictionary_learning: the defaults of its trainers (2e-4/√(d_sae/2¹⁴), 1,000 warm-up steps, b_dec from the geometric
  median, inputs scaled to unit mean square) and of its demonstration (decay over the last fifth). Batches of 1,024 in
  the place of 2,048: with those, 2 million tokens would end before the warm-up does and before the threshold of
  BatchTopK, which starts after step 1,000, is ever set.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Options = dict[str, Any]


def batches(path: str, size: int) -> Iterator[torch.Tensor]:
    """Batches [size, d_in] of a file of rows, in its order."""
    rows = np.load(path, mmap_mode="r")
    for start in range(0, len(rows) - size + 1, size):
        yield torch.from_numpy(np.array(rows[start : start + size]))


def n_rows(path: str) -> tuple[int, int]:
    """Number of rows of a file, and their width."""
    n, width = np.load(path, mmap_mode="r").shape
    return int(n), int(width)


def train_sae_lens(options: Options) -> None:
    """Train with SAELens and save for inference."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    ours = options["recipe"] == "ours"
    n, d_in = n_rows(options["rows"])
    size = options["batch"] if ours else 4096
    common: Options = {"d_in": d_in, "d_sae": options["d_sae"], "k": options["k"]}
    common["normalize_activations"] = "none" if ours else "expected_average_only_in"
    torch.manual_seed(options["seed"])
    if options["architecture"] == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    steps = n // size
    schedule: Options = {"lr": 3e-4, "lr_end": 3e-4}
    if ours:
        schedule = {
            "lr": options["learning_rate"],
            "lr_end": options["learning_rate"],
            "lr_warm_up_steps": round(options["warmup"] * steps),
            "lr_decay_steps": round(options["decay"] * steps),
        }
    config = SAETrainerConfig(
        total_training_samples=steps * size,
        train_batch_size_samples=size,
        n_batches_for_norm_estimate=min(1000, steps),
        **schedule,
    )
    # The stream begins again for the batches that their estimate of the norm takes.
    rows = itertools.chain.from_iterable(batches(options["rows"], size) for _ in range(2))
    trained = SAETrainer(config, sae, data_provider=rows).fit()
    trained.save_inference_model(options["out"])


def train_dictionary_learning(options: Options) -> None:
    """Train with dictionary_learning and save its ``ae.pt`` and ``config.json``."""
    # Importing the package needs nnsight, which only its buffers use and which is not installed.
    sys.modules.setdefault("nnsight", type(sys)("nnsight")).LanguageModel = object  # type: ignore[attr-defined]
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    ours = options["recipe"] == "ours"
    n, d_in = n_rows(options["rows"])
    size = options["batch"] if ours else 1024
    steps = n // size
    settings: Options = {"lr": None, "warmup_steps": 1000, "decay_start": int(0.8 * steps)}
    if ours:
        warmup = round(options["warmup"] * steps)
        settings = {
            "lr": options["learning_rate"],
            "warmup_steps": warmup,
            "decay_start": max(round((1 - options["decay"]) * steps), warmup + 1),
            "threshold_start_step": steps // 2,
        }
    kind = TopKTrainer if options["architecture"] == "topk" else BatchTopKTrainer
    trainer = kind(
        steps=steps,
        activation_dim=d_in,
        dict_size=options["d_sae"],
        k=options["k"],
        layer=0,
        lm_name="",
        device="cpu",
        seed=options["seed"],
        **settings,
    )
    scale = 1.0
    if not ours:  # as trainSAE does for normalize_activations=True: unit mean square over 100 batches
        squares = [
            float(x.square().sum(1).mean()) for x in itertools.islice(batches(options["rows"], size), 100)
        ]
        scale = float(np.mean(squares)) ** 0.5
    for step, x in enumerate(batches(options["rows"], size)):
        trainer.update(step, x / scale)
    trainer.ae.scale_biases(scale)
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.cpu() for name, tensor in trainer.ae.state_dict().items()}, out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))


if __name__ == "__main__":
    given: Options = json.loads(sys.argv[1])
    torch.set_num_threads(given.get("threads", torch.get_num_threads()))
    {"sae-lens": train_sae_lens, "dictionary-learning": train_dictionary_learning}[given["library"]](given)
