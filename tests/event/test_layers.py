"""Chains of layers against PyTorch: exact where sums are exact."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Network, Readout, SharedDropout, TimeSequential, convert
from iirsnn.event.network import EventNetwork
from iirsnn.models import ModelConfig, build
from tests.event.networks import assert_same, images, integers

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
    "average then max": [nn.AvgPool2d(2), nn.MaxPool2d(2)],
    "max ceil": [nn.MaxPool2d(3, stride=2, ceil_mode=True)],
    "max ceil, no window of its own": [nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True)],
    "adaptive": [nn.AdaptiveAvgPool2d((4, 5))],
    "adaptive, windows of unlike sizes": [nn.AdaptiveAvgPool2d((12, 5))],
    "adaptive, one size kept": [nn.AdaptiveAvgPool2d((None, 5))],
    "adaptive maximum": [nn.AdaptiveMaxPool2d((4, 5))],
    "adaptive, large windows": [nn.AdaptiveAvgPool2d((2, 5))],
    "zeros around": [nn.ZeroPad2d((1, 0, 2, 1))],
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
        image_shape=(1, 8, 10),
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


def test_logits_are_on_the_cpu_whatever_the_default_device():
    network = integers(nn.Conv2d(1, 4, 3), FusedLIF(), nn.Flatten(), Readout(16, 3))
    engine, images = EventNetwork.from_model(network), torch.ones(2, 1, 4, 4)
    wanted = engine(images)
    with torch.device("meta"):
        assert torch.equal(engine(images), wanted)
