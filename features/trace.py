"""Which features fire where in a text that somebody pastes."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, kept_at_all
from activations.errors import InputError
from activations.models import LanguageModel
from sae.codes import Pattern, SparseCodes
from sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Trace:
    """The tokens of a text and the features that fire on them.

    Attributes:
        tokens: the text of each of the n tokens; joined, they are the text.
        ids: their ids.
        codes: the firing features of each token, n rows on the CPU; none at excluded positions.
    """

    tokens: list[str]
    ids: list[int]
    codes: SparseCodes

    def at(self, position: int) -> list[tuple[int, float]]:
        """(feature, activation) of the features that fire on one token, strongest first."""
        _, features, values = self.codes.row_slice(position, position + 1).entries()
        order = values.argsort(descending=True, stable=True)
        return list(zip(features[order].tolist(), values[order].tolist(), strict=True))

    def activations(self, feature: int) -> np.ndarray:
        """The activation of one feature on every token, float32 ``[n]``."""
        column: np.ndarray = self.codes.column(feature).float().numpy()
        return column

    def strongest(self, n: int = 20, maxima: np.ndarray | None = None) -> list[tuple[int, float, int]]:
        """The features that fire most strongly anywhere in the text.

        Args:
            n: at most so many.
            maxima: ``[d_sae]``; if given, activations are compared as shares of the feature's maximum, so
                that features with large activations by nature do not come first everywhere.

        Returns:
            (feature, its largest activation, the position of that), strongest first.
        """
        rows, features, values = self.codes.entries()
        weights = values.double()
        if maxima is not None:
            weights = weights / torch.from_numpy(np.array(maxima, dtype=np.float64))[features].clamp_min(
                1e-12
            )
        order = weights.argsort(descending=True, stable=True)
        found: dict[int, tuple[int, float, int]] = {}
        for entry in order.tolist():
            if len(found) == n:
                break
            feature = int(features[entry])
            found.setdefault(feature, (feature, float(values[entry]), int(rows[entry])))
        return list(found.values())


def trace_text(model: LanguageModel, sae: SparseAutoencoder, text: str) -> Trace:
    """Which features fire where in ``text``.

    A text longer than the SAE's context is read in consecutive windows, which do not see each other. Where
    the SAE was trained behind BOS, every window is read behind BOS, which is no part of the trace.

    Raises:
        InputError: the text is empty.
    """
    ids = model.tokenizer.encode(text)
    if not ids:
        raise InputError("The text is empty: give at least one character.")
    has_bos = sae.metadata.get("prepend_bos", model.tokenizer.adds_bos)
    bos = [model.tokenizer.bos_id] if has_bos and model.tokenizer.bos_id is not None else []
    context = min(int(sae.metadata.get("context_size") or model.context_length), model.context_length) - len(
        bos
    )
    exclusions = sae.exclusions(model.tokenizer)
    parts = []
    for start in range(0, len(ids), context):
        window = torch.tensor([bos + ids[start : start + context]])
        found = model.capture(window, list(exclusions))
        x = found[sae.hook_name]
        kept = [rule.kept(window, found[hook_name]).to(x.device) for hook_name, rule in exclusions.items()]
        parts.append(encode_kept(sae, x[0, len(bos) :], torch.stack(kept).all(0)[0, len(bos) :]))
    return Trace(model.tokenizer.pieces(ids), ids, SparseCodes.concatenate(parts))


def encode_kept(sae: SparseAutoencoder, x: Tensor, kept: Tensor) -> SparseCodes:
    """Codes of ``x [n, d_in]``, ragged, on the CPU; nothing fires in rows that are not ``kept [n]``."""
    codes = sae.encode(x[kept].to(sae.device))
    counts = torch.zeros(len(x), dtype=torch.int64)
    counts[kept.cpu()] = codes.pattern.counts.cpu()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCodes(
        Pattern(sae.d_sae, codes.indices.flatten().cpu(), offsets), codes.values.flatten().cpu()
    )


def mean_norm(model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks) -> float:
    """Mean norm of the activations where the SAE writes, over ``blocks``; excluded positions left out."""
    exclusions = sae.exclusions(model.tokenizer)
    total, n = 0.0, 0
    with closing(capture_blocks(model, blocks, list(exclusions))) as batches:
        for start, captured in batches:
            y = captured[sae.hook_out]
            kept = kept_at_all(blocks, start, start + len(y), captured, exclusions)
            norms = y.float().norm(dim=-1)[kept.to(y.device)]
            total, n = total + float(norms.double().sum()), n + len(norms)
    return total / max(n, 1)
