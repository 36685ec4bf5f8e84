"""Both weight gradients: for every feature, a weighted sum of the rows in which it fired.

    out[i] = Σ weights[e] · table[row(e)]        over the entries e of feature i

For the decoder the table is the error and the weights are the values; for the encoder they are the centred input and
the gradients of the values. Both read one transposed structure (:class:`sae.codes.Transposed`): entries sorted by
feature, once per step.

One program per feature and block of columns adds its entries up in order, a chunk at a time, in registers, and writes
its block once, zeros included: no atomics, no zeroed output, the same bits on every run. Traffic: nnz·d numbers read,
d_sae·d written; nnz of the structure once per block of columns. Blocks of columns share the work of a feature that
fires on most rows, which is otherwise the longest program of the launch: n entries, where the mean is n·k/d_sae.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.codes import Transposed
from sae.kernels.launch import on, padded, warps

_CHUNK = 8  # entries at a time: n·k/d_sae, of which there are 8 and 4 in the shapes that we aim at
_COLUMNS = 256


@triton.jit
def _weighted_sums(
    order_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    d: int,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One block of columns of one feature's sum."""
    kind = out_ptr.dtype.element_ty
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    first = tl.load(offsets_ptr + feature)
    last = first + tl.load(counts_ptr + feature)
    total = tl.zeros((COLUMNS,), kind)
    for start in range(first, last, CHUNK):
        entries = start + tl.arange(0, CHUNK)
        there = entries < last
        places = tl.load(order_ptr + entries, mask=there, other=0)
        weights = tl.load(weights_ptr + places, mask=there, other=0.0).to(kind)
        rows = tl.load(rows_ptr + entries, mask=there, other=0)
        wanted = there[:, None] & inside[None, :]
        tile = tl.load(table_ptr + rows[:, None] * d + columns[None, :], mask=wanted, other=0.0)
        total += tl.sum(weights[:, None] * tile.to(kind), axis=0)
    tl.store(out_ptr + feature * d + columns, total, mask=inside)


def weighted_sums(transposed: Transposed, table: Tensor, weights: Tensor) -> Tensor:
    """For each feature, the sum of ``weight · table[row]`` over its entries.

    Args:
        transposed: the entries by feature. table: ``[n, d]``. weights: ``[nnz]`` (any shape) in row-major order.

    Returns:
        ``[d_sae, d]`` in the number format of ``weights``; zero rows for features without entries.
    """
    d_sae, d = len(transposed.counts), table.shape[1]
    out = torch.empty(d_sae, d, dtype=weights.dtype, device=table.device)
    columns = min(padded(d), _COLUMNS)
    with on(out):
        _weighted_sums[(d_sae, triton.cdiv(d, columns))](
            transposed.order,
            transposed.rows,
            transposed.offsets,
            transposed.counts,
            weights.contiguous(),
            table.contiguous(),
            out,
            d,
            CHUNK=_CHUNK,
            COLUMNS=columns,
            num_warps=warps(_CHUNK * columns),
        )
    return out
