"""replace_neurons without another library: its table, and the arithmetic of all adapters."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, replace_neurons
from iirsnn.conversion import Replacement, Replacements
from iirsnn.conversion.peers.equation import Equation, NoEqualError, Surrogate
from iirsnn.conversion.peers.library_surrogate import lif_with_derivative
from iirsnn.conversion.peers.synapse import filtered
from iirsnn.conversion.replace import Difference
from iirsnn.ops import reference


def test_a_model_of_no_other_library_has_an_empty_table():
    model = nn.Sequential(nn.Linear(3, 4), FusedLIF())
    table = replace_neurons(model, strict=True)
    assert table.rows == table.replaced == table.left == ()
    assert str(table) == "no neuron of Norse, sinabs, snnTorch, SpikingJelly found"
    assert type(model[1]) is FusedLIF


def test_no_library_is_imported_for_a_model_without_it():
    code = (
        "import sys, torch, iirsnn; iirsnn.replace_neurons(torch.nn.Linear(2, 2)); "
        "assert not {'norse', 'sinabs', 'snntorch', 'spikingjelly'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_has_a_line_a_neuron():
    check = Difference(0, 1940, 2.5e-7)
    table = Replacements(
        (
            Replacement("conv.1", "Lib LIF", "FusedLIF", "atan", "", check, check),
            Replacement("", "Lib Other", reason="inhibition"),
        )
    )
    assert str(table).splitlines() == [
        "name     neuron     became    surrogate  float64  float32  spikes that differ",
        "conv.1   Lib LIF    FusedLIF  atan       2.5e-07  2.5e-07  0 of 1940",
        "(model)  Lib Other  left                                   inhibition",
    ]
    assert [row.name for row in table.replaced] == ["conv.1"]
    assert [row.reason for row in table.left] == ["inhibition"]


def triangle(h, threshold):
    return reference.SURROGATES["triangle"][0](h / threshold - 1, 0.3) / threshold


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("v0", [False, True])
@pytest.mark.parametrize("reset", reference.RESETS)
def test_gradients_by_a_derivative_are_those_of_the_reference(reset, v0, detach_reset):
    rng = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    x, start, grad_s, grad_v = leaf(6, 4, 5), leaf(4, 5), leaf(6, 4, 5), leaf(4, 5)
    leak = torch.full((5,), 0.8, dtype=torch.float64, requires_grad=True)
    # one threshold: the reference's surrogate moves with it, that of a library does not
    threshold = 0.9
    start = start if v0 else None
    s, v = reference.lif_forward(
        *(x, torch.tensor([threshold], dtype=torch.float64), leak, start, reset, 0.2),
        *(detach_reset, "triangle", 0.3, True),
    )
    s_other, v_other = lif_with_derivative(
        x, threshold, threshold, leak, start, 0.2, triangle, reset, detach_reset
    )
    assert torch.equal(s, s_other)
    assert torch.equal(v, v_other)
    wanted = [t for t in (x, leak, start) if t is not None]
    for expected, got in zip(
        torch.autograd.grad([s, v], wanted, [grad_s, grad_v]),
        torch.autograd.grad([s_other, v_other], wanted, [grad_s, grad_v]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class Fires(torch.autograd.Function):
    """h > threshold, with the triangle of h - threshold."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("reset", ["soft", "soft_delayed", "none", "hard"])
def test_the_gradient_of_a_threshold_is_that_of_h_minus_threshold(reset, detach_reset):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    v0 = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    threshold = (0.5 + torch.rand(4, generator=rng, dtype=torch.float64)).requires_grad_()

    v, s = v0, Fires.apply(v0 - threshold)
    spikes = []
    for x_t in x:
        held = s.detach() if detach_reset else s
        h = 0.8 * v + x_t - (threshold * held if reset == "soft_delayed" else 0)
        s = Fires.apply(h - threshold)
        held = s.detach() if detach_reset else s
        v = {"soft": h - threshold * held, "hard": (1 - held) * h}.get(reset, h)
        spikes.append(s)
    expected = torch.stack(spikes), v

    got = lif_with_derivative(
        *(x, threshold, threshold, 0.8, v0, 0.0),
        lambda h, threshold: (1 - (h - threshold).abs()).clamp(min=0),
        *(reset, detach_reset),
    )
    assert torch.equal(got[0], expected[0])
    weights = [torch.randn(out.shape, generator=rng, dtype=torch.float64) for out in expected]
    (grad,) = torch.autograd.grad(expected, threshold, weights)
    (grad_got,) = torch.autograd.grad(got, threshold, weights)
    torch.testing.assert_close(grad_got, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("timesteps", [1, 6])
@pytest.mark.parametrize("start", [False, True])
def test_a_synaptic_current_is_a_filter(start, timesteps):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(timesteps, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    i0 = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True) if start else None
    decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(filtered, (x, i0, decay))
    expected, i = [], torch.zeros(3) if i0 is None else i0
    for t, x_t in enumerate(x):
        i = i + x_t if t == 0 else decay * i + x_t
        expected.append(i)
    torch.testing.assert_close(filtered(x, i0, decay), torch.stack(expected))
    torch.testing.assert_close(filtered(x, i0, 0.7), torch.stack(expected))


def test_a_gain_is_a_scale_or_a_multiplication():
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    surrogate = Surrogate(triangle, name="atan", slope=2.0)
    plain = Equation(threshold=0.6, surrogate=surrogate, leak=0.5, reset="hard", v_reset=0.25)
    scaled = Equation(
        threshold=0.6, surrogate=surrogate, leak=0.5, gain=0.125, reset="hard", v_reset=0.25
    )
    v0 = torch.full((2, 8), 0.25, dtype=torch.float64)
    for part in (x, x[:1]):
        s, v = plain.run(part, v0)
        s_scaled, v_scaled = scaled.run(8 * part, v0)
        assert torch.equal(s, s_scaled)
        assert torch.equal(v, v_scaled)


@pytest.mark.parametrize(("threshold", "rest"), [(0.0, 0.0), (0.2, 0.5), (float("inf"), 0.0)])
def test_a_threshold_has_to_be_above_the_rest(threshold, rest):
    equation = Equation(threshold, Surrogate(triangle), rest=rest, reset="hard")
    with pytest.raises(NoEqualError, match="is not above its resting membrane"):
        equation.height()
