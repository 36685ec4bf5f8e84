"""Run a model with what flows at one hook replaced, and sum what that does, document by document.

This is the expensive part of an evaluation: one forward pass per batch of blocks as the model is, and the part
behind the hook once more for each variant. What is summed and how figures come of it stands in :mod:`sae.evaluate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.capture import BlockRange, BlockRanges, blocks_per_batch, kept_at_all
from activations.errors import InputError
from activations.models import LanguageModel
from sae.bootstrap import PartialSums
from sae.codes import SparseCodes
from sae.controls import Autoencoder
from sae.model import SparseAutoencoder

AT_REPLACED = "at_replaced."
_LOGIT_BYTES = 64 << 20  # of one batch, if a block has not more
_CHUNK_ENTRIES = 1 << 18  # of log-probabilities: a few such tensors stay in a core's cache


@dataclass(frozen=True)
class BatchSums:
    """What one batch of blocks adds.

    documents: sums over positions ("positions", "y", "squares", and for each autoencoder "l0.NAME",
        "error.NAME", "cosine.NAME"), and over predictions ("predictions", "ce.clean", and for each variant
        "ce.NAME" and "kl.NAME"; all once more behind "at_replaced.", for predictions made at replaced
        positions).
    firings: of each SAE by name, int64 ``[d_sae]``, how often each of its features fires.
    n_tokens: how many tokens were read, without padding.
    """

    documents: PartialSums
    firings: dict[str, Tensor]
    n_tokens: int


@dataclass(frozen=True)
class Variants:
    """Everything that is put in the place of activations at one hook.

    saes: by name; all belong to the same hooks and leave out the same positions (:func:`check_alike`).
    controls: more that reconstructs from the same activations, by other names.
    mean: ``[d_out]``, of mean-ablation.
    """

    model: LanguageModel
    blocks: TokenBlocks
    saes: Mapping[str, SparseAutoencoder]
    controls: Mapping[str, Autoencoder]
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
        sae = next(iter(self.saes.values()))
        exclusions = sae.exclusions(self.model.tokenizer)
        mask = self.blocks.attention_mask(*block_range)
        also = [hook_name for hook_name in exclusions if hook_name != sae.hook_out]
        replay = self.model.replay(ids, sae.hook_out, also=also, attention_mask=mask)
        flowing = {**replay.captured, sae.hook_out: replay.activations}
        x, y = flowing[sae.hook_name], flowing[sae.hook_out]
        kept = kept_at_all(self.blocks, *block_range, flowing, exclusions)
        reconstruction = _Reconstruction(
            x[kept.to(x.device)].to(self.mean), y[kept.to(y.device)].to(self.mean), owners[kept.cpu().numpy()]
        )
        part.add(reconstruction.owners, reconstruction.totals())

        predicted = torch.from_numpy(owners[:, 1:] != PADDING)
        clean = Predictions(replay.logits, ids, predicted)
        values = {"predictions": torch.ones_like(clean.ce), "ce.clean": clean.ce}
        firings = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in self.saes.items()}

        def replace(name: str, replacement: Tensor) -> None:
            edited = y.clone()
            edited[kept.to(y.device)] = replacement.to(y)
            values[f"ce.{name}"], values[f"kl.{name}"] = clean.compare(replay.logits_with(edited))

        replace("zero", torch.zeros_like(reconstruction.y))
        replace("mean", self.mean.expand_as(reconstruction.y))
        for name, autoencoder in {**self.saes, **self.controls}.items():
            estimate = reconstruction.y
            if len(estimate):
                codes = autoencoder.encode(reconstruction.x)
                estimate = autoencoder.decode(codes, reconstruction.x)
                part.add(reconstruction.owners, reconstruction.compare(name, codes, estimate))
                if name in firings:
                    d_sae = len(firings[name])
                    firings[name] = torch.bincount(codes.indices.flatten(), minlength=d_sae).cpu()
            replace(name, estimate)

        predicted_owners = owners[:, 1:][predicted.numpy()]
        replaced = kept[:, :-1].cpu()[predicted].to(clean.ce)
        part.add(predicted_owners, values)
        part.add(predicted_owners, {AT_REPLACED + name: value * replaced for name, value in values.items()})
        return BatchSums(part, firings, int((owners != PADDING).sum()))


def check_alike(saes: Mapping[str, SparseAutoencoder]) -> None:
    """Make sure that SAEs can be measured in one pass.

    Raises:
        InputError: there is none, or they differ in hook, in what they leave out, in number format or in device.
    """
    if not saes:
        raise InputError("There is no SAE to evaluate: give at least one.")
    (first, sae), *others = saes.items()
    for name, other in others:
        for what in ("hook_name", "hook_name_out", "max_norm", "max_norm_out", "exclude_special_tokens"):
            if sae.metadata.get(what) != other.metadata.get(what):
                raise InputError(
                    f"{first} and {name} cannot be evaluated together, for their {what} differs"
                    f" ({sae.metadata.get(what)} and {other.metadata.get(what)}): evaluate each by itself."
                )
        if (sae.b_dec.dtype, sae.device) != (other.b_dec.dtype, other.device):
            raise InputError(
                f"{first} and {name} are evaluated together: bring them to one number format and one device."
            )


@dataclass(frozen=True)
class _Reconstruction:
    """What is to be reconstructed in one batch, ``y [n, d_out]`` from ``x [n, d_in]`` (the same for an SAE).

    owners: ``[n]``, the document of each row.
    """

    x: Tensor
    y: Tensor
    owners: np.ndarray

    @cached_property
    def exact(self) -> Tensor:
        """y in float64, on the CPU."""
        return self.y.cpu().double()

    def totals(self) -> dict[str, Tensor]:
        """Row by row, what explained variance is measured against."""
        squares = self.exact.square().sum(1)
        return {"positions": torch.ones(len(self.y)), "y": self.exact, "squares": squares}

    def compare(self, name: str, codes: SparseCodes, estimate: Tensor) -> dict[str, Tensor]:
        """Row by row, how near ``estimate [n, d_out]`` comes; ``codes`` are those it was made from."""
        estimate = estimate.cpu().double()
        lengths = (self.exact.square().sum(1) * estimate.square().sum(1)).sqrt()
        return {
            f"l0.{name}": codes.pattern.counts,
            f"error.{name}": (self.exact - estimate).square().sum(1),
            f"cosine.{name}": (self.exact * estimate).sum(1) / lengths.clamp_min(1e-300),
        }


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
