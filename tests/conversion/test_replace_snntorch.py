"""snnTorch's Leaky and Lapicque by iirsnn's kernels."""

import warnings

import pytest
import torch
from torch import nn

from iirsnn import replace_neurons

from .replaced import assert_same, current, exchanged, ten_steps

pytest.importorskip("snntorch", reason="snnTorch is not installed: pip install 'snntorch>=1.0'")
import snntorch as snn
from snntorch import surrogate, utils

LEAKY = {
    "plain": {},
    "hidden": {"init_hidden": True},
    "hidden and output": {"init_hidden": True, "output": True},
    "learned": {"learn_beta": True, "learn_threshold": True, "threshold": 0.7},
    "beta clamped": {"beta": 1.2, "learn_beta": True},
    "fast_sigmoid": {"spike_grad": surrogate.fast_sigmoid()},
    "fast_sigmoid, threshold": {"spike_grad": surrogate.fast_sigmoid(), "threshold": 0.7},
    "sigmoid": {"spike_grad": surrogate.sigmoid(5), "threshold": 0.7},
    "triangular": {"spike_grad": surrogate.triangular()},
    "straight through": {"spike_grad": surrogate.straight_through_estimator()},
    "no gradient": {"surrogate_disable": True},
    "per neuron": {"beta": torch.tensor([0.5, 0.7, 0.9, 0.8]), "learn_beta": True},
    "threshold per neuron": {"threshold": torch.tensor([0.5, 0.7, 0.9, 0.8])},
    "graded": {"graded_spikes_factor": 2.5, "learn_graded_spikes_factor": True},
}
LAPICQUE = {
    "beta": {"beta": 0.8},
    "R and C": {"R": 2.0, "C": 2.0},
    "hidden": {"beta": 0.7, "init_hidden": True},
    "learned threshold": {"beta": 0.7, "learn_threshold": True},
}


def run(cell, x):
    """Spikes and membranes of all timesteps."""
    utils.reset(nn.Sequential(cell))
    spikes, membranes = [], []
    mem = None if cell.init_hidden else torch.zeros_like(x[0])
    for x_t in x:
        out = cell(x_t) if cell.init_hidden else cell(x_t, mem)
        s, mem = (out, cell.mem) if isinstance(out, torch.Tensor) else out
        spikes.append(s)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("options", LEAKY)
def test_leaky(options, reset_mechanism, reset_delay):
    original = snn.Leaky(
        **{"beta": 0.8, **LEAKY[options]},
        reset_mechanism=reset_mechanism,
        reset_delay=reset_delay,
    )
    x = current(7, 5, 4)
    if options == "no gradient":
        other = exchanged(original)
        assert torch.equal(run(original, x)[0], run(other, x)[0])
    else:
        assert_same(run, original, exchanged(original), x)


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("options", LAPICQUE)
def test_lapicque(options, reset_mechanism):
    original = snn.Lapicque(**LAPICQUE[options], reset_mechanism=reset_mechanism)
    assert_same(run, original, exchanged(original), 2 * current(7, 3, 5))


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
def test_on_a_lattice_the_bits_are_the_same(reset_mechanism):
    original = snn.Leaky(0.5, reset_mechanism=reset_mechanism)
    other = exchanged(original)
    x = current(7, 64, 20, lattice=True)
    for expected, got in zip(run(original, x), run(other, x), strict=True):
        assert torch.equal(expected, got)
    s, mem = other(torch.ones(3), torch.zeros(3))
    assert mem.tolist() == [1.0] * 3
    assert s.tolist() == [0.0] * 3  # at the threshold it does not fire


def test_surrogates_of_the_kernels_and_of_the_library():
    net = nn.Sequential(
        snn.Leaky(0.9),
        snn.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25)),
        snn.Leaky(0.9, learn_threshold=True),
    )
    surrogates = [row.surrogate for row in replace_neurons(net).rows]
    assert surrogates == ["atan", "fast_sigmoid", "library"]


class Tutorial(nn.Module):
    """A net of two layers over time, as snnTorch's tutorials write one."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(30, 40)
        self.lif1 = snn.Leaky(beta=0.95, learn_beta=True)
        self.fc2 = nn.Linear(40, 10)
        self.lif2 = snn.Leaky(beta=0.95)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for _ in range(8):
            s, mem1 = self.lif1(self.fc1(x), mem1)
            s, mem2 = self.lif2(self.fc2(s), mem2)
            spikes.append(s)
            membranes.append(mem2)
        return torch.stack(spikes), torch.stack(membranes)


def losses(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    x = torch.rand(16, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10

    def loss():
        _, membranes = net(x)
        return sum(nn.functional.cross_entropy(mem, labels) for mem in membranes)

    return ten_steps(optimizer, loss)


def test_a_network_trains_as_before():
    torch.manual_seed(0)
    net = Tutorial()
    other = exchanged(net)
    expected = losses(net)
    torch.testing.assert_close(losses(other), expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0]
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(torch.ones(2, 30))[0], other(torch.ones(2, 30))[0])
    assert other.state_dict().keys() == net.state_dict().keys()
    assert other.lif1.beta.item() == net.lif1.beta.item() != 0.95


def test_the_library_resets_hidden_states():
    net = nn.Sequential(snn.Leaky(0.9, init_hidden=True), snn.Lapicque(beta=0.5, init_hidden=True))
    replace_neurons(net, strict=True)
    x = torch.rand(3, 4).requires_grad_()
    first = net(x)
    net(x)
    assert all(cell.mem.abs().sum() > 0 for cell in net)
    utils.reset(net)
    assert all(cell.mem.abs().sum() == 0 and not cell.mem.requires_grad for cell in net)
    assert torch.equal(net(x), first)
    for cell in net:
        cell.reset_state()
        assert cell.mem.abs().sum() == 0
    with pytest.raises(TypeError, match="mem: expected none with init_hidden=True"):
        net[0](x, x)


def inhibited():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return snn.Leaky(0.9, inhibition=True)


def changed():
    cell = snn.Leaky(0.9)
    cell.reset_mechanism = "zero"
    return cell


def graded(u):
    return torch.relu(u)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (inhibited, "inhibition: its neurons are not independent"),
        (lambda: snn.Leaky(0.9, state_quant=torch.round), "state_quant: its membrane is quantised"),
        (changed, "reset_mechanism was changed to 'zero' after it was made"),
        (lambda: snn.Lapicque(beta=0.9, learn_beta=True), "computed from a learned beta"),
        (lambda: snn.Leaky(0.9, threshold=0.0), "is not above its resting membrane"),
        (lambda: snn.Leaky(0.9, spike_grad=graded), "not the same on random currents"),
        (lambda: snn.Leaky(0.9, spike_grad=surrogate.SSO()), "not the same on random currents"),
        (lambda: snn.Synaptic(0.9, 0.8), "not one of Lapicque, Leaky"),
        (lambda: snn.RLeaky(0.9, all_to_all=False), "not one of Lapicque, Leaky"),
    ],
)
def test_what_is_left_is_named(make, reason):
    net = nn.Sequential(make())
    kind = type(net[0])
    with pytest.raises(ValueError, match=reason):
        replace_neurons(net, strict=True)
    (row,) = replace_neurons(net).left
    assert reason in row.reason
    assert type(net[0]) is kind
