"""``SparseAutoencoder``: encode activations into sparse codes, decode them back; load and save.

The class is for inference: weights are plain tensors in the units of the model's activations (whatever centring
and scaling training used is folded in), and gradients are the trainer's business.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.exclusion import Exclusion
from activations.files import hash_tensors
from activations.models import LanguageModel
from activations.tokenizer import Tokenizer
from sae.architectures.base import Weights
from sae.architectures.registry import architecture_from
from sae.codes import SparseCodes
from sae.config import SAEConfig
from sae.sparse import decode


class SparseAutoencoder:
    """``f = σ((x − b_dec) W_enc + b_enc)``, ``x̂ = f W_dec + b_dec``, with σ given by the architecture.

    Attributes:
        config: architecture, d_sae, k.
        weights: the tensors (:class:`sae.architectures.base.Weights`).
        metadata: where the SAE belongs: model_name, model_hash, hook_name, context_size, packing, prepend_bos,
            max_norm (tokens with a larger ‖x‖ were left out of training) and whatever its file says besides.
    """

    def __init__(self, config: SAEConfig, weights: Weights, metadata: dict[str, Any]) -> None:
        self.config = config
        self.weights = weights
        self.metadata = metadata
        self.architecture = architecture_from(config)

    @property
    def W_enc(self) -> Tensor:
        """Encoder, ``[d_in, d_sae]``."""
        return self.weights.encoder_rows.t()

    @property
    def b_enc(self) -> Tensor:
        """Encoder bias, ``[d_sae]``."""
        return self.weights.b_enc

    @property
    def W_dec(self) -> Tensor:
        """Decoder, ``[d_sae, d_in]``: row i is the direction that feature i writes."""
        return self.weights.W_dec

    @property
    def b_dec(self) -> Tensor:
        """Decoder bias, ``[d_in]``."""
        return self.weights.b_dec

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.weights.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.weights.W_dec.shape[0]

    @property
    def hook_name(self) -> str:
        """Where in the model this SAE reads and writes."""
        return str(self.metadata["hook_name"])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.W_dec.device

    @cached_property
    def hash(self) -> str:
        """sha256 over the tensors in name order."""
        return hash_tensors(self.weights.tensors())

    def exclusion(self, tokenizer: Tokenizer) -> Exclusion:
        """The positions that training left out: special tokens and outlier norms."""
        max_norm = self.metadata.get("max_norm")
        keeps_special = self.metadata.get("exclude_special_tokens") is False
        return Exclusion(
            frozenset() if keeps_special else tokenizer.special_ids,
            float("inf") if max_norm is None else float(max_norm),
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [n, d_in]``, activations in the units of x."""
        return self.architecture.encode(self.weights, x.to(self.b_dec.dtype))

    @torch.no_grad()
    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions ``[n, d_in]`` of n codes."""
        return decode(codes, self.W_dec, self.b_dec)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` for x of any leading shape, ``[..., d_in]``."""
        return self.decode(self.encode(x.reshape(-1, self.d_in))).view(x.shape).to(x.dtype)

    def to(self, device: str | torch.device) -> "SparseAutoencoder":
        """The same SAE with its weights on another device."""
        moved = Weights(**{name: tensor.to(device) for name, tensor in self.weights.tensors().items()})
        return SparseAutoencoder(self.config, moved, self.metadata)

    def save(self, folder: str | Path) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` in SAELens' format, atomically."""
        from sae.formats.saelens import write_saelens

        write_saelens(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "SparseAutoencoder":
        """Read a folder in SAELens' format (ours is the same).

        Raises:
            InputError: files missing or corrupt, or an architecture that we do not know.
        """
        from sae.formats.saelens import read_saelens

        return read_saelens(Path(folder))


def check_belongs(model: LanguageModel, sae: SparseAutoencoder) -> None:
    """Make sure that an SAE reads this model.

    Raises:
        InputError: the SAE does not say where it belongs, was trained on other weights, or has another width.
    """
    if "hook_name" not in sae.metadata:
        raise InputError("The SAE does not say where in a model it belongs: set metadata['hook_name'].")
    width = model.width(sae.hook_name)
    if width != sae.d_in:
        raise InputError(
            f"The SAE reads vectors of width {sae.d_in}, and {sae.hook_name} of {model.name} has width"
            f" {width}: choose the model that the SAE was trained on."
        )
    if sae.metadata.get("model_hash") not in (None, model.hash):
        raise InputError(
            f"The SAE was trained on other weights than those of {model.name}: choose the model that the SAE was"
            " trained on."
        )
