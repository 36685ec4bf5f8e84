"""One optimiser step of a table of rows in one pass: projection of the gradient, Adam, renormalisation.

For a row p with gradient g and moments m, v (Kingma & Ba 2014, as torch.optim.Adam computes it):

    g ← g − (g·p) p                              decoder only: take out the radial part (Bricken et al. 2023)
    m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    p ← p / ‖p‖                                  decoder only

The projection and the norm need a whole row, and a row fits the registers of one program: 8,192 numbers are 16 of each
of four kinds in 512 threads. So the row is read and written once: 16 bytes read and 12 written per number, where
separate operators take 28 for Adam alone and 32 more for projection and norm. Bias corrections come from the host
as numbers, which waits for nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim import Optimizer

from sae.kernels.launch import on, padded, warps


@triton.jit
def _adam_rows(
    rows_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    square_ptr: tl.tensor,
    d: int,
    step_size: float,
    root_correction: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    epsilon: float,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    here = tl.program_id(0).to(tl.int64) * d + columns
    p = tl.load(rows_ptr + here, mask=inside, other=0.0)
    g = tl.load(gradient_ptr + here, mask=inside, other=0.0)
    m = tl.load(mean_ptr + here, mask=inside, other=0.0)
    v = tl.load(square_ptr + here, mask=inside, other=0.0)
    if UNIT:
        g -= tl.sum(g * p) * p
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    p -= step_size * m / (tl.sqrt(v) / root_correction + epsilon)
    if UNIT:
        p /= tl.maximum(tl.sqrt(tl.sum(p * p)), 1e-8)
    tl.store(rows_ptr + here, p, mask=inside)
    tl.store(mean_ptr + here, m, mask=inside)
    tl.store(square_ptr + here, v, mask=inside)


def adam_rows(
    rows: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    unit: bool = False,
) -> None:
    """Advance ``rows`` and the moments by one step, in place.

    Args:
        rows: ``[d_sae, d]``, contiguous like the other three.
        gradient: its gradient, left as it is. mean, square: Adam's moments.
        step: counts from 1. unit: rows have norm 1, and keep it.
    """
    n, d = rows.shape
    beta1, beta2 = betas
    block = padded(d)
    with on(rows):
        _adam_rows[(n,)](
            rows,
            gradient,
            mean,
            square,
            d,
            learning_rate / (1 - beta1**step),
            (1 - beta2**step) ** 0.5,
            1 - beta1,
            beta2,
            1 - beta2,
            epsilon,
            UNIT=unit,
            BLOCK=block,
            num_warps=warps(block),
        )


class RowAdam(Optimizer):
    """Adam over the rows of two-dimensional parameters by :func:`adam_rows`, over vectors by PyTorch's operators.

    The state has the names and shapes of :class:`torch.optim.Adam`, so that a checkpoint of either serves both.

    Args:
        parameters: float32. unit: the one of them whose rows have norm 1 and keep it, if there is one.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        unit: Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self._unit = unit

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient; gradients stay as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        # The count stays on the host, where reading it waits for nothing; a checkpoint may have put it elsewhere.
        state["step"] = state.get("step", torch.zeros(())).cpu() + 1
        step, mean, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2), epsilon = group["lr"], group["betas"], group["eps"]
        if parameter.dim() == 2:
            adam_rows(
                parameter,
                gradient.contiguous(),
                mean,
                square,
                step=step,
                learning_rate=lr,
                betas=(beta1, beta2),
                epsilon=epsilon,
                unit=parameter is self._unit,
            )
            return
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(epsilon)
        parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
