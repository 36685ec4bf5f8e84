"""Decoding and the gradient of the values: sums of decoder rows, and dot products with them.

    error[r] = Σ_j values[r, j] · W_dec[indices[r, j]] + b_dec − goal[r]        (n rows of width d)
    dots[r, j] = error[r] · W_dec[indices[r, j]]

**In one pass** (:func:`error_and_dots`). A block of columns of the error needs only that block of the k decoder rows,
and the dot products are sums over such blocks. So one program per row walks over blocks of columns, holds the
``[k, block]`` tile of decoder rows in registers, takes from it first the block of the error and then its part of the
dot products. Every decoder row is read once where two kernels would read it twice: n·k·d numbers, the bulk of the
traffic of a sparse step. Whatever d is, a thread holds 16 numbers of the tile, so that no width spills registers.

It takes all k rows at once and is used up to k = 256. Beyond (AuxK with k = d/2), and for ragged codes, the two halves
run one after the other (:func:`gather_sum`, :func:`gathered_dots`), over chunks of entries; they also serve where an
auxiliary loss stands between them.

Numbers are added in the precision of the output, float32 for rows of bfloat16. No atomics: every output has one writer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.codes import Pattern
from sae.kernels.launch import on, padded, warps

FUSED_K = 256
_TILE = 4_096  # numbers of gathered rows that a program holds
_COLUMNS = 128  # of one block, at most: 256 bytes of bfloat16
_CHUNK = 16  # entries at a time where there may be any number of them


@triton.jit
def _error_and_dots(
    values_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    decoder_ptr: tl.tensor,
    b_dec_ptr: tl.tensor,
    goal_ptr: tl.tensor,
    error_ptr: tl.tensor,
    dots_ptr: tl.tensor,
    k: int,
    d: int,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One row of the error and its k dot products."""
    kind = error_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)
    values = tl.load(values_ptr + row * k + j, mask=j < k, other=0.0).to(kind)
    features = tl.load(indices_ptr + row * k + j, mask=j < k, other=0).to(tl.int64)
    dots = tl.zeros((K,), kind)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < d
        wanted = (j < k)[:, None] & inside[None, :]
        tile = tl.load(decoder_ptr + features[:, None] * d + columns[None, :], mask=wanted, other=0.0).to(
            kind
        )
        error = tl.sum(values[:, None] * tile, axis=0)
        error += tl.load(b_dec_ptr + columns, mask=inside, other=0.0).to(kind)
        error -= tl.load(goal_ptr + row * d + columns, mask=inside, other=0.0).to(kind)
        tl.store(error_ptr + row * d + columns, error, mask=inside)
        dots += tl.sum(tile * error[None, :], axis=1)
    tl.store(dots_ptr + row * k + j, dots, mask=j < k)


@triton.jit
def _gather_sum(
    values_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    k: int,
    d: int,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One block of columns of one output row."""
    kind = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    first, last = _entries(offsets_ptr, row, k)
    total = tl.zeros((COLUMNS,), kind)
    for start in range(first, last, CHUNK):
        entries = start + tl.arange(0, CHUNK)
        there = entries < last
        values = tl.load(values_ptr + entries, mask=there, other=0.0).to(kind)
        features = tl.load(indices_ptr + entries, mask=there, other=0).to(tl.int64)
        wanted = there[:, None] & inside[None, :]
        tile = tl.load(table_ptr + features[:, None] * d + columns[None, :], mask=wanted, other=0.0)
        total += tl.sum(values[:, None] * tile.to(kind), axis=0)
    tl.store(out_ptr + row * d + columns, total, mask=inside)


@triton.jit
def _gathered_dots(
    left_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    right_ptr: tl.tensor,
    dots_ptr: tl.tensor,
    k: int,
    d: int,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The dot products of one row, a chunk of entries at a time; the row itself stays in the cache."""
    kind = dots_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    first, last = _entries(offsets_ptr, row, k)
    for start in range(first, last, CHUNK):
        entries = start + tl.arange(0, CHUNK)
        there = entries < last
        features = tl.load(indices_ptr + entries, mask=there, other=0).to(tl.int64)
        dots = tl.zeros((CHUNK,), kind)
        for block in range(0, d, COLUMNS):
            columns = block + tl.arange(0, COLUMNS)
            inside = columns < d
            left = tl.load(left_ptr + row * d + columns, mask=inside, other=0.0).to(kind)
            wanted = there[:, None] & inside[None, :]
            tile = tl.load(right_ptr + features[:, None] * d + columns[None, :], mask=wanted, other=0.0)
            dots += tl.sum(tile.to(kind) * left[None, :], axis=1)
        tl.store(dots_ptr + entries, dots, mask=there)


@triton.jit
def _entries(offsets_ptr: tl.tensor, row: tl.tensor, k: int) -> tuple[tl.tensor, tl.tensor]:
    """Where a row's entries start and end: given by offsets, or k each."""
    if offsets_ptr is None:
        first, last = row * k, row * k + k
    else:
        first, last = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    return first, last


def error_and_dots(
    values: Tensor, pattern: Pattern, decoder: Tensor, b_dec: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor]:
    """``error = decoded − goal`` and its dot products with the decoder rows that each row selects.

    Args:
        values: ``[n, k]`` or ``[nnz]``. pattern: which features. decoder: ``[d_sae, d]``, float32 or bfloat16.
        b_dec: ``[d]``. goal: ``[n, d]``.

    Returns:
        error ``[n, d]`` and dots in the shape of ``values``.
    """
    if pattern.row_offsets is not None or values.shape[1] > FUSED_K:
        error = gather_sum(values, pattern, decoder).add_(b_dec).sub_(goal)
        return error, gathered_dots(error, decoder, pattern)
    (n, d), k = goal.shape, values.shape[1]
    error = torch.empty(n, d, dtype=values.dtype, device=values.device)
    dots = torch.empty_like(values)
    if error.numel():
        height = padded(k)
        columns = columns_of(d, height)
        with on(error):
            _error_and_dots[(n,)](
                values.contiguous(),
                pattern.indices.contiguous(),
                decoder.contiguous(),
                b_dec,
                goal.contiguous(),
                error,
                dots,
                k,
                d,
                K=height,
                COLUMNS=columns,
                num_warps=warps(height * columns),
            )
    return error, dots


def columns_of(d: int, height: int) -> int:
    """Width of the blocks of columns in which ``height`` rows are held at once."""
    return min(padded(d), _COLUMNS, _TILE // height)


def gather_sum(values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
    """``Σ_j values[r, j] · table[indices[r, j]]`` for every row r.

    Args:
        values: ``[n, k]`` or ``[nnz]``. pattern: which rows of the table. table: ``[d_sae, d]``.

    Returns:
        ``[n, d]`` in the number format of ``values``; zero for rows without entries.
    """
    n, d = pattern.n_rows, table.shape[1]
    out = torch.empty(n, d, dtype=values.dtype, device=values.device)
    if out.numel():
        columns = min(padded(d), 2 * _COLUMNS)
        with on(out):
            _gather_sum[(n, triton.cdiv(d, columns))](
                values.contiguous(),
                pattern.indices.contiguous(),
                pattern.row_offsets,
                table.contiguous(),
                out,
                pattern.indices.shape[-1],
                d,
                CHUNK=_CHUNK,
                COLUMNS=columns,
                num_warps=warps(_CHUNK * columns),
            )
    return out


def gathered_dots(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Dot products of each row with the table rows that its pattern selects.

    Args:
        left: ``[n, d]``. right: ``[d_sae, d]``.

    Returns:
        ``left[r] · right[indices[r, j]]`` in the shape of ``pattern.indices`` and the number format of ``left``.
    """
    d = left.shape[1]
    dots = torch.empty(pattern.indices.shape, dtype=left.dtype, device=left.device)
    if dots.numel():
        columns = min(padded(d), 2 * _COLUMNS)
        with on(dots):
            _gathered_dots[(pattern.n_rows,)](
                left.contiguous(),
                pattern.indices.contiguous(),
                pattern.row_offsets,
                right.contiguous(),
                dots,
                pattern.indices.shape[-1],
                d,
                CHUNK=_CHUNK,
                COLUMNS=columns,
                num_warps=warps(_CHUNK * columns),
            )
    return dots
