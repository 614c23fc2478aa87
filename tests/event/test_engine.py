"""The engine in C++ alone."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from iirsnn import FusedLIF
from tests.event.networks import (
    images,
)


def window(kernel=(1, 1), stride=(1, 1), padding=(0, 0)):
    return [*kernel, *stride, 1, 1, *padding, *padding]


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_residual_blocks(level, timesteps, precision):
    """conv + skip, and conv + 1x1 conv of an earlier layer, before the neurons."""
    engine = importlib.import_module("iirsnn._C").EventEngine(2, 6, 6, timesteps)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randint(-3, 4, shape, generator=generator).float()

    lif = FusedLIF(threshold=2.5, leak=0.5)

    def neurons(source_weights, outputs, skips=()):
        synapses = [
            (source, w.numpy(), 1, window(w.shape[2:], stride, padding))
            for source, w, stride, padding in source_weights
        ]
        full = np.full(outputs, 1, np.float32)
        return engine.add_neurons(
            synapses, list(skips), precision, 0 * full, full, 2.5 * full, 0.5 * full, "soft", 0.0
        )

    stem, first, second = weight(70, 2, 3, 3), weight(70, 70, 3, 3), weight(70, 70, 3, 3)
    third, fourth, short = weight(40, 70, 3, 3), weight(40, 40, 3, 3), weight(40, 70, 1, 1)
    last = weight(3, 40 * 9, 1, 1)
    s0 = neurons([(0, stem, (1, 1), (1, 1))], 70)
    s1 = neurons([(s0, first, (1, 1), (1, 1))], 70)
    s2 = neurons([(s1, second, (1, 1), (1, 1))], 70, skips=[(s0, 1.0)])
    s3 = neurons([(s2, third, (2, 2), (1, 1))], 40)
    s4 = neurons([(s3, fourth, (1, 1), (1, 1)), (s2, short, (2, 2), (0, 0))], 40)
    scale, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
    readout = last.view(3, 40, 3, 3).numpy()
    engine.add_readout((s4, readout, 1, window((3, 3))), precision, bias, scale)

    x = images(4, 2, 6, 6)
    conv = nn.functional.conv2d

    def step(current):  # [T * B, ...] -> spikes
        with torch.no_grad():
            return lif(current.unflatten(0, (timesteps, 4))).flatten(0, 1)

    many = x.repeat(timesteps, 1, 1, 1)
    a = step(conv(many, stem, padding=1))
    c = step(conv(step(conv(a, first, padding=1)), second, padding=1) + a)
    d = step(conv(c, third, stride=2, padding=1))
    e = step(conv(d, fourth, padding=1) + conv(c, short, stride=2))
    assert all(0.05 < s.mean() < 0.95 for s in (a, c, d, e))
    expected = conv(e, last.view(3, 40, 3, 3)).flatten(1).unflatten(0, (timesteps, 4)).sum(0)
    assert torch.equal(torch.from_numpy(engine.run(x.numpy(), 1)[0]), expected)


def test_engine_checks_what_it_is_given():
    engine = importlib.import_module("iirsnn._C").EventEngine(1, 4, 4, 1)
    ones = np.ones(8, np.float32)

    def neurons(
        source=0, shape=(8, 1, 3, 3), groups=1, skips=(), bias=ones, reset="soft", size=None
    ):
        synapses = [(source, np.ones(shape, np.float32), groups, window(size or shape[2:]))]
        return engine.add_neurons(synapses, list(skips), "fp32", bias, ones, ones, ones, reset, 0.0)

    cases = [
        (dict(source=3), "source: expected the number of an earlier layer"),
        (dict(shape=(8, 2, 3, 3)), r"expected float32 \[outputs, 1, 3, 3\], got \[8, 2, 3, 3\]"),
        (dict(shape=(8, 1, 5, 5)), "a kernel that fits the padded input of 4 x 4, got 5 x 5"),
        (dict(shape=(8, 1, 0, 0)), "positive kernel"),
        (dict(groups=0), "groups: expected a divisor"),
        (dict(bias=ones[:5]), r"bias: expected float32 \[8\], got 5"),
        (dict(reset="never"), "reset: expected soft, hard, none or soft_delayed, got 'never'"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            neurons(**arguments)
    spikes = neurons()
    with pytest.raises(ValueError, match="skips: expected spikes of the layer's own shape"):
        neurons(source=spikes, shape=(8, 8, 2, 2), skips=[(spikes, 1.0)])
    with pytest.raises(ValueError, match="expected a readout as its last layer"):
        engine.run(np.zeros((1, 1, 4, 4), np.float32), 1)
    with pytest.raises(ValueError, match=r"images: expected float32 \[count, 1, 4, 4\]"):
        engine.run(np.zeros((1, 4, 4), np.float32), 1)
