"""Networks that are graphs: the spikes and logits of PyTorch, file and all."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from iirsnn import FusedLIF, Network, Readout
from iirsnn.errors import UsageError
from iirsnn.event import EventNetwork
from iirsnn.event.flips import trace_flips
from iirsnn.models.graph import TIME_FUNCTIONS, GraphNetwork
from iirsnn.nn import BatchNormLIF
from iirsnn.runtime.library import set_capability
from tests.event.graphs import (
    GRAPHS,
    Bottlenecks,
    Branches,
    Dense,
    Graph,
    Inception,
    Pools,
    Residual,
    Shuffle,
    Timed,
    conv,
    first,
)
from tests.event.networks import images, integers, levels, spikes_of


def made(kind, timesteps=1):
    network = integers(kind()).layers[0].eval()
    network.timesteps = timesteps
    for module in network.modules():
        if isinstance(module, FusedLIF):
            module.threshold.data.mul_(0.5)  # as the graphs are small: more of them fire
    if kind is Pools:
        network.c.threshold.data.fill_(0.25)  # of averages, which are below 1
    side = 6 if kind is Branches else 8
    return network, images(3, network.stem.in_channels, side, side)


def check(net, network, x):
    expected, logits = spikes_of(network, x)
    assert torch.equal(net(x), logits)
    for ours, theirs in zip(net.spikes(), expected, strict=True):
        assert torch.equal(ours.float().reshape(theirs.shape), theirs)
        assert 0 < theirs.mean() < 1, "the case says nothing"


@pytest.mark.parametrize("kind", GRAPHS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("timesteps", [1, 2])
def test_graphs(level, tmp_path, kind, timesteps):
    network, x = made(kind, timesteps)
    net = EventNetwork.from_model(network, timesteps, image_shape=tuple(x.shape[1:]))
    check(net, network, x)
    names = [layer.name for layer in net.statistics()]
    assert len(names) == len(net.layers)
    net.save(tmp_path / "net.iirsnn")
    assert EventNetwork.load(tmp_path / "net.iirsnn") == net
    if timesteps == 1:
        assert trace_flips(net, network, x) == []


def network_of(kind, timesteps):
    """A GraphNetwork of a graph: what `convert` gives."""

    inner, x = made(kind)
    timed = Timed(inner)
    tracer = fx.Tracer(autowrap_functions=TIME_FUNCTIONS)
    tracer.is_leaf_module = lambda module, name: not list(module.children())
    graph = fx.GraphModule(timed, tracer.trace(timed))
    return GraphNetwork(graph, timesteps, tuple(x.shape[1:])).eval()


@pytest.mark.parametrize("kind", [Dense, Shuffle, Residual])
@pytest.mark.parametrize("timesteps", [1, 2])
def test_graph_networks(kind, timesteps):
    network, x = network_of(kind, timesteps), made(kind)[1]
    net = EventNetwork.from_model(network, timesteps)
    assert net.image_shape == tuple(x.shape[1:])
    check(net, network, x)
    with pytest.raises(UsageError, match="expected the T of the model"):
        EventNetwork.from_model(network, timesteps + 1)


@pytest.mark.parametrize("kind", GRAPHS, ids=lambda kind: kind.__name__)
def test_any_batch_any_threads_any_precision(kind):
    """Weights of any size: the same bits, alone or together, whoever computes them."""
    network, x = made(kind)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data *= torch.rand(parameter.shape, generator=generator) * 0.2 + 0.9
    for precision in ("fp32", "bf16", "int8"):
        net = EventNetwork.from_model(network, precision=precision, image_shape=tuple(x.shape[1:]))
        together = net(x)
        assert torch.equal(torch.cat([net(image[None]) for image in x]), together)
        assert net(x[:0]).shape == (0, together.shape[1])
        torch.set_num_threads(3)
        assert torch.equal(net(x), together)
        for name in levels():
            set_capability(name)
            assert torch.equal(net(x), together)
        kinds = {layer.name: {weight.dtype for weight in layer.weights} for layer in net.layers}
        assert kinds["stem"] == {torch.float32}
        assert precision == "fp32" or set.union(*kinds.values()) > {torch.float32}


def test_bf16_holds_quarters():
    network, x = made(Bottlenecks)
    net = EventNetwork.from_model(network, precision="bf16", image_shape=tuple(x.shape[1:]))
    check(net, network, x)


class Cut(Graph):
    """Real values beside some channels of spikes."""

    def build(self):
        self.stem, self.a, self.wide = conv(2, 70), FusedLIF(), conv(70, 20, 1)
        self.flat, self.head = nn.Flatten(), nn.Linear(28 * 64, 5)

    def body(self, x, timesteps):
        x = first(self.a, self.stem(x), timesteps)
        return self.head(self.flat(torch.cat([self.wide(x), x[:, 59:67]], 1)))


def test_one_layer_may_slice_and_concat():
    network, x = made(Cut)
    net = EventNetwork.from_model(network, image_shape=tuple(x.shape[1:]))
    check(net, network, x)
    stem, cut, wide, both, head = copy.deepcopy(net.layers)
    both.inputs[0].source, both.inputs[1] = 2, replace(cut.inputs[0], unit=1.0)
    head.inputs[0].source = 3
    one = EventNetwork([stem, wide, both, head], 1, image_shape=net.image_shape)
    assert torch.equal(one(x), net(x))


def test_statistics_of_real_values():
    network, x = made(Shuffle)
    net = EventNetwork.from_model(network, image_shape=tuple(x.shape[1:]))
    net(x)
    found = {layer.name: layer for layer in net.statistics()}
    depthwise, widen = found["depthwise"], found["widen"]
    assert widen.multiplications == widen.dense_operations == 3 * 64 * 18 * 18
    assert depthwise.multiplications == 0 < depthwise.additions
    assert depthwise.value_bytes == widen.value_bytes == 4 * 3 * 64 * 18
    assert (depthwise.spikes, depthwise.neurons) == (0, 0)
    assert found["squeeze"].multiplications == found["squeeze"].value_bytes == 0
    assert found["squeeze"].neurons == 64 * 18


def test_skips_and_sums_are_additions():
    network, x = made(Branches)
    net = EventNetwork.from_model(network, image_shape=tuple(x.shape[1:]))
    net(x)
    (stem, left, both, *_) = net.statistics()
    assert both.name == "add"
    assert both.additions == stem.spikes + left.spikes > 0
    assert both.multiplications == 0


@pytest.mark.parametrize("kind", [Bottlenecks, Dense, Shuffle, Residual])
def test_flips_are_traced_through_real_values(kind):
    """Real weights: what differs from PyTorch is explained, a wrong network is not."""
    network, x = made(kind)
    x = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data *= torch.rand(parameter.shape, generator=generator) * 0.2 + 0.9
    net = EventNetwork.from_model(network, image_shape=tuple(x.shape[1:]))
    assert all(flip.explained for flip in trace_flips(net, network, x))
    *_, last = (module for module in network.modules() if isinstance(module, FusedLIF))
    last.threshold.data *= 1.2
    flips = trace_flips(net, network, x)
    assert flips
    assert not any(flip.explained for flip in flips if flip.root and flip.distance > 1e4)


def test_batch_norm_lif():
    """Its norm may be exchanged: torch's is folded, Identity is none, others are refused."""
    block = BatchNormLIF(nn.BatchNorm2d(6), FusedLIF(threshold=0.3))
    network = Network([nn.Conv2d(1, 6, 3), block, nn.Flatten(), Readout(96, 3)], (1, 6, 6)).eval()
    block.norm.running_var.fill_(0.3)
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))

    def same():
        with torch.no_grad():
            found = EventNetwork.from_model(network)(x)
            torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-5)
            return found

    folded = same()
    kept, block.norm = block.norm, nn.SyncBatchNorm(6).eval()
    block.norm.load_state_dict(kept.state_dict())
    assert torch.equal(EventNetwork.from_model(network)(x), folded)
    block.norm = nn.Identity()
    assert not torch.equal(same(), folded)

    class Mine(nn.BatchNorm2d):
        pass

    for norm in (nn.GroupNorm(2, 6), Mine(6), nn.InstanceNorm2d(6)):
        block.norm = norm.eval()
        with pytest.raises(UsageError, match=rf"layers\.1\.norm \({type(norm).__name__}\)"):
            EventNetwork.from_model(network)


# ---- What is refused ----


class Odd(Graph):
    """One neuron layer, and whatever a test does to it."""

    def build(self):
        self.stem, self.a, self.flat, self.head = (
            conv(1, 4),
            FusedLIF(),
            nn.Flatten(),
            Readout(4, 2),
        )

    def body(self, x, timesteps):
        return self.head(self.flat(self.odd(first(self.a, self.stem(x), timesteps))))


ODD = {
    "mul": (lambda x: x * x, r"mul \(mul\): the event engine has no such operation"),
    "sigmoid": (lambda x: x.sigmoid(), r"sigmoid \(sigmoid\): the event engine has no such"),
    "number": (lambda x: x + 1, r"add \(add\): expected two values of the network"),
    "rows": (lambda x: x[:, :, 1:], r"getitem \(getitem\): expected a slice of channels"),
    "cat": (lambda x: torch.cat([x, x], 2), r"cat \(cat\): expected dim=1, got 2"),
    "mean": (lambda x: x.mean(1), r"mean \(mean\): expected the mean over rows and columns, got 1"),
    "view": (lambda x: x.view(-1, 2, 2, 64), r"view \(reshape\): expected to flatten"),
    "size": (lambda x: x.reshape(x.shape[0], 2, -1), r"reshape \(reshape\): expected to flatten"),
    "dtype": (lambda x: x + x.dtype, r"\(getattr\): expected shape, got dtype"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "torch.fx cannot trace it"),
    "shapes": (lambda x: x + x.mean([2, 3], keepdim=True), "expected one shape, got"),
    "chunk": (lambda x: x.chunk(2)[0], r"chunk \(chunk\): expected dim=1"),
}


@pytest.mark.parametrize("case", ODD)
def test_operations_that_are_refused(case):
    network = Odd()
    network.odd, message = ODD[case]
    with pytest.raises(UsageError, match=message):
        EventNetwork.from_model(network, image_shape=(1, 8, 8))


def test_graphs_that_are_refused():
    network, _ = made(Inception)
    with pytest.raises(UsageError, match=r"cat \(cat\): needs image_shape"):
        EventNetwork.from_model(network)

    class Batched(Odd):
        def body(self, x, timesteps):
            return self.head(self.flat(self.a(self.stem(x))))

    with pytest.raises(
        UsageError, match=r"a \(FusedLIF\): expected \[T, B, \.\.\.\] of split_time"
    ):
        EventNetwork.from_model(Batched(), image_shape=(1, 1, 1))

    network = Odd()
    network.odd, network.averages = nn.Identity(), False
    with pytest.raises(UsageError, match="expected 1 for a graph that ends without mean_over_time"):
        EventNetwork.from_model(network, 2, image_shape=(1, 1, 1))

    class Two(Odd):
        def body(self, x, timesteps):
            x = self.head(self.flat(first(self.a, self.stem(x), timesteps)))
            return x, x

    network = Two()
    network.averages = False
    with pytest.raises(UsageError, match="expected one output"):
        EventNetwork.from_model(network, image_shape=(1, 1, 1))
