"""The event engine against PyTorch: exact where sums are exact, within rounding elsewhere."""

import functools
import importlib
import json
import struct

import numpy as np
import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Network, Readout, SharedDropout, TimeSequential, convert
from iirsnn.conversion import NeuronConfig, to_spiking
from iirsnn.errors import RunError, UsageError
from iirsnn.event.flips import trace_flips
from iirsnn.event.network import FORMAT, EventNetwork
from iirsnn.measure.energy import OperationCounter
from iirsnn.models import ModelConfig, build, resnet
from iirsnn.models.resnet import Plan

LEVELS = ("portable", "avx2", "avx512")


@functools.cache
def levels():
    """The instruction sets this processor has, best last; asked before any test changes them."""
    module = importlib.import_module("iirsnn._C")
    best = module.build_info()["cpu_capability"]
    return LEVELS[: LEVELS.index(best) + 1]


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers on a busy machine: threads that wait for each other make minutes of seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in levels():
        pytest.skip(f"this processor has no {request.param}")
    module = importlib.import_module("iirsnn._C")
    module.set_cpu_capability(request.param)
    yield request.param
    module.set_cpu_capability(levels()[-1])


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

CONVOLUTIONS = {
    "3x3": dict(kernel_size=3, padding=1),
    "3x3 no padding": dict(kernel_size=3),
    "1x1": dict(kernel_size=1),
    "5x5 stride 2": dict(kernel_size=5, stride=2, padding=2),
    "1x3": dict(kernel_size=(1, 3), padding=(0, 1)),
    "stride over kernel": dict(kernel_size=2, stride=3),
    "wide padding": dict(kernel_size=3, padding=3),
    "dilation": dict(kernel_size=3, padding=2, dilation=2),
    "uneven": dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "same": dict(kernel_size=4, padding="same"),
    "valid": dict(kernel_size=2, padding="valid"),
    "no bias": dict(kernel_size=3, padding=1, bias=False),
    "whole image": dict(kernel_size=(7, 6)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("timesteps", [1, 3])
def test_convolutions(level, case, timesteps):
    options = CONVOLUTIONS[case]
    size = nn.Conv2d(1, 1, **options)(torch.zeros(1, 1, 7, 6)).shape[2:].numel()
    network = integers(
        nn.Conv2d(3, 20, 3, padding=1),
        FusedLIF(),
        nn.Conv2d(20, 70, **options),
        FusedLIF(channels=70),
        nn.Flatten(),
        Readout(70 * size, 5),
        timesteps=timesteps,
    )
    assert_same(network, images(3, 3, 7, 6))


@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c != "whole image"])
def test_first_layer(level, case):
    options = CONVOLUTIONS[case]
    size = nn.Conv2d(1, 1, **options)(torch.zeros(1, 1, 7, 6)).shape[2:].numel()
    network = integers(
        nn.Conv2d(2, 33, **options),
        FusedLIF(),
        nn.Flatten(),
        Readout(33 * size, 5),
        timesteps=2,
    )
    assert_same(network, images(3, 2, 7, 6))


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 48, 63, 64, 65, 130, 192])
def test_any_number_of_channels(level, channels):
    network = integers(
        nn.Conv2d(1, channels, 3, padding=1),
        FusedLIF(),
        nn.Conv2d(channels, channels, 3, padding=1),
        FusedLIF(),
        nn.Flatten(),
        nn.Linear(channels * 20, channels),
        FusedLIF(),
        Readout(channels, 3),
    )
    assert_same(network, images(5, 1, 5, 4), varied=channels > 1)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [
        (8, 8, 8),
        (8, 16, 8),
        (64, 128, 2),
        (96, 192, 2),
        (100, 150, 5),
        (130, 130, 130),
        (128, 64, 4),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_groups(level, channels, outputs, groups, precision):
    network = integers(
        nn.Conv2d(2, channels, 3, padding=1),
        FusedLIF(),
        nn.Conv2d(channels, outputs, 3, padding=1, groups=groups),
        FusedLIF(),
        nn.AvgPool2d(2),
        nn.Conv2d(outputs, outputs, 1, groups=groups),
        FusedLIF(),
        nn.Flatten(),
        Readout(outputs * 6, 3),
        timesteps=2,
    )
    for module in network.layers:
        if isinstance(module, nn.Conv2d):
            # int8 keeps these exactly: its scale is their largest over 127
            module.weight.data.view(len(module.weight), -1)[:, 0] = 127 / 32
            module.weight.data = (module.weight.data * 32).round() / 32
    network.layers[-1].weight.data[:, 0] = 127 / 32
    network.layers[-1].weight.data = (network.layers[-1].weight.data * 32).round() / 32
    assert_same(network, images(3, 2, 4, 6), precision=precision)


POOLS = {
    "average": [nn.AvgPool2d(2)],
    "average stride 1": [nn.AvgPool2d(2, stride=1)],
    "average 4x2": [nn.AvgPool2d((4, 2))],
    "average padded": [nn.AvgPool2d(2, padding=1)],
    "average twice": [nn.AvgPool2d(2), nn.AvgPool2d(2)],
    "max": [nn.MaxPool2d(2)],
    "max overlapping": [nn.MaxPool2d(3, stride=2, padding=1)],
    "max dilated": [nn.MaxPool2d(2, stride=1, dilation=2)],
    "max then average": [nn.MaxPool2d(2), nn.AvgPool2d(2)],
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("then", ["conv", "linear"])
@pytest.mark.parametrize("timesteps", [1, 2])
def test_pools(level, case, then, timesteps):
    pools = POOLS[case]
    rest = nn.Sequential(*pools)(torch.zeros(1, 1, 8, 10)).shape[2:].numel()
    if then == "conv":
        middle = [nn.Conv2d(70, 66, 3, padding=1), FusedLIF(), nn.Flatten()]
    else:
        middle = [nn.Flatten(), nn.Linear(70 * rest, 66), FusedLIF()]
    network = integers(
        nn.Conv2d(1, 70, 3, padding=1),
        FusedLIF(),
        *pools,
        *middle,
        Readout(66 * (rest if then == "conv" else 1), 4),
        timesteps=timesteps,
    )
    assert_same(network, images(3, 1, 8, 10))


def test_average_pool_whose_size_is_no_power_of_two():
    network = integers(
        nn.Conv2d(1, 40, 3, padding=1), FusedLIF(), nn.AvgPool2d(3), nn.Flatten(), Readout(160, 4)
    )
    x = images(3, 1, 6, 6)
    net = EventNetwork.from_model(network)
    torch.testing.assert_close(net(x), network(x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
@pytest.mark.parametrize("channels", [None, 20])
def test_resets_over_time(level, reset, channels):
    def neurons():
        return FusedLIF(channels=channels, reset=reset, v_reset=0.25 if reset == "hard" else 0.0)

    network = integers(
        nn.Conv2d(1, 20, 3), neurons(), nn.Conv2d(20, 20, 3), neurons(), nn.Flatten(),
        Readout(20 * 4, 3), timesteps=4,
    )  # fmt: skip
    assert_same(network, images(4, 1, 6, 6))


@pytest.mark.parametrize("batch", [1, 2, 17, 150])
def test_batches(level, batch):
    network = integers(
        nn.Conv2d(1, 20, 3), FusedLIF(), nn.Conv2d(20, 100, 3), FusedLIF(), nn.Flatten(),
        nn.Linear(400, 200), FusedLIF(), nn.Linear(200, 70), FusedLIF(), Readout(70, 3),
        timesteps=2,
    )  # fmt: skip
    assert_same(network, images(batch, 1, 6, 6))


def test_an_image_alone_or_in_a_batch_of_any_thread_number():
    network = convert(
        build(ModelConfig("vgg", layers=[40, "A", 70], hidden=[130]), 10, (1, 12, 12)),
        torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(0)),
        80.0,
        timesteps=2,
    ).eval()
    x = torch.randn(9, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    net = EventNetwork.from_model(network, 2)
    together = net(x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(net(x), together)
        assert torch.equal(torch.cat([net(image[None]) for image in x]), together)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_instruction_sets_give_the_same_bits(precision, pool, timesteps):
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(64, 3, 16, 16, generator=generator)
    config = ModelConfig("vgg", layers=[48, "A", 100, 70, "A", 33], hidden=[90], pool=pool)
    network = convert(build(config, 10, (3, 16, 16)), calibration, 80.0, timesteps=timesteps)
    net = EventNetwork.from_model(network.eval(), timesteps, precision=precision)
    module = importlib.import_module("iirsnn._C")
    results = []
    for name in levels():
        module.set_cpu_capability(name)
        results.append((net(calibration[:20]), engine_spikes(net)))
    for logits, spikes in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(spikes, results[0][1], strict=True))


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_flips_are_traced_to_rounding(name):
    """Thresholds set on a current: those neurons fire or not by the order of the additions."""
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


def test_plain_sequential_with_batch_norm_dropout_and_nesting():
    first = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), FusedLIF(threshold=0.3))
    model = nn.Sequential(
        first,
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 9, 30, bias=False),
        nn.BatchNorm1d(30),
        FusedLIF(threshold=0.2),
        SharedDropout(0.5),
        nn.Linear(30, 4),
    )
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(8, 1, 8, 8)
    net = EventNetwork.from_model(model)
    assert net.image_shape is None
    oracle = Network.from_sequential(nn.Sequential(*first, *list(model)[1:])).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), oracle(x), rtol=1e-4, atol=1e-4)
    assert net.image_shape == (1, 8, 8)
    assert model.training


def test_time_sequential_and_a_first_linear_layer():
    modules = [nn.Flatten(), nn.Linear(24, 40), FusedLIF(), Readout(40, 3)]
    network = integers(*modules, timesteps=3)
    x = images(6, 1, 4, 6)
    expected = network(x)
    net = EventNetwork.from_model(TimeSequential(*modules), 3, image_shape=(1, 4, 6))
    assert torch.equal(net(x), expected)


def test_empty_batch():
    network = integers(nn.Conv2d(1, 4, 3), FusedLIF(), nn.Flatten(), Readout(16, 3))
    assert EventNetwork.from_model(network)(torch.zeros(0, 1, 4, 4)).shape == (0, 3)


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


# ---- Residual blocks ----


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
    shortcuts = [layer for layer in net.layers if layer.shortcut is not None]
    assert len(shortcuts) == 3
    assert sum(layer.shortcut_weight is None for layer in shortcuts) == 2


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


# ---- Precisions ----


def test_bf16_is_the_model_with_rounded_weights():
    network = integers(
        nn.Conv2d(1, 40, 3), FusedLIF(), nn.Conv2d(40, 100, 3), FusedLIF(), nn.Flatten(),
        nn.Linear(400, 100), FusedLIF(), Readout(100, 4), timesteps=2,
    )  # fmt: skip
    assert_same(network, images(3, 1, 6, 6), precision="bf16")  # quarters are bf16 already
    for layer in EventNetwork.from_model(network, 2, precision="bf16").layers[1:]:
        assert layer.weight.dtype == torch.bfloat16


def test_int8_sums_do_not_overflow_in_the_worst_case():
    """All channels spike into weights of the largest magnitude, pooled counts at their most."""
    for sign in (1.0, -1.0):
        network = integers(
            nn.Conv2d(1, 640, 3, padding=1), FusedLIF(), nn.AvgPool2d(4),
            nn.Conv2d(640, 40, 3, padding=1), FusedLIF(), nn.Flatten(), nn.Linear(160, 40),
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


def test_int8_is_the_model_with_rounded_weights():
    generator = torch.Generator().manual_seed(5)
    calibration = torch.randn(64, 1, 12, 12, generator=generator)
    config = ModelConfig("vgg", layers=[40, "A", 70, "A"], hidden=[90])
    network = convert(build(config, 10, (1, 12, 12)), calibration, 80.0, timesteps=1).eval()
    net = EventNetwork.from_model(network, precision="int8")
    rounded = {layer.name: layer for layer in net.layers[1:] if layer.weight is not None}
    pooled = {"layers.3": 4, "layers.7": 4}  # their weights carry the average pool's 1/4
    for name, module in network.named_modules():
        if name in rounded:
            layer = rounded[name]
            shape = (-1, *[1] * (layer.weight.dim() - 1))
            module.weight.data = (
                layer.weight.float() * layer.scale.view(shape) * pooled.get(name, 1)
            )
    logits = net(calibration)
    with torch.no_grad():
        expected = network(calibration)
    same = (logits - expected).abs().amax(1) < 1e-4 * expected.abs().max()
    assert same.float().mean() > 0.9  # the others hold a spike within rounding of its threshold


# ---- Files ----


@pytest.fixture
def small():
    network = integers(
        nn.Conv2d(1, 20, 3), FusedLIF(channels=20), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(80, 40), FusedLIF(), Readout(40, 3), timesteps=2, image_shape=(1, 6, 6),
    )  # fmt: skip
    return network, images(5, 1, 6, 6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_file_gives_the_same_network(small, tmp_path, precision):
    network, x = small
    net = EventNetwork.from_model(network, 2, precision=precision)
    net.notes["classes"] = ["a", "b", "c"]
    net.save(tmp_path / "net.iirsnn")
    read = EventNetwork.load(tmp_path / "net.iirsnn")
    assert torch.equal(read(x), net(x))
    assert read.notes == net.notes
    assert (read.timesteps, read.precision, read.image_shape) == (2, precision, (1, 6, 6))


def test_int8_files_are_small(small, tmp_path):
    network, _ = small
    sizes = {}
    for precision in ("fp32", "bf16", "int8"):
        path = tmp_path / precision
        EventNetwork.from_model(network, 2, precision=precision).save(path)
        sizes[precision] = path.stat().st_size
    assert sizes["int8"] < sizes["bf16"] < sizes["fp32"]


def rewrite(path, change):
    """Change the JSON header that iirsnn keeps in a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["iirsnn"])
    change(ours)
    header["__metadata__"]["iirsnn"] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "not a file": (lambda p: p.unlink(), "no such file"),
    "newer": (lambda p: rewrite(p, lambda h: h.update(event_format=FORMAT + 1)), "newer iirsnn"),
    "no network": (lambda p: rewrite(p, lambda h: h.pop("event_format")), "no event network"),
    "no layers": (lambda p: rewrite(p, lambda h: h.pop("layers")), "damaged"),
    "unknown layer": (
        lambda p: rewrite(p, lambda h: h["layers"][0].update(colour="red")),
        "damaged",
    ),
    "missing tensor": (
        lambda p: rewrite(p, lambda h: h["layers"].insert(0, h["layers"][2])),
        "damaged",
    ),
    "wrong shape": (lambda p: rewrite(p, lambda h: h.update(image_shape=[1, 9, 9])), "layers.4"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(small, tmp_path, case):
    path = tmp_path / "net.iirsnn"
    EventNetwork.from_model(small[0], 2).save(path)
    damage, message = DAMAGE[case]
    damage(path)
    with pytest.raises(RunError, match=message):
        EventNetwork.load(path)


# ---- What the engine does not have ----


def refused(*modules, match, timesteps=1, **options):
    with pytest.raises(UsageError, match=match):
        EventNetwork.from_model(nn.Sequential(*modules), timesteps, **options)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.ReLU(), r"1 \(ReLU\)|0 \(Conv2d\).*ReLU"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.MaxPool2d(2), "expected a BatchNorm or FusedLIF after it, got 1"),
        (FusedLIF(stateful=True), r"1 \(FusedLIF\): expected stateful=False"),
        (FusedLIF(packed=True), r"1 \(FusedLIF\): expected packed=False"),
        (FusedLIF(channels=3), r"1 \(FusedLIF\): threshold: expected 1 element or 4, got 3"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"1 \(BatchNorm2d\): expected running"),
        (nn.BatchNorm1d(4), r"1 \(BatchNorm1d\): cannot follow Conv2d"),
    ],
)
def test_modules_after_a_convolution(module, match):
    refused(nn.Conv2d(1, 4, 3), module, nn.Flatten(), nn.Linear(16, 2), match=match)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.AdaptiveAvgPool2d(1), r"2 \(AdaptiveAvgPool2d\)"),
        (nn.AvgPool2d(2, ceil_mode=True), r"2 \(AvgPool2d\): expected ceil_mode=False"),
        (nn.AvgPool2d(2, divisor_override=3), r"2 \(AvgPool2d\): expected no divisor_override"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), "count_include_pad=True"),
        (nn.MaxPool2d(2, ceil_mode=True), r"2 \(MaxPool2d\): expected ceil_mode=False"),
        (nn.Conv2d(4, 4, 1, padding_mode="circular"), r"2 \(Conv2d\).*FusedLIF after it"),
        (nn.BatchNorm2d(4), r"2 \(BatchNorm2d\): expected a Conv2d or Linear"),
        (FusedLIF(), r"2 \(FusedLIF\): expected a Conv2d or Linear"),
        (nn.Linear(4, 4), r"2 \(Linear\): expected a Flatten before"),
        (nn.Flatten(0), r"2 \(Flatten\): expected start_dim=1"),
    ],
)
def test_modules_after_neurons(module, match):
    refused(nn.Conv2d(1, 4, 3), FusedLIF(), module, nn.Flatten(), nn.Linear(16, 2), match=match)


def test_other_models():
    refused(nn.Conv2d(1, 4, 3), FusedLIF(), match="expected a Linear as its last layer")
    refused(nn.AvgPool2d(2), match="expected a FusedLIF before")
    refused(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), FusedLIF(), nn.Flatten(),
        nn.Linear(4, 2), match="padding with zeros, got reflect",
    )  # fmt: skip
    with pytest.raises(UsageError, match="TransformerEncoderLayer"):
        EventNetwork.from_model(nn.TransformerEncoderLayer(8, 1))


def test_max_pool_of_an_average_pool():
    network = integers(
        nn.Conv2d(1, 4, 3), FusedLIF(), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Flatten(),
        Readout(4, 2), image_shape=(1, 6, 6),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"layers\.3.*max pool: expected spikes"):
        EventNetwork.from_model(network)


def test_numbers_that_are_not_finite(small):
    for name in ("layers.0.weight", "layers.4.bias", "layers.1.threshold", "layers.5.leak"):
        network, _ = small
        state = network.state_dict()
        kept = state[name].clone()
        state[name].view(-1)[0] = float("nan")
        with pytest.raises(UsageError, match=r"expected a finite"):
            EventNetwork.from_model(network, 2)
        state[name].copy_(kept)


def test_wrong_arguments(small):
    network, x = small
    with pytest.raises(UsageError, match="expected the T of the model, 2, got 1"):
        EventNetwork.from_model(network)
    with pytest.raises(UsageError, match="precision: expected one of fp32, bf16, int8, got 'fp8'"):
        EventNetwork.from_model(network, 2, precision="fp8")
    with pytest.raises(UsageError, match="timesteps: expected an integer"):
        EventNetwork.from_model(network, 0)
    net = EventNetwork.from_model(network, 2)
    with pytest.raises(RunError, match="expected a call"):
        net.statistics()
    with pytest.raises(UsageError, match=r"expected \[B, 1, 6, 6\], got \[5, 1, 6, 7\]"):
        net(torch.zeros(5, 1, 6, 7))
    with pytest.raises(UsageError, match=r"expected \[B, 1, 6, 6\], got \[5, 3, 6, 6\]"):
        net(torch.zeros(5, 3, 6, 6))
    with pytest.raises(UsageError, match="expected a float tensor"):
        net(torch.zeros(5, 1, 6, 6, dtype=torch.uint8))
    with pytest.raises(UsageError, match="expected finite values"):
        net(x / 0)


def test_images_too_small_for_the_model():
    net = EventNetwork.from_model(
        nn.Sequential(nn.Conv2d(1, 4, 5), FusedLIF(), nn.Flatten(), nn.Linear(16, 2))
    )
    with pytest.raises(UsageError, match=r"0: cannot follow 1 x 3 x 3 .*kernel that fits"):
        net(torch.zeros(1, 1, 3, 3))
    with pytest.raises(UsageError, match=r"3: cannot follow 4 x 3 x 3 .*36 input features, got 16"):
        net(torch.zeros(1, 1, 7, 7))


# ---- The engine alone ----


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
    assert torch.equal(torch.from_numpy(engine.run(x.numpy())), expected)


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
        engine.run(np.zeros((1, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"images: expected float32 \[count, 1, 4, 4\]"):
        engine.run(np.zeros((1, 4, 4), np.float32))
