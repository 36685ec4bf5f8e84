"""OpenAI's format: one ``.pt`` file per SAE, a dictionary with ``pre_bias``, ``latent_bias`` and the two matrices.

    ReLU    f = relu(W_enc (x − pre_bias) + latent_bias),  x̂ = W_dec f + pre_bias
    TopK    n = (x − mean x) / (std x + 1e-5),  f = relu(top-k of W_enc (n − pre_bias) + latent_bias),
            x̂ = (W_dec f + pre_bias) · std x + mean x

with the unbiased standard deviation over the width (``model.py`` of openai/sparse_autoencoder; Gao et al. 2024,
2406.04093). Selecting before or after the ReLU gives the same activations. ``activation`` says which of the two it is,
``activation_state_dict`` holds k. Statistics of the training that lie in the file are not kept.
"""

from pathlib import Path
from typing import Any

from activations.errors import InputError
from sae.architectures.base import Weights
from sae.config import SAEConfig
from sae.formats.origin import with_origin
from sae.formats.reading import as_table, check_tensors, matrix_shape
from sae.model import SparseAutoencoder

FORMAT = "openai"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SETTINGS = ("activation", "activation_state_dict")


def read_openai(file: Path, content: dict[str, Any]) -> SparseAutoencoder:
    """Read an SAE.

    Args:
        content: what :func:`sae.formats.reading.read_content` gave for ``file``.

    Raises:
        InputError: the tensors do not fit each other, or the activation is neither ReLU nor TopK.
    """
    big = {name: value for name, value in content.items() if name not in _STATISTICS + _SETTINGS}
    d_sae, d_in = matrix_shape(file, big, "encoder.weight")
    shapes: dict[str, tuple[int, ...]] = {
        "pre_bias": (d_in,),
        "encoder.weight": (d_sae, d_in),
        "latent_bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
    }
    tensors = check_tensors(file, big, shapes, "its format")
    weights = Weights(
        tensors["encoder.weight"],
        tensors["latent_bias"],
        tensors["decoder.weight"].t().contiguous(),
        tensors["pre_bias"],
    )
    activation = content.get("activation", "ReLU")
    if activation == "ReLU":
        config = SAEConfig(architecture="relu", d_sae=d_sae)
        return SparseAutoencoder(config, weights, with_origin({}, FORMAT, {"activation": activation}))
    k = as_table(content.get("activation_state_dict")).get("k")
    if activation != "TopK" or not isinstance(k, int):
        raise InputError(
            f"{file} has the activation {activation!r} with k = {k!r}: ReLU, or TopK with its k, is read."
        )
    config = SAEConfig(d_sae=d_sae, k=k)
    config.check()
    found = {"normalize_activations": "layer_norm"}
    return SparseAutoencoder(config, weights, with_origin(found, FORMAT, {"activation": activation, "k": k}))
