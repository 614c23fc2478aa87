"""Inputs and modules that the tests of BatchNorm and LIF in one share."""

import copy

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.ops import reference
from tests.composed import Composed

# [B, C, ...]: what the kernels do differently.
SHAPES = {
    "rows of whole vectors": (3, 6, 8, 8),
    "rows, odd": (3, 5, 7, 5),
    "short rows": (9, 24, 2, 2),
    "several chunks": (5, 12, 32, 32),
    "one channel": (7, 1, 9, 5),
    "no image": (70, 48),
    "one dimension": (4, 6, 17),
    "three dimensions": (2, 3, 4, 3, 5),
}
LAST = {
    "columns": (2, 32, 12, 12),
    "columns, several chunks": (5, 64, 20, 20),
    "columns, odd": (3, 21, 5, 5),
}


def make(shape, timesteps, dtype=torch.float32, *, last=False, channels=False, affine=True):
    """x, weight, bias, threshold, leak, grad_s: a current of mean 1/2 and deviation 2."""
    rng = torch.Generator().manual_seed(timesteps)

    def normal(*size):
        return torch.randn(size, generator=rng)

    def laid(t):
        if last:
            t = t.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, t.shape[:2])
        return t.to(dtype)

    count = shape[1]
    x, grad_s = (laid(normal(timesteps, *shape)) for _ in range(2))
    weight, bias = (1 + 0.3 * normal(count), 0.3 * normal(count)) if affine else (None, None)
    threshold, leak = torch.tensor([0.7]), torch.tensor([0.8])
    if channels:
        threshold, leak = torch.linspace(0.6, 0.9, count), torch.linspace(1.0, 0.7, count)
    return 2 * x + 0.5, weight, bias, threshold, leak, grad_s


EVERY_SHAPE = [
    pytest.param(shape, last, id=name)
    for shapes, last in ((SHAPES, False), (LAST, True))
    for name, shape in shapes.items()
]


def how(reset="soft", detach=True, surrogate="triangle"):
    return reset, 0.125, detach, surrogate, reference.SURROGATES[surrogate][1]


def modules(shape, **options):
    """BatchNormLIF and the two modules with the same parameters."""
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(shape[1], **options.pop("norm", {}))
    neuron = FusedLIF(0.7, 0.8, **options)
    for parameter in [*norm.parameters(), *neuron.parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.0)
    return BatchNormLIF(norm, neuron), Composed(*copy.deepcopy((norm, neuron)))


def run(module, x, grad_s):
    x = x.detach().requires_grad_()
    s = module(x)
    s.backward(grad_s)
    return s.detach(), x.grad, [p.grad for p in module.parameters()]
