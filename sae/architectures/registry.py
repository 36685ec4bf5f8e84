"""From a configuration to an architecture."""

from sae.architectures.base import Architecture
from sae.architectures.relu import ReLU
from sae.architectures.topk import TopK
from sae.config import SAEConfig


def architecture_from(config: SAEConfig) -> Architecture:
    """The architecture that a configuration describes."""
    if config.architecture == "topk":
        return TopK(config.d_sae, config.k, config.auxk)
    return ReLU(config.d_sae, config.l1)
