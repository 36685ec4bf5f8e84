"""Models that read pictures: capturing by hook name from a tensor of pixels.

They have no tokenizer, context or text to write, so they have a class of their own; everything runs through
``TransformerBridge``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from activations.errors import InputError
from activations.hooked import HookedModel
from activations.loading import load_vision_folder, locate, resolve_device, resolve_dtype


class VisionModel(HookedModel):
    """A vision transformer whose activations are captured by TransformerLens hook name.

    Made by :meth:`load`, :meth:`from_hf` or :meth:`from_bridge`. A position is a patch of the picture, after the class
    token.

    Attributes:
        name: what it was loaded by.
        config: the Hugging Face configuration.
        n_layers, d_model, n_heads, d_head: its dimensions.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        *,
        hf_model: Any = None,
        bridge: Any = None,
        weight_files: Sequence[Path] = (),
    ):
        super().__init__(
            name, config, hf_model=hf_model, bridge=bridge, path="bridge", weight_files=weight_files
        )
        if not hasattr(config, "image_size"):
            raise InputError(f"{name} is a {config.model_type} model, which reads no pictures.")

    @classmethod
    def load(
        cls, name: str, *, device: str | None = None, dtype: str | torch.dtype | None = None
    ) -> "VisionModel":
        """Load a local Hugging Face folder or a model of the hub; arguments as for :meth:`LanguageModel.load`.

        Raises:
            InputError: the model cannot be found or read, or it reads no pictures.
        """
        chosen_device = resolve_device(device)
        folder = locate(name)
        hf_model = load_vision_folder(folder, chosen_device, resolve_dtype(dtype, chosen_device))
        weight_files = sorted(folder.glob("*.safetensors"))
        return cls(name, hf_model.config, hf_model=hf_model, weight_files=weight_files)

    @classmethod
    def from_hf(cls, model: Any, name: str) -> "VisionModel":
        """Wrap a loaded Hugging Face vision transformer, as it is, in evaluation mode."""
        return cls(name, model.config, hf_model=model.eval())

    @classmethod
    def from_bridge(cls, bridge: Any) -> "VisionModel":
        """Wrap an existing ``TransformerBridge``, with its weights as they are."""
        model = bridge.original_model.eval()
        return cls(str(bridge.cfg.model_name), model.config, bridge=bridge)

    @torch.no_grad()
    def capture(
        self,
        pixels: Tensor,
        hook_names: Sequence[str],
        *,
        out: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """What flows at ``hook_names`` when the model sees ``pixels``; stops after the last of them.

        Args:
            pixels: ``[batch, channels, height, width]``, scaled as the model's image processor does.
            hook_names: TransformerLens names.
            out: tensors, by hook name, into which what is captured is written.

        Returns:
            for each name ``[batch, 1 + patches, width]`` (hooks inside attention keep their own shape), in the model's
            dtype. The tensors may share memory: do not change them in place.

        Raises:
            InputError: ``pixels`` have the wrong shape, or a hook does not exist or does not fire.
        """
        expected = self._picture_shape
        if tuple(pixels.shape[1:]) != expected:
            raise InputError(
                f"The pixels have shape {list(pixels.shape)}; {self.name} reads [batch, channels, height, width] ="
                f" [batch, {', '.join(map(str, expected))}]."
            )
        backend = self._backend(hook_names, ())
        forward = partial(backend.base_model, pixel_values=pixels.to(self.device, self.dtype))
        return backend.sites.capture(forward, list(dict.fromkeys(hook_names)), len(pixels), out=out)

    @property
    def _picture_shape(self) -> tuple[int, ...]:
        size = self.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.config.num_channels, height, width

    def _probe(self, batch: int, pos: int) -> dict[str, Any]:
        return {
            "pixel_values": torch.zeros(batch, *self._picture_shape, device=self.device, dtype=self.dtype)
        }
