"""Sparse codes: what an SAE's encoder returns, and what everything downstream reads.

Two layouts behind one interface. *Fixed*: ``indices`` and ``values`` are ``[n, k]``, exactly k features fire in
every row. *Ragged* (compressed sparse rows): ``row_offsets`` is ``[n + 1]``, and row r owns entries
``row_offsets[r] : row_offsets[r + 1]`` of the flat ``indices`` and ``values``. A stored value is never 0, and a
feature occurs at most once in a row; values may be negative, so "fires" means "is stored". (Inside the trainer a
fixed layout may hold zeros, where a row has fewer than k positive pre-activations.)
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which features fire in which row.

    Attributes:
        d_sae: number of features.
        indices: int32, ``[n, k]`` (fixed) or ``[nnz]`` in row-major order (ragged).
        row_offsets: int64 ``[n + 1]`` for the ragged layout, None for the fixed one.
    """

    d_sae: int
    indices: Tensor
    row_offsets: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows (tokens)."""
        return len(self.indices) if self.row_offsets is None else len(self.row_offsets) - 1

    @property
    def counts(self) -> Tensor:
        """Number of entries per row, int64 ``[n]``."""
        if self.row_offsets is None:
            n, k = self.indices.shape
            return torch.full((n,), k, dtype=torch.int64, device=self.indices.device)
        return self.row_offsets.diff()

    def rows(self) -> Tensor:
        """The row of every entry in row-major order, int64 ``[nnz]``."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.indices.device),
            self.counts,
            output_size=self.indices.numel(),
        )

    def slice(self, start: int, stop: int) -> tuple["Pattern", slice]:
        """The pattern of rows ``start:stop``, and the span of their entries in the leading axis of ``values``."""
        if self.row_offsets is None:
            return Pattern(self.d_sae, self.indices[start:stop]), slice(start, stop)
        offsets = self.row_offsets[start : stop + 1]
        span = slice(int(offsets[0]), int(offsets[-1]))
        return Pattern(self.d_sae, self.indices[span], offsets - offsets[0]), span

    @cached_property
    def transposed(self) -> "Transposed":
        """The same entries grouped by feature; built once, then shared by everything that sums over features."""
        flat = self.indices.flatten()
        order = _grouped(flat, self.d_sae)
        fixed = self.row_offsets is None
        rows = order // self.indices.shape[1] if fixed else self.rows().index_select(0, order)
        counts = _counts(flat, order, self.d_sae)
        return Transposed(order.long(), rows.long(), counts.cumsum(0) - counts, counts)


def _grouped(features: Tensor, d_sae: int) -> Tensor:
    """The places of all entries, feature by feature, ascending within each; int32 or int64.

    On a CPU a feature and a place are sorted as one number, which numpy does in vector registers.
    """
    bits = max(len(features) - 1, 1).bit_length()  # of a place
    if features.device.type != "cpu" or (d_sae - 1) >> (32 - bits):
        return features.argsort(stable=True)
    places = torch.arange(len(features), dtype=torch.int32)
    keys = features.bitwise_left_shift(bits).bitwise_or_(places)
    keys.numpy().view(np.uint32).sort()
    return keys.bitwise_and_((1 << bits) - 1)


def _counts(features: Tensor, order: Tensor, d_sae: int) -> Tensor:
    """How many entries each feature has, int64 ``[d_sae]``; ``order`` groups the entries by feature."""
    if features.device.type == "cpu":
        return torch.bincount(features, minlength=d_sae)
    # bincount asks the device for the largest feature, and waits.
    bounds = torch.arange(d_sae + 1, dtype=features.dtype, device=features.device)
    return torch.searchsorted(features[order], bounds).diff()


@dataclass(frozen=True)
class Transposed:
    """Entries of a pattern grouped by feature, rows ascending within a feature.

    Attributes:
        order: int64 ``[nnz]``, the place of each entry in row-major order.
        rows: int64 ``[nnz]``, the row of each entry.
        offsets: int64 ``[d_sae]``, where each feature's entries start.
        counts: int64 ``[d_sae]``, how many entries each feature has.
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor
    counts: Tensor

    def weighted_sums(self, table: Tensor, weights: Tensor) -> Tensor:
        """For each feature, the sum of ``weight · table[row]`` over its entries.

        Args:
            table: ``[n, d]``. weights: ``[nnz]`` (any shape) in row-major order.

        Returns:
            ``[d_sae, d]``; zero rows for features without entries.
        """
        return torch.nn.functional.embedding_bag(
            self.rows,
            table,
            self.offsets,
            mode="sum",
            per_sample_weights=weights.flatten().index_select(0, self.order),
        )


@dataclass(frozen=True)
class SparseCodes:
    """The firing features of n rows and their activations.

    Attributes:
        pattern: which features fire where.
        values: activations, in the units of the SAE's input, same shape as ``pattern.indices``.
    """

    pattern: Pattern
    values: Tensor

    @classmethod
    def from_topk(cls, indices: Tensor, values: Tensor, d_sae: int) -> "SparseCodes":
        """Codes from k entries per row of which some may be 0 (a row with too few positives).

        Args:
            indices: int32 ``[n, k]``. values: ``[n, k]``. Zeros are dropped, which makes the layout ragged.
        """
        fires = values != 0
        if bool(fires.all()):
            return cls(Pattern(d_sae, indices), values)
        return cls(Pattern(d_sae, indices[fires], _offsets(fires.sum(dim=1))), values[fires])

    @classmethod
    def from_dense(cls, dense: Tensor) -> "SparseCodes":
        """Codes of a dense ``[n, d_sae]`` tile of activations (ragged)."""
        rows, indices = dense.nonzero(as_tuple=True)
        offsets = _offsets(torch.bincount(rows, minlength=len(dense)))
        return cls(Pattern(dense.shape[1], indices.int(), offsets), dense[rows, indices])

    @classmethod
    def concatenate(cls, parts: "list[SparseCodes]") -> "SparseCodes":
        """Stack codes of consecutive rows; fixed only if every part is fixed with the same k."""
        first = parts[0].pattern
        if len(parts) == 1:
            return parts[0]
        patterns = [part.pattern for part in parts]
        if all(p.row_offsets is None and p.indices.shape[1] == first.indices.shape[1] for p in patterns):
            indices = torch.cat([p.indices for p in patterns])
            return cls(Pattern(first.d_sae, indices), torch.cat([part.values for part in parts]))
        offsets = _offsets(torch.cat([p.counts for p in patterns]))
        indices = torch.cat([p.indices.flatten() for p in patterns])
        return cls(
            Pattern(first.d_sae, indices, offsets), torch.cat([part.values.flatten() for part in parts])
        )

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.pattern.d_sae

    @property
    def n_rows(self) -> int:
        """Number of rows (tokens)."""
        return self.pattern.n_rows

    @property
    def indices(self) -> Tensor:
        """Firing features, int32, ``[n, k]`` or flat ``[nnz]``."""
        return self.pattern.indices

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.values.numel()

    def l0(self) -> float:
        """Mean number of firing features per row."""
        return self.nnz / max(self.n_rows, 1)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries in row-major order: rows int64 ``[nnz]``, features int64 ``[nnz]``, values ``[nnz]``."""
        return self.pattern.rows(), self.indices.flatten().long(), self.values.flatten()

    def row_slice(self, start: int, stop: int) -> "SparseCodes":
        """The codes of rows ``start:stop``."""
        pattern, span = self.pattern.slice(start, stop)
        return SparseCodes(pattern, self.values[span])

    def column(self, feature: int) -> Tensor:
        """The activation of one feature in every row, dense ``[n]``."""
        rows, features, values = self.entries()
        mine = features == feature
        out = values.new_zeros(self.n_rows)
        out[rows[mine]] = values[mine]
        return out

    def to_dense(self) -> Tensor:
        """The dense ``[n, d_sae]`` tensor: for small inputs and for tests."""
        rows, features, values = self.entries()
        dense = values.new_zeros(self.n_rows, self.d_sae)
        dense[rows, features] = values
        return dense


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, dim=0, out=offsets[1:])
    return offsets
