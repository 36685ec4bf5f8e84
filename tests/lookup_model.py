"""A "model" whose activations are small whole numbers, looked up by token and place, and what goes with it.

Every product and sum is exact, equal activations abound (so that ties are tested), and numbers can be compared for
equality however the text is cut into chunks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import END_OF_TEXT, VOCABULARY, tiny_tokenizer
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.tokenizer import Tokenizer
from features.build import build_index
from features.index import FeatureIndex
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.model import SparseAutoencoder

D_IN = 8
D_SAE = 48
CONTEXT = 40
HOOK = "blocks.0.hook_resid_post"
WRITTEN = "blocks.1.hook_mlp_out"
OUTLIERS = (40, 41, 42)  # tokens whose activations are 100 times the usual
MAX_NORM = 60.0


class LookupModel:
    """Activations are whole numbers that depend on the token and a little on its place."""

    name = "lookup"
    hash = "lookup-model"
    d_model = D_IN
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(tiny_tokenizer())
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randint(-4, 5, (VOCABULARY, D_IN), generator=generator).float()
        self.table[list(OUTLIERS)] *= 100
        self.shift = torch.randint(0, 2, (CONTEXT, D_IN), generator=generator).float()
        self.gain = torch.rand(D_IN, generator=generator) + 0.5
        self.W_U = torch.randn(D_IN, VOCABULARY, generator=generator)

    def width(self, hook_name: str) -> int:
        return D_IN

    def capture(self, ids: Tensor, hook_names: list[str], attention_mask: Any = None) -> dict[str, Tensor]:
        x = self.table[ids] + self.shift[: ids.shape[1]]
        return dict.fromkeys(hook_names, x)

    def logit_lens_weights(self) -> tuple[Tensor, Tensor]:
        return self.gain, self.W_U


def make_sae(architecture: str = "relu", hook_name: str = HOOK, **metadata: Any) -> SparseAutoencoder:
    """Whole-number weights. Feature 0 never fires, feature 1 nearly everywhere."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(-2, 3, (D_SAE, D_IN), generator=generator).float()
    bias = torch.randint(-24, -8, (D_SAE,), generator=generator).float()
    bias[:2] = torch.tensor([-1e4, 100.0])
    decoder = torch.randn(D_SAE, D_IN, generator=generator)
    weights = Weights(rows, bias, decoder, torch.ones(D_IN))
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=5)  # type: ignore[arg-type]
    return SparseAutoencoder(config, weights, {"hook_name": hook_name, "max_norm": MAX_NORM, **metadata})


def make_blocks(n_blocks: int = 60, packing: str = "concatenated", seed: int = 3) -> TokenBlocks:
    """Documents of 5 to 120 random tokens; the last block ends in padding."""
    random = np.random.default_rng(seed)
    ids, documents = [], []
    while sum(map(len, ids)) < n_blocks * CONTEXT - 150:
        n = int(random.integers(5, 121))
        # Few tokens are common, as in text.
        tokens = (VOCABULARY * random.random(n) ** 3).astype(np.int64).clip(1)
        ids.append(np.array([END_OF_TEXT, *tokens]))
        documents.append(np.full(n + 1, len(documents)))
        if packing == "isolated":
            rest = -(n + 1) % CONTEXT
            ids.append(np.full(rest, END_OF_TEXT))
            documents[-1] = np.concatenate([documents[-1], np.full(rest, PADDING)])
    names = [f"paket/größe_{i}.py" for i in range(len(documents))]
    flat_ids, flat_documents = np.concatenate(ids), np.concatenate(documents)
    rest = -len(flat_ids) % CONTEXT
    flat_ids = np.pad(flat_ids, (0, rest), constant_values=END_OF_TEXT)
    flat_documents = np.pad(flat_documents, (0, rest), constant_values=PADDING)
    return TokenBlocks(
        flat_ids.astype(np.uint16).reshape(-1, CONTEXT),
        flat_documents.astype(np.int32).reshape(-1, CONTEXT),
        names,
        "train",
        packing,
        False,
    )


def build(folder: Path, blocks: TokenBlocks, sae: SparseAutoencoder, **options: Any) -> FeatureIndex:
    return build_index(LookupModel(), sae, blocks, folder, **options)  # type: ignore[arg-type]


class Dense:
    """Every activation at every position, ``[positions, d_sae]`` float64, 0 where positions do not count."""

    def __init__(self, sae: SparseAutoencoder, blocks: TokenBlocks) -> None:
        model = LookupModel()
        self.ids = blocks.ids.reshape(-1).astype(int)
        self.documents = blocks.documents.reshape(-1)
        x = model.capture(blocks.ids_tensor(0, blocks.n_blocks), [HOOK])[HOOK].view(-1, D_IN).double()
        self.kept = (self.ids != END_OF_TEXT) & (x.norm(dim=1).numpy() <= MAX_NORM)
        w = sae.weights
        pre = torch.relu((x - w.b_dec.double()) @ w.encoder_rows.double().T + w.b_enc.double())
        if sae.config.architecture == "topk":
            pre = sae.encode(x.float()).to_dense().double()
        self.a = pre.numpy() * self.kept[:, None]

    def firings(self, feature: int) -> list[tuple[float, int]]:
        """(activation, position), strongest first; of equals, the earlier first."""
        positions = np.flatnonzero(self.a[:, feature])
        return sorted(((float(self.a[p, feature]), int(p)) for p in positions), key=lambda f: (-f[0], f[1]))

    def strongest_per_document(self, feature: int) -> list[tuple[float, int]]:
        best: dict[int, tuple[float, int]] = {}
        for value, position in self.firings(feature):
            best.setdefault(int(self.documents[position]), (value, position))
        return list(best.values())


def same_files(a: Path, b: Path, but: tuple[str, ...] = ()) -> None:
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    for name in names:
        if name not in but:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
