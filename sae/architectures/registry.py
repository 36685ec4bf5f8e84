"""From a configuration to an architecture."""

from sae.architectures.base import Architecture
from sae.architectures.batch_topk import BatchTopK
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.matryoshka import Matryoshka
from sae.architectures.relu import ReLU
from sae.architectures.topk import TopK
from sae.config import SAEConfig

ARCHITECTURES: dict[str, type[Architecture]] = {
    kind.name: kind for kind in (TopK, BatchTopK, Matryoshka, JumpReLU, Gated, ReLU)
}


def architecture_from(config: SAEConfig) -> Architecture:
    """The architecture that a configuration describes."""
    return ARCHITECTURES[config.architecture](config)
