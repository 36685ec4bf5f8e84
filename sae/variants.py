"""Run a model with what flows at one hook replaced, and sum what that does, document by document.

This is the expensive part of an evaluation: one forward pass per batch of blocks as the model is, and the part
behind the hook once more for each variant. What is summed and how figures come of it stands in :mod:`sae.evaluate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.capture import BlockRange, BlockRanges, blocks_per_batch, kept_positions
from activations.models import LanguageModel
from sae.bootstrap import PartialSums
from sae.controls import Autoencoder
from sae.model import SparseAutoencoder

AT_REPLACED = "at_replaced."
_LOGIT_BYTES = 64 << 20  # of one batch, if a block has not more
_CHUNK_ENTRIES = 1 << 18  # of log-probabilities: a few such tensors stay in a core's cache


@dataclass(frozen=True)
class BatchSums:
    """What one batch of blocks adds.

    documents: sums over positions ("positions", "x", "squares", and for each autoencoder "l0.NAME",
        "error.NAME", "cosine.NAME"), and over predictions ("predictions", "ce.clean", and for each variant
        "ce.NAME" and "kl.NAME"; all once more behind "at_replaced.", for predictions made at replaced
        positions).
    firings: int64 ``[d_sae]``, how often each feature of the SAE fires.
    n_tokens: how many tokens were read, without padding.
    """

    documents: PartialSums
    firings: Tensor
    n_tokens: int


@dataclass(frozen=True)
class Variants:
    """Everything that is put in the place of activations at an SAE's hook.

    autoencoders: by name, "sae" among them.
    mean: ``[d_in]``, of mean-ablation.
    """

    model: LanguageModel
    sae: SparseAutoencoder
    blocks: TokenBlocks
    autoencoders: dict[str, Autoencoder]
    mean: Tensor

    def batches(self) -> Sequence[BlockRange]:
        """Ranges of blocks that suit the device, their logits below 64 MB where that is possible."""
        block_bytes = self.blocks.context_length * self.model.d_vocab * 4
        size = max(
            1, min(blocks_per_batch(self.model, self.blocks.context_length), _LOGIT_BYTES // block_bytes)
        )
        return BlockRanges(self.blocks.n_blocks, size)

    @torch.no_grad()
    def measure(self, block_range: BlockRange) -> BatchSums:
        """Run the model over some blocks, as it is and once for each variant."""
        owners = self.blocks.documents[slice(*block_range)]
        ids = self.blocks.ids_tensor(*block_range)
        part = PartialSums(np.unique(owners[owners != PADDING]))
        replay = self.model.replay(
            ids, self.sae.hook_name, attention_mask=self.blocks.attention_mask(*block_range)
        )
        x = replay.activations
        kept = kept_positions(self.blocks, *block_range, x, self.sae.exclusion(self.model.tokenizer))
        rows = x[kept].to(self.sae.b_dec)
        replacements, firings = self._replacements(rows, owners[kept.cpu().numpy()], part)

        predicted = torch.from_numpy(owners[:, 1:] != PADDING)
        clean = Predictions(replay.logits, ids, predicted)
        values = {"predictions": torch.ones_like(clean.ce), "ce.clean": clean.ce}
        for name, replacement in replacements.items():
            edited = x.clone()
            edited[kept] = replacement.to(x)
            values[f"ce.{name}"], values[f"kl.{name}"] = clean.compare(replay.logits_with(edited))
        predicted_owners = owners[:, 1:][predicted.numpy()]
        replaced = kept[:, :-1].cpu()[predicted].to(clean.ce)
        part.add(predicted_owners, values)
        part.add(predicted_owners, {AT_REPLACED + name: value * replaced for name, value in values.items()})
        return BatchSums(part, firings, int((owners != PADDING).sum()))

    def _replacements(
        self, x: Tensor, owners: np.ndarray, part: PartialSums
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What each variant puts in the place of ``x [n, d_in]``, and how often each feature fires.

        Sums of reconstruction metrics go to ``part``; ``owners [n]`` is the document of each row.
        """
        replacements = {"zero": torch.zeros_like(x), "mean": self.mean.expand_as(x)}
        firings = torch.zeros(self.sae.d_sae, dtype=torch.int64)
        if len(x) == 0:
            return replacements | dict.fromkeys(self.autoencoders, x), firings
        exact = x.cpu().double()
        squares = exact.square().sum(1)
        values = {"positions": torch.ones(len(x)), "x": exact, "squares": squares}
        for name, autoencoder in self.autoencoders.items():
            codes = autoencoder.encode(x)
            replacements[name] = autoencoder.decode(codes)
            estimate = replacements[name].cpu().double()
            lengths = (squares * estimate.square().sum(1)).sqrt()
            values[f"l0.{name}"] = codes.pattern.counts
            values[f"error.{name}"] = (exact - estimate).square().sum(1)
            values[f"cosine.{name}"] = (exact * estimate).sum(1) / lengths.clamp_min(1e-300)
            if name == "sae":
                firings = torch.bincount(codes.indices.flatten(), minlength=self.sae.d_sae).cpu()
        part.add(owners, values)
        return replacements, firings


class Predictions:
    """The unchanged model's predictions in one batch, to compare those of a variant with.

    Args:
        logits: ``[batch, pos, d_vocab]``. ids: ``[batch, pos]``.
        predicted: bool ``[batch, pos − 1]``, which of the tokens from the second on count.

    Attributes:
        ce: ``[n]``, cross-entropies of the n predicted tokens, in nats.
    """

    def __init__(self, logits: Tensor, ids: Tensor, predicted: Tensor) -> None:
        block, position = predicted.nonzero(as_tuple=True)
        self._places = (block * ids.shape[1] + position).to(logits.device)
        self._targets = ids[:, 1:][predicted].to(logits.device)
        n, dtype = len(self._targets), torch.promote_types(logits.dtype, torch.float32)
        # Chunks of rows go into tensors made beforehand, so that no second tensor of this size exists.
        self._log_p = torch.empty(n, logits.shape[-1], dtype=dtype, device=logits.device)
        self.ce = torch.empty(n, dtype=dtype, device=logits.device)
        for rows, log_p in self._log_probabilities(logits):
            self._log_p[rows] = log_p
            self.ce[rows] = self._cross_entropy(rows, log_p)

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies under a variant's logits, and KL(unchanged ‖ variant): each ``[n]``, in nats."""
        ce, kl = torch.empty_like(self.ce), torch.empty_like(self.ce)
        for rows, log_q in self._log_probabilities(logits):
            log_p = self._log_p[rows]
            ce[rows] = self._cross_entropy(rows, log_q)
            kl[rows] = (log_p.exp() * (log_p - log_q)).sum(1)
        return ce, kl

    def _log_probabilities(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-softmax at the places that count, some rows ``[·, d_vocab]`` at a time."""
        flat = logits.flatten(0, 1)
        step = max(1, _CHUNK_ENTRIES // flat.shape[1])
        for first in range(0, len(self._places), step):
            rows = slice(first, first + step)
            yield rows, flat[self._places[rows]].log_softmax(-1, dtype=self._log_p.dtype)

    def _cross_entropy(self, rows: slice, log_q: Tensor) -> Tensor:
        return -log_q.gather(1, self._targets[rows, None]).squeeze(1)
