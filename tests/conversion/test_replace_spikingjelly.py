"""SpikingJelly's nodes by iirsnn's kernels."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from iirsnn import replace_neurons, reset_state

from .replaced import assert_same, current, exchanged, ten_steps

pytest.importorskip(
    "spikingjelly", reason="SpikingJelly is not installed: pip install 'spikingjelly>=2.0'"
)
from spikingjelly.activation_based import functional, layer, neuron, surrogate

NODES = {
    "IF": lambda **o: neuron.IFNode(**o),
    "LIF": lambda **o: neuron.LIFNode(**o),
    "LIF tau 3.3": lambda **o: neuron.LIFNode(tau=3.3, **o),
    "LIF no decay": lambda **o: neuron.LIFNode(tau=1.5, decay_input=False, **o),
    "PLIF": lambda **o: neuron.ParametricLIFNode(init_tau=2.7, **o),
    "PLIF no decay": lambda **o: neuron.ParametricLIFNode(decay_input=False, **o),
}
INPUT_SCALE = {"LIF": 2, "LIF tau 3.3": 3.3, "PLIF": 2.7}  # so that about a third fires
SURROGATES = {
    "Sigmoid(3)": surrogate.Sigmoid(3.0),
    "ATan": surrogate.ATan(),
    "PiecewiseQuadratic(1.25)": surrogate.PiecewiseQuadratic(1.25),  # as wide as the threshold
    "PiecewiseQuadratic": surrogate.PiecewiseQuadratic(),
    "SoftSign(2.5)": surrogate.SoftSign(2.5),
    "SuperSpike": surrogate.SuperSpike(),
    "Erf": surrogate.Erf(),
    "PiecewiseExp": surrogate.PiecewiseExp(),
}
OF_KERNELS = {"Sigmoid(3)", "ATan", "PiecewiseQuadratic(1.25)", "SoftSign(2.5)"}


def run(node, x):
    """Spikes and the last membrane, in two pieces."""
    functional.reset_net(node)
    if node.step_mode == "s":
        return torch.stack([node(x_t) for x_t in x]), node.v
    return torch.cat([node(x[:3]), node(x[3:])]), node.v


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("node", NODES)
def test_nodes(node, v_reset, detach_reset, step_mode):
    original = NODES[node](v_reset=v_reset, detach_reset=detach_reset, step_mode=step_mode)
    assert_same(run, original, exchanged(original), INPUT_SCALE.get(node, 1) * current(7, 3, 5, 4))


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name):
    original = neuron.LIFNode(v_threshold=0.8, surrogate_function=SURROGATES[name], step_mode="m")
    assert_same(run, original, exchanged(original), current(7, 3, 20))
    (row,) = replace_neurons(original).rows
    assert (row.surrogate != "library") == (name in OF_KERNELS)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("node", ["IF", "LIF"])
def test_a_membrane_at_the_threshold_fires(node, v_reset):
    original = NODES[node](v_reset=v_reset, step_mode="m")
    x = current(7, 64, 20, lattice=True)
    assert_same(run, original, exchanged(original), x)
    functional.reset_net(original)
    at_once = original(x[:1])
    assert at_once[x[:1] == (1.0 if node == "IF" else 2.0)].min() == 1


def test_membranes_are_recorded_as_before():
    original = neuron.LIFNode(step_mode="m", store_v_seq=True)
    other = exchanged(original)
    x = current(5, 2, 9)
    assert torch.equal(original(x), other(x))
    torch.testing.assert_close(original.v_seq, other.v_seq)


def test_the_threshold_of_a_replaced_node_may_be_changed():
    original = neuron.LIFNode(step_mode="m")
    other = exchanged(original)
    original.v_threshold = other.v_threshold = 0.5
    assert_same(run, original, other, current(6, 3, 30))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1, bias=False),
        layer.BatchNorm2d(6),
        neuron.IFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),
        layer.Conv2d(6, 6, 3, padding=1, bias=False),
        layer.BatchNorm2d(6),
        neuron.ParametricLIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
        layer.Flatten(),
        layer.Linear(6 * 16, 10),
        neuron.LIFNode(tau=1.5, v_reset=None, v_threshold=0.2),
    )
    functional.set_step_mode(net, "m")
    return net


def losses(net, reset):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10

    def loss():
        reset(net)
        rate = net(x.expand(4, *x.shape)).mean(0)
        return nn.functional.mse_loss(rate, nn.functional.one_hot(labels, 10).float())

    return ten_steps(optimizer, loss)


def test_a_network_trains_as_before():
    net = network()
    other = exchanged(net)
    expected = losses(net, functional.reset_net)
    torch.testing.assert_close(losses(other, functional.reset_net), expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0]


def test_state_dicts_load_in_both_directions():
    net = network()
    other = exchanged(net)
    losses(net, functional.reset_net)
    other.load_state_dict(net.state_dict())
    assert other.state_dict().keys() == net.state_dict().keys()
    x = torch.rand(4, 3, 1, 8, 8)
    for each in (net, other):
        functional.reset_net(each)
    assert torch.equal(net(x), other(x))
    net.load_state_dict(other.state_dict())


def test_parameters_and_identity_stay():
    net = network()
    before = list(net.modules()), list(net.parameters())
    replace_neurons(net)
    assert all(a is b for a, b in zip(net.modules(), before[0], strict=True))
    assert all(a is b for a, b in zip(net.parameters(), before[1], strict=True))
    assert replace_neurons(net).rows == ()


def test_the_library_resets_and_steps_without_a_warning(caplog):
    net = network()
    functional.reset_net(net)
    replace_neurons(net)
    with caplog.at_level(logging.WARNING):
        net(torch.rand(2, 3, 1, 8, 8))
        functional.detach_net(net)
        functional.reset_net(net)
        functional.set_step_mode(net, "s")
        net(torch.rand(3, 1, 8, 8))
        reset_state(net[2])
    assert caplog.records == []
    assert net[2].v == 0.0
    assert net[6].v.shape == (3, 6, 4, 4)


def test_copies_and_pickles():
    node = exchanged(neuron.ParametricLIFNode(step_mode="m"))
    x = current(4, 2, 9)
    expected = node(x)
    node.reset()
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert type(other) is type(node)
        assert torch.equal(other(x), expected)


def test_a_membrane_in_use_is_kept():
    original, other = (neuron.LIFNode(step_mode="m") for _ in range(2))
    x = current(6, 2, 9).requires_grad_()
    assert torch.equal(original(x[:3]), other(x[:3]))
    replace_neurons(other)
    assert torch.equal(original(x[3:]), other(x[3:]))


def test_hooks_stay_and_see_nothing_of_the_check():
    node = neuron.LIFNode(step_mode="m")
    seen = []
    node.register_forward_hook(lambda module, args, output: seen.append(output))
    replace_neurons(node)
    assert seen == []
    assert node(torch.ones(2, 3)) is seen[0]


class Own(neuron.LIFNode):
    """A user's own, of which nothing is known."""


class NotSpiking(neuron.LIFNode):
    def __new__(cls):
        return neuron.LIFNode(surrogate_function=surrogate.Sigmoid(spiking=False))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Own, "not one of IFNode, LIFNode, ParametricLIFNode"),
        (neuron.QIFNode, "not one of"),
        (NotSpiking, "it emits no spikes"),
        (lambda: neuron.IFNode(v_threshold=0.0), "is not above its resting membrane"),
        (lambda: neuron.LIFNode(v_threshold=0.2, v_reset=0.3), "is not above its resting"),
    ],
)
def test_what_is_left_is_named(make, reason):
    net = nn.Sequential(neuron.IFNode(), make())
    kind = type(net[1])
    with pytest.raises(ValueError, match=r"1 \(.*\): .*" + reason):
        replace_neurons(net, strict=True)
    assert type(net[0]) is neuron.IFNode
    table = replace_neurons(net)
    assert [row.name for row in table.replaced] == ["0"]
    assert reason in table.left[0].reason
    assert type(net[1]) is kind


def test_a_wrong_equation_is_found_by_the_check(monkeypatch):
    from iirsnn.conversion.peers import spikingjelly

    monkeypatch.setattr(spikingjelly.Equation, "leak", 0.5)
    right = spikingjelly.equation

    def wrong(node):
        found = right(node)
        object.__setattr__(found, "detach_reset", not found.detach_reset)
        return found

    monkeypatch.setattr(spikingjelly, "equation", wrong)
    node = neuron.LIFNode()
    (row,) = replace_neurons(node).rows
    assert "not the same on random currents" in row.reason
    assert type(node) is neuron.LIFNode
