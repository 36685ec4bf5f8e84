"""``SparseAutoencoder``: encode activations into sparse codes, decode them back; load and save.

The class is for inference: weights are plain tensors in the units of the model's activations (whatever centring
and scaling training used is folded in), and gradients are the trainer's business.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, get_args

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
from sae.normalising import Normalisation, normalised
from sae.sparse import decode


class SparseAutoencoder:
    """``f = σ((x − b_dec) W_enc + b_enc)``, ``x̂ = f W_dec + b_dec``, with σ given by the architecture.

    A *transcoder* (``config.transcoder``) reads x at one hook and predicts y at another, ``f = σ(x W_enc + b_enc)``,
    ``ŷ = f W_dec + b_dec``, plus ``W_skip x`` where it has a skip connection.

    Attributes:
        config: architecture, d_sae, k.
        weights: the tensors (:class:`sae.architectures.base.Weights`).
        metadata: where the SAE belongs: model_name, model_hash, hook_name, context_size, packing, prepend_bos,
            max_norm (tokens with a larger ‖x‖ were left out of training) and whatever its file says besides; of a
            transcoder also hook_name_out and max_norm_out (the bound on ‖y‖); of some SAEs from elsewhere
            normalize_activations (:mod:`sae.normalising`).
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
        """Decoder, ``[d_sae, d_out]``: row i is the direction that feature i writes."""
        return self.weights.W_dec

    @property
    def b_dec(self) -> Tensor:
        """Decoder bias, ``[d_out]``."""
        return self.weights.b_dec

    @property
    def W_skip(self) -> Tensor | None:
        """Of a transcoder with a skip connection, what it multiplies its input by: ``[d_out, d_in]``."""
        return self.weights.W_skip

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return self.weights.encoder_rows.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is written: d_in, but for a transcoder."""
        return self.weights.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.weights.W_dec.shape[0]

    @property
    def hook_name(self) -> str:
        """Where in the model this SAE reads."""
        return str(self.metadata["hook_name"])

    @property
    def hook_out(self) -> str:
        """Where its reconstruction belongs: ``hook_name``, but for a transcoder."""
        return str(self.metadata["hook_name_out"]) if self.config.transcoder else self.hook_name

    @property
    def normalisation(self) -> Normalisation | None:
        """What is done to every vector before it is encoded and undone behind it; None for most."""
        name = self.metadata.get("normalize_activations")
        return name if name in get_args(Normalisation) else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.W_dec.device

    @cached_property
    def hash(self) -> str:
        """sha256 over the tensors in name order."""
        return hash_tensors(self.weights.tensors())

    def exclusion(self, tokenizer: Tokenizer) -> Exclusion:
        """The positions that training left out by what is at ``hook_name``: special tokens and outlier norms."""
        return self._exclusion(tokenizer, "max_norm")

    def exclusions(self, tokenizer: Tokenizer) -> dict[str, Exclusion]:
        """The same at each hook; training of a transcoder kept the positions that count at both of its hooks."""
        found = {self.hook_name: self.exclusion(tokenizer)}
        if self.config.transcoder:
            found[self.hook_out] = self._exclusion(tokenizer, "max_norm_out")
        return found

    def _exclusion(self, tokenizer: Tokenizer, bound: str) -> Exclusion:
        max_norm = self.metadata.get(bound)
        keeps_special = self.metadata.get("exclude_special_tokens") is False
        return Exclusion(
            frozenset() if keeps_special else tokenizer.special_ids,
            float("inf") if max_norm is None else float(max_norm),
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [n, d_in]``, activations in the units of x."""
        x = x.to(self.b_dec.dtype)
        if self.normalisation is None:
            return self.architecture.encode(self.weights, x)
        x, scale, _ = normalised(self.normalisation, x)
        codes = self.architecture.encode(self.weights, x)
        scales = scale.flatten()[codes.pattern.rows()].view_as(codes.values)
        return SparseCodes(codes.pattern, codes.values * scales)

    @torch.no_grad()
    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """Reconstructions ``[n, d_out]`` of n codes.

        Args:
            x: ``[n, d_in]``, what the codes are of; needed for a skip connection, or a normalisation to undo.

        Raises:
            InputError: there is one of these, and no x.
        """
        if x is None and (self.W_skip is not None or self.normalisation is not None):
            raise InputError(
                "What this SAE puts out depends on its input beyond the codes: give decode the x that was encoded."
            )
        if x is not None and self.normalisation is not None:
            _, scale, mean = normalised(self.normalisation, x.to(self.b_dec.dtype))
            return (
                decode(codes, self.W_dec, torch.zeros_like(self.b_dec)).addcmul_(scale, self.b_dec).add_(mean)
            )
        output = decode(codes, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return output
        assert x is not None
        return output.addmm_(x.to(output.dtype), self.W_skip.t())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``decode(encode(x), x)`` for x of any leading shape: ``[..., d_in]`` to ``[..., d_out]``."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows), rows).view(*x.shape[:-1], self.d_out).to(x.dtype)

    def to(self, device: str | torch.device) -> "SparseAutoencoder":
        """The same SAE with its weights on another device."""
        moved = Weights(**{name: tensor.to(device) for name, tensor in self.weights.tensors().items()})
        return SparseAutoencoder(self.config, moved, self.metadata)

    def save(self, folder: str | Path) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` in SAELens' format, atomically.

        Other formats: :func:`sae.formats.convert.convert`.
        """
        from sae.formats.saelens import write_saelens

        write_saelens(self, Path(folder))

    @classmethod
    def load(cls, name: str | Path) -> "SparseAutoencoder":
        """Read an SAE of any known format, which shows in its content: SAELens' (ours), dictionary_learning's,
        sparsify's, OpenAI's, those of Gemma Scope and Llama Scope.

        Args:
            name: a folder (a run, too), a file of weights, or ``hf:org/repo/path@revision`` on the Hugging Face hub
                (path and revision where needed).

        Raises:
            InputError: files missing, corrupt or unsafe, or something in them that we do not have.
        """
        from sae.formats.detect import load

        return load(name)


def check_belongs(model: LanguageModel, sae: SparseAutoencoder) -> None:
    """Make sure that an SAE reads, and a transcoder writes, in this model.

    Raises:
        InputError: the SAE does not say where it belongs, was trained on other weights, or has another width; or a
            transcoder writes before it reads.
    """
    if "hook_name" not in sae.metadata:
        raise InputError("The SAE does not say where in a model it belongs: set metadata['hook_name'].")
    if sae.config.transcoder and "hook_name_out" not in sae.metadata:
        raise InputError("The transcoder does not say where it writes: set metadata['hook_name_out'].")
    sides = [("reads", sae.hook_name, sae.d_in), ("writes", sae.hook_out, sae.d_out)]
    for verb, hook_name, width in sides if sae.config.transcoder else sides[:1]:
        found = model.width(hook_name)
        if found != width:
            raise InputError(
                f"The SAE {verb} vectors of width {width}, and {hook_name} of {model.name} has width"
                f" {found}: choose the model that the SAE was trained on."
            )
    if sae.config.transcoder:
        check_order(model, sae.hook_name, sae.hook_out)
    if sae.metadata.get("model_hash") not in (None, model.hash):
        raise InputError(
            f"The SAE was trained on other weights than those of {model.name}: choose the model that the SAE was"
            " trained on."
        )


def check_order(model: LanguageModel, hook_name: str, hook_out: str) -> None:
    """Make sure that a transcoder reads what does not depend on what it writes.

    Raises:
        InputError: ``hook_out`` is computed before ``hook_name``, or a hook is not there.
    """
    if not model.computes_before(hook_name, hook_out):
        raise InputError(
            f"{model.name} computes {hook_out} before {hook_name}: a transcoder reads at the earlier hook and predicts"
            " the later one."
        )
