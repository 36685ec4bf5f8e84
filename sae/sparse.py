"""The hot path: encode and select, decode, and their gradients, without a whole ``[n, d_sae]`` tensor.

One TopK training step needs one dense product (pre-activations); everything else touches only the n·k selected
entries. The autograd functions here share one transposed structure (:class:`sae.codes.Pattern`), so the
sort by feature happens once per step. Costs and the sources of the tricks: ``docs/design.md``, "The hot path".

Weights are kept row-major by feature: ``W_enc`` is passed here as ``[d_sae, d_in]`` (``encoder_rows``), the
transpose of its usual form, so that a feature's encoder and decoder are both contiguous rows.
"""

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.codes import Pattern, SparseCodes, Transposed
from sae.global_select import winners_of_rows
from sae.kernels.choice import Kernels, narrow, selecting, serving
from sae.mesh import mesh_in_force
from sae.workers import n_workers, share

_ROWS = (
    512  # of a tile on one thread: fewer, and the product packs the weights too often; more leave the cache
)
_TILE_BYTES = 16 << 20  # of pre-activations: selection then reads them from the cache
_BLOCK_WIDTH = 4096  # features: tiles so wide are high enough for the product to run at its full rate
_RUNS, _LATER_RUNS = 8, 4
_COLUMN = 0xFFFFFFFF  # the part of a key that holds the column

_workspace = threading.local()

T = TypeVar("T")


def tile_rows(d_sae: int, itemsize: int = 4, device_type: str = "cpu") -> int:
    """How many rows of pre-activations are computed at a time: where PyTorch has one thread, half as many.

    Elsewhere than on a CPU few large tiles: there a tile costs its launches, and 512 MB is little.
    """
    if device_type != "cpu":
        return max(16, (512 << 20) // (d_sae * itemsize))
    rows = _ROWS * min(torch.get_num_threads(), 2)
    return max(16, min(rows, _TILE_BYTES // (d_sae * itemsize)))


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scratch tensor that is reused from call to call: fresh pages cost more than the arithmetic on them."""
    size = math.prod(shape)
    key = (name, dtype, device)
    buffers = _workspace.__dict__.setdefault("buffers", {})
    if key not in buffers or buffers[key].numel() < size:
        with torch.inference_mode(
            False
        ):  # a tensor made in inference mode could not be written outside it later
            buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key][:size].view(shape)


@torch.no_grad()
def map_tiles(
    work: Callable[[Tensor], T],
    centred: Tensor,
    encoder_rows: Tensor,
    encoder_bias: Tensor,
    *,
    takes_narrow: bool = False,
) -> list[T]:
    """``work`` on the pre-activations ``centred · W_enc + b_enc``, tile of rows by tile of rows; no gradient.

    The product is one operator; ``work`` on a tile is shared out among threads (:mod:`sae.workers`), some rows each.

    Args:
        work: takes ``[rows, d_sae]``, valid during the call only.
        takes_narrow: ``work`` may be given the number format of the product; otherwise it gets that of ``centred``.
        centred: ``[n, d_in]``, the input minus b_dec. encoder_rows: ``[d_sae, d_in]``. encoder_bias: ``[d_sae]``.

    Returns:
        the results in the order of the rows.
    """
    d_sae, device, kind = len(encoder_rows), centred.device, narrow() or centred.dtype
    weights, bias = encoder_rows.detach().to(kind).t(), encoder_bias.detach().to(kind)
    # On a CPU the bias costs less where a tile is read than in the product, which would first fill the tile with it.
    # A narrow product would have to be rounded once more.
    bias_apart = device.type == "cpu" and kind == centred.dtype

    @torch.no_grad()  # which holds in one thread only
    def one(part: Tensor) -> T:
        if bias_apart:
            part.add_(bias)
        if kind != centred.dtype and not takes_narrow:
            part = _buffer("widened", part.shape, centred.dtype, device).copy_(part)
        return work(part)

    results: list[T] = []
    for rows in centred.to(kind).split(tile_rows(d_sae, kind.itemsize, device.type)):
        tile = _buffer("tile", (len(rows), d_sae), kind, device)
        tile = torch.mm(rows, weights, out=tile) if bias_apart else torch.addmm(bias, rows, weights, out=tile)
        results += share(one, tile.split(max(16, math.ceil(len(rows) / n_workers(device)))), device)
    return results


def topk_of_tile(tile: Tensor, k: int, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, exactly, by a tournament.

    View a row as 8 runs of equal length and take the maximum across the runs (which vectorises). The k largest
    entries lie in the k columns with the largest maxima, so 8k candidates remain; the k largest maxima are found in
    the same way, until the row is too short for it to pay. Among few, numpy selects in vector registers, and faster
    in place than through an index: so a value travels with its column as one number (:func:`_keys`).

    Args:
        tile: ``[rows, width]``.
        relu: negative entries will be clipped at 0, so that any of them may be chosen where too few are positive.

    Returns:
        values ``[rows, k]`` and integer indices ``[rows, k]``, in no particular order; all entries if there are fewer.
    """
    k = min(k, tile.shape[1])
    if tile.device.type != "cpu" or tile.dtype != torch.float32:
        return tile.topk(k, dim=1, sorted=False)
    halves = _halves(_tournament(tile, k, _RUNS, relu))
    bits = halves[..., 1].contiguous()
    return (bits if relu else _ordered(bits)).view(torch.float32), halves[..., 0].contiguous()


def _tournament(tile: Tensor, k: int, runs: int, relu: bool) -> Tensor:
    """Keys of the k largest entries of each row ``[rows, k]``; valid until the next call in this thread."""
    rows, width = tile.shape
    if width % runs or width <= 2 * _RUNS * k:
        return _largest(_keys(tile, _count_up(width, 1), relu), k)
    length = width // runs
    tile = tile.view(rows, runs, length)
    maxima = torch.amax(tile, dim=1, out=_buffer(f"maxima {length}", (rows, length), tile.dtype, tile.device))
    winners = (_tournament(maxima, k, _LATER_RUNS, relu) & _COLUMN).unsqueeze(1)
    candidates = tile.gather(2, winners.expand(rows, runs, k))
    columns = winners + _count_up(width, length).view(runs, 1)
    return _largest(_keys(candidates.view(rows, runs * k), columns.view(rows, runs * k), relu), k)


def _keys(values: Tensor, columns: Tensor, relu: bool) -> Tensor:
    """Numbers that sort like ``values [rows, width]``: the value in the high half, its column in the low one.

    Args:
        relu: negative values may come in any order.

    Returns:
        int64 ``[rows, width]``; valid until the next call in this thread.
    """
    keys = _buffer("keys", values.shape, torch.int64, values.device)
    halves, bits = _halves(keys), values.view(torch.int32)
    halves[..., 0] = columns
    halves[..., 1] = bits if relu else _ordered(bits)
    return keys


def _halves(keys: Tensor) -> Tensor:
    """Both halves ``[rows, width, 2]``, int32; the low one comes first on every machine that runs us."""
    return keys.view(torch.int32).view(*keys.shape, 2)


def _ordered(bits: Tensor) -> Tensor:
    """The bits of float32 numbers as int32 numbers in the same order, and back: it is its own inverse.

    Those of numbers that are not negative are in order as they are.
    """
    return bits.bitwise_right_shift(31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


@lru_cache(maxsize=64)
def _count_up(stop: int, step: int) -> Tensor:
    return torch.arange(0, stop, step, dtype=torch.int32)


def _largest(keys: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, a view; moves the keys within their rows."""
    first = keys.shape[1] - k
    keys.numpy().partition(first, axis=1)
    return keys[:, first:]


def encode_topk(
    centred: Tensor, encoder_rows: Tensor, encoder_bias: Tensor, k: int, *, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Pre-activations and selection, tile by tile; no gradient.

    Args:
        centred: ``[n, d_in]``, the input minus b_dec.
        encoder_rows: ``[d_sae, d_in]``. encoder_bias: ``[d_sae]``. k: how many to keep per row.
        relu: clip the selected values at 0.

    Returns:
        values ``[n, k]`` and int32 indices ``[n, k]``; all entries if there are fewer.
    """
    k, kernels = min(k, len(encoder_rows)), selecting() or TORCH
    on_cpu = centred.device.type == "cpu"
    width = _block_width(len(encoder_rows)) if on_cpu else len(encoder_rows)
    found = []
    for start in range(0, len(encoder_rows), width):
        parts = map_tiles(
            lambda tile: kernels.topk(tile, k, relu),
            centred,
            encoder_rows[start : start + width],
            encoder_bias[start : start + width],
            takes_narrow=not on_cpu or kernels is not TORCH,
        )
        values = torch.cat([tile_values for tile_values, _ in parts]).to(centred.dtype)
        found.append((values, torch.cat([tile_indices.int() for _, tile_indices in parts]).add_(start)))
    values, indices = found[0] if len(found) == 1 else _best_of(found, k, relu)
    return (values.relu_() if relu else values), indices


def _block_width(d_sae: int) -> int:
    """Into how wide blocks of features selection divides a dictionary on a CPU: evenly, near ``_BLOCK_WIDTH``."""
    n_blocks = max(round(d_sae / _BLOCK_WIDTH), 1)
    return 64 * math.ceil(d_sae / n_blocks / 64)


def _best_of(found: list[tuple[Tensor, Tensor]], k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row from those of every block of features."""
    values, indices = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))

    @torch.no_grad()
    def one(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        best, places = topk_of_tile(part[0], k, relu=relu)
        return best, part[1].gather(1, places.long())

    step = max(16, math.ceil(len(values) / n_workers(values.device)))
    parts = share(one, list(zip(values.split(step), indices.split(step), strict=True)), values.device)
    best_values, best_indices = (torch.cat(results) for results in zip(*parts, strict=True))
    return best_values, best_indices


class _Encode(torch.autograd.Function):
    """Gives selected pre-activations their gradients; selecting and computing them happened before."""

    @staticmethod
    def forward(
        ctx: Any,
        input_bias: Tensor | None,
        rows: Tensor,
        bias: Tensor,
        values: Tensor,
        centred: Tensor,
        pattern: Pattern,
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, values, centred)
        ctx.pattern, ctx.relu, ctx.kernels = pattern, relu, serving(pattern, rows) or TORCH
        ctx.mesh = mesh_in_force()
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, values, centred = ctx.saved_tensors
        grad = grads[0] * (values > 0) if ctx.relu else grads[0]
        d_rows = ctx.kernels.weighted_sums(ctx.pattern.transposed, centred, grad)
        d_bias = torch.zeros_like(rows[:, 0]).index_add_(0, ctx.pattern.indices.flatten(), grad.flatten())
        # The gradient of the input bias needs no [n, d_in] gather: Σ_n Σ_i g_ni W_i = (Σ_n g_n) · W.
        d_input_bias = -ctx.mesh.sum_over_features(d_bias @ rows) if ctx.needs_input_grad[0] else None
        return d_input_bias, d_rows, d_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, b_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.pattern, ctx.kernels = pattern, serving(pattern, decoder) or TORCH
        decoded = ctx.kernels.gather_sum(values, pattern, decoder)
        return mesh_in_force().sum_over_features(decoded).add_(b_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_values = ctx.kernels.gathered_dots(grad, decoder, ctx.pattern) if ctx.needs_input_grad[0] else None
        d_decoder = ctx.kernels.weighted_sums(ctx.pattern.transposed, grad, values)
        return d_values, d_decoder, grad.sum(0), None


class _SquaredError(torch.autograd.Function):
    """Takes the gradient of the values in the forward pass, which spares several passes over ``[n, d_in]``."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, decoder: Tensor, b_dec: Tensor, goal: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels = serving(pattern, decoder) or TORCH
        mesh = mesh_in_force()
        if mesh.n_shards == 1:
            error, d_values = ctx.kernels.error_and_dots(values, pattern, decoder, b_dec, goal)
        else:
            decoded = mesh.sum_over_features(ctx.kernels.gather_sum(values, pattern, decoder))
            error = decoded.add_(b_dec).sub_(goal)
            d_values = ctx.kernels.gathered_dots(error, decoder, pattern)
        ctx.save_for_backward(values, error, d_values)
        ctx.pattern, ctx.factor = pattern, 2 / len(goal)
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)  # no zeros [n, d_out] in the place of the error's gradient
        return torch.linalg.vector_norm(error).square() / len(goal), error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, error, d_values = ctx.saved_tensors
        factor = grads[0] * ctx.factor
        d_decoder = ctx.kernels.weighted_sums(ctx.pattern.transposed, error, values * factor)
        d_goal = error * -factor if ctx.needs_input_grad[3] else None
        return d_values * factor, d_decoder, error.sum(0) * factor, d_goal, None


def _gather_sum(values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
    """``Σ_j values[r, j] · table[indices[r, j]]`` for every row r: ``[n, d]``."""
    if pattern.row_offsets is None:
        return embedding_bag(pattern.indices, table, mode="sum", per_sample_weights=values)
    offsets = pattern.row_offsets[:-1].to(pattern.indices.dtype)
    return embedding_bag(pattern.indices, table, offsets, mode="sum", per_sample_weights=values)


def gathered_dots(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Dot products of each row with the table rows that its pattern selects, without an ``[n, k, d]`` tensor.

    Args:
        left: ``[n, d]``. right: ``[d_sae, d]``.

    Returns:
        ``left[r] · right[indices[r, j]]``, in the shape of ``pattern.indices``.
    """
    kernel = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if kernel is None:  # a private name of PyTorch: the plain form costs an [nnz, d] tensor per chunk
        return _gathered_dots_plain(left, right, pattern)
    if pattern.row_offsets is None:
        rows, offsets = _fixed_bags(*pattern.indices.shape, left.device)
    else:
        rows, offsets = pattern.rows().int(), pattern.row_offsets[:-1].int()
    return kernel(left, right, pattern.indices.flatten(), offsets, rows, 0).view(pattern.indices.shape)


class _TorchKernels:
    """The sparse part of a step in PyTorch's operators, on any device."""

    def topk(self, tile: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
        return topk_of_tile(tile, k, relu=relu)

    def gather_sum(self, values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
        return _gather_sum(values, pattern, table)

    def gathered_dots(self, left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        return gathered_dots(left, right, pattern)

    def error_and_dots(
        self, values: Tensor, pattern: Pattern, decoder: Tensor, b_dec: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        error = _gather_sum(values, pattern, decoder).add_(b_dec).sub_(goal)
        return error, gathered_dots(error, decoder, pattern)

    def weighted_sums(self, transposed: Transposed, table: Tensor, weights: Tensor) -> Tensor:
        return transposed.weighted_sums(table, weights)


TORCH: Kernels = _TorchKernels()


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each row of ``left [n, d]`` with the same row of ``right [n, d]``: ``[n]``."""
    n = len(left)
    same = torch.arange(n, dtype=torch.int32, device=left.device).view(n, 1)
    return gathered_dots(left, right, Pattern(n, same)).view(n)


@lru_cache(maxsize=16)
def _fixed_bags(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of each entry ``[n · k]`` and first entry of each row ``[n]``, int32, where every row has k entries."""
    rows = torch.arange(n, dtype=torch.int32, device=device)
    return rows.repeat_interleave(k), rows * k


def _gathered_dots_plain(left: Tensor, right: Tensor, pattern: Pattern, chunk: int = 65_536) -> Tensor:
    rows, features = pattern.rows(), pattern.indices.flatten()
    dots = [
        (left[rows[i : i + chunk]] * right[features[i : i + chunk]]).sum(-1)
        for i in range(0, len(features), chunk)
    ]
    return torch.cat(dots).view(pattern.indices.shape)


def topk_codes(
    x: Tensor,
    input_bias: Tensor | None,
    encoder_rows: Tensor,
    encoder_bias: Tensor,
    k: int,
    *,
    relu: bool = True,
) -> SparseCodes:
    """TopK encoder with gradients: ``topk(relu((x − input_bias) W_enc + b_enc))`` (Gao et al. 2024, 2406.04093).

    Args:
        x: ``[n, d_in]`` (receives no gradient). input_bias: ``[d_in]``, or None for nothing to subtract.
        encoder_rows: ``[d_sae, d_in]``. encoder_bias: ``[d_sae]``. relu: whether selected values are clipped at 0.

    Returns:
        codes in the fixed layout, ``values`` differentiable; entries clipped at 0 stay in place.
    """
    with torch.no_grad():
        centred = x if input_bias is None else x - input_bias
        values, indices = encode_topk(centred, encoder_rows, encoder_bias, k, relu=relu)
    codes = SparseCodes(Pattern(len(encoder_rows), indices), values)
    return winning(differentiable(codes, centred, input_bias, encoder_rows, encoder_bias, relu=relu), k)


def winning(codes: SparseCodes, k: int) -> SparseCodes:
    """Codes in the fixed layout of one shard of the features, 0 but for the k largest of a row over all shards."""
    mesh = mesh_in_force()
    if mesh.n_shards == 1:
        return codes
    lost = ~winners_of_rows(codes.values.detach(), k, mesh)
    return SparseCodes(codes.pattern, codes.values.masked_fill(lost, 0))


def differentiable(
    codes: SparseCodes,
    centred: Tensor,
    input_bias: Tensor | None,
    encoder_rows: Tensor,
    encoder_bias: Tensor,
    *,
    relu: bool = False,
) -> SparseCodes:
    """Codes whose values are entries of ``centred · W_enc + b_enc``, with their gradients.

    Args:
        codes: without gradient. centred: ``[n, d_in]``, ``x − input_bias``; the rest as in :func:`topk_codes`.
        relu: whether values were clipped at 0; those that are 0 then receive no gradient.
    """
    values = _Encode.apply(input_bias, encoder_rows, encoder_bias, codes.values, centred, codes.pattern, relu)
    return SparseCodes(codes.pattern, values)


@torch.no_grad()
def encode_relu(centred: Tensor, encoder_rows: Tensor, encoder_bias: Tensor) -> SparseCodes:
    """``relu(centred · W_enc + b_enc)`` as ragged codes, tile by tile; no gradient. Arguments as in encode_topk."""
    parts = map_tiles(lambda tile: SparseCodes.from_dense(tile.relu_()), centred, encoder_rows, encoder_bias)
    return SparseCodes.concatenate(parts)


def decode(codes: SparseCodes, decoder: Tensor, b_dec: Tensor) -> Tensor:
    """``Σ_i f_i · W_dec[i] + b_dec``, differentiable in the values, the decoder and b_dec.

    Args:
        decoder: ``[d_sae, d_in]``. b_dec: ``[d_in]``.

    Returns:
        ``[n, d_in]``.
    """
    return _Decode.apply(codes.values, decoder, b_dec, codes.pattern)


def squared_error(codes: SparseCodes, decoder: Tensor, b_dec: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """``mean_n ‖ŷ − goal‖²`` for the ŷ that :func:`decode` gives, differentiable like it, in one pass.

    Args:
        decoder: ``[d_sae, d_out]``. b_dec: ``[d_out]``. goal: ``[n, d_out]`` (receives a gradient if it asks for one).

    Returns:
        the mean, and ``ŷ − goal`` ``[n, d_out]`` without gradient.
    """
    mse, error = _SquaredError.apply(codes.values, decoder, b_dec, goal, codes.pattern)
    return mse, error
