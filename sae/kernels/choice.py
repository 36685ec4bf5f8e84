"""Who computes the sparse part of a step: PyTorch's operators, Triton kernels, or dense products.

PyTorch serves everywhere unless a caller asks for Triton::

    with using("triton"):
        codes = topk_codes(...)

The choice is made once, in the forward pass; what it chose stays with the autograd node, since a GPU's backward pass
runs in a thread of its own, which does not see the caller's context.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol

import torch
from torch import Tensor

from activations.errors import InputError
from sae.codes import Pattern, Transposed

KernelsName = Literal["torch", "triton"]
ProductName = Literal["float32", "bfloat16"]

# Of an H200: see dense_is_faster.
_BYTES_PER_SECOND = 4.8e12
_OPERATIONS_PER_SECOND = {
    2: 700e12,
    4: 60e12,
}  # by the bytes of a number: bfloat16 in tensor cores, float32 outside
_name: ContextVar[KernelsName] = ContextVar("kernels", default="torch")
_product: ContextVar[ProductName] = ContextVar("product", default="float32")


class Kernels(Protocol):
    """The operations that make up the sparse part of a step; shapes as in :mod:`sae.sparse`."""

    def topk(self, tile: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
        """Values and indices ``[rows, k]`` of the k largest entries of every row of ``tile [rows, d_sae]``.

        With ``relu`` it does not matter which of the negative entries are chosen.
        """

    def gather_sum(self, values: Tensor, pattern: Pattern, table: Tensor) -> Tensor:
        """``Σ_j values[r, j] · table[indices[r, j]]`` for every row r: ``[n, d]``."""

    def gathered_dots(self, left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        """``left[r] · right[indices[r, j]]``, in the shape of ``pattern.indices``."""

    def error_and_dots(
        self, values: Tensor, pattern: Pattern, decoder: Tensor, b_dec: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``error = decoded − goal`` ``[n, d]``, and ``gathered_dots(error, decoder)``."""

    def weighted_sums(self, transposed: Transposed, table: Tensor, weights: Tensor) -> Tensor:
        """For each feature the sum of ``weight · table[row]`` over its entries: ``[d_sae, d]``."""


@contextmanager
def using(name: KernelsName, product: ProductName = "float32") -> Iterator[None]:
    """Have ``name`` serve the calls made inside the block, by this thread.

    Args:
        product: bfloat16 makes the encoder product of copies in that format, and has Triton gather such rows; what is
            added up is added in the format of the weights. float32 leaves everything in that format.
    """
    tokens = _name.set(name), _product.set(product)
    try:
        yield
    finally:
        _name.reset(tokens[0])
        _product.reset(tokens[1])


def narrow() -> torch.dtype | None:
    """The number format of the product and of gathered rows, where it is not that of the weights."""
    return None if _product.get() == "float32" else torch.bfloat16


def check_available(name: KernelsName, device: torch.device) -> None:
    """Raise InputError where these kernels cannot run: Triton needs its package and a CUDA device.

    ``TRITON_INTERPRET=1`` in the environment runs the kernels on any device, very slowly, for tests.
    """
    if name == "torch":
        return
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            "kernels is triton, and the package triton is not installed: pip install triton, or kernels torch."
        )
    if device.type != "cuda" and not interpreted():
        raise InputError(
            f"kernels is triton, which needs a CUDA device, and this run is on {device.type}: take kernels torch."
        )


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serving(pattern: Pattern, table: Tensor) -> Kernels | None:
    """Who computes with this pattern and rows of ``table``; None where PyTorch's operators do."""
    if _name.get() == "torch":
        return None
    l0, rows = pattern.indices.numel() / max(pattern.n_rows, 1), narrow() or table.dtype
    if table.device.type == "cuda" and dense_is_faster(pattern.d_sae, l0, rows.itemsize):
        from sae.kernels.dense import DenseKernels

        return DenseKernels(rows)
    return _triton(rows)


def selecting() -> Kernels | None:
    """Who selects the k largest of a tile; None where PyTorch's operators do."""
    return None if _name.get() == "torch" else _triton(None)


def _triton(rows: torch.dtype | None) -> Kernels:
    from sae.kernels.triton_kernels import TritonKernels

    return TritonKernels(rows)


def dense_is_faster(d_sae: int, l0: float, itemsize: int) -> bool:
    """Whether a GPU takes less time for dense products than for the gathers of the sparse part of a step.

    Derived, not measured. Three gathers (decoding together with the gradient of the values, and one for each weight
    gradient) move ``3 · n · L0 · d · itemsize`` bytes. Dense, the same takes four products of ``2 · n · d_sae · d``
    operations, and passes over ``[n, d_sae]`` that cost about as much as a fifth. On a device of 4.8 TB/s that
    multiplies bfloat16 at 700 and float32 at 60 TFLOP/s, the two are equal at d_sae / L0 = 88 and 15.

    Args:
        l0: features that fire per row. itemsize: bytes of a number of the rows that are gathered.
    """
    operations = _OPERATIONS_PER_SECOND.get(itemsize)
    if operations is None:
        return False
    return 10 * d_sae / operations < 3 * l0 * itemsize / _BYTES_PER_SECOND
