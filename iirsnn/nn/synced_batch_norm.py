"""A BatchNorm over the batches of all processes, and how a BatchNorm counts a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import Lost


@contextmanager
def losses() -> Iterator[None]:
    """A collective operation fails when another process is gone."""
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL or the store
        raise Lost("another process of this run ended before its time") from error


def all_reduce(tensor: Tensor, group: Any = None) -> None:
    """Make a tensor the sum of those of all processes, in place. Raises Lost."""
    with losses():
        dist.all_reduce(tensor, group=group)


def next_momentum(norm: Any) -> float:
    """Of a BatchNorm's call, which is counted: a running mean where the norm has no momentum."""
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def update_running_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Count a call of a BatchNorm that saw this mean and unbiased variance, each [C]."""
    momentum = next_momentum(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), momentum)


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes, on any device; torch's own needs a GPU.

    Equals one process's BatchNorm over the whole batch, up to rounding.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any [B, C, ...]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        others = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        elements = x.new_tensor([x.numel() / x.shape[1]])
        total = _AllReduce.apply(torch.cat([x.sum(others), elements]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            unbiased = variance.detach() * count / (count - 1)
            update_running_statistics(self, mean.detach(), unbiased)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y: Tensor = centred * scale.view(shape)
        if self.affine:
            y = y + self.bias.view(shape)
        return y.to(input.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for each process uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        all_reduce(total)
        return total
