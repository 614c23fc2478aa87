"""What the engine counts."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Readout
from iirsnn.conversion import to_spiking
from iirsnn.event.network import EventNetwork
from iirsnn.measure.energy import OperationCounter
from iirsnn.models import resnet
from tests.event.networks import PLAN, assert_same, images, integers


@pytest.mark.parametrize("timesteps", [1, 2])
def test_statistics_count_what_energy_counts(timesteps):
    network = integers(
        nn.Conv2d(2, 20, 3, padding=1), FusedLIF(), nn.MaxPool2d(2),
        nn.Conv2d(20, 70, 3, stride=2, padding=1), FusedLIF(), nn.Flatten(),
        nn.Linear(70 * 4, 50), FusedLIF(), Readout(50, 3), timesteps=timesteps,
    )  # fmt: skip
    x = images(5, 2, 8, 8)
    net = assert_same(network, x)
    counter = OperationCounter(network)
    with counter.watching(), torch.no_grad():
        network(x)
    statistics = {layer.name: layer for layer in net.statistics()}
    for name, counted in counter.layers.items():
        ours = statistics[name]
        if counted.multiplications:
            # the engine skips the padding; the model's count does not
            assert 0 < ours.multiplications <= counted.multiplications
        elif name != "layers.8":  # the readout's input is summed over time there
            assert ours.additions == counted.additions
            assert ours.weight_bytes == 4 * counted.additions
        assert ours.milliseconds > 0
    for name, spikes in counter.spikes.items():
        index = int(name.split(".")[1])
        assert statistics[f"layers.{index - 1}"].spikes == spikes
    assert statistics["layers.3"].dense_operations == 5 * 4 * 70 * 20 * 9
    assert statistics["layers.3"].neurons == 70 * 4


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_bytes_of_weights_are_those_of_their_precision(precision, size):
    network = integers(
        nn.Conv2d(2, 20, 3, padding=1), FusedLIF(), nn.Conv2d(20, 70, 3), FusedLIF(), nn.Flatten(),
        Readout(70 * 36, 3),
    )  # fmt: skip
    net = EventNetwork.from_model(network, precision=precision)
    net(images(5, 2, 8, 8))
    first, *others = net.statistics()
    assert first.weight_bytes == 4 * first.multiplications > 0  # the image meets float32
    assert all(layer.weight_bytes == size * layer.additions > 0 for layer in others)


def test_pooled_counts_cost_fewer_additions_than_their_spikes():
    network = integers(
        nn.Conv2d(2, 64, 3, padding=1), FusedLIF(), nn.AvgPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), FusedLIF(), nn.Flatten(), Readout(64 * 16, 3),
    )  # fmt: skip
    network.layers[1].threshold.data.fill_(0.5)
    x = images(5, 2, 8, 8)
    net = assert_same(network, x)
    counter = OperationCounter(network)
    with counter.watching(), torch.no_grad():
        network(x)
    ours = net.statistics()[2].additions
    assert 0 < ours < counter.layers["layers.3"].additions


def test_a_network_too_dense_to_pay_says_so():
    network = integers(
        nn.Conv2d(1, 16, 3), FusedLIF(), nn.Conv2d(16, 16, 1), FusedLIF(), nn.Flatten(),
        Readout(256, 3), timesteps=2,
    )  # fmt: skip
    network.layers[0].bias.data.fill_(50.0)
    network.layers[2].bias.data.fill_(50.0)
    net = EventNetwork.from_model(network, 2)
    with pytest.warns(RuntimeWarning, match="the dense network is faster"):
        net(images(2, 1, 6, 6))
    assert net.density() == 2


def test_residual_additions_are_those_of_its_spikes():
    ann = resnet(PLAN["global pool"], 5, (2, 8, 8))
    network = integers(*to_spiking(ann, 1).layers, timesteps=1)
    net = assert_same(network, images(3, 2, 8, 8))
    counter = OperationCounter(network)
    with counter.watching():
        network(images(3, 2, 8, 8))
    expected = sum(layer.additions for layer in counter.layers.values())
    *hidden, readout = net.statistics()  # whose counts of 16 cost fewer additions than spikes
    assert sum(s.additions for s in hidden) == expected - counter.layers[readout.name].additions
