"""Activations of token blocks, computed batch by batch."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.exclusion import Exclusion

if TYPE_CHECKING:
    from activations.models import LanguageModel

BLOCKS_PER_BATCH_CPU = 4
BLOCKS_PER_BATCH_GPU = 64

BlockRange = tuple[int, int]

T = TypeVar("T")
R = TypeVar("R")


def blocks_per_batch(model: "LanguageModel") -> int:
    """How many blocks go through the model at once: few stay in a CPU's cache, many fill a GPU."""
    return BLOCKS_PER_BATCH_CPU if model.device.type == "cpu" else BLOCKS_PER_BATCH_GPU


def block_ranges(n_blocks: int, batch_blocks: int, start: int = 0) -> list[BlockRange]:
    """(start, stop) of each batch from block ``start`` on."""
    return [(i, min(i + batch_blocks, n_blocks)) for i in range(start, n_blocks, batch_blocks)]


def capture_blocks(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_names: Sequence[str],
    *,
    batch_blocks: int | None = None,
    start: int = 0,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Activations of all blocks from ``start`` on, in order; see :func:`capture_ranges`.

    Yields:
        (first block of the batch, {hook_name: [batch, context, width]}).
    """
    ranges = block_ranges(blocks.n_blocks, batch_blocks or blocks_per_batch(model), start)
    return capture_ranges(model, blocks, hook_names, ranges)


def capture_ranges(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_names: Sequence[str],
    ranges: Iterable[BlockRange],
    *,
    n_workers: int | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Activations of blocks ``start`` to ``stop`` for each of ``ranges``, in that order.

    Shared out among Python threads as :func:`in_order` says. Edits in force (``model.edited``) hold in all.
    """

    def capture(block_range: BlockRange) -> tuple[int, dict[str, Tensor]]:
        mask = blocks.attention_mask(*block_range)
        ids = blocks.ids_tensor(*block_range).to(model.device)
        mask = None if mask is None else mask.to(model.device)
        return block_range[0], model.capture(ids, hook_names, attention_mask=mask)

    return in_order(model.device, capture, ranges, n_workers=n_workers)


def in_order(
    device: torch.device, work: Callable[[T], R], items: Iterable[T], *, n_workers: int | None = None
) -> Iterator[R]:
    """``work(item)`` for each of ``items``, in their order.

    On a CPU the items are shared out among ``n_workers`` Python threads (as many as PyTorch has threads by
    default), each of which computes on one thread: half again as fast as splitting every product of a small
    model among them, and the same numbers whatever their number. Each call sees the context variables of the
    caller.
    """
    if device.type != "cpu":
        yield from map(work, items)
        return

    n_workers = n_workers or torch.get_num_threads()
    with single_threaded_workers(n_workers) as pool:
        pending: deque[Future[R]] = deque()
        remaining = iter(items)

        def submit(count: int) -> None:
            for item in islice(remaining, count):
                # A context can be entered by one thread at a time: each call has its own copy.
                pending.append(pool.submit(partial(contextvars.copy_context().run, work, item)))

        try:
            submit(2 * n_workers)  # one item in work and one ready for each worker bounds the memory
            while pending:
                yield pending.popleft().result()
                submit(1)
        finally:
            for future in pending:
                future.cancel()


def kept_positions(blocks: TokenBlocks, start: int, stop: int, x: Tensor, exclusion: Exclusion) -> Tensor:
    """Which positions of blocks ``start`` to ``stop`` count: bool [stop - start, context], False at padding.

    x: their activations [stop - start, context, width].
    """
    kept = exclusion.kept(blocks.ids_tensor(start, stop), x)
    mask = blocks.attention_mask(start, stop)
    return kept if mask is None else kept & mask.bool().to(kept.device)


def single_threaded_workers(n_workers: int) -> ThreadPoolExecutor:
    """Threads in each of which PyTorch computes on one thread; the caller keeps its own setting."""
    setting = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="capture")
    everyone = threading.Barrier(n_workers)

    def start() -> None:
        torch.set_num_threads(1)
        everyone.wait()

    for future in [pool.submit(start) for _ in range(n_workers)]:
        future.result()
    # PyTorch also remembers the last setting as the default of threads that begin later: put it back.
    torch.set_num_threads(setting)
    return pool


@contextmanager
def single_threaded() -> Iterator[None]:
    """PyTorch computes on one thread in this block."""
    setting = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(setting)
