"""The geometric median: the point with the least sum of distances to given points, hardly moved by outliers."""

import torch
from torch import Tensor

ITERATIONS = 50


@torch.no_grad()
def geometric_median(points: Tensor) -> Tensor:
    """Weiszfeld's algorithm: means weighted by the inverse distance to the last estimate, 50 times from the mean.

    Args:
        points: ``[n, d]``.

    Returns:
        ``[d]``.
    """
    estimate = points.mean(0)
    least = torch.finfo(points.dtype).eps * points.norm(dim=1).mean()
    for _ in range(ITERATIONS):
        weights = 1 / (points - estimate).norm(dim=1).clamp_min(least)
        estimate = weights @ points / weights.sum()
    return estimate
