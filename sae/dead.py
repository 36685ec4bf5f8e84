"""Which features are dead, known without waiting for the device.

How many features are dead decides the shape of the auxiliary loss, and asking a GPU for a number makes the host wait
until everything queued before is done. So the list is refreshed at fixed steps only: at a refresh the features that
have been silent for too long are sent on their way to the host, and at the next refresh, when they have long arrived,
they come into force. The rule is the same on a CPU, where it costs nothing, and what is on its way belongs to the
checkpoint: a run depends neither on the device nor on interruptions.
"""

import torch
from torch import Tensor

from sae.mesh import ALONE, Mesh
from sae.readback import Readback

REFRESH_STEPS = 16  # at most; a hundredth of shorter runs


class DeadFeatures:
    """The list of dead features.

    Args:
        d_sae: number of features. window: a feature silent for more than so many tokens is dead.
        n_steps: length of the run. device: where the weights are. mesh: every process keeps count of all features.

    Attributes:
        silent_tokens: int64 ``[d_sae]``, tokens since each feature fired.
        window: see above.
        indices: int64, the features that count as dead now (the list in force).
        own: those of this shard, numbered from its first feature.
    """

    def __init__(
        self, d_sae: int, window: int, n_steps: int, device: torch.device, mesh: Mesh = ALONE
    ) -> None:
        self.window = window
        shard_size = d_sae // mesh.n_shards
        self._first, self._end = mesh.shard * shard_size, (mesh.shard + 1) * shard_size
        self.refresh_steps = max(1, min(REFRESH_STEPS, n_steps // 100))
        self.silent_tokens = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.indices = self.own = torch.empty(0, dtype=torch.int64, device=device)
        self._coming = Readback(self.mask())

    def mask(self) -> Tensor:
        """bool ``[d_sae]``: the features that have been silent for too long by now."""
        return self.silent_tokens > self.window

    @property
    def elsewhere(self) -> int:
        """Number of features in force that are not of this shard."""
        return len(self.indices) - len(self.own)

    def at(self, step: int) -> Tensor:
        """``own`` as it is in force at this step, refreshed where that is due; call it once before every step."""
        if step % self.refresh_steps == 0:
            self._take_up(self._coming.value())
            self._coming = Readback(self.mask())
        return self.own

    def refresh(self) -> None:
        """Bring the list up to date at once; this waits for the device."""
        self._take_up(self.mask().cpu())
        self._coming = Readback(self.mask())

    def update(self, fired: Tensor, n_tokens: int) -> None:
        """Take note of a batch of ``n_tokens`` in which the features ``fired`` (bool ``[d_sae]``) fired."""
        self.silent_tokens.add_(n_tokens).masked_fill_(fired, 0)

    def revive(self, features: Tensor) -> None:
        """Count these features (int64) as having fired just now."""
        self.silent_tokens[features] = 0
        self.refresh()

    def _take_up(self, dead: Tensor) -> None:
        self.indices = self._sent(dead.nonzero().flatten())
        self.own = self._sent(dead[self._first : self._end].nonzero().flatten())

    def _sent(self, found: Tensor) -> Tensor:
        device = self.silent_tokens.device
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {
            "silent_tokens": self.silent_tokens,
            "indices": self.indices,
            "coming": self._coming.value(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up a state that :meth:`state` gave."""
        device = self.silent_tokens.device
        self.silent_tokens.copy_(state["silent_tokens"])
        self.indices = state["indices"].to(device)
        self.own = self.indices[(self.indices >= self._first) & (self.indices < self._end)] - self._first
        self._coming = Readback(state["coming"].to(device))
