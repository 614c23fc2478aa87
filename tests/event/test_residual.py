"""Residual networks of this package."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, convert
from iirsnn.conversion import NeuronConfig, to_spiking
from iirsnn.event.network import EventNetwork
from iirsnn.measure.evaluation import count_operations
from iirsnn.models import ModelConfig, build, membrane_resnet, resnet
from tests.event.networks import PLAN, assert_same, engine_spikes, images, integers, spikes_of


@pytest.mark.parametrize("plan", PLAN)
@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d])
@pytest.mark.parametrize(("timesteps", "per_channel"), [(1, True), (2, False)])
def test_residual_networks(level, plan, pool, timesteps, per_channel):
    ann = resnet(PLAN[plan], 5, (2, 8, 8), pool=pool)
    snn = to_spiking(ann, timesteps, NeuronConfig(per_channel=per_channel))
    network = integers(*snn.layers, timesteps=timesteps)
    for module in network.modules():
        if isinstance(module, FusedLIF) and not per_channel:
            module.threshold.data.fill_(0.5)
    net = assert_same(network, images(3, 2, 8, 8))
    shortcuts = [layer.inputs[1] for layer in net.layers if len(layer.inputs) > 1]
    assert len(shortcuts) == 3
    assert sum(shortcut.weight is None for shortcut in shortcuts) == 2


@pytest.mark.parametrize(("timesteps", "per_channel"), [(1, True), (2, False)])
def test_shortcuts_of_currents(level, timesteps, per_channel):
    ann = membrane_resnet([4, 4, "A", 6, 6], 5, (2, 8, 8))
    snn = to_spiking(ann, timesteps, NeuronConfig(per_channel=per_channel))
    network = integers(*snn.layers, timesteps=timesteps, image_shape=(2, 8, 8))
    x = images(3, 2, 8, 8)
    net = assert_same(network, x)
    counted = count_operations(network, x)
    found = net.statistics()
    assert sum(layer.spikes for layer in found) == sum(counted.spikes.values())
    multiplications = sum(layer.multiplications for layer in found)
    assert multiplications == 3 * 2 * 4 * (3 * 8 - 2) ** 2  # the stem's, without its border


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_residual_network_in_a_file(tmp_path, precision):
    ann = resnet(PLAN["global pool"], 5, (2, 8, 8))
    network = integers(*to_spiking(ann, 2).layers, timesteps=2, image_shape=(2, 8, 8))
    net = EventNetwork.from_model(network, 2, precision=precision)
    net.save(tmp_path / "net.iirsnn")
    x = images(3, 2, 8, 8)
    assert torch.equal(EventNetwork.load(tmp_path / "net.iirsnn")(x), net(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vgg6"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_batch_norm_kept_in_the_snn_is_folded(name, per_channel):
    """The models of this package, with statistics that say something and thresholds by channel."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 16, 16, generator=generator)
    torch.manual_seed(0)
    ann = build(ModelConfig(name, hidden=[64], batch_norm=True), 10, (3, 16, 16))
    ann.train()(x)
    neuron = NeuronConfig(keep_batch_norm=True, per_channel=per_channel)
    network = convert(ann.eval(), x, 85.0, timesteps=1, neuron=neuron).eval()
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    if per_channel:
        for module in network.modules():
            if isinstance(module, FusedLIF):
                factors = torch.rand(module.threshold.shape, generator=generator) * 0.4 + 0.8
                module.threshold.data *= factors
    net = EventNetwork.from_model(network)
    expected, logits = spikes_of(network, x)
    found = net(x)
    for ours, theirs in zip(engine_spikes(net), expected, strict=True):
        assert float((ours.reshape(theirs.shape) != theirs).float().mean()) < 1e-4
    same = (found - logits).abs().amax(1) < 1e-3 * logits.abs().max()
    assert same.float().mean() > 0.8  # the others hold a spike within rounding of its threshold
