"""Matryoshka BatchTopK: the first m_l features have to reconstruct by themselves, for a few widths m_1 < … < d_sae.

    L = Σ_l w_l · mean ‖x̂_l − x‖² + auxk · AuxK,  x̂_l = Σ_(i < m_l) f_i W_dec,i + b_dec,  Σ_l w_l = 1

Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (2503.17547). Early features
stay general, since they must do without the later ones. f is BatchTopK's: one selection over all features, whose
entries every level shares. AuxK reconstructs the error of the widest level.

The weights are scaled to sum 1, equal by default, so that the loss has the size of the other architectures' and AuxK
the same share in it. (SAELens adds the levels up; dictionary_learning divides by their number twice.)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sae.architectures.base import Moment, Weights
from sae.architectures.batch_topk import BatchTopK, threshold_state
from sae.architectures.selecting import Reconstruction
from sae.nested import nested_squared_error


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK with nested dictionaries."""

    name: ClassVar[str] = "matryoshka"

    def reconstruct(
        self, weights: Weights, x: Tensor, goal: Tensor, k: int, moment: Moment
    ) -> Reconstruction:
        """See the module's equation; term ``mse_m`` is the error of the level of width m."""
        widths = self.config.resolved_levels()
        codes = self.select(weights, x, k)
        total, levels, error = nested_squared_error(
            codes, weights.W_dec, weights.b_dec, goal, widths, self.level_weights()
        )
        inner = {f"mse_{width}": level for width, level in zip(widths[:-1], levels, strict=False)}
        state = threshold_state(moment.state, codes.values.detach())
        return Reconstruction(codes, total, {"mse": levels[-1], **inner}, error, state)

    def level_weights(self) -> tuple[float, ...]:
        """The levels' weights, with sum 1."""
        weights = self.config.level_weights or (1.0,) * len(self.config.resolved_levels())
        return tuple(weight / sum(weights) for weight in weights)
