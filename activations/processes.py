"""Several processes that share one piece of work, as ``torchrun`` starts them."""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONGEST_WAIT = timedelta(days=7)
"""One process may tokenise for hours while the others wait."""


def _nobody_to_wait_for() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """rank: number of this process. size: how many there are. wait: returns when all have called it."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = _nobody_to_wait_for


ALONE = Processes()


def local_rank() -> int | None:
    """Number of this process among those that ``torchrun`` started on this machine; None without ``torchrun``."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None else int(rank)


def started_processes(device: "torch.device | None" = None) -> Processes:
    """Those that ``torchrun`` started, of which this is one; otherwise this process alone.

    Args:
        device: where tensors lie that they will exchange; None for nothing but "I am here".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        on_cuda = device is not None and device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=LONGEST_WAIT)
        atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
    return Processes(dist.get_rank(), dist.get_world_size(), dist.barrier)
