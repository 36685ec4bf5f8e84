"""Share work out among a few Python threads, each of which computes on one thread.

For many small operators on a CPU that beats threads inside each of them: pieces stay in a core's cache from one
operator to the next, and no operator waits for the slowest of several threads, which on a busy machine costs more than
the work itself. One large product is better left to PyTorch's own threads.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from activations.capture import single_threaded_workers

S = TypeVar("S")
T = TypeVar("T")


def n_workers(device: torch.device) -> int:
    """How many threads share the work: as many as PyTorch would use, and one where the device is no CPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def share(work: Callable[[S], T], items: Sequence[S], device: torch.device) -> list[T]:
    """``work(item)`` for every item, in their order; see the module. ``device`` is where the tensors are."""
    n = min(n_workers(device), len(items))
    results: Iterable[T] = map(work, items) if n <= 1 else _pool(n).map(work, items)
    return list(results)


@cache
def _pool(n: int) -> ThreadPoolExecutor:
    return single_threaded_workers(n)
