"""Networks whose sums are exact in float32, and what PyTorch makes of them."""

import functools

import torch
from torch import nn

from iirsnn import FusedLIF, Network
from iirsnn.event.network import EventNetwork
from iirsnn.models.resnet import Plan
from iirsnn.runtime.library import library

LEVELS = ("portable", "avx2", "avx512")


@functools.cache
def levels():
    """The instruction sets this processor has, best last; asked before any test changes them."""
    best = library().iirsnn_capability().decode()
    return LEVELS[: LEVELS.index(best) + 1]


def integers(*modules, timesteps=1, image_shape=None, seed=0):
    """A Network whose sums are exact in float32: weights are quarters, thresholds eighths."""
    network = Network(modules, image_shape)
    network.timesteps = timesteps
    generator = torch.Generator().manual_seed(seed)

    def draw(like, low, high, step):
        return torch.randint(low, high + 1, like.shape, generator=generator) * step

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = draw(module.weight, -3, 3, 0.25)
            if module.bias is not None:
                module.bias.data = draw(module.bias, -2, 2, 0.25)
        elif isinstance(module, FusedLIF):
            module.threshold.data = draw(module.threshold, 1, 20, 0.125)
            module.leak.data = draw(module.leak, 1, 4, 0.25)
    return network.eval()


def images(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator) * 0.5


def spikes_of(network, x):
    """Spikes of each FusedLIF, [T, B, ...], and the logits."""
    spikes = []
    hooks = [
        m.register_forward_hook(lambda module, inputs, output: spikes.append(output))
        for m in network.modules()
        if isinstance(m, FusedLIF)
    ]
    with torch.no_grad():
        logits = network(x)
    for hook in hooks:
        hook.remove()
    return spikes, logits


def engine_spikes(net):
    return [spikes.float() for spikes in net.spikes()]


def assert_same(network, x, varied=True, **options):
    net = EventNetwork.from_model(network, network.timesteps, **options)
    expected, logits = spikes_of(network, x)
    assert torch.equal(net(x), logits)
    found = engine_spikes(net)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)
        assert not varied or 0 < theirs.mean() < 1, "the case says nothing"
    return net


PLAN = {
    "average pool before, flat end": Plan((20, 40), True, ((40, 1), (70, 2)), False, (30,)),
    "global pool": Plan((70,), False, ((70, 2), (100, 1)), True),
}
