"""Networks: the paper's lists, one convolution for all timesteps, and what sees time."""

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from iirsnn import FusedLIF, Network, Readout, SharedDropout, TimeSequential, convert
from iirsnn.conversion import NeuronConfig, to_spiking
from iirsnn.functional import lif
from iirsnn.measure.evaluation import count_operations
from iirsnn.models import MembraneBlock, ModelConfig, ResidualBlock, build, membrane_resnet, vgg
from iirsnn.nn import direct

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)

# "A" is a 2x2 pool after the convolution before it
PAPER = {
    "vgg6": "64 A 128 128 A",
    "vgg9": "64 A 128 256 A 256 512 A 512 A 512",
    "vgg11": "64 A 128 256 A 512 512 A 512 A 512 512",
    "vgg16": "64 64 A 128 128 A 256 256 256 A 512 512 512 A 512 512 512",
    "vgg16-imagenet": "64 64 A 128 128 A 256 256 256 A 512 512 512 A 512 512 512 A",
}


def on_meta(name, classes, image_shape):
    """A network without memory for its weights."""
    with torch.device("meta"):
        return build(ModelConfig(name=name, batch_norm=False), classes, image_shape)


def small(**options):
    torch.manual_seed(0)
    options = {"hidden": [20], **options}
    return vgg([6, "A", 8, 10], 5, (2, 8, 8), **options)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", PAPER)
def test_layer_lists_are_the_papers(name):
    network = on_meta(name, 100, IMAGENET if name.endswith("imagenet") else CIFAR)
    described = []
    for module in network.layers:
        if isinstance(module, nn.Conv2d):
            assert (module.kernel_size, module.padding, module.stride) == ((3, 3), (1, 1), (1, 1))
            described.append(str(module.out_channels))
        elif isinstance(module, nn.AvgPool2d):
            assert module.kernel_size == 2
            described.append("A")
    assert " ".join(described) == PAPER[name]
    linear = [m.out_features for m in network.layers if isinstance(m, nn.Linear)]
    assert linear == [4096, 4096, 100]
    assert isinstance(network.layers[-1], Readout)


def test_vgg16_on_cifar_has_the_papers_operations():
    network = on_meta("vgg16", 10, CIFAR)
    counted = count_operations(network, torch.zeros(1, *CIFAR, device="meta"))
    assert counted.multiplications == pytest.approx(338.4e6, abs=0.05e6)
    # The paper's two figures belong to two networks: 338.4 M MACs to four pools, so 2048 features
    # before the first FC layer; 33.6 M parameters to five, so 512 of them. This is the first.
    linear = [module for module in network.layers if isinstance(module, nn.Linear)]
    assert linear[0].in_features == 2048
    assert parameters(network) == pytest.approx(39.94e6, abs=0.05e6)
    five_pools = on_meta("vgg16-imagenet", 10, CIFAR)
    assert parameters(five_pools) == pytest.approx(33.6e6, abs=0.05e6)


def test_vgg16_on_imagenet_has_the_papers_operations():
    network = on_meta("vgg16-imagenet", 1000, IMAGENET)
    counted = count_operations(network, torch.zeros(1, *IMAGENET, device="meta"))
    assert counted.multiplications == pytest.approx(15.47e9, abs=0.005e9)


def test_ann_and_snn_have_the_same_keys_but_for_the_neurons():
    ann = small(dropout=0.1)
    snn = to_spiking(ann, 3)
    places = [i for i, module in enumerate(ann.layers) if isinstance(module, nn.ReLU)]
    assert len(places) == 4
    own = {f"layers.{i}.{name}" for i in places for name in ("threshold", "leak")}
    assert set(snn.state_dict()) == set(ann.state_dict()) | own
    for name, value in ann.state_dict().items():
        assert torch.equal(snn.state_dict()[name], value)


def record_inputs(network, kind):
    """Input shapes of each call of each module of a kind, in order."""
    shapes = []
    for module in network.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, inputs, output: shapes.append(inputs[0].shape))
    return shapes


def test_each_convolution_runs_once_and_the_first_one_on_one_timestep():
    snn = to_spiking(small(), 4)
    convolutions = record_inputs(snn, nn.Conv2d)
    pools = record_inputs(snn, nn.AvgPool2d)
    neurons = record_inputs(snn, FusedLIF)
    snn(torch.randn(3, 2, 8, 8))
    assert convolutions == [(3, 2, 8, 8), (12, 6, 4, 4), (12, 8, 4, 4)]
    assert pools == [(12, 6, 8, 8)]
    assert neurons == [(4, 3, 6, 8, 8), (4, 3, 8, 4, 4), (4, 3, 10, 4, 4), (4, 3, 20)]


def test_every_layer_before_the_first_neuron_runs_on_one_timestep():
    layers = TimeSequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), FusedLIF(), nn.Conv2d(4, 2, 1))
    convolutions = record_inputs(layers, nn.Conv2d)
    layers(direct(torch.randn(3, 2, 6, 6), 5))
    assert convolutions == [(3, 2, 6, 6), (3, 4, 4, 4), (15, 4, 4, 4)]


@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_direct_encoding_equals_images_copied_for_every_timestep(timesteps, memory_format):
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    snn = convert(small().double(), images, timesteps=timesteps).to(memory_format=memory_format)
    results = []
    for x in (direct(images, timesteps), torch.stack([images] * timesteps)):
        snn.zero_grad()
        logits = snn.layers(x)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in snn.parameters())])
    assert all(weight.grad.abs().sum() > 0 for weight in snn.parameters() if weight.dim() > 1)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("pool", "kind", "values"),
    [("average", nn.AvgPool2d, {0, 0.25, 0.5, 0.75, 1}), ("max", nn.MaxPool2d, {0, 1})],
)
def test_pools(pool, kind, values):
    snn = to_spiking(small(pool=pool), 3)
    snn.layers[1].threshold.data.fill_(0.3)
    (layer,) = [module for module in snn.layers if isinstance(module, kind)]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    snn(torch.randn(8, 2, 8, 8))
    assert set(seen[0].unique().tolist()) == values


def test_dropout_is_on_every_hidden_layer_that_no_pool_follows():
    network = small(dropout=0.4, batch_norm=True)
    kinds = [type(module).__name__ for module in network.layers]
    norm = ["BatchNorm2d", "ReLU"]
    assert kinds == [
        *["Conv2d", *norm, "AvgPool2d"],
        *["Conv2d", *norm, "SharedDropout"],
        *["Conv2d", *norm, "SharedDropout"],
        *["Flatten", "Linear", "BatchNorm1d", "ReLU", "SharedDropout", "Readout"],
    ]
    assert all(m.p == 0.4 for m in network.layers if isinstance(m, SharedDropout))
    assert network.layers[0].bias is None  # the normalisation has one


def test_shared_dropout_has_one_mask_for_all_timesteps():
    dropout = SharedDropout(0.25)
    y = dropout(torch.ones(5, 40, 100))
    assert torch.equal(y, y[:1].expand(5, 40, 100))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (y[0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(y[0, 0], y[0, 1])  # each image has its own
    assert not torch.equal(y, dropout(torch.ones(5, 40, 100)))  # and each pass


def test_shared_dropout_leaves_its_input_alone_in_eval_and_at_zero():
    x = torch.randn(2, 3, 4)
    assert SharedDropout(0.5).eval()(x) is x
    assert SharedDropout(0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1, 2, float("nan")])
def test_dropout_out_of_range(p):
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        SharedDropout(p)


@pytest.mark.parametrize("bias", [True, False])
def test_readout_accumulates_over_time(bias):
    readout = Readout(7, 3, bias=bias)
    s = torch.randint(2, (4, 5, 7)).float()
    expected = torch.zeros(5, 3)
    for step in s:
        expected += step @ readout.weight.T
        if bias:
            expected += readout.bias
    torch.testing.assert_close(readout(s), expected)


def test_networks_of_one_timestep_are_plain_anns():
    network = small().eval()
    plain = nn.Sequential(*network.layers[:-1], nn.Linear(20, 5))
    plain[-1].load_state_dict(network.layers[-1].state_dict())
    images = torch.randn(4, 2, 8, 8)
    torch.testing.assert_close(network(images), plain(images))


def test_a_time_sequential_inside_another_still_sees_time():
    torch.manual_seed(0)
    inner = [nn.Conv2d(2, 4, 3), FusedLIF(0.5), nn.Conv2d(4, 3, 1), FusedLIF(0.2)]
    x = torch.randn(3, 5, 2, 6, 6)
    nested = TimeSequential(TimeSequential(*inner[:2]), TimeSequential(*inner[2:]))
    assert torch.equal(nested(x), TimeSequential(*inner)(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "expected a convolution's channels first"),
        ({"layers": ["A", 8]}, "expected a convolution's channels first"),
        ({"layers": [8, 0]}, "expected positive widths"),
        ({"layers": [8, -8]}, "expected positive widths"),
        ({"layers": [8, "a"]}, "expected positive widths and 'A' for a pool, got 'a'"),
        ({"layers": [8, 1.5]}, "expected positive widths"),
        ({"layers": [8, "A", 8, "A", 8, "A", 8, "A"]}, "4 pools are too many for .* 8 x 8"),
        ({"hidden": [0]}, "expected positive widths"),
        ({"pool": "median"}, "pool: expected one of average, max, got 'median'"),
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_descriptions_that_give_no_network(change, message):
    described = {"layers": [8, "A"], "classes": 10, "image_shape": (1, 8, 8), **change}
    with pytest.raises(ValueError, match=message):
        vgg(**described)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="vgg7"), "model.name: expected one of vgg, vgg6, .*, got 'vgg7'"),
        (ModelConfig(name="vgg6", layers=[8]), "vgg6 has its own; use name=vgg"),
        (ModelConfig(name="vgg"), "expected a convolution's channels first"),
    ],
)
def test_model_sections_that_give_no_network(config, message):
    with pytest.raises(ValueError, match=message):
        build(config, 10, CIFAR)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 2, 8, 9), (2, 8, 8)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"images: expected \[B, 2, 8, 8\], got"):
        small()(torch.zeros(shape))


def test_timesteps_below_one():
    network = small()
    network.timesteps = 0
    with pytest.raises(ValueError, match="timesteps"):
        network(torch.zeros(1, 2, 8, 8))


def test_from_sequential_shares_the_parameters():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    network = Network.from_sequential(model)
    assert [p.data_ptr() for p in network.parameters()] == [
        p.data_ptr() for p in model.parameters()
    ]
    images = torch.randn(2, 2, 2, 2)
    torch.testing.assert_close(network(images), model(images))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
def test_from_sequential_needs_a_linear_at_the_end(model):
    with pytest.raises(ValueError, match="model: expected a Linear as the last layer"):
        Network.from_sequential(model)


@pytest.mark.parametrize("name", ["resnet18", "resnet19", "resnet20"])
def test_residual_networks_have_the_parameters_counted_by_hand(name):
    with torch.device("meta"):
        network = build(ModelConfig(name=name), 10, CIFAR)

    def convs(*shapes):
        return sum(9 * cin * cout + 2 * cout for cin, cout in shapes)

    def group(cin, cout, blocks):
        shapes = [(cin, cout), *[(cout, cout)] * (2 * blocks - 1)]
        return convs(*shapes) + (cin * cout + 2 * cout if cin != cout else 0)

    by_hand = {
        "resnet20": convs((3, 64), (64, 64), (64, 64))
        + sum(group(*g) for g in [(64, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 2)])
        + 2048 * 10
        + 10,
        "resnet18": convs((3, 64))
        + sum(group(*g) for g in [(64, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 2)])
        + 512 * 10
        + 10,
        "resnet19": convs((3, 128))
        + sum(group(*g) for g in [(128, 128, 3), (128, 256, 3), (256, 512, 2)])
        + 512 * 256
        + 2 * 256
        + 256 * 10
        + 10,
    }
    assert parameters(network) == by_hand[name]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_residual_block_is_its_equation(per_channel, keep):
    torch.manual_seed(0)
    block = ResidualBlock(4, 6, 2, batch_norm=True)
    ann = Network([nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), block, nn.Flatten(), Readout(96, 3)])
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    snn = to_spiking(ann.eval(), 3, NeuronConfig(per_channel=per_channel, keep_batch_norm=keep))
    block = snn.layers[2]
    x = (torch.rand(3, 2, 4, 8, 8) < 0.3).float()
    merged = x.flatten(0, 1)
    first, second, shortcut = (
        fuse_conv_bn_eval(c.eval(), n.eval())
        for c, n in (
            (ann.layers[2].main[0], ann.layers[2].main[1]),
            (ann.layers[2].main[4], ann.layers[2].main[5]),
            (ann.layers[2].shortcut[0], ann.layers[2].shortcut[1]),
        )
    )
    inside = lif(first(merged).unflatten(0, (3, 2)), 1.0, 1.0)
    current = second(inside.flatten(0, 1)) + shortcut(merged)
    expected = lif(current.unflatten(0, (3, 2)), 1.0, 1.0)
    with torch.no_grad():
        got = block(x)
    assert got.shape == (3, 2, 6, 4, 4)
    assert 0 < got.mean() < 1
    assert (got != expected).float().mean() < 0.002  # folding rounds
    neurons = [m for m in snn.modules() if isinstance(m, FusedLIF)]
    assert [n.channels for n in neurons] == ([4, 6, 6] if per_channel else [None] * 3)
    assert any(isinstance(m, nn.BatchNorm2d) for m in snn.modules()) == keep


def test_a_residual_block_without_change_of_shape_adds_its_input():
    block = ResidualBlock(3, 3)
    nn.init.zeros_(block.main[-1].weight)
    nn.init.zeros_(block.main[-1].bias)
    x = torch.randn(2, 4, 3, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_a_residual_network_that_halves_too_often_is_refused():
    with pytest.raises(ValueError, match="expected a height and width that 16 divides, got 28 x"):
        build(ModelConfig(name="resnet20"), 10, (1, 28, 28))


def test_a_block_of_currents_is_its_equation():
    torch.manual_seed(0)
    for stride, width in ((1, 4), (2, 6)):
        block = MembraneBlock(4, width, stride)
        block.neuron, block.main[1] = FusedLIF(0.5), FusedLIF(0.5)
        x = torch.randn(3, 2, 4, 7, 7)
        spikes = lif(x, 0.5)
        inside = lif(block.main[0](spikes.flatten(0, 1)).unflatten(0, (3, 2)), 0.5)
        expected = block.main[3](inside.flatten(0, 1)).unflatten(0, (3, 2))
        if stride == 1:
            expected = expected + x
        else:
            shortcut = block.shortcut[0](spikes.flatten(0, 1))
            expected = expected + shortcut.unflatten(0, (3, 2))
        assert torch.equal(block(x), expected)
        assert expected.shape == (3, 2, width, *(7 if stride == 1 else 4,) * 2)


def test_shortcuts_of_currents_carry_the_gradient_past_silent_neurons():
    network = membrane_resnet([4, 4, 4], 3, (1, 6, 6))
    snn = to_spiking(network, 1)
    for neuron in [m for m in snn.modules() if isinstance(m, FusedLIF)][:-1]:
        nn.init.constant_(neuron.threshold, 1e6)  # no spike, no surrogate
    snn(torch.rand(2, 1, 6, 6)).square().sum().backward()
    assert snn.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "expected a stem's channels and blocks"),
        ([4], "expected a stem's channels and blocks"),
        (["A", 4, 4], "expected a stem's channels and blocks"),
        ([4, 4, "A"], "'A' before a block"),
        ([4, "A", "A", 4], "'A' before a block"),
        ([4, -4], "expected positive widths"),
        ([4, "B"], "expected positive widths"),
    ],
)
def test_a_description_of_no_residual_network(layers, message):
    with pytest.raises(ValueError, match=message):
        build(ModelConfig("membrane-resnet", layers=layers), 10, (1, 28, 28))


def test_a_residual_network_of_currents_is_as_it_is_written():
    network = build(ModelConfig("membrane-resnet", layers=[4, 4, "A", 6]), 10, (1, 9, 9))
    blocks = [m for m in network.layers if isinstance(m, MembraneBlock)]
    assert [(b.main[0].in_channels, b.main[0].stride) for b in blocks] == [(4, (1, 1)), (4, (2, 2))]
    assert [len(b.shortcut) for b in blocks] == [0, 2]
    assert network(torch.rand(2, 1, 9, 9)).shape == (2, 10)
