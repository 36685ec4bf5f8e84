"""The geometric median: the point with the least sum of distances to given points, hardly moved by outliers."""

import torch
from torch import Tensor

from sae.mesh import ALONE, Mesh

ITERATIONS = 50


@torch.no_grad()
def geometric_median(points: Tensor, mesh: Mesh = ALONE) -> Tensor:
    """Weiszfeld's algorithm: means weighted by the inverse distance to the last estimate, 50 times from the mean.

    Args:
        points: ``[n, d]``. mesh: whose other processes have further points, equally many.

    Returns:
        ``[d]``.
    """
    estimate = mesh.mean_over_data(points.mean(0))
    least = torch.finfo(points.dtype).eps * mesh.mean_over_data(points.norm(dim=1).mean())
    for _ in range(ITERATIONS):
        weights = 1 / (points - estimate).norm(dim=1).clamp_min(least)
        estimate = mesh.sum_over_data(weights @ points) / mesh.sum_over_data(weights.sum())
    return estimate
