"""What labels are worth: the same labels for things that nobody claims to be features.

*MLP neurons* of the same layer and *random directions* in the space that the SAE reads, each with a threshold at which
it fires as often as the feature that it is paired with, are labelled and scored by the very same code. A share of
features with a good label means something only beside theirs. (The kind "says" is open to features alone: it needs
what they write.)
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.capture import capture_blocks, kept_at_all
from activations.errors import InputError
from activations.exclusion import Exclusion
from activations.models import LanguageModel
from activations.progress import Progress, silent
from activations.tokenizer import Tokenizer
from features.aspects import Text
from features.explain import Evidence
from features.firing_table import FiringTable
from sae.codes import SparseCodes
from sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Thresholded:
    """Numbers read off activations, each firing where it exceeds its threshold; an activation is what it exceeds it by.

    Attributes:
        hook_name: where in the model.
        directions: float32 ``[d_sae, d_in]``, dot products with which are read; or int64 ``[d_sae]``, coordinates.
        threshold: float32 ``[d_sae]``, infinite for those that never fire.
        excluded: which positions do not count, by hook.
    """

    hook_name: str
    directions: Tensor
    threshold: Tensor
    excluded: dict[str, Exclusion]

    @property
    def d_sae(self) -> int:
        """How many they are."""
        return len(self.directions)

    @property
    def b_dec(self) -> Tensor:
        """Of the device and number format that :meth:`encode` takes."""
        return self.threshold

    def exclusions(self, tokenizer: Tokenizer) -> dict[str, Exclusion]:
        """The SAE's, so that the same positions count."""
        return self.excluded

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [n, d_in]``."""
        return SparseCodes.from_dense((project(self.directions, x) - self.threshold).clamp_min(0))


def project(directions: Tensor, x: Tensor) -> Tensor:
    """``[n, m]``, what m directions or coordinates (see :class:`Thresholded`) read off ``x [n, d_in]``."""
    return x @ directions.t() if directions.is_floating_point() else x[:, directions]


def mlp_neurons(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, count: np.ndarray, *, seed: int = 0
) -> Thresholded:
    """A neuron of the SAE's layer for every feature, in random order, as often as needed.

    Args:
        blocks: the text that labels are fitted to. count: int ``[d_sae]``, firings of each feature there.

    Raises:
        InputError: the SAE does not read in a layer, or the model's MLPs have no neurons (experts).
    """
    layer = re.match(r"blocks\.\d+\.", sae.hook_name)
    if layer is None:
        raise InputError(
            f"{sae.hook_name} is in no layer, so that no neurons can be compared with its features."
        )
    hook_name = f"{layer[0]}mlp.hook_post"
    width = model.width(hook_name)
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(width, generator=generator) for _ in range(-(-len(count) // width))]
    return _calibrated(model, sae, blocks, hook_name, torch.cat(rounds)[: len(count)], count)


def random_directions(
    model: LanguageModel, sae: SparseAutoencoder, blocks: TokenBlocks, count: np.ndarray, *, seed: int = 0
) -> Thresholded:
    """A random direction of the SAE's input for every feature; arguments as for :func:`mlp_neurons`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(count), sae.d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return _calibrated(model, sae, blocks, sae.hook_name, directions, count)


def control_evidence(
    model: LanguageModel,
    control: Thresholded,
    blocks: TokenBlocks,
    score_blocks: TokenBlocks,
    *,
    progress: Progress = silent,
) -> Evidence:
    """What labels of a control are made from: ``blocks`` to fit to, ``score_blocks`` to score on."""
    train = FiringTable.of(model, control, blocks, task="read firings", progress=progress)
    score = FiringTable.of(model, control, score_blocks, task="read held-out firings", progress=progress)
    tokenizer = model.tokenizer
    return Evidence(
        Text.of_blocks([blocks, score_blocks], tokenizer.vocabulary(), tokenizer.special_ids),
        train,
        score.moved(blocks.ids.size),
        np.ones(control.d_sae),
        train.medians(),
        None,
    )


def _calibrated(
    model: LanguageModel,
    sae: SparseAutoencoder,
    blocks: TokenBlocks,
    hook_name: str,
    directions: Tensor,
    count: np.ndarray,
) -> Thresholded:
    """Thresholds at which each direction fires ``count`` times on ``blocks`` (more rarely, where values are equal)."""
    excluded = sae.exclusions(model.tokenizer)
    excluded.setdefault(hook_name, Exclusion(excluded[sae.hook_name].special_ids, float("inf")))
    rows = []
    for start, found in capture_blocks(model, blocks, list(excluded)):
        kept = kept_at_all(blocks, start, start + len(found[hook_name]), found, excluded)
        rows.append(found[hook_name][kept].float().cpu())
    x = torch.cat(rows)
    threshold = torch.full((len(count),), float("inf"))
    for number in np.flatnonzero(count).tolist():
        values = project(directions[number : number + 1], x)[:, 0].numpy()
        weakest = len(values) - int(count[number])  # of those that are to fire
        if weakest == 0:
            threshold[number] = float(values.min()) - 1
            continue
        below, above = np.partition(values, (weakest - 1, weakest))[weakest - 1 : weakest + 1]
        threshold[number] = (float(below) + float(above)) / 2
    return Thresholded(hook_name, directions, threshold, excluded)
