"""A BatchNorm and the neurons behind it, called as one in training: half the memory is kept."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import BatchNormLIF, FusedLIF, TimeSequential, neurons


def fuse_norms(network: nn.Module, timesteps: int) -> nn.Module:
    """The network with a `BatchNormLIF` for each BatchNorm right before neurons.

    It shares every layer with `network`, which stays as it is: to train one is to train both, and
    names, parameters and state_dict are those of `network`. The first neurons see a current that is
    the same at every timestep. Where T > 1 their norm stays apart: it runs on one timestep alone.

    Args:
        network: of TimeSequentials, at any depth; any other has no such pairs.
        timesteps: T of its next forward passes.
    """
    return _fused(network, None if timesteps == 1 else next(iter(neurons(network)), None))


def _fused(module: nn.Module, apart: FusedLIF | None) -> nn.Module:
    children: dict[str, nn.Module | None] = {}
    last = ""
    for name, child in module._modules.items():
        norm = children.get(last)
        pair = isinstance(module, TimeSequential) and isinstance(norm, _BatchNorm)
        if pair and isinstance(child, FusedLIF) and child is not apart:
            assert norm is not None
            children[last] = BatchNormLIF(norm, child)
        else:
            children[name] = None if child is None else _fused(child, apart)
            last = name
    if children == module._modules:
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin
