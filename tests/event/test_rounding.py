"""Real weights: the same bits on every instruction set, PyTorch's spikes within rounding."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Readout, convert
from iirsnn.errors import UsageError
from iirsnn.event.flips import trace_flips
from iirsnn.event.network import EventNetwork
from iirsnn.models import ModelConfig, build, resnet
from iirsnn.runtime.library import set_capability
from tests.event.networks import (
    PLAN,
    engine_spikes,
    images,
    integers,
    levels,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_instruction_sets_give_the_same_bits(precision, pool, timesteps):
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(64, 3, 16, 16, generator=generator)
    config = ModelConfig("vgg", layers=[48, "A", 256, 70, "A", 33], hidden=[90], pool=pool)
    network = convert(build(config, 10, (3, 16, 16)), calibration, 80.0, timesteps=timesteps)
    net = EventNetwork.from_model(network.eval(), timesteps, precision=precision)
    results = []
    for name in levels():
        set_capability(name)
        results.append((net(calibration[:20]), engine_spikes(net)))
    for logits, spikes in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(spikes, results[0][1], strict=True))


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_flips_are_traced_to_rounding(name):
    """Thresholds set on a current: those neurons fire or not by the order of the additions."""
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    if name == "vgg":
        config = ModelConfig("vgg", layers=[48, "A", 100, 70], hidden=[90], batch_norm=False)
        ann = build(config, 10, (3, 16, 16))
    else:
        ann = resnet(PLAN["global pool"], 10, (3, 16, 16))
    network = convert(ann, x, 85.0, timesteps=1).eval()
    currents = []
    neuron = [m for m in network.modules() if isinstance(m, FusedLIF)][1]
    with torch.no_grad():
        handle = neuron.register_forward_pre_hook(lambda m, inputs: currents.append(inputs[0]))
        network(x)
        handle.remove()
        for value in currents[0].flatten().sort().values[-2000:-1980]:
            neuron.threshold.fill_(float(value))
            net = EventNetwork.from_model(network)
            flips = trace_flips(net, network, x)
            if flips:
                break
    roots = [flip for flip in flips if flip.root]
    assert roots
    assert {flip.layer for flip in roots} == {net.layers[2 if name == "vgg" else 1].name}
    assert all(flip.explained for flip in flips)
    assert max(flip.distance for flip in roots) < 20


def test_flips_of_another_network_are_not_explained():
    network = integers(
        nn.Conv2d(1, 20, 3), FusedLIF(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 40),
        FusedLIF(), Readout(40, 3),
    )  # fmt: skip
    net = EventNetwork.from_model(network)
    x = images(5, 1, 6, 6)
    assert trace_flips(net, network, x) == []
    network.layers[1].threshold.data += 0.5
    flips = trace_flips(net, network, x)
    assert any(flip.root for flip in flips)
    assert not any(flip.explained for flip in flips if flip.root)
    network.layers[4].bias.data.zero_()
    net = EventNetwork.from_model(network)
    network.layers[1].threshold.data.fill_(1e6)  # nothing at all reaches the neurons after it
    assert any(not flip.root for flip in trace_flips(net, network, x))
    with pytest.raises(UsageError, match="fp32 weights, got T = 1, int8"):
        trace_flips(EventNetwork.from_model(network, precision="int8"), network, x)


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_real_weights_differ_within_rounding_only(pool, batch_norm):
    """Each layer of PyTorch, given the engine's own spikes, agrees but within rounding."""
    generator = torch.Generator().manual_seed(3)
    calibration = torch.randn(64, 3, 16, 16, generator=generator)
    layers = [48, "A", 100, 70, "A", 33]
    config = ModelConfig("vgg", layers=layers, hidden=[90], pool=pool, batch_norm=batch_norm)
    ann = build(config, 10, (3, 16, 16))
    ann.train()(calibration)  # gives BatchNorm statistics
    network = convert(ann.eval(), calibration, 80.0, timesteps=1).eval()
    x = torch.randn(32, 3, 16, 16, generator=generator)
    net = EventNetwork.from_model(network)
    logits = net(x)
    found = iter(engine_spikes(net))
    state, total, rounding = x.double(), 0, torch.zeros(())
    for module in network.layers:
        if isinstance(module, FusedLIF):
            spikes = next(found)[0].reshape(state.shape)
            flips = spikes.bool() != (state > module.threshold.double())
            distance = (state - module.threshold.double()).abs()
            assert bool((distance[flips] <= 2 * rounding[flips]).all())
            total += int(flips.sum())
            state = spikes.double()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            exact = module.double() if not isinstance(module, Readout) else None
            if exact is None:
                reference = state @ module.weight.double().T + module.bias.double()
                break
            absolute = type(module)(**_arguments(module)).double()
            absolute.weight.data = module.weight.data.abs()
            absolute.bias.data = module.bias.data.abs()
            # n additions of parts whose absolute values add up to S err by less than n eps S
            terms = module.weight[0].numel() + 1
            rounding = terms * 2.0**-24 * absolute(state.abs()).detach()
            state = module(state).detach()
        else:
            state = module(state)
    assert total < 20
    torch.testing.assert_close(logits, reference.float(), rtol=1e-5, atol=1e-5)


def _arguments(module):
    if isinstance(module, nn.Linear):
        return dict(in_features=module.in_features, out_features=module.out_features)
    return dict(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=module.kernel_size,
        padding=module.padding,
    )
