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


def bridge_backend(bridge: Any) -> Backend:
    """The bridge as a way to run a model: every hook name and alias that TransformerLens gives it."""
    by_point: dict[int, Site] = {}
    sites: dict[str, Site] = {}
    for name, point in bridge.hook_dict.items():
        if name.endswith(".hook_resid_mid"):
            # The same point as ln2.hook_in, but an edit of the residual stream must reach the residual too.
            sites[name] = Site(point, "hook_point", in_place=True)
        else:
            is_z = point is bridge.hook_dict.get(f"{name.rpartition('.attn.')[0]}.attn.hook_z")
            sites[name] = by_point.setdefault(id(point), Site(point, "hook_point", flatten=is_z))
    model = bridge.original_model
    return Backend(model, model.base_model, HookSites(sites))
