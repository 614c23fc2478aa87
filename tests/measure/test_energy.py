"""Operations counted by hand, position by position, against those the counter finds."""

import itertools

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF, Network, Readout
from iirsnn.conversion import to_spiking
from iirsnn.measure.energy import EnergyPenalty, OperationCounter, fan_out, with_memory
from iirsnn.measure.evaluation import count_operations
from iirsnn.models import ModelConfig, build
from iirsnn.models.resnet import MembraneBlock, ResidualBlock
from iirsnn.nn import neurons


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


#: The networks of the paper for 3 x 32 x 32: 3x3 convolutions (channels in, out, side of their
#: input), "A" for the 2x2 pool after one; then the linear layers.
CIFAR_VGGS = {
    "vgg6": (
        [(3, 64, 32), "A", (64, 128, 16), (128, 128, 16), "A"],
        [(128 * 8 * 8, 4096), (4096, 4096), (4096, 10)],
    ),
    "vgg9": (
        [
            *[(3, 64, 32), "A", (64, 128, 16), (128, 256, 16), "A"],
            *[(256, 256, 8), (256, 512, 8), "A", (512, 512, 4), "A", (512, 512, 2)],
        ],
        [(512 * 2 * 2, 4096), (4096, 4096), (4096, 10)],
    ),
    "vgg11": (
        [
            *[(3, 64, 32), "A", (64, 128, 16), (128, 256, 16), "A"],
            *[(256, 512, 8), (512, 512, 8), "A", (512, 512, 4), "A", (512, 512, 2), (512, 512, 2)],
        ],
        [(512 * 2 * 2, 4096), (4096, 4096), (4096, 10)],
    ),
    "vgg16": (
        [
            *[(3, 64, 32), (64, 64, 32), "A", (64, 128, 16), (128, 128, 16), "A"],
            *[(128, 256, 8), (256, 256, 8), (256, 256, 8), "A"],
            *[(256, 512, 4), (512, 512, 4), (512, 512, 4), "A"],
            *[(512, 512, 2), (512, 512, 2), (512, 512, 2)],
        ],
        [(512 * 2 * 2, 4096), (4096, 4096), (4096, 10)],
    ),
}


def ann(name, classes=10, shape=(3, 32, 32), **settings):
    with torch.device("meta"):
        return build(ModelConfig(name=name, batch_norm=False, **settings), classes, shape)


def always_firing(network, timesteps):
    """The SNN of a network on the meta device, in which each neuron fires at each timestep."""
    snn = to_spiking(network, timesteps).to_empty(device="cpu")
    for name, parameter in snn.named_parameters():
        nn.init.constant_(
            parameter, {"weight": 0.0, "threshold": 0.5}.get(name.split(".")[-1], 1.0)
        )
    return snn


@pytest.mark.parametrize("name", CIFAR_VGGS)
def test_multiplications_of_the_papers_vggs(name):
    convolutions, linear = CIFAR_VGGS[name]
    layers = [layer for layer in convolutions if layer != "A"]
    expected = sum(9 * i * o * side**2 for i, o, side in layers)
    expected += sum(i * o for i, o in linear)
    counted = count_operations(ann(name), torch.zeros(2, 3, 32, 32, device="meta"))
    assert (counted.multiplications, counted.additions) == (expected, 0)
    assert counted.energy_uj == pytest.approx(expected * 4.6e-6)
    assert counted.spike_rates == []
    if name == "vgg16":
        assert expected == pytest.approx(338.4e6, abs=0.05e6)
        assert counted.energy_uj == pytest.approx(1557, abs=0.5)


def test_multiplications_of_the_papers_vgg16_for_imagenet():
    plan = {224: [(3, 64), (64, 64)], 112: [(64, 128), (128, 128)]}
    plan |= {56: [(128, 256), (256, 256), (256, 256)], 28: [(256, 512), (512, 512), (512, 512)]}
    plan |= {14: [(512, 512)] * 3}
    expected = sum(9 * i * o * side**2 for side, layers in plan.items() for i, o in layers)
    expected += 512 * 7 * 7 * 4096 + 4096 * 4096 + 4096 * 1000
    network = ann("vgg16-imagenet", 1000, (3, 224, 224))
    counted = count_operations(network, torch.zeros(1, 3, 224, 224, device="meta"))
    assert counted.multiplications == expected == pytest.approx(15.47e9, abs=0.005e9)
    assert counted.energy_uj == pytest.approx(71.2e3, abs=50)


@pytest.mark.parametrize("timesteps", [1, 2])
@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize("name", ["vgg6", "vgg16"])
def test_additions_of_the_papers_vggs_in_which_all_neurons_fire(name, pool, timesteps):
    convolutions, linear = CIFAR_VGGS[name]
    sub_spikes, once, pooled = 0, 0, 1
    for layer in convolutions[1:]:
        if layer == "A":
            pooled = 4 if pool == "average" else 1
            continue
        channels, out, side = layer
        # along one side of a padded 3x3 convolution the two outer outputs see 2 inputs, not 3
        operations = channels * out * (3 * side - 2) ** 2
        sub_spikes, once, pooled = sub_spikes + pooled * operations, once + operations, 1
    for channels, out in linear:
        sub_spikes, once, pooled = sub_spikes + pooled * channels * out, once + channels * out, 1
    snn = always_firing(ann(name, pool=pool), timesteps)
    counted = count_operations(snn, torch.zeros(1, 3, 32, 32))
    first = 9 * 3 * 64 * 32 * 32
    assert counted.multiplications == first
    assert counted.additions == timesteps * sub_spikes
    assert counted.additions_pooled_once == timesteps * once
    energy = (first * 4.6 + timesteps * sub_spikes * 0.9) * 1e-6
    assert counted.energy_uj == pytest.approx(energy)
    assert counted.spike_rates == [timesteps] * len(counted.spike_rates)


#: The blocks of the paper's ResNet20 for 3 x 32 x 32: channels in, out, side of input, stride.
BLOCKS = [
    *[(64, 64, 16, 1), (64, 64, 16, 1), (64, 128, 16, 2), (128, 128, 8, 1)],
    *[(128, 256, 8, 2), (256, 256, 4, 1), (256, 512, 4, 2), (512, 512, 2, 1)],
]


def test_operations_of_the_papers_resnet20():
    stem = 9 * 32 * 32 * (3 * 64 + 64 * 64 + 64 * 64)
    multiplications, shortcuts = stem + 512 * 2 * 2 * 10, 0
    for channels, out, side, stride in BLOCKS:
        pixels = (side // stride) ** 2
        multiplications += 9 * channels * out * pixels + 9 * out * out * pixels
        if stride == 1:
            shortcuts += channels * side**2
        else:
            multiplications += channels * out * pixels
    counted = count_operations(ann("resnet20"), torch.zeros(1, 3, 32, 32, device="meta"))
    assert (counted.multiplications, counted.additions) == (multiplications, shortcuts)
    assert counted.energy_uj == pytest.approx((multiplications * 4.6 + shortcuts * 0.9) * 1e-6)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_additions_of_the_papers_resnet20_in_which_all_neurons_fire(timesteps):
    sub_spikes = once = 2 * 64 * 64 * (3 * 32 - 2) ** 2 + 512 * 2 * 2 * 10
    pooled = 4  # what the first block sees
    for channels, out, side, stride in BLOCKS:
        half = side // stride
        # of stride 2, the first output alone sees the border
        reached = 3 * side - 2 if stride == 1 else 3 * half - 1
        entering = channels * out * reached**2
        entering += channels * side**2 if stride == 1 else channels * out * half**2
        inner = out * out * (3 * half - 2) ** 2
        sub_spikes, once = sub_spikes + pooled * entering + inner, once + entering + inner
        pooled = 1
    counted = count_operations(always_firing(ann("resnet20"), timesteps), torch.zeros(1, 3, 32, 32))
    assert counted.multiplications == 9 * 3 * 64 * 32 * 32
    assert counted.additions == timesteps * sub_spikes
    assert counted.additions_pooled_once == timesteps * once
    assert counted.spike_rates == [timesteps] * 19


@pytest.mark.parametrize("spikes", [0, 1, 5])
def test_an_identity_shortcut_adds_each_spike_once(spikes):
    block = ResidualBlock(2, 2)
    network = Network([nn.Conv2d(2, 2, 1), FusedLIF(0.5), block, nn.Flatten(), Readout(32, 3)])
    block.main[1], block.neuron = FusedLIF(0.5), FusedLIF(0.5)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for neuron in neurons(network):
        nn.init.constant_(neuron.threshold, 0.5)
    nn.init.eye_(network.layers[0].weight[:, :, 0, 0])
    image = torch.zeros(1, 2, 4, 4)
    image[0, 0].view(-1)[5 : 5 + spikes] = 1
    layers = count_operations(network, image).layers
    assert layers["layers.2.shortcut"].additions == spikes
    # the second convolution is silent, so the shortcut alone is what fires and is read out
    assert layers["layers.4"].additions == spikes * 3


@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_shortcut_of_currents_adds_each_value_at_each_timestep(timesteps):
    block = MembraneBlock(2, 2)
    network = Network([nn.Conv2d(1, 2, 1), block, nn.ReLU(), nn.Flatten(), Readout(32, 3)])
    images = torch.rand(5, 1, 4, 4)
    counted = count_operations(network, images).layers["layers.1.shortcut"]
    assert (counted.additions, counted.values) == (5 * 2 * 16, 5 * 2 * 16)
    block.neuron, block.main[1], network.layers[2] = (FusedLIF(0.5) for _ in range(3))
    network.timesteps = timesteps
    counted = count_operations(network, images).layers["layers.1.shortcut"]
    assert counted.additions == counted.additions_pooled_once == timesteps * 5 * 2 * 16


def test_bytes_of_an_ann_counted_by_hand():
    network = Network(
        [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), Readout(32, 3)], (1, 4, 4)
    )
    counted = count_operations(network, torch.rand(5, 1, 4, 4))
    operations = {"layers.0": 9 * 2 * 16, "layers.3": 32 * 3}
    values = {"layers.0": 16 + 32, "layers.3": 32 + 3}
    for name, layer in counted.layers.items():
        assert layer.dense_bytes == 5 * 4 * (operations[name] + values[name])
    assert counted.dense_bytes == 4 * (sum(operations.values()) + sum(values.values()))


def test_memory_costs_what_the_table_says():
    """8 KB SRAM: 10 pJ for 64 bits; DRAM: 640 pJ for 32 bits."""
    found = with_memory(3.0, 2e6)
    assert found == {"sram": pytest.approx(3 + 2.5), "dram": pytest.approx(3 + 320)}


def test_counting_stops_with_its_context_and_adds_up():
    network, image = hand_made(nn.AvgPool2d(2))
    counter = OperationCounter(network)
    for _ in range(2):
        with counter.watching():
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
    with penalty.watching():
        network(images)
    ann = 36 * 9 * 4 + 9 * 4 * 6 + 54 * 7 + 7 * 3
    # no padding: each spike reaches every output, and the penalty is exact
    value = penalty.value(timesteps)
    assert value.item() == pytest.approx(counter.additions / ann, rel=1e-6)
    assert counter.additions > 0
    value.backward()
    gradients = [p.grad for p in network.layers[0].parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_the_price_on_spikes_of_a_norm_and_a_neuron_in_one():
    torch.manual_seed(0)
    norm, neuron, head = nn.BatchNorm2d(4), FusedLIF(0.3), Readout(144, 3)
    images, found = torch.rand(5, 1, 8, 8), []
    for pair in ([norm, neuron], [BatchNormLIF(norm, neuron)]):
        network = Network([nn.Conv2d(1, 4, 3), nn.Identity(), *pair, nn.Flatten(), head])
        nn.init.constant_(network.layers[0].weight, 0.1)
        network.timesteps = 3
        penalty, counter = EnergyPenalty(network), OperationCounter(network)
        with penalty.watching(), counter.watching():
            assert all(m._fusable() for m in network.layers if isinstance(m, BatchNormLIF))
            network(images)
        found.append((penalty.value(3).item(), counter.additions, *counter.spike_rates))
    assert found[0][0] > 0
    assert found[1] == pytest.approx(found[0])
