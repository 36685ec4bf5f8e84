"""A run without a folder full of files: a tiny model, a random SAE, a few statistics and a real label store."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_models import tiny_language_model

from features.labels import Label, Labels, Score
from features.trace import Trace, trace_text
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

D_SAE = 48
CONTEXT = 16
N_TOKENS = 10_000


class SmallRun:
    """What search, traces and contrasts ask of a :class:`features.run.Run`."""

    name = "small"

    def __init__(self, folder: Path) -> None:
        self.folder = SimpleNamespace(path=folder)
        self.model = tiny_language_model("llama")
        generator = torch.Generator().manual_seed(1)
        rows = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=generator), dim=1)
        weights = Weights(rows, torch.zeros(D_SAE), rows.clone(), torch.zeros(32))
        metadata = {"hook_name": "blocks.1.hook_resid_post", "context_size": CONTEXT, "prepend_bos": False}
        self.sae = SparseAutoencoder(SAEConfig(d_sae=D_SAE, k=4), weights, metadata)
        self.labels = Labels.open(folder / "labels.sqlite")
        random = np.random.default_rng(2)
        count = random.integers(0, N_TOKENS // 2, D_SAE)
        count[7] = 0
        tokens = np.full((D_SAE, 20), -1)
        for feature in range(D_SAE):
            n = int(random.integers(0, 21))
            tokens[feature, :n] = random.choice(np.arange(1, 320), n, replace=False)
        self.index: Any = SimpleNamespace(
            d_sae=D_SAE,
            n_tokens=N_TOKENS,
            count=count,
            density=count / N_TOKENS,
            max=random.random(D_SAE).astype(np.float32) + 0.5,
            vocabulary=self.model.tokenizer.vocabulary(),
            manifest={"inputs": {"sae_hash": self.sae.hash, "number": 1}},
            array={"token_id": tokens}.__getitem__,
        )

    def trace(self, text: str) -> Trace:
        return trace_text(self.model, self.sae, text)


def scored(feature: int, text: str, f1: float) -> Label:
    """An automatic label with a score."""
    return Label(feature, text, "automatic", scores=(Score("tokens", f1, 100),))
