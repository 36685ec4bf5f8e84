"""One training on several processes: rows of a batch and features of the dictionary are dealt out to a grid of them.

``torchrun`` starts the processes. They form a grid *data × features*: those of one row of the grid hold the same part
of every batch and each a *shard* of the features (rows of ``W_enc``ᵀ, ``b_enc``, ``W_dec``, …); those of one column
hold the same shard and each another part. ``b_dec`` and ``W_skip`` are everywhere, in the same bits.

A loss does not know the grid. The few operators that sum or select over all rows or all features ask for the mesh in
force (:func:`mesh_in_force`) and keep it for their backward pass, as they do with kernels. One process has the mesh
:data:`ALONE`, in which every method gives back what it got.

Every process must call the same methods in the same order, with tensors of the same shape and number format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from activations.errors import InputError
from activations.processes import started_processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """The grid and the place of this process in it.

    Attributes:
        n_data, n_shards: size of the grid. rank: number of this process; shards of the same rows are neighbours.
        data: the processes with the same shard. features: those with the same rows. None where this one is alone.
    """

    n_data: int = 1
    n_shards: int = 1
    rank: int = 0
    data: "ProcessGroup | None" = None
    features: "ProcessGroup | None" = None

    @classmethod
    def started(cls, shards: int, device: torch.device) -> "Mesh":
        """The grid of the processes that ``torchrun`` started, whose tensors lie on this kind of device.

        Raises:
            InputError: their number is no multiple of ``shards``.
        """
        processes = started_processes(device)
        if processes.size % shards:
            raise InputError(
                f"shards is {shards}, and the number of processes, {processes.size}, is no multiple of it: start them"
                f" with torchrun --no-python --nproc-per-node {shards} sae train …"
            )
        if processes.size == 1:
            return ALONE
        from torch.distributed.device_mesh import init_device_mesh

        n_data = processes.size // shards
        grid = init_device_mesh(device.type, (n_data, shards), mesh_dim_names=("data", "features"))
        return cls(n_data, shards, processes.rank, grid.get_group("data"), grid.get_group("features"))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.n_data * self.n_shards

    @property
    def data_rank(self) -> int:
        """Which part of every batch this process has."""
        return self.rank // self.n_shards

    @property
    def shard(self) -> int:
        """Which shard of the features this process has."""
        return self.rank % self.n_shards

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of a batch; may be taken in place, as all sums here."""
        return tensor if self.n_data == 1 else _summed(tensor, self.data)

    def mean_over_data(self, tensor: Tensor) -> Tensor:
        """The mean over the parts of a batch, which have equally many rows."""
        return tensor if self.n_data == 1 else _summed(tensor, self.data).div_(self.n_data)

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """The sum over the shards."""
        return tensor if self.n_shards == 1 else _summed(tensor, self.features)

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.size == 1 else _summed(tensor, None)

    def smallest_of_all(self, tensor: Tensor) -> Tensor:
        """The smallest over all processes, entry by entry."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        tensor = tensor.contiguous()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def agreed(self, fact: T) -> T:
        """What process 0 says, pickled."""
        if self.size == 1:
            return fact
        import torch.distributed as dist

        facts: list[Any] = [fact]
        dist.broadcast_object_list(facts, src=0, device=torch.device("cpu"))
        told: T = facts[0]
        return told

    def told_by_all(self, fact: T) -> list[T]:
        """What every process says, pickled, in the order of their ranks."""
        if self.size == 1:
            return [fact]
        import torch.distributed as dist

        facts: list[Any] = [None] * self.size
        dist.all_gather_object(facts, fact)
        return facts

    def most(self, number: int) -> int:
        """The largest of a number that each process says; the hosts wait for each other."""
        return number if self.size == 1 else -int(self.smallest_of_all(torch.tensor(-number)))

    def wait(self) -> None:
        """Return when all processes have called it."""
        self.most(0)

    def any_feature(self, own: Tensor) -> Tensor:
        """Which of all features any process marked: bool ``[d_sae]``, from bool ``[d_sae / n_shards]``."""
        if self.size == 1:
            return own
        marked = torch.zeros(self.n_shards, len(own), dtype=torch.int32, device=own.device)
        marked[self.shard] = own
        return _summed(marked, None).flatten() > 0

    def own(self, tensor: Tensor) -> Tensor:
        """The rows of this shard, of a tensor with a row for every feature."""
        return tensor if self.n_shards == 1 else tensor.chunk(self.n_shards)[self.shard].clone()

    def of_all_shards(self, tensor: Tensor) -> Tensor:
        """What every shard has, one below the other."""
        return tensor if self.n_shards == 1 else torch.cat(_gathered(tensor, self.n_shards, self.features))

    def of_all(self, tensor: Tensor) -> Tensor:
        """What every process has: one more dimension, in front."""
        return tensor[None] if self.size == 1 else torch.stack(_gathered(tensor, self.size, None))


ALONE = Mesh()
_mesh: ContextVar[Mesh] = ContextVar("mesh", default=ALONE)


@contextmanager
def spread_over(mesh: Mesh) -> Iterator[None]:
    """Have the calls made inside the block, by this thread, compute one part of what all processes compute."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def mesh_in_force() -> Mesh:
    """The mesh of the block that is running; :data:`ALONE` outside of any."""
    return _mesh.get()


def _summed(tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
    import torch.distributed as dist

    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def _gathered(tensor: Tensor, n: int, group: "ProcessGroup | None") -> list[Tensor]:
    import torch.distributed as dist

    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(n)]
    dist.all_gather(found, tensor.contiguous(), group=group)
    return found
