"""Networks that are graphs: the spikes and logits of PyTorch, file and all."""

import pytest
import torch

from iirsnn import FusedLIF
from iirsnn.event import EventNetwork
from iirsnn.event.flips import trace_flips
from tests.event.graphs import GRAPHS, Branches, Pools
from tests.event.networks import images, integers, spikes_of


def made(kind, timesteps=1):
    network = integers(kind()).layers[0].eval()
    network.timesteps = timesteps
    for module in network.modules():
        if isinstance(module, FusedLIF):
            module.threshold.data.mul_(0.5)  # as the graphs are small: more of them fire
    if kind is Pools:
        network.c.threshold.data.fill_(0.25)  # of averages, which are below 1
    side = 6 if kind is Branches else 8
    return network, images(3, network.stem.in_channels, side, side)


def check(net, network, x):
    expected, logits = spikes_of(network, x)
    assert torch.equal(net(x), logits)
    for ours, theirs in zip(net.spikes(), expected, strict=True):
        assert torch.equal(ours.float().reshape(theirs.shape), theirs)
        assert 0 < theirs.mean() < 1, "the case says nothing"


@pytest.mark.parametrize("kind", GRAPHS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("timesteps", [1, 2])
def test_graphs(level, tmp_path, kind, timesteps):
    network, x = made(kind, timesteps)
    net = EventNetwork.from_model(network, timesteps, image_shape=tuple(x.shape[1:]))
    check(net, network, x)
    names = [layer.name for layer in net.statistics()]
    assert len(names) == len(net.layers)
    net.save(tmp_path / "net.iirsnn")
    assert EventNetwork.load(tmp_path / "net.iirsnn") == net
    if timesteps == 1:
        assert trace_flips(net, network, x) == []
