"""Layers that know about time; everything else in a model is a plain torch.nn module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeSequential(nn.Sequential):
    """A Sequential over [T, B, ...].

    Modules with a true class attribute `over_time` (neurons, shared dropout, readout) see
    [T, B, ...]. All others see the merged axis [T*B, ...] and so run once for all timesteps; where
    the input is the same at every timestep (stride 0 in time, see `iirsnn.nn.direct`) they
    run on one timestep alone.
    """

    over_time = True  # so that one may stand inside another

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) if getattr(module, "over_time", False) else _merged(module, x)
        return x


def _merged(module: nn.Module, x: Tensor) -> Tensor:
    timesteps = x.shape[0]
    if timesteps > 1 and x.stride(0) == 0:
        y: Tensor = module(x[0])
        return y.expand(timesteps, *y.shape)
    merged: Tensor = module(x.flatten(0, 1))
    return merged.view(timesteps, x.shape[1], *merged.shape[1:])


class SharedDropout(nn.Module):
    """Dropout with one mask for all timesteps: a dropped neuron is silent for the whole pass.

    Args:
        p: probability of dropping a neuron, 0 <= p < 1.
    """

    over_time = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, ...] -> the same shape."""
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(torch.ones_like(x[0]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Readout(nn.Linear):
    """The last layer: accumulates its current over time and never spikes.

    sum_t (W s_t + b) is computed as W (sum_t s_t) + T b, so the product runs once.
    """

    over_time = True

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, in_features] -> logits [B, out_features]."""
        timesteps = x.shape[0]
        bias = None if self.bias is None else timesteps * self.bias
        return F.linear(x.sum(0), self.weight, bias)
