"""Values on their way from the device to the host: asked for now, read later, so that no step waits for them."""

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor as it is now, for the host.

    On a GPU the copy goes to pinned memory behind the work that is queued; elsewhere it is made at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.detach().to("cpu", copy=True)

    def value(self) -> Tensor:
        """The copy, on the CPU; waits only where the device has not come so far yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
