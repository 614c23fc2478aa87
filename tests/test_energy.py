"""Operations counted by hand, position by position, against those the counter finds."""

import itertools

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Network, Readout
from iirsnn.energy import EnergyPenalty, OperationCounter, fan_out
from iirsnn.evaluation import count_operations
from iirsnn.models import ModelConfig, build


def additions_one_by_one(conv, spikes):
    """Visit every output and every input under its kernel: an addition for each spike there."""
    count = 0
    _, channels, height, width = spikes.shape
    groups, kernel = conv.groups, conv.kernel_size
    output = conv(spikes)
    for b, out, y, x in itertools.product(*map(range, output.shape)):
        group = out // (conv.out_channels // groups)
        inputs = range(group * channels // groups, (group + 1) * channels // groups)
        for c, i, j in itertools.product(inputs, range(kernel[0]), range(kernel[1])):
            row = y * conv.stride[0] - conv.padding[0] + i * conv.dilation[0]
            column = x * conv.stride[1] - conv.padding[1] + j * conv.dilation[1]
            if 0 <= row < height and 0 <= column < width:
                count += int(spikes[b, c, row, column])
    return count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "groups": 4},
        {"padding": (0, 1), "stride": (2, 1), "groups": 2, "dilation": (1, 2)},
    ],
)
def test_fan_out_of_a_convolution(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **options)
    spikes = torch.randint(4, (2, 4, 7, 6)).float()  # 2, 3: sub-spikes of a pool
    assert fan_out(conv, spikes) == additions_one_by_one(conv, spikes)


@pytest.mark.parametrize(("place", "outputs"), [((0, 0), 4), ((0, 2), 6), ((1, 2), 9)])
def test_a_spike_at_the_border_reaches_fewer_outputs(place, outputs):
    spikes = torch.zeros(1, 3, 4, 4)
    spikes[0, 1][place] = 1
    assert fan_out(nn.Conv2d(3, 5, 3, padding=1), spikes) == 5 * outputs


def test_fan_out_of_a_linear_layer():
    spikes = torch.tensor([[[1.0, 0, 3], [0, 0, 1]]])
    assert fan_out(nn.Linear(3, 7), spikes) == 5 * 7


def test_large_counts_are_exact():
    assert fan_out(nn.Conv2d(1, 1, 1), torch.ones(5001, 1, 61, 61)) == 18_608_721
    assert fan_out(nn.Linear(4001, 1), torch.ones(4999, 4001)) == 20_000_999


def hand_made(pool):
    """Conv 1->2, pool, conv 2->3, readout 5, with weights that make its spikes known."""
    layers = [
        *[nn.Conv2d(1, 2, 1, bias=False), FusedLIF(0.5), pool],
        *[nn.Conv2d(2, 3, 3, padding=1), FusedLIF(0.5)],
        *[nn.Flatten(), Readout(12, 5)],
    ]
    nn.init.ones_(layers[0].weight)
    nn.init.zeros_(layers[3].weight)
    nn.init.ones_(layers[3].bias)  # the second layer always fires
    network = Network(layers, (1, 4, 4))
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :2, :2] = 1  # these five neurons fire at each timestep, in both channels
    image[0, 0, 3, 3] = 1
    return network, image


@pytest.mark.parametrize("timesteps", [1, 2, 3])
@pytest.mark.parametrize(
    ("pool", "sub_spikes", "pooled_spikes"), [(nn.AvgPool2d(2), 5, 2), (nn.MaxPool2d(2), 2, 2)]
)
@pytest.mark.parametrize("images", [1, 150])
def test_operations_of_a_network_counted_by_hand(
    timesteps, pool, sub_spikes, pooled_spikes, images
):
    network, image = hand_made(pool)
    network.timesteps = timesteps
    counted = count_operations(network, image.expand(images, 1, 4, 4))
    assert counted.images == images
    assert counted.multiplications == 2 * 16  # the first layer, once for all timesteps
    # each of the 2x2 pooled positions reaches all four outputs of each of three channels
    second = timesteps * 2 * sub_spikes * 4 * 3
    readout = timesteps * 12 * 5
    assert counted.additions == second + readout
    assert counted.additions_pooled_once == timesteps * 2 * pooled_spikes * 4 * 3 + readout
    assert counted.energy_uj == pytest.approx((32 * 4.6 + (second + readout) * 0.9) * 1e-6)
    assert counted.spike_rates == [timesteps * 10 / 32, timesteps]
    assert list(counted.spikes) == ["layers.1", "layers.4"]
    assert [layer.multiplications for layer in counted.layers.values()] == [32 * images, 0, 0]


def test_a_silent_network_costs_its_first_layer_alone():
    network, image = hand_made(nn.AvgPool2d(2))
    nn.init.zeros_(network.layers[3].bias)
    counted = count_operations(network, torch.zeros_like(image))
    assert (counted.multiplications, counted.additions) == (32, 0)
    assert counted.spike_rates == [0, 0]


def test_sub_spikes_of_pools_in_a_row_multiply():
    network = Network(
        [
            *[nn.Conv2d(1, 1, 1), FusedLIF(0.5), nn.AvgPool2d(2), nn.AvgPool2d(2)],
            *[nn.Flatten(), Readout(1, 3)],
        ]
    )
    nn.init.ones_(network.layers[0].weight)
    nn.init.zeros_(network.layers[0].bias)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0].view(-1)[:7] = 1
    assert count_operations(network, image).additions == 7 * 3


@pytest.mark.parametrize(
    ("name", "classes", "shape", "microjoules"),
    [
        ("vgg16", 10, (3, 32, 32), pytest.approx(1557, abs=0.5)),
        ("vgg16-imagenet", 1000, (3, 224, 224), pytest.approx(71.2e3, abs=50)),
    ],
)
def test_energy_of_the_papers_anns(name, classes, shape, microjoules):
    with torch.device("meta"):
        ann = build(ModelConfig(name=name, batch_norm=False), classes, shape)
    counted = count_operations(ann, torch.zeros(1, *shape, device="meta"))
    assert counted.energy_uj == microjoules
    assert counted.additions == 0
    assert counted.spike_rates == []


def test_counting_stops_with_its_context_and_adds_up():
    network, image = hand_made(nn.AvgPool2d(2))
    counter = OperationCounter(network)
    for _ in range(2):
        with counter.counting():
            network(image)
        network(image)
    assert counter.images == 2
    assert counter.multiplications == 32
    assert all(not module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_the_penalty_is_the_additions_counted(pool, timesteps):
    torch.manual_seed(0)
    pools = {"average": nn.AvgPool2d(2), "max": nn.MaxPool2d(2)}
    network = Network(
        [
            *[nn.Conv2d(1, 4, 3), FusedLIF(0.3), pools[pool], nn.Conv2d(4, 6, 1), FusedLIF(0.3)],
            *[nn.Flatten(), nn.Linear(54, 7), FusedLIF(0.2), Readout(7, 3)],
        ]
    )
    network.timesteps = timesteps
    images = torch.rand(5, 1, 8, 8)
    counter = count_operations(network, images)
    penalty = EnergyPenalty(network)
    with penalty.measured():
        network(images)
    ann = 36 * 9 * 4 + 9 * 4 * 6 + 54 * 7 + 7 * 3
    # no padding: each spike reaches every output, and the penalty is exact
    value = penalty.value(timesteps)
    assert value.item() == pytest.approx(counter.additions / ann, rel=1e-6)
    assert counter.additions > 0
    value.backward()
    gradients = [p.grad for p in network.layers[0].parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
