"""Norse's LIFBoxCell, LIFCell, LIF and Lift by iirsnn's kernels."""

import copy

import pytest
import torch
from torch import nn, tensor

from iirsnn import replace_neurons

from .replaced import assert_same, current, exchanged, ten_steps

pytest.importorskip("norse", reason="Norse is not installed: pip install 'norse>=1.1'")
import norse.torch as norse
from norse.torch.functional.lif_box import LIFBoxParameters
from norse.torch.functional.reset import reset_subtract

FAST = {"tau_mem_inv": tensor(400.0)}
BOX = {
    "plain": {},
    "rest and reset": {"v_leak": tensor(0.1), "v_th": tensor(1.1), "v_reset": tensor(-0.2)},
    "subtracts": {"reset_method": reset_subtract},
    "subtracts, rest": {"reset_method": reset_subtract, "v_leak": tensor(0.2)},
    "triangle": {"method": "triangle", "alpha": 0.3},
    "threshold": {"v_th": tensor(0.6)},
    "tanh": {"method": "tanh", "alpha": 2.0},
}
SYNAPTIC = {
    "plain": {},
    "rest and reset": {"v_leak": tensor(0.1), "v_th": tensor(1.1), "v_reset": tensor(-0.2)},
    "triangle": {"method": "triangle", "alpha": tensor(0.3)},
    "circ": {"method": "circ", "alpha": tensor(2.0)},
    "slow synapse": {"tau_syn_inv": tensor(100.0)},
}


def over_cells(cell, x):
    spikes, state = [], None
    for x_t in x:
        s, state = cell(x_t, state)
        spikes.append(s)
    return torch.stack(spikes), *state


def over_layer(layer, x):
    """In two pieces."""
    first, state = layer(x[:3])
    second, state = layer(x[3:], state)
    return torch.cat([first, second]), *state


def over_lift(lift, x):
    first, state = lift(x[:3])
    second, state = lift((x[3:], state))
    return torch.cat([first, second]), *state


@pytest.mark.parametrize("options", BOX)
def test_box_cells(options):
    cell = norse.LIFBoxCell(LIFBoxParameters(**FAST, **BOX[options]))
    assert_same(over_cells, cell, exchanged(cell), 2.5 * current(7, 3, 5, 4))
    lift = norse.Lift(cell)
    assert_same(over_lift, lift, exchanged(lift), 2.5 * current(7, 3, 5, 4))


@pytest.mark.parametrize("options", SYNAPTIC)
def test_lif_with_a_synapse(options):
    p = norse.LIFParameters(**FAST, **SYNAPTIC[options])
    x = 2 * current(7, 3, 5, 4)
    for module, run in (
        (norse.LIFCell(p), over_cells),
        (norse.LIF(p), over_layer),
        (norse.Lift(norse.LIFCell(p)), over_lift),
    ):
        assert_same(run, module, exchanged(module), x)


def test_another_time_step():
    cell = norse.LIFBoxCell(dt=0.004)
    assert_same(over_cells, cell, exchanged(cell), 2.5 * current(7, 3, 5))


def network():
    torch.manual_seed(0)
    return norse.SequentialState(
        norse.Lift(nn.Conv2d(1, 4, 3)),
        norse.LIF(norse.LIFParameters(**FAST, method="triangle", alpha=tensor(0.3))),
        nn.Flatten(2),
        nn.Linear(4 * 36, 20),
        norse.LIF(norse.LIFParameters(**FAST)),
        nn.Linear(20, 10),
        norse.LI(),
    )


def losses(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = 10 * torch.rand(8, 12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10

    def loss():
        out, _ = net(x)
        return nn.functional.cross_entropy(out.mean(0), labels)

    return ten_steps(optimizer, loss)


def test_a_sequential_trains_as_before():
    net = network()
    other = copy.deepcopy(net)
    table = replace_neurons(other)
    assert [row.name for row in table.replaced] == ["1", "4"]
    assert [row.original for row in table.left] == ["Norse LI"]
    expected = losses(net)
    torch.testing.assert_close(losses(other), expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0]
    other.load_state_dict(net.state_dict())


def test_sparse_inputs_take_the_library_s_way():
    x = (torch.rand(4, 3, 6) > 0.5).float()
    layer = norse.LIF(norse.LIFParameters(tau_mem_inv=tensor(800.0)))
    other = exchanged(layer)
    expected, _ = layer(x.to_sparse())
    got, _ = other(x.to_sparse())
    assert torch.equal(expected.to_dense(), got.to_dense())
    assert expected.to_dense().sum() > 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: norse.LIF(record_states=True), "record_states"),
        (lambda: norse.LIF(norse.LIFParameters(method="adjoint")), "method 'adjoint'"),
        (lambda: norse.LIFRecurrent(3, 4), "not one of LIF, LIFBoxCell, LIFCell, Lift"),
        (lambda: norse.LIFAdExCell(), "not one of"),
        (
            lambda: norse.LIF(norse.LIFParameters(tau_mem_inv=nn.Parameter(tensor(100.0)))),
            "its parameter tau_mem_inv is learned or not one number",
        ),
        (
            lambda: norse.LIFBoxCell(LIFBoxParameters(reset_method=lambda z, v, r, th: v - z)),
            "a reset_method of its own",
        ),
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
