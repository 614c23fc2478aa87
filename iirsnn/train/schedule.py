"""The optimiser of a stage, its learning rate over time, and dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn import Readout, SharedDropout, neurons
from .recipe import StageConfig


def make_optimizer(network: nn.Module, config: StageConfig) -> torch.optim.Optimizer:
    """The optimiser of a stage; thresholds and leaks have no weight decay."""
    own = {id(p) for neuron in neurons(network) for p in neuron.parameters()}
    shifts = set() if config.shift_rate == 1 else {id(p) for p in _shifts(network)}
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) not in own | shifts]},
        {"params": [p for p in parameters if id(p) in shifts], "factor": config.shift_rate},
        {
            "params": [p for p in parameters if id(p) in own],
            "weight_decay": 0.0,
            "factor": config.neuron_rate,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.Adam(
        groups, config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
    )


def _shifts(network: nn.Module) -> Iterator[nn.Parameter]:
    """What shifts the current of a channel's neurons: each bias but a Readout's."""
    for module in network.modules():
        bias = module._parameters.get("bias")
        if bias is not None and not isinstance(module, Readout):
            yield bias


def set_learning_rate(optimizer: torch.optim.Optimizer, config: StageConfig, done: float) -> None:
    """Set the learning rate for a stage of which the fraction `done` in [0, 1) is over."""
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = config.decay ** -sum(done >= milestone for milestone in config.milestones)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor * group.get("factor", 1.0)


def set_dropout(network: nn.Module, p: float) -> None:
    """Set the probability of every dropout."""
    for module in network.modules():
        if isinstance(module, (SharedDropout, nn.Dropout)):
            module.p = p
