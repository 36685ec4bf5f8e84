"""Activations of token blocks, computed batch by batch."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial, reduce
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from activations.blocks import PADDING, TokenBlocks
from activations.exclusion import Exclusion

if TYPE_CHECKING:
    from activations.models import LanguageModel

TOKENS_PER_BATCH_CPU = 2048
TOKENS_PER_BATCH_GPU = 16_384

BlockRange = tuple[int, int]

T = TypeVar("T")
R = TypeVar("R")


def blocks_per_batch(model: "LanguageModel", context_length: int) -> int:
    """How many blocks go through the model at once: few stay in a CPU's cache, many fill a GPU."""
    tokens = TOKENS_PER_BATCH_CPU if model.device.type == "cpu" else TOKENS_PER_BATCH_GPU
    return max(1, tokens // context_length)


@dataclass(frozen=True)
class BlockRanges(Sequence[BlockRange]):
    """(first, last + 1) of each batch of blocks from ``start`` on; computed when asked for, however many there are."""

    n_blocks: int
    batch_blocks: int
    start: int = 0

    def __len__(self) -> int:
        return max(0, -(-(self.n_blocks - self.start) // self.batch_blocks))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = self.start + int(index) % len(self) * self.batch_blocks
        return first, min(first + self.batch_blocks, self.n_blocks)


def capture_blocks(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_names: Sequence[str],
    *,
    batch_blocks: int | None = None,
    start: int = 0,
) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """Activations of all blocks from ``start`` on, in order; see :func:`capture_ranges`.

    Yields:
        (first block of the batch, {hook_name: [batch, context, width]}).
    """
    ranges = BlockRanges(
        blocks.n_blocks, batch_blocks or blocks_per_batch(model, blocks.context_length), start
    )
    return capture_ranges(model, blocks, hook_names, ranges)


def capture_ranges(
    model: "LanguageModel",
    blocks: TokenBlocks,
    hook_names: Sequence[str],
    ranges: Iterable[BlockRange],
    *,
    n_workers: int | None = None,
) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """Activations of blocks ``start`` to ``stop`` for each of ``ranges``, in that order.

    Shared out among Python threads as :func:`in_order` says. Edits in force (``model.edited``) hold in all.
    """

    def work(block_range: BlockRange) -> tuple[int, dict[str, Tensor]]:
        return block_range[0], capture_range(model, blocks, hook_names, block_range)

    return in_order(model.device, work, ranges, n_workers=n_workers)


def capture_range(
    model: "LanguageModel", blocks: TokenBlocks, hook_names: Sequence[str], block_range: BlockRange
) -> dict[str, Tensor]:
    """Activations of the blocks of one range, {hook_name: [batch, context, width]}."""
    mask = blocks.attention_mask(*block_range)
    return model.capture(blocks.ids_tensor(*block_range), hook_names, attention_mask=mask)


def in_order(
    device: torch.device, work: Callable[[T], R], items: Iterable[T], *, n_workers: int | None = None
) -> Generator[R, None, None]:
    """``work(item)`` for each of ``items``, in their order.

    Close it (``contextlib.closing``) where not everything is read: its threads end then, and not at some later time.

    On a CPU the items are shared out among ``n_workers`` Python threads (as many as PyTorch has threads by
    default), each of which computes on one thread: half again as fast as splitting every product of a small
    model among them, and the same numbers whatever their number. Each call sees the context variables of the
    caller.
    """
    if device.type == "cuda":
        yield from _on_second_stream(device, work, items)
        return
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


def _on_second_stream(device: torch.device, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``work(item)`` in order, two items ahead, on a CUDA stream beside that of the caller."""
    stream = torch.cuda.Stream(device)
    context = contextvars.copy_context()

    def run(item: T) -> tuple[R, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            result = work(item)
            return result, stream.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="capture") as pool:
        pending: deque[Future[tuple[R, torch.cuda.Event]]] = deque()
        remaining = iter(items)

        def submit(count: int) -> None:
            for item in islice(remaining, count):
                pending.append(pool.submit(context.run, run, item))

        try:
            submit(2)
            while pending:
                result, done = pending.popleft().result()
                submit(1)
                here = torch.cuda.current_stream(device)
                here.wait_event(done)
                for tensor in _tensors(result):
                    if tensor.is_cuda:
                        tensor.record_stream(here)  # its memory is not reused before the caller is done
                yield result
        finally:
            for future in pending:
                future.cancel()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def counted_positions(blocks: TokenBlocks, start: int, stop: int) -> Tensor:
    """Which positions of blocks ``start`` to ``stop`` hold text to count: bool [stop - start, context].

    False at padding, and in a chat at the messages of roles that were not asked for.
    """
    real = blocks.documents[start:stop] != PADDING
    return torch.from_numpy(real if blocks.counted is None else real & blocks.counted[start:stop])


def kept_positions(blocks: TokenBlocks, start: int, stop: int, x: Tensor, exclusion: Exclusion) -> Tensor:
    """Which positions of blocks ``start`` to ``stop`` count: bool [stop - start, context].

    x: their activations [stop - start, context, width].
    """
    kept = exclusion.kept(blocks.ids_tensor(start, stop), x)
    return kept & counted_positions(blocks, start, stop).to(kept.device)


def kept_at_all(
    blocks: TokenBlocks,
    start: int,
    stop: int,
    activations: Mapping[str, Tensor],
    exclusions: Mapping[str, Exclusion],
) -> Tensor:
    """Which positions of blocks ``start`` to ``stop`` count at each of several hooks: bool [stop - start, context].

    activations: by hook name, [stop - start, context, width]. exclusions: the rule at each hook.
    """
    at_each = [
        kept_positions(blocks, start, stop, activations[hook_name], exclusion)
        for hook_name, exclusion in exclusions.items()
    ]
    return reduce(lambda kept, others: kept & others.to(kept.device), at_each)


def single_threaded_workers(n_workers: int) -> ThreadPoolExecutor:
    """Threads in each of which PyTorch computes on one thread; the caller keeps its own setting."""
    setting = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="capture")
    everyone = threading.Barrier(n_workers)

    def start() -> None:
        # Asked for the first time in a thread, PyTorch sets the default there, over what was set before.
        torch.get_num_threads()
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
