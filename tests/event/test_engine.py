"""The engine by itself: networks made of layers, without a model."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF
from iirsnn.event import EventNetwork
from iirsnn.event.layer import Input, Layer, Window
from tests.event.networks import (
    images,
)


def neurons(*inputs, outputs, **changed):
    full = torch.ones(outputs)
    return Layer(
        "neurons",
        "neurons",
        list(inputs),
        **{"bias": 0 * full, "threshold": 2.5 * full, "leak": 0.5 * full, **changed},
    )


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_residual_blocks(level, timesteps, precision):
    """conv + skip, and conv + 1x1 conv of an earlier layer, before the neurons."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randint(-3, 4, shape, generator=generator).float()

    def synapses(source, weight, stride=1, padding=0):
        if precision == "int8" and source:  # the image's stay as they are
            weight = weight.to(torch.int8)
        pads = (padding, padding)
        window = Window(tuple(weight.shape[2:]), (stride, stride), before=pads, after=pads)
        return Input(source, weight, window)

    def scale(outputs, source=1):
        return {"scale": torch.ones(outputs)} if precision == "int8" and source else {}

    stem, first, second = weight(70, 2, 3, 3), weight(70, 70, 3, 3), weight(70, 70, 3, 3)
    third, fourth, short = weight(40, 70, 3, 3), weight(40, 40, 3, 3), weight(40, 70, 1, 1)
    last = weight(3, 40, 3, 3)
    layers = [
        neurons(synapses(0, stem, padding=1), outputs=70),
        neurons(synapses(1, first, padding=1), outputs=70, **scale(70)),
        neurons(synapses(2, second, padding=1), Input(1), outputs=70, **scale(70)),
        neurons(synapses(3, third, 2, padding=1), outputs=40, **scale(40)),
        neurons(synapses(4, fourth, padding=1), synapses(3, short, 2), outputs=40, **scale(40)),
        Layer("readout", "last", [synapses(5, last)], bias=torch.zeros(3), **scale(3)),
    ]
    net = EventNetwork(layers, timesteps, precision, (2, 6, 6))

    x = images(4, 2, 6, 6)
    conv = nn.functional.conv2d
    lif = FusedLIF(threshold=2.5, leak=0.5)

    def step(current):  # [T * B, ...] -> spikes
        with torch.no_grad():
            return lif(current.unflatten(0, (timesteps, 4))).flatten(0, 1)

    many = x.repeat(timesteps, 1, 1, 1)
    a = step(conv(many, stem, padding=1))
    c = step(conv(step(conv(a, first, padding=1)), second, padding=1) + a)
    d = step(conv(c, third, stride=2, padding=1))
    e = step(conv(d, fourth, padding=1) + conv(c, short, stride=2))
    assert all(0.05 < s.mean() < 0.95 for s in (a, c, d, e))
    expected = conv(e, last).flatten(1).unflatten(0, (timesteps, 4)).sum(0)
    assert torch.equal(net(x), expected)


def test_engine_checks_what_it_is_given():
    ones = torch.ones(8)

    def built(*more, source=0, shape=(8, 1, 3, 3), groups=1, size=None, end=True, **changed):
        given = Input(source, torch.ones(shape), Window(tuple(size or shape[2:])), groups)
        layers = [neurons(given, outputs=8, **changed), *more]
        if end:
            layers.append(Layer("output", "end", [Input(len(layers))]))
        return EventNetwork(layers, 1, "fp32", (1, 4, 4))

    cases = [
        (dict(source=3), r"neurons\.inputs\.0\.source: expected an integer from 0 to 0, got 3"),
        (dict(shape=(8, 2, 3, 3)), "expected 1 channels, got 2 in 1 groups"),
        (dict(shape=(8, 1, 5, 5)), "a kernel that fits the padded input of 4 x 4, got 5 x 5"),
        (dict(shape=(8, 1, 3, 3), size=(0, 0)), "positive kernel"),
        (dict(groups=0), "groups: expected an integer from 1"),
        (dict(groups=3), "expected outputs in 3 groups, got 8"),
        (dict(bias=ones[:5]), r"threshold: expected float32\[5\], got float32\[8\]"),
        (dict(reset="never"), "reset: expected one of soft, hard, none, soft_delayed, got"),
        (dict(end=False), "expected a readout or an output as the last layer"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            built(**arguments)
    skip = neurons(Input(1, torch.ones(8, 8, 2, 2), Window((2, 2))), Input(1), outputs=8)
    with pytest.raises(ValueError, match="skips: expected spikes of the layer's own shape"):
        built(skip)
    with pytest.raises(ValueError, match=r"images: expected \[B, 1, 4, 4\], got \[1, 1, 4, 5\]"):
        built()(torch.zeros(1, 1, 4, 5))
