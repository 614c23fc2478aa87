"""The exponential moving average of a network's weights over the steps of its training."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """average <- d average + (1 - d) weights after each step; buffers likewise, counters copied.

    d = min(decay, (1 + step) / (10 + step)): early weights are forgotten early. A moving average of
    the iterates is Polyak's and Juditsky's (1992); d is that of TensorFlow's
    `ExponentialMovingAverage` with `num_updates`.

    Args:
        network: whose weights are averaged; it is copied, and read again at each update.
        decay: in (0, 1); the average is that of about the last 1 / (1 - decay) steps.

    Attributes:
        network: with the average as its weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False), decay
        now = network.state_dict(keep_vars=True)  # the tensors themselves, which training changes
        pairs = [(average, now[name]) for name, average in self.network.state_dict().items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, weights = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, weights, share)
        for count, now in self._copied:
            count.copy_(now)
