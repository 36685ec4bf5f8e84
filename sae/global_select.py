"""The largest entries of rows, or of a whole batch, whose features lie on several processes: exactly, and ties decided.

Each process brings its own candidates, which hold every entry of its own that can be among the winners.
"""

import torch
from torch import Tensor

from sae.mesh import Mesh

_DIGIT = 8  # bits


@torch.no_grad()
def winners_of_rows(values: Tensor, k: int, mesh: Mesh) -> Tensor:
    """Which of a row's candidates are among its k largest over all shards; of equal ones the first shard's, in order.

    Args:
        values: ``[n, m]``, the ``min(k, own features)`` largest entries of each row; m may differ between shards.

    Returns:
        bool ``[n, m]``, at most k for each row over all shards.
    """
    if mesh.n_shards == 1:
        return torch.ones_like(values, dtype=torch.bool)
    own = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)
    shards = mesh.of_all_shards(own.t().contiguous())  # [shards · k, n]
    places = shards.sort(dim=0, descending=True, stable=True).indices[:k]
    won = torch.zeros_like(shards, dtype=torch.bool).scatter_(0, places, True)
    return won.view(mesh.n_shards, k, -1)[mesh.shard, : values.shape[1]].t()


@torch.no_grad()
def winners_of_batch(values: Tensor, count: int, mesh: Mesh) -> Tensor:
    """Which candidates are among the ``count`` largest of all processes; of equal ones the first process's, in order.

    Args:
        values: ``[m]``, none below 0; m may differ between processes. A NaN is larger than any number.

    Returns:
        bool ``[m]``.
    """
    bits = _sortable(values)
    threshold = _sortable(nth_largest(values, count, mesh))
    above, ties = bits > threshold, bits == threshold
    numbers = mesh.of_all(torch.stack([above.sum(), ties.sum()]))
    left = count - numbers[:, 0].sum() - numbers[: mesh.rank, 1].sum()
    return above | (ties & (ties.cumsum(0) <= left))


@torch.no_grad()
def nth_largest(values: Tensor, n: int, mesh: Mesh) -> Tensor:
    """The n-th largest of the values of all processes, a scalar; 0 where there are fewer.

    Found digit by digit of the floats' bits: each process counts how many of its values have each digit, and the counts
    are summed. No host waits for a device.

    Args:
        values: ``[m]``, as in :func:`winners_of_batch`.
    """
    bits = _sortable(values)
    prefix = torch.zeros((), dtype=bits.dtype, device=bits.device)
    left = torch.full((), n, device=bits.device)
    for shift in range(bits.element_size() * 8 - _DIGIT, -1, -_DIGIT):
        digits = bits >> shift
        alike = (digits >> _DIGIT) == prefix
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=bits.device)
        counts.index_add_(0, (digits & ((1 << _DIGIT) - 1)).int(), alike.long())
        at_least = mesh.sum_over_all(counts).flip(0).cumsum(0)  # the largest digit first
        place = (at_least < left).sum().clamp_max(len(counts) - 1)
        left = left - torch.where(place > 0, at_least[place - 1], 0)
        prefix = (prefix << _DIGIT) | (len(counts) - 1 - place)
    return prefix.to(bits.dtype).view(values.dtype)


def _sortable(values: Tensor) -> Tensor:
    """The bits of floats that are not below 0, as integers in the same order; a NaN, of whichever sign, comes last."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(kind) & torch.iinfo(kind).max
