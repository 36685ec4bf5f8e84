"""BatchTopK: of all n·d_sae values ``relu((x − b_dec) W_enc + b_enc)`` of a batch, the n·k largest fire.

    L = mean ‖x̂ − x‖² + auxk · AuxK,  x̂ = f W_dec + b_dec,  ‖W_dec,i‖ = 1

Bussmann et al. 2024, "BatchTopK sparse autoencoders" (2412.06410). A token may thus use more features than another;
k is their mean. Inference must not depend on which tokens share a batch, so it compares with a threshold θ, the mean
over batches t of the smallest activation m_t that was selected, and the finished SAE is a JumpReLU with that θ for all
features. The mean is exponential, with the correction that Adam's moments have, so that it is a mean of batches from
the first one on:

    θ_t = Σ_s β^(t−s) m_s / Σ_s β^(t−s),  β = 0.99

The weights move while θ is averaged. A memory of about 100 batches is a few percent of even a short run (2 million
tokens are 1,000 to 2,000 steps), and lies where the learning rate has almost fallen to 0; one batch says θ to a few
percent already. (SAELens has β = 0.99 and starts from 0 without correction; dictionary_learning has 0.999.)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.base import Moment, Weights
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.selecting import Reconstruction, Selecting
from sae.batch_select import batch_topk_codes
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.mesh import mesh_in_force
from sae.sparse import squared_error

THRESHOLD_DECAY = 0.99


@dataclass(frozen=True)
class BatchTopK(Selecting):
    """k features fire per token on average; the state is the threshold's sum and the weight in that sum."""

    name: ClassVar[str] = "batch_topk"

    def initial_state(self) -> dict[str, Tensor]:
        """No batch seen."""
        return {"threshold_sum": torch.zeros(()), "threshold_weight": torch.zeros(())}

    def reconstruct(
        self, weights: Weights, x: Tensor, goal: Tensor, k: int, moment: Moment
    ) -> Reconstruction:
        """See the module's equation."""
        codes = self.select(weights, x, k)
        mse, error = squared_error(codes, weights.W_dec, weights.b_dec, goal)
        state = threshold_state(moment.state, codes.values.detach())
        return Reconstruction(codes, mse, {"mse": mse.detach()}, error, state)

    def select(self, weights: Weights, x: Tensor, k: int) -> SparseCodes:
        """The codes of a batch, with gradients."""
        return batch_topk_codes(x, self.input_bias(weights), weights.encoder_rows, weights.b_enc, k * len(x))

    def finished(self, weights: Weights, state: dict[str, Tensor]) -> tuple[SAEConfig, Weights]:
        """A JumpReLU whose features share one threshold; 0 where no batch has been seen."""
        _, weights = super().finished(weights, state)
        shared = torch.ones_like(weights.b_enc) * threshold(state)
        return self._jumprelu(), replace(weights, threshold=shared)

    def encode(self, weights: Weights, x: Tensor) -> SparseCodes:
        """The activations above ``weights.threshold``."""
        return JumpReLU(self._jumprelu()).encode(weights, x)

    def _jumprelu(self) -> SAEConfig:
        config = self.config
        return SAEConfig(
            architecture="jumprelu", d_sae=config.d_sae, transcoder=config.transcoder, skip=config.skip
        )


def threshold_state(state: dict[str, Tensor], values: Tensor) -> dict[str, Tensor]:
    """The state after a batch in which ``values`` were selected here; as it was where none of them is positive."""
    infinity = values.new_full((1,), torch.inf)
    own = torch.cat([infinity, torch.where(values > 0, values, infinity)]).min()
    smallest = mesh_in_force().smallest_of_all(own)
    some = torch.isfinite(smallest)
    share = (1 - THRESHOLD_DECAY) * some
    return {
        "threshold_sum": (1 - share) * state["threshold_sum"] + share * torch.where(some, smallest, 0.0),
        "threshold_weight": (1 - share) * state["threshold_weight"] + share,
    }


def threshold(state: dict[str, Tensor]) -> Tensor:
    """θ, a scalar: the mean of the batches that the state has seen, 0 where it has seen none."""
    weight = state["threshold_weight"]
    return torch.where(weight > 0, state["threshold_sum"] / weight, 0.0)
