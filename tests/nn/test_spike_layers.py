"""Spike layers against torch's own in float64, and what they keep for the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iirsnn import FusedLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_spike_layers
from iirsnn.nn import use_plain_layers
from iirsnn.nn.spike_layers import MODES

pytest.importorskip("iirsnn._C", reason="spike layers by events need iirsnn._C")


pytestmark = pytest.mark.usefixtures("built_in_costs")

CONVS = {
    "3x3": dict(arguments=(64, 64, 3), options=dict(padding=1), size=(3, 8, 8)),
    "odd": dict(arguments=(35, 21, 3), options=dict(padding=1), size=(2, 7, 5)),
    "large": dict(arguments=(70, 40, 3), options=dict(padding=1, bias=False), size=(2, 40, 36)),
    "small images": dict(arguments=(130, 33, 3), options=dict(padding=1), size=(70, 2, 2)),
    "no padding": dict(arguments=(16, 17, 3), options={}, size=(2, 6, 9)),
    "much padding": dict(arguments=(16, 17, 3), options=dict(padding=(4, 3)), size=(2, 3, 4)),
    "5x5": dict(arguments=(40, 16, 5), options=dict(padding=2), size=(2, 9, 8)),
    "2x4": dict(arguments=(40, 16, (2, 4)), options=dict(padding=(1, 0)), size=(2, 9, 8)),
    "1x1": dict(arguments=(200, 48, 1), options={}, size=(2, 6, 6)),
    "stride": dict(arguments=(24, 36, 3), options=dict(stride=2, padding=1), size=(3, 9, 11)),
    "strides": dict(arguments=(24, 36, 3), options=dict(stride=(1, 3), padding=1), size=(3, 9, 11)),
    "dilation": dict(arguments=(24, 36, 3), options=dict(dilation=2, padding=2), size=(2, 9, 8)),
    "stride and dilation": dict(
        arguments=(24, 36, 3),
        options=dict(stride=(3, 2), dilation=(2, 3), padding=3),
        size=(2, 13, 14),
    ),
    "groups": dict(arguments=(90, 40, 3), options=dict(groups=5, padding=1), size=(2, 6, 6)),
    "depthwise": dict(arguments=(20, 20, 3), options=dict(groups=20, padding=1), size=(2, 6, 6)),
    "same, odd": dict(arguments=(24, 24, 3), options=dict(padding="same"), size=(2, 6, 6)),
    "circular": dict(
        arguments=(24, 24, 3), options=dict(padding=1, padding_mode="circular"), size=(2, 6, 6)
    ),
}


def spikes(size, density=0.2):
    return (torch.rand(size) < density).float()


def pooled(size):
    return spikes((*size, 4)).mean(-1)


def sparse_reals(size):
    return spikes(size) * torch.randn(size)


INPUTS = {
    "bits": (spikes, "bits"),
    "after dropout": (lambda size: spikes(size) / 0.8, "bits"),
    "counts": (pooled, "counts"),
    "reals": (sparse_reals, "tensor"),
}


def gradients(layer, x, grad):
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad.to(out.dtype))
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return [out.detach(), x.grad, *grads]


def no_worse(found, dense, exact):
    """Root mean square error at most twice the dense layer's own, or 2 roundings of the values'."""
    for i, (ours, theirs, true) in enumerate(zip(found, dense, exact, strict=True)):
        assert ours.shape == true.shape
        error, own = ((t.double() - true).square().mean().sqrt() for t in (ours, theirs))
        rounding = 2 * torch.finfo(ours.dtype).eps * true.square().mean().sqrt()
        assert error <= max(2 * own, rounding), ("out", "grad_x", "grad_weight", "grad_bias")[i]


def against_dense(layer, plain, x, expected_kept, mode, last=False):
    layer.load_state_dict(plain.state_dict())
    layer.set_mode(mode)
    exact_layer = copy.deepcopy(plain).double()
    grad = torch.randn_like(plain(x).detach())
    grad *= torch.rand_like(grad) < 0.5
    exact = gradients(exact_layer, x.double(), grad.double())
    dense = gradients(plain, x, grad)
    if last:
        layer, x = (
            layer.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
    found = gradients(layer, x, grad)
    assert layer.decision.kept == expected_kept
    assert layer.decision.forward == ("dense" if expected_kept == "tensor" else mode)
    if expected_kept != "tensor" and not any(n > 1 for n in getattr(layer, "stride", ())):
        assert layer.decision.input_grad == mode
    no_worse(found, dense, exact)
    if last:
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    else:
        assert found[0].is_contiguous()


@pytest.mark.parametrize(
    "size", [(1, 180_000), pytest.param((100, 170_000), marks=pytest.mark.slow)], ids=str
)
def test_images_beyond_the_offsets_of_events_are_computed_as_torch_does(size):
    torch.manual_seed(0)
    plain, layer = (
        nn.Conv2d(1, 2, (1, 3), padding=(0, 1)),
        SpikeConv2d(1, 2, (1, 3), padding=(0, 1)),
    )
    layer.load_state_dict(plain.state_dict())
    layer.set_mode("events")
    x = spikes((1, 1, *size))
    grad = torch.randn_like(plain(x).detach())
    exact = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    no_worse(gradients(layer, x, grad), gradients(plain, x, grad), exact)
    decision = layer.decision
    assert (decision.kept, decision.forward, decision.weight_grad) == ("bits", "dense", "dense")
    assert decision.reason == "events cannot address images of this size"


@pytest.mark.parametrize(
    ("layer", "size"), [(SpikeConv2d(2, 3, 3), (1, 2, 5, 5)), (SpikeLinear(4, 3), (2, 4))], ids=str
)
def test_the_input_may_be_named(layer, size):
    assert torch.equal(layer(input=torch.ones(size)), layer(torch.ones(size)))


@pytest.mark.parametrize("mode", ["events", "dense"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, kind, mode):
    torch.manual_seed(0)
    case = CONVS[name]
    make, kept = INPUTS[kind]
    images, height, width = case["size"]
    x = make((images, case["arguments"][0], height, width))
    plain = nn.Conv2d(*case["arguments"], **case["options"])
    layer = SpikeConv2d(*case["arguments"], **case["options"])
    against_dense(layer, plain, x, kept, mode, last=kind == "bits")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", [(37, 100), (3, 5, 300), (210,)])
def test_linear(shape, kind):
    torch.manual_seed(0)
    make, kept = INPUTS[kind]
    plain, layer = nn.Linear(shape[-1], 43), SpikeLinear(shape[-1], 43)
    against_dense(layer, plain, make(shape), kept, "events")


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_instruction_sets_give_the_same_bits(level):
    from iirsnn import _C

    best = _C.build_info()["cpu_capability"]
    order = ["portable", "avx2", "avx512"]
    if order.index(level) > order.index(best):
        pytest.skip(f"this processor has {best} at most")
    torch.manual_seed(0)
    layer = SpikeConv2d(70, 40, 3, padding=1)
    layer.set_mode("events")
    for x in (spikes((4, 70, 8, 8)), pooled((4, 70, 8, 8))):
        grad = torch.randn(4, 40, 8, 8)
        expected = gradients(layer, x, grad)
        _C.set_cpu_capability(level)
        try:
            found = gradients(layer, x, grad)
        finally:
            _C.set_cpu_capability(best)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[2])


def test_gradients_after_inference_mode():
    layer, x = SpikeConv2d(4, 4, 3), 0.125 * (torch.rand(2, 4, 6, 6) < 0.2)
    with torch.inference_mode():  # a unit that no other test has: its table is made here
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_repeats_bit_for_bit():
    torch.manual_seed(0)
    layer = SpikeConv2d(64, 64, 3, padding=1)
    layer.set_mode("events")
    x, grad = spikes((20, 64, 6, 6)), torch.randn(20, 64, 6, 6)
    first, second = gradients(layer, x, grad), gradients(layer, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["bits", "after dropout", "counts"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_gradient_of_a_weight(threads, kind):
    """Each sums some of the images; numbers are such that every order gives the same."""
    torch.manual_seed(0)
    plain, layer = nn.Conv2d(20, 16, 3, padding=1), SpikeConv2d(20, 16, 3, padding=1)
    x, grad = INPUTS[kind][0]((7, 20, 12, 12)), torch.randint(-1, 2, (7, 16, 12, 12)).float()
    layer.load_state_dict(plain.state_dict())
    layer.set_mode("events")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradients(layer, x, grad)[2]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.double(), gradients(plain.double(), x.double(), grad.double())[2])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1.0, 0.3], ids=["nan", "inf", "negative", "another"]
)
def test_one_other_value_is_seen(value):
    torch.manual_seed(0)
    x = spikes((4, 64, 16, 16))
    x[3, 10, 5, 7] = value
    layer, plain = SpikeConv2d(64, 8, 3), nn.Conv2d(64, 8, 3)
    plain.load_state_dict(layer.state_dict())
    found = layer(x)
    assert layer.decision.kept == "tensor"
    assert torch.equal(found.nan_to_num(), plain(x).nan_to_num())


def test_pool_sizes_up_to_255_counts():
    torch.manual_seed(0)
    layer = SpikeConv2d(3, 8, 1)
    for size in (2, 3, 5, 15):
        x = F.avg_pool2d(spikes((2, 3, 4 * size, 4 * size), 0.5), size)
        layer(x)
        assert layer.decision.kept == "counts"


def test_no_spikes_and_no_images():
    layer = SpikeConv2d(8, 8, 3, padding=1)
    layer.set_mode("events")
    out = layer(torch.zeros(2, 8, 4, 4))
    assert torch.equal(out, layer.bias[None, :, None, None].expand_as(out))
    assert layer(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    assert SpikeLinear(5, 3)(torch.zeros(0, 5)).shape == (0, 3)


@pytest.mark.parametrize("mode", ["events", "dense"])
def test_autocast(mode):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 48, 3, padding=1)
    layer = SpikeConv2d(64, 48, 3, padding=1)
    layer.load_state_dict(plain.state_dict())
    layer.set_mode(mode)
    x, grad = spikes((4, 64, 8, 8)), torch.randn(4, 48, 8, 8)
    exact = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, found = gradients(plain, x, grad), gradients(layer, x, grad)
    assert found[0].dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [t.dtype for t in dense[1:]] == [torch.float32] * 3
    for ours, theirs, true in zip(found, dense, exact, strict=True):
        error = (ours.double() - true).abs().max()
        assert error <= 2 * max((theirs.double() - true).abs().max(), 2**-8 * true.abs().max())


def test_same_parameters_as_torch():
    torch.manual_seed(3)
    plain = [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(5, 7)]
    torch.manual_seed(3)
    layers = [SpikeConv2d(4, 6, 3, groups=2), SpikeLinear(5, 7)]
    for ours, theirs in zip(layers, plain, strict=True):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3}, {"kernel_size": 2}, {"kernel_size": 2, "padding": 1}]
)
def test_pool_keeps_nothing(options):
    x = spikes((2, 8, 9, 9)).to(memory_format=torch.channels_last).requires_grad_()
    kept = []
    pool = SpikeAvgPool2d(**options)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = pool(x)
    assert kept == []
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(nn.AvgPool2d(**options)(x), x, grad)
    assert torch.equal(found, expected)


def bytes_kept(layer, x):
    kept = {}

    def pack(t):
        if not any(t.data_ptr() == p.data_ptr() for p in layer.parameters()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("mode", ["events", "dense"])
def test_bytes_kept(mode):
    torch.manual_seed(0)
    layer = SpikeConv2d(128, 16, 3, padding=1)
    layer.set_mode(mode)
    x = spikes((8, 128, 16, 16))
    table = 256 * 4
    assert bytes_kept(layer, x) == x.numel() // 8 + table
    assert bytes_kept(layer, pooled((8, 128, 16, 16))) == x.numel() + table


def test_second_derivative_is_refused():
    layer = SpikeLinear(8, 4)
    x = spikes((3, 8)).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_torch_compile_breaks_the_graph_only():
    torch._dynamo.reset()
    model = nn.Sequential(SpikeLinear(16, 8), nn.ReLU())
    x = spikes((4, 16))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("mode", ["auto", "events", "dense"])
def test_an_input_that_does_not_fit_is_torchs_error(mode):
    layer = SpikeLinear(8, 4)
    layer.set_mode(mode)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        layer(torch.ones(2, 7))


def test_decision_by_density():
    torch.manual_seed(0)
    layer = SpikeConv2d(128, 128, 3, padding=1)
    assert layer.decision is None
    layer(spikes((2, 128, 8, 8), 0.05))
    assert (layer.decision.forward, layer.decision.weight_grad) == ("events", "events")
    assert 0.04 < layer.decision.density < 0.06
    layer(spikes((2, 128, 8, 8), 0.95))
    assert (layer.decision.forward, layer.decision.weight_grad) == ("dense", "dense")
    with pytest.raises(ValueError, match="expected one of auto, events, dense"):
        layer.set_mode("never")


OPTIONS = ([1, 1], [1, 1], [1, 1], 1)


def test_opcheck():
    torch.manual_seed(0)
    x = spikes((2, 70, 5, 6))
    table = torch.arange(256.0)
    ops = torch.ops.iirsnn
    weight, bias = torch.randn(9, 70, 3, 3), torch.randn(9)
    for counts in (False, True):
        torch.library.opcheck(ops.spike_pack.default, (x, table, counts))
        packed, _ = ops.spike_pack(x, table, counts)
        size = list(x.shape)
        torch.library.opcheck(ops.spike_unpack.default, (packed, table, size, torch.float32))
        arguments = (packed, table, size, weight, bias, *OPTIONS)
        torch.library.opcheck(ops.spike_conv2d.default, arguments)
        grad = torch.randn(2, 9, 5, 6)
        arguments = (packed, table, size, grad, list(weight.shape), *OPTIONS)
        torch.library.opcheck(ops.spike_conv2d_weight.default, arguments)
    arguments = (grad, weight, size, [1, 1], [1, 1], 1)
    torch.library.opcheck(ops.spike_conv2d_input.default, arguments)


@pytest.mark.parametrize(
    "name", ["3x3", "odd", "small images", "much padding", "dilation", "groups"]
)
def test_input_gradient_by_events(name):
    torch.manual_seed(0)
    case = CONVS[name]
    layer = nn.Conv2d(*case["arguments"], **case["options"])
    images, height, width = case["size"]
    x = torch.zeros(images, layer.in_channels, height, width, requires_grad=True)
    out = layer(x)
    grad = sparse_reals(out.shape)
    out.backward(grad)
    found = torch.ops.iirsnn.spike_conv2d_input(
        grad,
        layer.weight.detach(),
        list(x.shape),
        list(layer.padding),
        list(layer.dilation),
        layer.groups,
    )
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size=[2, 64, 5, 5]), "packed: expected"),
        (dict(weight=torch.ones(4, 3, 3, 3)), "weight: expected"),
        (dict(table=torch.ones(4)), "table: expected"),
        (dict(bias=torch.ones(3)), "bias: expected"),
        (dict(stride=[0, 1]), "stride"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    packed, _ = torch.ops.iirsnn.spike_pack(spikes((2, 64, 4, 4)), torch.arange(256.0), False)
    arguments = dict(
        packed=packed,
        table=torch.arange(256.0),
        size=[2, 64, 4, 4],
        weight=torch.ones(4, 64, 3, 3),
        bias=None,
        stride=[1, 1],
        padding=[1, 1],
        dilation=[1, 1],
        groups=1,
    )
    with pytest.raises(ValueError, match=message):
        torch.ops.iirsnn.spike_conv2d(**{**arguments, **change})


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_may_become_plain_between_its_passes(mode):
    torch.manual_seed(0)
    network = nn.Sequential(FusedLIF(1.0, 0.9), nn.Conv2d(8, 4, 3, padding=1))
    expected = copy.deepcopy(network)
    x = torch.randn(1, 2, 8, 5, 5)
    use_spike_layers(network, mode)
    out = network[1](network[0](x)[0])
    use_plain_layers(network)
    out.square().sum().backward()
    expected[1](expected[0](x)[0]).square().sum().backward()
    torch.testing.assert_close(network[1].weight.grad, expected[1].weight.grad)
    torch.testing.assert_close(network[0].threshold.grad, expected[0].threshold.grad)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_a_linear_layer_without_inputs_or_outputs(mode, inputs, outputs):
    plain = nn.Linear(inputs, outputs)
    layer = SpikeLinear(inputs, outputs)
    layer.load_state_dict(plain.state_dict())
    layer.set_mode(mode)
    x = torch.ones(4, inputs)
    results = []
    for each in (plain, layer):
        given = x.clone().requires_grad_()
        out = each(given)
        out.sum().backward()
        results.append((out, given.grad, each.weight.grad, each.bias.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
