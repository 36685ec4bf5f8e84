"""Reach a chosen L0 and hold it: the sparsity weight λ is moved by a controller.

The measurement is the batch's L0. The controller is proportional and integral in ``u = log(L0 / target)``, since L0 and λ are related
by something like a power law: ``log λ = I + P · u``, where I gathers u over time. Time is the fraction of the run that has
passed: how fast a network answers depends on the learning rate, which is chosen from the length of the run.
"""

import math

import torch
from torch import Tensor

from sae.architectures.base import Moment
from sae.config import SAEConfig

WARMUP = 0.05  # of the run: the sparsity weight rises from 0
PROPORTIONAL = 1.0
INTEGRAL = 10.0
SMOOTHING = 0.9  # of the measurement, from batch to batch
_KEYS = ("log_weight", "log_off", "done")


def initial_control(config: SAEConfig) -> dict[str, Tensor]:
    if config.target_l0 is None:
        return {}
    return {
        "log_weight": torch.tensor(math.log(config.resolved_sparsity_weight())),
        "log_off": torch.zeros(()),
        "done": torch.zeros(()),
    }


def sparsity_weight(config: SAEConfig, moment: Moment) -> Tensor | float:
    rise = min(moment.done / WARMUP, 1.0)
    if config.target_l0 is None:
        return config.resolved_sparsity_weight() * rise
    return (moment.state["log_weight"] + PROPORTIONAL * moment.state["log_off"]).exp() * rise


def next_control(config: SAEConfig, moment: Moment, l0: Tensor) -> dict[str, Tensor]:
    if config.target_l0 is None:
        return moment.state
    state = moment.state
    off = l0.clamp_min(1e-2).log() - math.log(config.target_l0)
    off = SMOOTHING * state["log_off"] + (1 - SMOOTHING) * off
    passed = moment.done - state["done"]
    return {
        **state,
        "log_weight": state["log_weight"] + INTEGRAL * passed * off.clamp(-2, 2),
        "log_off": off,
        "done": torch.full_like(state["done"], moment.done),
    }
