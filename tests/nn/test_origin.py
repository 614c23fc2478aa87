"""What is known of a tensor by where it comes from, and spike layers that rely on it alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iirsnn
from iirsnn import BatchNormLIF, FusedLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from iirsnn.nn.origin import Layout, Origin, origin
from iirsnn.ops.backend import has_kernels

pytestmark = pytest.mark.skipif(
    not has_kernels("cpu"), reason="what is packed without iirsnn._C is not worth it"
)
BITS, QUARTERS, TWO = Origin(), Origin(4, 4), Origin(2)


@pytest.fixture
def no_events(monkeypatch):
    """A CPU without events computes as a GPU does."""
    layer = iirsnn.nn.spike_layers._SpikeLayer
    monkeypatch.setattr(layer, "_no_events", lambda self, x, dtype: "not in this test")


def current(*size, dtype=torch.float32):
    return torch.randn(size or (2, 3, 4, 8, 8), dtype=dtype, requires_grad=True)


def spikes(*size, dtype=torch.float32):
    return FusedLIF()(current(*size, dtype=dtype))


NEURONS = {
    "LIF": FusedLIF(),
    "stateful": FusedLIF(stateful=True),
    "reference": FusedLIF(backend="reference"),
    "BatchNorm and LIF": BatchNormLIF(nn.BatchNorm2d(4), FusedLIF()),
    "recomputed": BatchNormLIF(nn.BatchNorm2d(4), FusedLIF(backend="reference")),
}


@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name):
    assert origin(NEURONS[name](current())) == BITS


def test_a_membrane_is_no_spike():
    s, v = FusedLIF(return_v=True)(current())
    assert origin(s) == BITS
    assert origin(v) is None


def _last(s):
    return s.to(memory_format=torch.channels_last)


#: s [6, 4, 8, 8] -> something else, and what that is.
KNOWN = {
    "merged": (lambda s: s.view(2, 3, 4, 8, 8).flatten(0, 1), BITS),
    "merged, channels_last": (
        lambda s: FusedLIF()(_last(s).unflatten(0, (2, 3)) * 1).flatten(0, 1),
        BITS,
    ),
    "flat": (lambda s: s.flatten(1), BITS),
    "turned": (lambda s: s.transpose(0, 1).contiguous(), BITS),
    "channels_last": (lambda s: s.to(memory_format=torch.channels_last), BITS),
    "half": (lambda s: s.to(torch.bfloat16), BITS),
    "one image": (lambda s: s[1], BITS),
    "images": (lambda s: s[1:3], BITS),
    "chunk": (lambda s: s.chunk(2)[1], BITS),
    "max pool": (lambda s: F.max_pool2d(s, 3, 2, 1), BITS),
    "joined": (lambda s: torch.cat([s, s], 1), BITS),
    "stacked": (lambda s: torch.stack([s, s]), BITS),
    "added": (lambda s: s + s, TWO),
    "joined sums": (lambda s: torch.cat([s, s + s], 1), TWO),
    "average pool": (lambda s: F.avg_pool2d(s, 2), QUARTERS),
    "the package's": (lambda s: SpikeAvgPool2d(2)(s), QUARTERS),
    "average of averages": (lambda s: F.avg_pool2d(F.avg_pool2d(s, 2), 4), Origin(64, 64)),
    "average of sums": (lambda s: F.avg_pool2d(s + s, (1, 2)), Origin(4, 2)),
    "maximum of averages": (lambda s: F.max_pool2d(F.avg_pool2d(s, 2), 2), QUARTERS),
    "padded": (lambda s: F.avg_pool2d(s, 2, 2, 1), QUARTERS),
}
UNKNOWN = {
    "negative": lambda s: -s,
    "difference": lambda s: s - s,
    "scaled sum": lambda s: torch.add(s, s, alpha=2),
    "sum with a number": lambda s: s + 1,
    "sum with reals": lambda s: s + current(6, 4, 8, 8),
    "unlike": lambda s: torch.cat([s[:, :, :4, :4], F.avg_pool2d(s, 2)], 1),
    "thirds": lambda s: F.avg_pool2d(s, 3),
    "a divisor": lambda s: F.avg_pool2d(s, 2, divisor_override=3),
    "padding not counted": lambda s: F.avg_pool2d(s, 2, 2, 1, count_include_pad=False),
    "ragged": lambda s: F.avg_pool2d(s, 2, 3, ceil_mode=True),
    "beyond 8 bits": lambda s: F.avg_pool2d(F.avg_pool2d(s, 8), 1) + F.avg_pool2d(s, 16, 1, 8),
    "strided": lambda s: s[:, ::2],
    "detached": lambda s: s.detach().requires_grad_() * 1,
    "written to": lambda s: s.mul_(2).view(6, -1),
    "dropped": lambda s: F.dropout(s, 0.5),
    "real": lambda s: torch.sigmoid(s),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    make, wanted = KNOWN[name]
    x = make(spikes(6, 1, 4, 8, 8).squeeze(1))
    assert origin(x) == wanted
    counts = x.detach() * wanted.divisor
    assert torch.equal(counts, counts.round().clamp(0, wanted.most))


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    assert origin(UNKNOWN[name](spikes(6, 1, 4, 8, 8).squeeze(1))) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", KNOWN)
def test_packed_and_back(name, dtype):
    """The same values in the same layout."""
    x = KNOWN[name][0](spikes(6, 1, 4, 8, 8, dtype=dtype).squeeze(1)).detach()
    what = KNOWN[name][1]
    packed = what.pack(x)
    y = what.unpack(packed, Layout.of(x))
    assert torch.equal(x, y)
    assert (x.dtype, x.stride()) == (y.dtype, y.stride())
    assert packed.nbytes == (-(-x.numel() // 64) * 8 if what == BITS else x.numel())


@pytest.fixture
def no_short_way(monkeypatch):
    """The twins in Python, as where iirsnn._C is compiled later or does not take the device."""
    for module in ("origin", "spike_convolution", "spike_layers"):
        monkeypatch.setattr(f"iirsnn.nn.{module}.direct", lambda name: None)


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_the_twin_knows_as_much(name, no_short_way):
    make, wanted = KNOWN.get(name) or (UNKNOWN[name], None)
    assert origin(make(spikes(6, 1, 4, 8, 8).squeeze(1))) == wanted


def products(layer, plain, x):
    """[out, grad_x, grad_weight, grad_bias] of both layers, for the same x."""
    plain.load_state_dict(layer.state_dict())
    found = []
    for module in (layer, plain):
        out = module(x)
        grads = torch.autograd.grad(
            out, [x, *module.parameters()], torch.ones_like(out) / 3, retain_graph=True
        )
        found.append([out, *grads])
    return found


CONVS = {
    "3x3": ((4, 5, 3), dict(padding=1)),
    "stride and dilation": ((4, 6, 3), dict(stride=2, dilation=2, padding=2)),
    "groups": ((4, 6, (1, 3)), dict(groups=2)),
    "same": ((4, 5, 2), dict(padding="same")),
    "circular": ((4, 5, 3), dict(padding=1, padding_mode="circular")),
    "no bias": ((4, 5, 1), dict(bias=False)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["bits", "counts"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_have_the_bits_of_torchs(no_events, name, pool, layout, dtype):
    """What is kept is the input, so every product is."""
    torch.manual_seed(0)
    arguments, options = CONVS[name]
    s = spikes(6, 1, 4, 8, 8, dtype=dtype).squeeze(1).to(memory_format=layout)
    x = SpikeAvgPool2d(2)(s) if pool else s
    layer = SpikeConv2d(*arguments, **options, dtype=dtype).to(memory_format=layout)
    plain = nn.Conv2d(*arguments, **options, dtype=dtype).to(memory_format=layout)
    for ours, torchs in zip(*products(layer, plain, x), strict=True):
        assert torch.equal(ours, torchs)
    assert layer.decision.kept == ("counts" if pool else "bits")
    assert (layer.decision.forward, layer.decision.reason) == ("dense", "not in this test")


@pytest.mark.parametrize("twin", [False, True], ids=["compiled", "twin"])
def test_a_linear_layer_has_the_bits_of_torchs(no_events, request, twin):
    if twin:
        request.getfixturevalue("no_short_way")
    x = spikes(5, 3, 70)
    for ours, torchs in zip(*products(SpikeLinear(70, 9), nn.Linear(70, 9), x), strict=True):
        assert torch.equal(ours, torchs)


LAYERS = {
    "convolution": lambda: SpikeConv2d(4, 6, (1, 3), stride=(2, 1), padding=1, groups=2),
    "1x1": lambda: SpikeConv2d(4, 5, 1, bias=False),
    "pool": lambda: SpikeAvgPool2d(2),
    "ragged pool": lambda: SpikeAvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "pool with a divisor": lambda: SpikeAvgPool2d((2, 1), divisor_override=3),
    "linear": lambda: nn.Sequential(nn.Flatten(), SpikeLinear(256, 3)),
}
NODES = {"convolution": "SpikeProduct", "1x1": "SpikeProduct", "linear": "SpikeProduct"}
NODES |= {"pool": "SpikeAverageOf4", "ragged pool": "SpikeAveragePool"}
NODES["pool with a divisor"] = "SpikeAveragePool"
SPIKES = {
    "bits": lambda s: s,
    "channels_last": lambda s: s.to(memory_format=torch.channels_last),
    "turned": lambda s: s.transpose(2, 3),
    "counts": lambda s: s + s,
}


@pytest.mark.parametrize("trained", ["x", "weight", "all"])
@pytest.mark.parametrize("kind", SPIKES)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layers_are_their_twins(no_events, monkeypatch, name, kind, trained):
    """Outputs and gradients in bits and strides, whichever gradients are asked for."""
    torch.manual_seed(0)
    s, layer = SPIKES[kind](spikes(6, 1, 4, 8, 8).squeeze(1)), LAYERS[name]()
    inputs = {"x": [s], "weight": [*layer.parameters()][:1], "all": [s, *layer.parameters()]}
    found = []
    for short in (True, False):
        if not short:
            for module in ("origin", "spike_convolution", "spike_layers"):
                monkeypatch.setattr(f"iirsnn.nn.{module}.direct", lambda name: None)
        out = layer(s)
        assert (out.grad_fn.name() == NODES[name]) == short
        of = inputs[trained] or [s]
        found.append([out, *torch.autograd.grad(out, of, torch.ones_like(out) / 3)])
    for ours, twins in zip(*found, strict=True):
        assert torch.equal(ours, twins)
        assert ours.stride() == twins.stride()


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_autograd(no_events, name):
    """A graph of gradients that is compiled as a whole has the gradients of one that is not."""
    from torch._dynamo import compiled_autograd

    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(1, 6, 4, 8, 8, requires_grad=True)

    def gradients():
        loss = layer(FusedLIF(learn_threshold=False)(x * 2).flatten(0, 1)).square().sum()
        leaves = [x, *layer.parameters()]
        loss.backward()
        return [(leaf.grad, setattr(leaf, "grad", None))[0] for leaf in leaves]

    wanted = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    for got, grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, grad, rtol=0, atol=0)


def test_a_graph_is_used_once_and_what_it_keeps_is_watched(no_events):
    layer = SpikeConv2d(4, 5, 3)
    loss = layer(spikes(6, 1, 4, 8, 8).squeeze(1)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss = layer(spikes(6, 1, 4, 8, 8).squeeze(1)).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pool_is_differentiated_twice():
    """It is linear, and an average of more than spikes is one too."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(SpikeAvgPool2d(2), x)
    assert torch.autograd.gradgradcheck(SpikeAvgPool2d(3, 1, 1), x)


def test_what_the_short_ways_leave(no_events):
    """Subclasses, transforms, forward mode, meta tensors, and what has no gradient."""

    class Own(torch.Tensor):
        pass

    s = spikes(6, 1, 4, 8, 8).squeeze(1)
    layer, pool, half = SpikeConv2d(4, 5, 3), SpikeAvgPool2d(2), torch.full((1,), 0.5)
    product = iirsnn._C.spike_product
    options = (1, 1, half, "auto", ((1, 1), (0, 0), (1, 1), 1))
    assert product(s, layer.weight, layer.bias, *options).shape == (6, 5, 6, 6)
    assert product(s.detach(), layer.weight.detach(), None, *options) is None
    assert product(s.as_subclass(Own), layer.weight, None, *options) is None
    assert product(s.to("meta"), layer.weight.to("meta"), None, *options) is None
    assert product(s.flatten(1), layer.weight, None, *options) is None
    assert product(s, layer.weight, None, *options[:-1], (1, 0, 1)) is None
    assert isinstance(pool(s.as_subclass(Own)), Own)
    assert not pool(s.detach()).requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, s)
        assert product(dual, layer.weight, None, *options) is None
    taken = []
    torch.func.grad(lambda x: taken.append(product(x, layer.weight, None, *options)) or x.sum())(s)
    assert taken == [None]


def test_what_is_unknown_is_kept_and_runs_as_torchs(no_events):
    layer = SpikeLinear(70, 9)
    for x in (current(5, 3, 70) * 2, spikes(5, 3, 70).detach()):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer.decision.kept == "tensor"
    layer.weight.requires_grad_(False)  # then nothing of x is needed
    layer(spikes(5, 3, 70)).sum().backward()
    assert layer.decision.kept == "tensor"


def test_under_autocast(no_events):
    layer, s = SpikeConv2d(4, 5, 3), spikes(6, 1, 4, 8, 8, dtype=torch.bfloat16).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(s)
    assert (out.dtype, layer.decision.kept) == (torch.bfloat16, "bits")
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_only_one_derivative(no_events):
    layer, s = SpikeConv2d(4, 5, 3), spikes(6, 1, 4, 8, 8).squeeze(1)
    with pytest.raises(RuntimeError, match="one backward pass through a spike layer"):
        torch.autograd.grad(layer(s).sum(), layer.weight, create_graph=True)


def test_a_network_trains_the_same(no_events):
    """Convolutions, pools, a sum of spikes; gradients with the bits of torch's layers."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.neurons = nn.ModuleList(FusedLIF() for _ in range(3))
            self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
            self.last = nn.Linear(32, 10)
            self.pool = nn.AvgPool2d(2)

        def forward(self, x):
            def fire(neuron, x):
                return neuron(x.unflatten(0, (2, 3))).flatten(0, 1)

            a = fire(self.neurons[0], self.first(x))
            b = fire(self.neurons[1], self.second(a))
            c = fire(self.neurons[2], self.third(self.pool(a + b)))
            return self.last(self.pool(c).flatten(1)).unflatten(0, (2, 3)).sum(0)

    torch.manual_seed(0)
    plain = Network()
    layered = iirsnn.use_spike_layers(copy.deepcopy(plain))
    x = torch.randn(6, 3, 12, 12)
    for network in (plain, layered):
        network.to(memory_format=torch.channels_last)(x).square().sum().backward()
    kept = [layered.second, layered.third, layered.last]
    assert [layer.decision.kept for layer in kept] == ["bits", "counts", "counts"]
    for ours, torchs in zip(layered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, torchs.grad)
