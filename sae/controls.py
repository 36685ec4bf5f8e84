"""What an SAE must beat: a linear map and random weights, at the same L0.

A good reconstruction proves little by itself: activations concentrate in few directions, and dictionaries
that were never trained explain much of their variance too (2501.17727, 2602.14111). Controls are fitted on
training text, like the SAE; only how sparse they are is fitted to the text that is evaluated, where most SAEs fire
at another rate than in training. The linear one keeps round(L0) numbers of each activation: principal components for
an SAE, and for a transcoder, which has to predict other activations than those it reads, reduced-rank regression.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, capture_ranges, kept_at_all
from activations.models import LanguageModel
from sae.architectures.base import Weights
from sae.codes import Pattern, SparseCodes
from sae.config import SAEConfig
from sae.model import SparseAutoencoder
from sae.sparse import tile_rows

REFERENCE_ROWS = 20_000
EVALUATED_ROWS = 8192
L0_ROWS = 2048
L0_TOLERANCE = 0.02


class Autoencoder(Protocol):
    """What a reconstruction comes from: an SAE or transcoder, or a control that behaves like one."""

    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [n, d_in]``."""
        ...

    def decode(self, codes: SparseCodes, x: Tensor) -> Tensor:
        """Reconstructions ``[n, d_out]`` of codes of ``x [n, d_in]``."""
        ...


def control_autoencoders(
    sae: SparseAutoencoder, reference: Tensor, evaluated: Tensor, seed: int
) -> dict[str, Autoencoder]:
    """Both controls, at the SAE's mean L0 over ``evaluated``.

    Args:
        reference: activations of training text as :func:`reference_activations` gives them, with the SAE's device
            and dtype.
        evaluated: likewise, of the text that is evaluated, as :func:`evaluated_activations` gives them.
        seed: of the random weights.
    """
    x, y = read_and_written(sae, reference)
    l0 = _mean_l0(sae, read_and_written(sae, evaluated)[0])
    rank = max(1, round(l0))
    linear: dict[str, Autoencoder] = (
        {"reduced_rank": ReducedRank.fit(x, y, rank)}
        if sae.config.transcoder
        else {"principal_components": PrincipalComponents.fit(x, rank)}
    )
    return {**linear, "random_weights": random_weights(sae, reference, evaluated, l0, seed)}


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
        return cls(mean, _principal_directions(centred, k).to(reference))

    def encode(self, x: Tensor) -> SparseCodes:
        """Coordinates of ``x [n, d_in]``: every row has all k components."""
        return _all_fire((x - self.mean) @ self.components.t())

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """Reconstructions ``[n, d_in]``."""
        return codes.values @ self.components + self.mean


@dataclass(frozen=True)
class ReducedRank:
    """The best prediction of y from k numbers that are linear in x: reduced-rank regression (Izenman 1975).

    With B the least-squares map of centred x to centred y, and V the first k principal components of what it
    predicts, ŷ = (x − x̄) B V Vᵀ + ȳ. Where y is x, B is the identity, and these are the principal components.

    mean_in: ``[d_in]``. reading: B V, ``[d_in, k]``.
    mean_out: ``[d_out]``. components: Vᵀ, ``[k, d_out]``, orthonormal rows, largest predicted variance first.
    """

    mean_in: Tensor
    reading: Tensor
    mean_out: Tensor
    components: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, k: int) -> "ReducedRank":
        """From activations ``x [n, d_in]`` and ``y [n, d_out]``, in float64, without ridge.

        All components where k exceeds d_out; the shortest of several least-squares maps.
        """
        mean_in, mean_out = mean_activation(x), mean_activation(y)
        centred = x.cpu().double() - mean_in.cpu().double()
        goal = y.cpu().double() - mean_out.cpu().double()
        least_squares = torch.linalg.lstsq(centred, goal, driver="gelsd").solution
        components = _principal_directions(centred @ least_squares, k)
        return cls(mean_in, (least_squares @ components.t()).to(x), mean_out, components.to(y))

    def encode(self, x: Tensor) -> SparseCodes:
        """The k numbers of each row of ``x [n, d_in]``."""
        return _all_fire((x - self.mean_in) @ self.reading)

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """Predictions ``[n, d_out]``."""
        return codes.values @ self.components + self.mean_out


def _principal_directions(centred: Tensor, k: int) -> Tensor:
    """The first k principal directions of ``centred [n, d]``, as orthonormal rows ``[k, d]``."""
    return torch.linalg.eigh(centred.t() @ centred).eigenvectors.t().flip(0)[:k]


def _all_fire(values: Tensor) -> SparseCodes:
    """Codes of which every one of the k entries of ``values [n, k]`` is one."""
    n, k = values.shape
    indices = torch.arange(k, dtype=torch.int32, device=values.device).expand(n, k)
    return SparseCodes(Pattern(k, indices), values)


def random_weights(
    sae: SparseAutoencoder, reference: Tensor, evaluated: Tensor, l0: float, seed: int
) -> SparseAutoencoder:
    """An untrained SAE of the same size and L0: random unit rows, tied, centred on the mean activation.

    A TopK SAE is compared with TopK. The L0 of every other architecture depends on its weights: there the control is
    a ReLU SAE with one threshold for all features, found by bisection on 2,048 rows of ``evaluated``. The decoder is
    multiplied by the one number that reconstructs 2,048 rows of ``reference`` best: random directions would otherwise
    lose by their length alone. A transcoder's decoder rows are drawn by themselves, and it has no skip connection.

    Args:
        reference, evaluated: as for :func:`control_autoencoders`.
        l0: the mean L0 to reach.
    """
    x, y = read_and_written(sae, reference)
    mean_in, mean_out = mean_activation(x), mean_activation(y)
    x, y = _some_rows(x), _some_rows(y)
    firing = _some_rows(read_and_written(sae, evaluated)[0])
    generator = torch.Generator().manual_seed(seed)
    tied = Weights.tied(sae.d_in, sae.d_sae, generator)
    if sae.config.transcoder:
        drawn = Weights.tied(sae.d_out, sae.d_sae, generator)
        tied = replace(drawn, encoder_rows=tied.encoder_rows)
    weights = Weights(**{name: tensor.to(sae.b_dec) for name, tensor in tied.tensors().items()})
    config = replace(sae.config, skip=False)
    if sae.config.architecture != "topk":
        config = SAEConfig(architecture="relu", d_sae=sae.d_sae, transcoder=sae.config.transcoder)
    centring = weights.encoder_rows @ mean_in if sae.config.transcoder else torch.zeros_like(weights.b_enc)

    def with_threshold(threshold: float) -> SparseAutoencoder:
        b_enc = -threshold - centring
        return SparseAutoencoder(config, replace(weights, b_enc=b_enc, b_dec=mean_out), {})

    control = with_threshold(0.0)
    if _mean_l0(control, firing) > (1 + L0_TOLERANCE) * l0:
        # Encoder rows have norm 1, so no pre-activation exceeds the norm of its input.
        low, high = 0.0, float((firing - mean_in).norm(dim=1).max())
        for _ in range(20):
            threshold = (low + high) / 2
            if _mean_l0(with_threshold(threshold), firing) > l0:
                low = threshold
            else:
                high = threshold
        control = with_threshold(high)
    estimate = control(x) - mean_out
    scale = ((y - mean_out) * estimate).sum() / estimate.square().sum().clamp_min(1e-30)
    return SparseAutoencoder(config, replace(control.weights, W_dec=weights.W_dec * scale), {})


def mean_activation(reference: Tensor) -> Tensor:
    """Mean row of ``reference [n, d]``, summed in float64, in its dtype and on its device."""
    return reference.cpu().double().mean(0).to(reference)


def read_and_written(sae: SparseAutoencoder, activations: Tensor) -> tuple[Tensor, Tensor]:
    """What an SAE reads ``[n, d_in]`` and what it is to reconstruct ``[n, d_out]``: the same, but for a transcoder.

    Args:
        activations: ``[n, d_in]``; of a transcoder ``[n, d_in + d_out]``, both hooks side by side.
    """
    if not sae.config.transcoder:
        return activations, activations
    read, written = activations.split([sae.d_in, sae.d_out], dim=1)
    return read, written


def reference_activations(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, n_rows: int = REFERENCE_ROWS
) -> Tensor:
    """Activations to fit controls on: the first ``n_rows`` of ``blocks`` that training would keep.

    Args:
        blocks: of the train split.

    Returns:
        float32 ``[n_rows, d_in]`` on the CPU, of a transcoder ``[n_rows, d_in + d_out]``; fewer rows where the blocks
        hold fewer.
    """
    batches = capture_blocks(model, blocks, list(sae.exclusions(model.tokenizer)))
    return _kept_rows(model, sae, blocks, batches, n_rows)


def evaluated_activations(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, seed: int, n_rows: int = EVALUATED_ROWS
) -> Tensor:
    """Activations to measure L0 on: the first ``n_rows`` that count of ``blocks``, these in a random order.

    Args:
        blocks: of the split that is evaluated. seed: of the order.

    Returns:
        as :func:`reference_activations`.
    """
    order = np.random.default_rng(seed).permutation(blocks.n_blocks).tolist()
    ranges = ((block, block + 1) for block in order)
    batches = capture_ranges(model, blocks, list(sae.exclusions(model.tokenizer)), ranges)
    return _kept_rows(model, sae, blocks, batches, n_rows)


def _kept_rows(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    batches: Generator[tuple[int, dict[str, Tensor]], Any, None],
    n_rows: int,
) -> Tensor:
    """The first ``n_rows`` of ``batches`` (first block, activations by hook) that count, all hooks side by side."""
    exclusions = sae.exclusions(model.tokenizer)
    parts: list[Tensor] = []
    missing = n_rows
    with closing(batches):
        for start, captured in batches:
            stop = start + len(captured[sae.hook_name])
            counts = kept_at_all(blocks, start, stop, captured, exclusions)
            sides = (captured[hook_name] for hook_name in exclusions)
            parts.append(torch.cat([x[counts.to(x.device)][:missing].float().cpu() for x in sides], dim=1))
            missing -= len(parts[-1])
            if missing <= 0:
                break
    return torch.cat(parts)


def _some_rows(x: Tensor) -> Tensor:
    """At most 2,048 rows of ``x [n, d]``, evenly spaced."""
    return x[:: -(-len(x) // L0_ROWS)]


def _mean_l0(sae: SparseAutoencoder, x: Tensor) -> float:
    """Mean number of features that fire per row of ``x [n, d_in]``; a tile at a time, for most may fire."""
    return sum(sae.encode(tile).nnz for tile in x.split(tile_rows(sae.d_sae))) / len(x)
