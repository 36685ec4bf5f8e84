"""Adam, with its moments in float32 or in 8 bits, and the rows of features that start anew.

The 8-bit form follows Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (2110.02861): a tensor is
cut into blocks, each divided by its largest magnitude, and every quotient is rounded to one of 256 values that lie
densest near 0 (dynamic tree quantisation). Ours differs in three points. Of the second moment the square root is kept,
so that both moments span the same seven decades. A root above 0 is never rounded to 0, which would make the next
update of that weight enormous. And the rounding point between two neighbouring values moves from step to step along an
equidistributed sequence, where the paper rounds to the nearest: a second moment moves by a thousandth of itself in a
step, less than the gap to the next value, and would otherwise stand still. Nothing is random.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

BLOCK = 256  # entries with a common scale
_CHUNK = BLOCK << 12  # entries that are in float32 at a time
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are equidistributed


@lru_cache(maxsize=8)
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of dynamic tree quantisation in ascending order, float32, from −0.993 (or 0) to 1.

    Besides 0 and 1 there are in each decade, from 1 down to 1e-6, the centres of equal parts of [0.1, 1] times the
    decade: 64 parts in the first (128 where there is no sign), and half as many in every following one.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        parts = 2 ** (6 - decade + (not signed))
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0**-decade
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values.float().to(device)


def quantised(values: Tensor, code: Tensor, rounding: float = 0.5) -> tuple[Tensor, Tensor]:
    """Blocks of values as indices into a code, and the scale of each block.

    Args:
        values: float32 ``[n_blocks, BLOCK]``. code: ``[256]``, ascending, from :func:`dynamic_code`.
        rounding: the fraction of the gap between two values of the code from which on the upper one is taken,
            above 0 and below 1.

    Returns:
        uint8 ``[n_blocks, BLOCK]``, and float32 ``[n_blocks]``: the value of largest magnitude in each block, with its
        sign, so that it is 1 in the code, which has no −1.
    """
    scales = values.gather(1, values.abs().argmax(1, keepdim=True))
    quotients = values / torch.where(scales == 0, 1, scales)
    edges = torch.lerp(code[:-1], code[1:], rounding)
    return torch.bucketize(quotients, edges, right=True).to(torch.uint8), scales[:, 0]


def dequantised(indices: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """What :func:`quantised` gave, as float32 ``[n_blocks, BLOCK]``."""
    return code[indices.int()].mul_(scales[:, None])


class Adam8bit(Optimizer):
    """Adam with two bytes of state for a weight; see the module. ``betas`` and ``eps`` as in :class:`torch.optim.Adam`.

    Tensors of one dimension keep float32 moments: they are small, and their entries differ most.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= self._fresh(parameter)
        state["step"] = state["step"].cpu() + 1  # on the CPU, where reading it waits for no device
        step = int(state["step"])
        if parameter.dim() == 1:
            change = self._moved(state["first"], state["second"], gradient, step, group)
            parameter.add_(change)
            return
        rounding = (0.5 + step * _GOLDEN) % 1.0
        flat, grads = parameter.view(-1), gradient.reshape(-1)
        signed, unsigned = dynamic_code(True, flat.device), dynamic_code(False, flat.device)
        for start in range(0, flat.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            blocks = slice(start // BLOCK, (start + _CHUNK) // BLOCK)
            gradient_blocks = _blocks(grads[part])
            first = dequantised(state["first"][blocks], state["first_scales"][blocks], signed)
            second = dequantised(state["root"][blocks], state["root_scales"][blocks], unsigned).square_()
            change = self._moved(first, second, gradient_blocks, step, group)
            flat[part] += change.view(-1)[: len(flat[part])]
            state["first"][blocks], state["first_scales"][blocks] = quantised(first, signed, rounding)
            root = second.sqrt_()
            indices, state["root_scales"][blocks] = quantised(root, unsigned, rounding)
            state["root"][blocks] = torch.where(root > 0, indices.clamp_min(1), indices)

    @staticmethod
    def _moved(first: Tensor, second: Tensor, gradient: Tensor, step: int, group: dict[str, Any]) -> Tensor:
        """Move both moments on, in place; the change of the weights (Kingma and Ba 2015, algorithm 1)."""
        beta1, beta2 = group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return (first / denominator).mul_(-group["lr"] / (1 - beta1**step))

    @staticmethod
    def _fresh(parameter: Tensor) -> dict[str, Tensor]:
        step = torch.zeros(())
        if parameter.dim() == 1:
            return {"step": step, "first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}
        n_blocks, device = -(-parameter.numel() // BLOCK), parameter.device
        zero = int((dynamic_code(True, device) == 0).nonzero())
        return {
            "step": step,
            "first": torch.full((n_blocks, BLOCK), zero, dtype=torch.uint8, device=device),
            "first_scales": torch.zeros(n_blocks, device=device),
            "root": torch.zeros((n_blocks, BLOCK), dtype=torch.uint8, device=device),
            "root_scales": torch.zeros(n_blocks, device=device),
        }


def _blocks(flat: Tensor) -> Tensor:
    """A flat tensor in blocks, the last filled up with zeros."""
    missing = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)


def make_optimizer(parameters: Iterable[Tensor], lr: float, moments: Literal["float32", "8bit"]) -> Optimizer:
    """Adam over the parameters, with moments of this kind."""
    if moments == "8bit":
        return Adam8bit(parameters, lr)
    optimizer = Adam(parameters, lr=lr, fused=True)
    # Made here and not in the first step, where they would split the memory that later steps use again.
    for parameter in optimizer.param_groups[0]["params"]:
        state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}
    return optimizer


@torch.no_grad()
def forget(optimizer: Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Set both moments of some rows of a parameter to 0.

    Args:
        rows: int64 indices into its first dimension.
    """
    for name, value in optimizer.state[parameter].items():
        if name == "step" or name.endswith("_scales"):
            continue
        empty = int((dynamic_code(True, value.device) == 0).nonzero()) if _is_signed_code(name, value) else 0
        value.view(-1)[: parameter.numel()].view(parameter.shape)[rows] = empty


def _is_signed_code(name: str, value: Tensor) -> bool:
    return name == "first" and value.dtype == torch.uint8
