"""What an SAE must beat: principal components and random weights, at the same L0.

A good reconstruction proves little by itself: activations concentrate in few directions, and dictionaries
that were never trained explain much of their variance too (2501.17727, 2602.14111). Controls are fitted on
training text, like the SAE.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, kept_positions
from activations.models import LanguageModel
from sae.architectures.base import Weights
from sae.codes import Pattern, SparseCodes
from sae.model import SparseAutoencoder
from sae.sparse import tile_rows

REFERENCE_ROWS = 20_000
L0_ROWS = 2048
L0_TOLERANCE = 0.02


class Autoencoder(Protocol):
    """What a reconstruction comes from: an SAE, or a control that behaves like one."""

    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [n, d_in]``."""
        ...

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions ``[n, d_in]``."""
        ...


def control_autoencoders(sae: SparseAutoencoder, reference: Tensor, seed: int) -> dict[str, Autoencoder]:
    """Both controls, at the SAE's mean L0 over 2,048 rows of ``reference``.

    Args:
        reference: ``[n, d_in]``, activations of training text, with the SAE's device and dtype.
        seed: of the random weights.
    """
    sample = reference[:: -(-len(reference) // L0_ROWS)]
    l0 = _mean_l0(sae, sample)
    return {
        "principal_components": PrincipalComponents.fit(reference, max(1, round(l0))),
        "random_weights": random_weights(sae, mean_activation(reference), sample, l0, seed),
    }


@dataclass(frozen=True)
class PrincipalComponents:
    """The first k principal components: the best reconstruction from k numbers that is linear in x.

    mean: ``[d_in]``.
    components: ``[k, d_in]``, orthonormal rows, largest variance first.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, reference: Tensor, k: int) -> "PrincipalComponents":
        """From activations ``reference [n, d_in]``, in float64; all components where k exceeds d_in."""
        mean = mean_activation(reference)
        centred = reference.cpu().double() - mean.cpu().double()
        directions = torch.linalg.eigh(centred.t() @ centred).eigenvectors.t().flip(0)
        return cls(mean, directions[:k].to(reference))

    def encode(self, x: Tensor) -> SparseCodes:
        """Coordinates of ``x [n, d_in]``: every row has all k components."""
        k = len(self.components)
        indices = torch.arange(k, dtype=torch.int32, device=x.device).expand(len(x), k)
        return SparseCodes(Pattern(k, indices), (x - self.mean) @ self.components.t())

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions ``[n, d_in]``."""
        return codes.values @ self.components + self.mean


def random_weights(
    sae: SparseAutoencoder, mean: Tensor, sample: Tensor, l0: float, seed: int
) -> SparseAutoencoder:
    """The SAE's architecture with random tied unit rows, centred on ``mean``, at the same L0.

    An architecture whose L0 depends on its weights (ReLU) gets one threshold for all features, found by
    bisection on ``sample``. The decoder is multiplied by the one number that reconstructs ``sample`` best:
    random directions would otherwise lose by their length alone.

    Args:
        mean: ``[d_in]``. sample: ``[n, d_in]``, activations of training text.
        l0: the mean L0 to reach.
    """
    tied = Weights.tied(sae.d_in, sae.d_sae, torch.Generator().manual_seed(seed))
    weights = Weights(**{name: tensor.to(sae.b_dec) for name, tensor in tied.tensors().items()})

    def with_threshold(threshold: float) -> SparseAutoencoder:
        b_enc = torch.full_like(weights.b_enc, -threshold)
        return SparseAutoencoder(sae.config, replace(weights, b_enc=b_enc, b_dec=mean), sae.metadata)

    control = with_threshold(0.0)
    if _mean_l0(control, sample) > (1 + L0_TOLERANCE) * l0:
        # Encoder rows have norm 1, so no pre-activation exceeds the norm of its input.
        low, high = 0.0, float((sample - mean).norm(dim=1).max())
        for _ in range(20):
            threshold = (low + high) / 2
            control = with_threshold(threshold)
            if _mean_l0(control, sample) > l0:
                low = threshold
            else:
                high = threshold
    estimate = control(sample) - mean
    scale = ((sample - mean) * estimate).sum() / estimate.square().sum().clamp_min(1e-30)
    return SparseAutoencoder(sae.config, replace(control.weights, W_dec=weights.W_dec * scale), sae.metadata)


def mean_activation(reference: Tensor) -> Tensor:
    """Mean row of ``reference [n, d]``, summed in float64, in its dtype and on its device."""
    return reference.cpu().double().mean(0).to(reference)


def reference_activations(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, n_rows: int = REFERENCE_ROWS
) -> Tensor:
    """Activations to fit controls on: the first ``n_rows`` of ``blocks`` that training would keep.

    Args:
        blocks: of the train split.

    Returns:
        float32 ``[n_rows, d_in]`` on the CPU; fewer rows where the blocks hold fewer.
    """
    exclusion = sae.exclusion(model.tokenizer)
    parts: list[Tensor] = []
    missing = n_rows
    for start, captured in capture_blocks(model, blocks, [sae.hook_name]):
        x = captured[sae.hook_name]
        kept = x[kept_positions(blocks, start, start + len(x), x, exclusion)][:missing]
        parts.append(kept.float().cpu())
        missing -= len(kept)
        if missing <= 0:
            break
    return torch.cat(parts)


def _mean_l0(sae: SparseAutoencoder, x: Tensor) -> float:
    """Mean number of features that fire per row of ``x [n, d_in]``; a tile at a time, for most may fire."""
    return sum(sae.encode(tile).nnz for tile in x.split(tile_rows(sae.d_sae))) / len(x)
