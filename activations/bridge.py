"""The second way to run a model: TransformerLens' ``TransformerBridge``, which has every hook.

It recomputes attention in Python (several times slower than SDPA on long sequences), so it serves only what
the SDPA path does not: attention patterns, queries, keys, normalised inputs, other architectures. The bridge
is a rewired Hugging Face model, and its hook points are modules: the machinery of :mod:`activations.hooks`
runs it unchanged. TransformerLens is imported here, inside the function that needs it, because that takes
seconds.
"""

import copy
import warnings
from itertools import chain
from typing import Any

from activations.architectures import STREAM_HOOKS
from activations.errors import InputError
from activations.hooks import Backend, HookSites, Site


def start_bridge(hf_model: Any) -> Any:
    """A ``TransformerBridge`` over a Hugging Face model, with its weights as they are.

    Starting a bridge rewires the modules of the model it is given, so it gets a copy of them; the parameters
    are shared (only fused query-key-value matrices are split, which copies them).

    Raises:
        InputError: TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    shared = {id(tensor): tensor for tensor in chain(hf_model.parameters(), hf_model.buffers())}
    model = copy.deepcopy(hf_model, shared)
    model.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    except (ValueError, KeyError, NotImplementedError):
        raise InputError(
            f"TransformerLens cannot run the architecture {type(model).__name__}: choose a model of another"
            " one."
        ) from None


def centring_has_effect(bridge: Any) -> bool:
    """Whether TransformerLens' centred writing weights change what this model shows and not what it computes.

    They do where everything reads the residual stream through a LayerNorm in front of it.
    """
    refused = ("supports_fold_ln", "supports_center_writing_weights")  # TransformerLens takes them as given
    reads_through_norm = all(getattr(bridge.adapter, name, True) for name in refused)
    return reads_through_norm and bridge.cfg.normalization_type in ("LN", "LNPre")


def bridge_backend(bridge: Any, *, centred: bool = False) -> Backend:
    """The bridge as a way to run a model: every hook name and alias that TransformerLens gives it.

    Args:
        bridge: a ``TransformerBridge``.
        centred: whether what is captured in the residual stream has its mean subtracted.
    """
    points: dict[str, Any] = bridge.hook_dict
    stream = {id(point) for name, point in points.items() if name.rpartition(".")[2] in STREAM_HOOKS}
    by_point: dict[int, Site] = {}
    sites: dict[str, Site] = {}
    for name, point in points.items():
        centre = centred and id(point) in stream
        if name.endswith(".hook_resid_mid"):
            # The same point as ln2.hook_in, but an edit of the residual stream must reach the residual too.
            sites[name] = Site(point, "hook_point", in_place=True, centred=centre)
        else:
            is_z = point is points.get(f"{name.rpartition('.attn.')[0]}.attn.hook_z")
            site = Site(point, "hook_point", flatten=is_z, centred=centre)
            sites[name] = by_point.setdefault(id(point), site)
    model = bridge.original_model
    return Backend(model, model.base_model, HookSites(sites))
