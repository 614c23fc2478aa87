"""sinabs' LIF and IAF by iirsnn's kernels."""

import copy

import pytest
import torch
from torch import nn

from iirsnn import replace_neurons

from .replaced import assert_same, current, exchanged, ten_steps

pytest.importorskip("sinabs", reason="sinabs is not installed: pip install 'sinabs>=3.1'")
import sinabs
from sinabs import activation, layers

SINGLE = {"spike_fn": activation.SingleSpike}
OPTIONS = {
    "plain": {},
    "threshold": {"spike_threshold": torch.tensor(0.7)},
    "heaviside": {"surrogate_grad_fn": activation.Heaviside()},
    "gaussian": {"surrogate_grad_fn": activation.Gaussian(), "spike_threshold": torch.tensor(0.8)},
    "periodic": {"surrogate_grad_fn": activation.PeriodicExponential()},
    "resets": {"reset_fn": activation.MembraneReset()},
    "subtracts its threshold": {"reset_fn": activation.MembraneSubtract(1.0)},
    "synapse": {"tau_syn": 3.0},
    "threshold per channel": {"spike_threshold": torch.tensor([0.5, 0.7, 0.9])[:, None, None]},
}
LAYERS = {
    "IAF": lambda **o: layers.IAF(**SINGLE, **o),
    "LIF": lambda **o: layers.LIF(tau_mem=3.0, **SINGLE, **o),
    "LIF not normed": lambda **o: layers.LIF(tau_mem=9.0, norm_input=False, **SINGLE, **o),
    "LIF alphas": lambda **o: layers.LIF(tau_mem=3.0, train_alphas=True, **SINGLE, **o),
    "LIFSqueeze": lambda **o: layers.LIFSqueeze(tau_mem=3.0, batch_size=2, **SINGLE, **o),
    "IAFSqueeze": lambda **o: layers.IAFSqueeze(batch_size=2, **SINGLE, **o),
}
NORMED = {"LIF", "LIF alphas", "LIFSqueeze"}


def run(layer, x):
    """x [T, B, ...]: spikes, then the last state, in two pieces."""
    layer.reset_states()
    spikes = []
    for part in (x[:3], x[3:]):
        batch_first = part.transpose(0, 1)
        if isinstance(layer, layers.SqueezeMixin):
            s = layer(batch_first.flatten(0, 1)).unflatten(0, batch_first.shape[:2])
        else:
            s = layer(batch_first)
        spikes.append(s.transpose(0, 1))
    states = [layer.v_mem, layer.i_syn] if hasattr(layer, "i_syn") else [layer.v_mem]
    return torch.cat(spikes), *[state for state in states if state is not None]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, options):
    original = LAYERS[layer](**OPTIONS[options])
    x = current(7, 2, 3, 4, 5) * (3 if layer in NORMED else 1)
    assert_same(run, original, exchanged(original), x)


def test_tau_per_channel():
    original = layers.LIF(tau_mem=torch.tensor([2.0, 3.0, 4.0])[:, None, None], **SINGLE)
    assert_same(run, original, exchanged(original), 3 * current(7, 2, 3, 4, 5))


@pytest.mark.parametrize("reset_fn", [activation.MembraneSubtract(), activation.MembraneReset()])
def test_a_membrane_at_the_threshold_fires(reset_fn):
    original = LAYERS["IAF"](reset_fn=reset_fn)
    x = current(7, 20, 30, lattice=True)
    assert_same(run, original, exchanged(original), x)
    original.reset_states()
    assert original(x.transpose(0, 1)[:, :1])[x[0].unsqueeze(1) == 1].min() == 1


def test_states_carry_on_and_follow_the_batch():
    original = LAYERS["LIF"]()
    other = exchanged(original)
    for batch in (3, 3, 5):
        torch.manual_seed(0)  # sinabs draws which of its states a new batch starts from
        expected = original(torch.full((batch, 4, 6), 2.0))
        torch.manual_seed(0)
        assert torch.equal(other(torch.full((batch, 4, 6), 2.0)), expected)
        assert other.firing_rate == original.firing_rate
    assert other(torch.ones(2, 3, 7)).shape == (2, 3, 7)


def network():
    torch.manual_seed(0)
    surrogate = {"surrogate_grad_fn": activation.SingleExponential()}
    return nn.Sequential(
        layers.FlattenTime(),
        nn.Conv2d(1, 4, 3),
        layers.IAFSqueeze(batch_size=12, **SINGLE, **surrogate),
        layers.SumPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 10),
        layers.UnflattenTime(batch_size=12),
        layers.LIF(tau_mem=5.0, **SINGLE, **surrogate),
    )


def losses(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.rand(12, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10

    def loss():
        sinabs.reset_states(net)
        return nn.functional.cross_entropy(net(5 * x).sum(1), labels)

    return ten_steps(optimizer, loss)


def test_a_sequential_trains_as_before():
    net = network()
    other = copy.deepcopy(net)
    table = replace_neurons(other, strict=True)
    assert [row.became for row in table.rows] == ["FusedIAFSqueeze", "FusedLIF"]
    expected = losses(net)
    torch.testing.assert_close(losses(other), expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0]
    other.load_state_dict(net.state_dict())
    assert other.state_dict().keys() == net.state_dict().keys()


def test_the_library_resets_states():
    net = network()
    replace_neurons(net)
    x = torch.rand(12, 8, 1, 8, 8)
    first = net(5 * x)
    assert net[2].v_mem.abs().sum() > 0
    sinabs.reset_states(net)
    assert net[2].v_mem.abs().sum() == 0
    assert torch.equal(net(5 * x), first)
    net[2].reset_state()
    assert net[2].v_mem.abs().sum() == 0
    sinabs.zero_grad(net)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (layers.IAF, "spike_fn MultiSpike: only SingleSpike emits at most one spike"),
        (lambda: layers.IAF(spike_fn=activation.MaxSpike(1)), "spike_fn MaxSpike"),
        (lambda: layers.IAF(**SINGLE, min_v_mem=-1.0), "min_v_mem"),
        (lambda: layers.IAF(**SINGLE, record_states=True), "record_states"),
        (
            lambda: layers.IAF(**SINGLE, reset_fn=activation.MembraneReset(0.1)),
            "MembraneReset adds its reset_value at every step",
        ),
        (
            lambda: layers.IAF(**SINGLE, reset_fn=activation.MembraneSubtract(0.5)),
            "MembraneSubtract subtracts something else than the threshold",
        ),
        (lambda: layers.ALIF(3.0, 4.0), "not one of IAF, IAFSqueeze, LIF, LIFSqueeze"),
        (lambda: layers.ExpLeak(3.0), "not one of"),
        (lambda: layers.LIFRecurrent(3.0, nn.Linear(3, 3)), "not one of"),
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
