"""Many texts read at once: what each feature does in each of them, sparse, and their mean activation vectors.

Texts are cut into windows of the SAE's context, as :func:`features.trace.trace_text` does. The windows of many texts
are read together, those of like length beside each other, padded on the right. Nothing is dense in texts × features.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activations.capture import TOKENS_PER_BATCH_CPU, TOKENS_PER_BATCH_GPU, in_order
from activations.errors import InputError
from activations.models import LanguageModel
from activations.progress import Progress, silent
from features.groups import group_starts
from features.terms import is_unicode
from sae.model import SparseAutoencoder

MAX_TOKENS = 4_096
"""Tokens of a text that are read, unless another number is asked for; the rest is left out."""


@dataclass(frozen=True)
class TextFeatures:
    """What fires in n texts; the m entries are sorted by feature, then by text.

    Attributes:
        d_sae: number of features.
        feature, text: int64 ``[m]``: a feature, and a text in which it fires.
        max: float32 ``[m]``: its largest activation there.
        sum: float64 ``[m]``: the sum of its activations there.
        position: int64 ``[m]``: the token of the largest, the first of equals.
        n_tokens: int64 ``[n]``: how many tokens of each text count: special tokens and outliers do not.
        n_cut: how many texts were longer than what was read.
        pooled: float64 ``[n, d_in]``: mean activation vector at the hook over the tokens that count.
        ids: token ids of each text, as far as it was read.
    """

    d_sae: int
    feature: np.ndarray
    text: np.ndarray
    max: np.ndarray
    sum: np.ndarray
    position: np.ndarray
    n_tokens: np.ndarray
    n_cut: int
    pooled: np.ndarray
    ids: list[list[int]]

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self.n_tokens)

    @property
    def mean(self) -> np.ndarray:
        """float64 ``[m]``: mean activation over all tokens of the text that count, silent ones too."""
        return np.asarray(self.sum / self.n_tokens[self.text])


def read_texts(
    model: LanguageModel,
    sae: SparseAutoencoder,
    texts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = silent,
) -> TextFeatures:
    """Read texts through the model and the SAE.

    BOS, other special tokens and outlier norms do not count, as in training.

    Args:
        names: what each text is called where something is wrong with it; "Text 0" and so on by default.
        max_tokens: of a text at most so many are read, in windows of the SAE's context that do not see each other.

    Raises:
        InputError: a text has no token that counts or is not valid Unicode, or an activation is negative.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1.")
    called = [f"Text {i}" for i in range(len(texts))] if names is None else names
    for text, name in zip(texts, called, strict=True):
        if not text.strip():
            raise InputError(f"{name} is empty: leave it out, or give it at least one word.")
        if not is_unicode(text):
            raise InputError(f"{name} holds half of a character: texts must be valid Unicode.")
    encoded = model.tokenizer.encode_batch(list(texts))
    ids = [text_ids[:max_tokens] for text_ids in encoded]
    n_tokens, pooled = np.zeros(len(texts), dtype=np.int64), np.zeros((len(texts), sae.d_in))
    parts = []
    with (
        progress("read texts", total=sum(map(len, ids)), unit="tokens") as step,
        closing(_activations(model, sae, ids)) as batches,
    ):
        for batch, x in batches:
            np.add.at(n_tokens, batch.text, 1)
            _add_rows(pooled, batch.text, x)
            rows, feature, value = (entry.cpu().numpy() for entry in sae.encode(x.to(sae.device)).entries())
            if len(value) and value.min() < 0:
                raise InputError(
                    "This SAE has negative activations: texts are compared by positive ones only."
                )
            cell = feature * len(texts) + batch.text[rows]
            parts.append(_Cells(cell, value, value.astype(np.float64), batch.position[rows]).merged())
            step(batch.n_read)
    for name, count in zip(called, n_tokens, strict=True):
        if not count:
            raise InputError(f"{name} has no tokens that count: special tokens and outliers are left out.")
    cells = _Cells.concatenate(parts).merged()
    feature, owner = np.divmod(cells.cell, len(texts))
    return TextFeatures(
        d_sae=sae.d_sae,
        feature=feature,
        text=owner,
        max=cells.max,
        sum=cells.sum,
        position=cells.position,
        n_tokens=n_tokens,
        n_cut=sum(len(text_ids) > max_tokens for text_ids in encoded),
        pooled=pooled / n_tokens[:, None],
        ids=ids,
    )


@dataclass(frozen=True)
class _Batch:
    """Text and position of the rows that count, int64, and how many tokens were read."""

    text: np.ndarray
    position: np.ndarray
    n_read: int


@dataclass(frozen=True)
class _Cells:
    """Activations by cell, feature · n_texts + text; one cell may occur several times."""

    cell: np.ndarray
    max: np.ndarray
    sum: np.ndarray
    position: np.ndarray

    @classmethod
    def concatenate(cls, parts: "list[_Cells]") -> "_Cells":
        names = ("cell", "max", "sum", "position")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def merged(self) -> "_Cells":
        """Every cell once, in ascending order."""
        if not len(self.cell):
            return self
        order = np.argsort(self.cell, kind="stable")
        cell, value, position = self.cell[order], self.max[order], self.position[order]
        starts = group_starts(cell)
        highest = np.maximum.reduceat(value, starts)
        at_highest = value == np.repeat(highest, np.diff(starts, append=len(cell)))
        first = np.minimum.reduceat(np.where(at_highest, position, np.iinfo(np.int64).max), starts)
        return _Cells(cell[starts], highest, np.add.reduceat(self.sum[order], starts), first)


def _activations(
    model: LanguageModel, sae: SparseAutoencoder, ids: Sequence[Sequence[int]]
) -> Generator[tuple[_Batch, Tensor], None, None]:
    """Activations ``[m, d_in]`` of the tokens that count, with their texts, batch by batch."""
    tokenizer = model.tokenizer
    has_bos = sae.metadata.get("prepend_bos", tokenizer.adds_bos) and tokenizer.bos_id is not None
    bos = [tokenizer.bos_id] if has_bos else []
    width = min(int(sae.metadata.get("context_size") or model.context_length), model.context_length) - len(
        bos
    )
    exclusions = sae.exclusions(tokenizer)
    windows = [(text, start) for text, text_ids in enumerate(ids) for start in range(0, len(text_ids), width)]
    lengths = [min(width, len(ids[text]) - start) for text, start in windows]
    limit = TOKENS_PER_BATCH_CPU if model.device.type == "cpu" else TOKENS_PER_BATCH_GPU

    def work(batch: list[int]) -> tuple[_Batch, Tensor]:
        longest = max(lengths[i] for i in batch)
        padded = torch.full((len(batch), len(bos) + longest), tokenizer.separator_id)
        text = np.zeros((len(batch), longest), dtype=np.int64)
        position = np.zeros((len(batch), longest), dtype=np.int64)
        is_real = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, i in enumerate(batch):
            owner, start = windows[i]
            padded[row, : len(bos) + lengths[i]] = torch.tensor(
                [*bos, *ids[owner][start : start + lengths[i]]]
            )
            text[row], position[row] = owner, start + np.arange(longest)
            is_real[row, : lengths[i]] = True
        mask = torch.ones_like(padded)
        mask[:, len(bos) :] = is_real
        found = model.capture(padded, list(exclusions), attention_mask=mask)
        kept = is_real
        for hook_name, rule in exclusions.items():
            kept = kept & rule.kept(padded, found[hook_name]).cpu()[:, len(bos) :]
        x = found[sae.hook_name][:, len(bos) :]
        counts = kept.numpy()
        n_read = sum(lengths[i] for i in batch)
        return _Batch(text[counts], position[counts], n_read), x[kept.to(x.device)]

    return in_order(model.device, work, list(_batches(lengths, limit)))


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Windows of like length together, longest first, at most ``limit`` places with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _add_rows(total: np.ndarray, text: np.ndarray, x: Tensor) -> None:
    """Add the rows of ``x [m, d]`` to the totals of their texts; the rows of a window lie together."""
    if len(text):
        starts = np.flatnonzero(np.diff(text, prepend=-1))
        np.add.at(total, text[starts], np.add.reduceat(x.cpu().double().numpy(), starts, axis=0))
