"""BatchNormLIF against nn.BatchNorm2d and FusedLIF one after the other: forward and backward.

    pytest benchmarks/bench_batch_norm.py --benchmark-only -s

The shapes are those of VGG16's first and third stage on 32x32 images. Both give the same spikes.
"""

import copy

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF

#: T, B, C, height = width
SHAPES = [(1, 16, 64, 32), (5, 16, 64, 32), (1, 64, 256, 8), (5, 16, 256, 8)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Two(nn.Module):
    def __init__(self, norm, neuron):
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x):
        return self.neuron(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def cases():
    for shape in SHAPES:
        for layout in FORMATS:
            for dtype in (torch.float32, torch.bfloat16):
                telling = shape == SHAPES[0] and dtype == torch.float32
                marks = [pytest.mark.telling] if telling else []
                name = "x".join(map(str, shape)) + f"-{layout}-{str(dtype)[6:]}"
                yield pytest.param(shape, layout, dtype, marks=marks, id=name)


@pytest.mark.parametrize(("shape", "layout", "dtype"), list(cases()))
def test_step(race, shape, layout, dtype):
    timesteps, batch, channels, size = shape

    def normal():
        t = torch.randn(timesteps * batch, channels, size, size).to(dtype)
        return t.to(memory_format=FORMATS[layout]).unflatten(0, (timesteps, batch))

    x, grad_s = normal().requires_grad_(), normal()
    parts = nn.BatchNorm2d(channels), FusedLIF(1.0, 0.9)
    two, fused = Two(*copy.deepcopy(parts)), BatchNormLIF(*parts)
    different = (two(x) != fused(x)).double().mean().item()
    assert different < 1e-4  # torch sums channels_last in float32: currents near the threshold

    def step(module):
        def run():
            x.grad = None
            module(x).backward(grad_s)

        return run

    facts = {
        "subject": "batch_norm",
        "timesteps": timesteps,
        "batch": batch,
        "channels": channels,
        "size": size,
        "layout": layout,
        "dtype": str(dtype)[6:],
        "threads": torch.get_num_threads(),
    }
    calls = {"two modules": step(two), "BatchNormLIF": step(fused)}
    race(calls, facts, {}, 2.0, (21, 21), limit="two modules")
