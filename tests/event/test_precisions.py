"""bf16 and int8 weights."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Readout, convert
from iirsnn.event.network import EventNetwork
from iirsnn.models import ModelConfig, build
from tests.event.graphs import Residual
from tests.event.networks import assert_same, engine_spikes, images, integers, spikes_of


def test_all_weights_but_those_of_the_image_are_bf16():
    network = integers(
        nn.Conv2d(1, 40, 3), FusedLIF(), nn.Conv2d(40, 100, 3), FusedLIF(), nn.Flatten(),
        nn.Linear(400, 100), FusedLIF(), Readout(100, 4), timesteps=2,
    )  # fmt: skip
    assert_same(network, images(3, 1, 6, 6), precision="bf16")  # quarters are bf16 already
    first, *others = EventNetwork.from_model(network, 2, precision="bf16").layers
    assert first.weights[0].dtype == torch.float32  # the image meets it
    assert all(layer.weights[0].dtype == torch.bfloat16 for layer in others)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_int8_sums_do_not_overflow_in_the_worst_case(pool):
    """All channels spike into weights of the largest magnitude, pooled counts at their most."""
    side = 8 // pool
    for sign in (1.0, -1.0):
        network = integers(
            nn.Conv2d(1, 640, 3, padding=1), FusedLIF(), nn.AvgPool2d(pool),
            nn.Conv2d(640, 40, 3, padding=1), FusedLIF(), nn.Flatten(),
            nn.Linear(40 * side * side, 40),
            FusedLIF(), Readout(40, 3),
        )  # fmt: skip
        network.layers[0].bias.data.fill_(100.0)
        network.layers[3].weight.data.fill_(sign)
        network.layers[3].bias.data.fill_(2880.0 * -sign)
        net = EventNetwork.from_model(network, precision="int8")
        x = images(2, 1, 8, 8)
        logits = net(x)
        expected, _ = spikes_of(network, x)
        assert expected[0].mean() == 1
        for ours, theirs in zip(engine_spikes(net)[:2], expected, strict=False):
            assert torch.equal(ours.reshape(theirs.shape), theirs)
        assert logits.shape == (2, 3)


def test_int8_weights_are_the_nearest_multiples_of_their_outputs_scale():
    """The scale is of all weights that an output sums, those of a second convolution too."""
    torch.manual_seed(0)
    network = Residual().eval()
    exact, net = (
        EventNetwork.from_model(network, precision=precision, image_shape=(2, 8, 8))
        for precision in ("fp32", "int8")
    )
    rounded = [(a, b) for a, b in zip(exact.layers, net.layers, strict=True) if b.scale is not None]
    assert max(len(layer.weights) for layer, _ in rounded) > 1
    for layer, whole in rounded:
        largest = torch.zeros(len(layer.bias))
        for weight, integer in zip(layer.weights, whole.weights, strict=True):
            scale = whole.scale.view(-1, *[1] * (weight.dim() - 1))
            assert ((weight - integer.float() * scale).abs() <= 0.5001 * scale).all()
            largest = torch.maximum(largest, integer.float().abs().flatten(1).amax(1))
        assert (largest == 127).all()


def converted():
    """A small network and its calibration images."""
    generator = torch.Generator().manual_seed(5)
    calibration = torch.randn(64, 1, 12, 12, generator=generator)
    config = ModelConfig("vgg", layers=[40, "A", 70, "A"], hidden=[90])
    return convert(
        build(config, 10, (1, 12, 12)), calibration, 80.0, timesteps=1
    ).eval(), calibration


def assert_logits_of(net, rounded, x):
    logits = net(x)
    with torch.no_grad():
        expected = rounded(x)
    same = (logits - expected).abs().amax(1) < 1e-4 * expected.abs().max()
    assert same.float().mean() > 0.9  # the others hold a spike within rounding of its threshold


def test_bf16_is_the_model_with_rounded_weights():
    network, calibration = converted()
    net = EventNetwork.from_model(network, precision="bf16")
    _, *others = [
        module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert len(others) == 3
    for module in others:
        exact = module.weight.data
        module.weight.data = exact.bfloat16().float()
        assert (module.weight.data != exact).float().mean() > 0.9
    assert_logits_of(net, network, calibration)


def test_int8_is_the_model_with_rounded_weights():
    network, calibration = converted()
    net = EventNetwork.from_model(network, precision="int8")
    rounded = {layer.name: layer for layer in net.layers[1:] if layer.weights}
    pooled = {"layers.3": 4, "layers.7": 4}  # their weights carry the average pool's 1/4
    for name, module in network.named_modules():
        if name in rounded:
            layer = rounded[name]
            (weight,) = layer.weights
            shape = (-1, *[1] * (weight.dim() - 1))
            module.weight.data = weight.float() * layer.scale.view(shape) * pooled.get(name, 1)
    assert_logits_of(net, network, calibration)
