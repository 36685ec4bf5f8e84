"""The k largest entries of every row, exactly, without sorting: bisection on the bits of the k-th largest value.

Floats are ordered as integers once the lower bits of the negative ones are flipped. The k-th largest of such *keys* is
found bit by bit from the top: a bit of it is 1 exactly if at least k keys are as large with that bit set. That is 32
rounds (16 for bfloat16) of a comparison and a sum over keys that stay in registers. Then every entry above the k-th
largest is kept, and of those equal to it the ones of lowest index, so that the result is the same wherever it runs.

A row of pre-activations is too long for the registers of one program, so selection is a tournament of two rounds. Cut
the row into runs of G entries and take each run's maximum, the one pass over the row. The k largest entries lie in the
k runs with the largest maxima, ties to the first runs; so select k runs, then k among their k·G entries. With G near
√(d_sae/k) both rounds select among √(d_sae·k) keys: 1,024 for (d_sae, k) = (32,768, 32), 2,048 for (65,536, 64).

Traffic per row of a tile: d_sae numbers read (from the cache: the product has just written them), d_sae/G keys
written and read, k·G numbers read in runs, k numbers and k indices written. One program per row: its keys are compared
and counted within one block of threads, without atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.launch import on, padded, warps

_LONGEST = 8_192  # keys of one program: 16 in each of 512 threads
_ONE_ROUND = 2_048  # so many keys are selected from at once: a tournament would not make them fewer by much
_TILE = 4_096  # numbers that one program takes the maxima of


@triton.jit
def _keys(x: tl.tensor) -> tl.tensor:
    """Integers in the order of the numbers; −0 equals 0, and NaN is above everything, as in torch.topk."""
    if x.dtype == tl.int32:  # keys already
        keys = x
    else:
        wide = x.to(tl.float32)
        bits = tl.where(wide == 0.0, 0.0, wide).to(tl.int32, bitcast=True)
        keys = tl.where(wide != wide, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        if x.dtype == tl.bfloat16:  # the upper half is the number, and the lower half would cost rounds
            keys = keys & -0x10000
    return keys


@triton.jit
def _run_maxima(
    tile_ptr: tl.tensor, maxima_ptr: tl.tensor, width: int, n_runs: int, RUN: tl.constexpr, RUNS: tl.constexpr
) -> None:
    """Keys of the maxima of ``RUNS`` runs of ``RUN`` entries; one program per row and block of runs."""
    row = tl.program_id(0).to(tl.int64)
    runs = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    columns = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    inside = columns < width
    keys = _keys(tl.load(tile_ptr + row * width + columns, mask=inside, other=0.0))
    maxima = tl.max(tl.where(inside, keys, -0x80000000), axis=1)
    tl.store(maxima_ptr + row * n_runs + runs, maxima, mask=runs < n_runs)


@triton.jit
def _select(
    source_ptr: tl.tensor,
    winners_ptr: tl.tensor,
    values_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    width: int,
    n_candidates: int,
    k: int,
    RUN: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The k largest of one row, in the order of their columns: of the whole row, or of the runs that won."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < n_candidates
    columns = places
    if winners_ptr is not None:
        run = tl.load(winners_ptr + row * k + places // RUN, mask=inside, other=0)
        columns = run * RUN + places % RUN
        inside = inside & (columns < width)
    numbers = tl.load(source_ptr + row * width + columns, mask=inside, other=0)
    keys = tl.where(inside, _keys(numbers), -0x80000000)

    kth = tl.full((), -0x80000000, tl.int32)
    bit = kth  # clears the sign first; then one bit after another is set
    for _ in range(ROUNDS):
        kth = tl.where(tl.sum((keys >= kth ^ bit).to(tl.int32)) >= k, kth ^ bit, kth)
        bit = (bit >> 1) & 0x7FFFFFFF

    above = keys > kth
    equal = keys == kth
    n_equal = k - tl.sum(above.to(tl.int32))
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # one scan counts both
    before = tl.cumsum(counts, 0) - counts
    equal_before = before >> 16
    keep = above | (equal & (equal_before < n_equal))
    out = row * k + (before & 0xFFFF) + tl.minimum(equal_before, n_equal)
    tl.store(indices_ptr + out, columns, mask=keep)
    if values_ptr is not None:
        tl.store(values_ptr + out, numbers, mask=keep)


def topk(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row; of equal ones those of lowest index.

    Args:
        tile: ``[rows, width]``, contiguous, float32, bfloat16 or float16. k: at most ``width``.

    Returns:
        values ``[rows, k]`` and int32 indices ``[rows, k]``, in the order of the indices.
    """
    rows, width = tile.shape
    rounds = 16 if tile.dtype == torch.bfloat16 else 32
    values = tile.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int32, device=tile.device)
    if not values.numel():
        return values, indices
    if width <= _ONE_ROUND:
        _launch(tile, None, values, indices, width, 1, rounds)
        return values, indices
    run = _run_length(width, k)
    n_runs = triton.cdiv(width, run)
    maxima = torch.empty(rows, n_runs, dtype=torch.int32, device=tile.device)
    per_program = max(_TILE // run, 1)
    grid = (rows, triton.cdiv(n_runs, per_program))
    with on(tile):
        _run_maxima[grid](tile, maxima, width, n_runs, RUN=run, RUNS=per_program, num_warps=warps(_TILE))
    winners = torch.empty_like(indices)
    _launch(maxima, None, None, winners, n_runs, 1, rounds)
    _launch(tile, winners, values, indices, k * run, run, rounds)
    return values, indices


def _launch(
    source: Tensor,
    winners: Tensor | None,
    values: Tensor | None,
    indices: Tensor,
    n_candidates: int,
    run: int,
    rounds: int,
) -> None:
    (rows, width), k = source.shape, indices.shape[1]
    block = padded(n_candidates)
    with on(source):
        _select[(rows,)](
            source,
            winners,
            values,
            indices,
            width,
            n_candidates,
            k,
            RUN=run,
            ROUNDS=rounds,
            BLOCK=block,
            num_warps=warps(block),
        )


def supported(tile: Tensor, k: int) -> bool:
    """Whether :func:`topk` takes this: float64 and a k of several thousand are left to ``torch.topk``."""
    width = tile.shape[1]
    if tile.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    run = _run_length(width, k)
    return width <= _ONE_ROUND or (k <= width // run and max(width // run, k * run) <= _LONGEST)


def _run_length(width: int, k: int) -> int:
    """A power of two near √(width/k)."""
    return 1 << max(round(math.log2(width / k) / 2), 0)
