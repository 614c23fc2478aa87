"""A network in evaluation that the threads of a server share: layers keep nothing of a call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, convert, use_spike_layers
from iirsnn.functional import lif
from iirsnn.models import ModelConfig, build
from iirsnn.nn import BatchNormLIF

SIZES = (1, 7, 3, 16)


def network(timesteps, spike_layers):
    config = ModelConfig("vgg", layers=[24, "A", 40], hidden=[50], pool="average")
    torch.manual_seed(0)
    ann = build(config, 10, (3, 12, 12))
    snn = convert(ann, torch.randn(64, 3, 12, 12), 80.0, timesteps=timesteps).eval()
    if spike_layers:
        use_spike_layers(snn, spike_layers)
    return snn


def assert_shared(function, draw):
    """Four threads, each with another number of torch's own, call it on batches of any size."""
    inputs = [draw(size) for size in SIZES]
    with torch.no_grad():
        alone = [function(x) for x in inputs]
    start = threading.Barrier(4)

    def caller(number):
        start.wait()
        with torch.no_grad():
            for turn in range(12):
                index = (number + turn) % len(SIZES)
                assert torch.equal(function(inputs[index]), alone[index])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))


@pytest.mark.parametrize("spike_layers", [None, "auto", "events", "dense"])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_converted_network(timesteps, spike_layers):
    net = network(timesteps, spike_layers)
    assert_shared(net, lambda size: torch.randn(size, 3, 12, 12))


@pytest.mark.parametrize("timesteps", [1, 4])
def test_layers(timesteps):
    norm = BatchNormLIF(nn.BatchNorm2d(6), FusedLIF(channels=6)).eval()
    neuron = FusedLIF(leak=0.9, channels=6)
    for layer in (norm, neuron, lambda x: lif(x, packed=True).unpack()):
        assert_shared(layer, lambda size: torch.randn(timesteps, size, 6, 5, 5) + 0.4)
