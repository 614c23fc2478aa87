"""FusedLIF: parameters, state, constraints, what it prints."""

import math

import pytest
import torch

from iirsnn import FusedLIF, PackedSpikes
from iirsnn.functional import lif


def test_is_functional_lif_with_its_parameters():
    x = torch.randn(4, 2, 3, 5) + 0.5
    neuron = FusedLIF(0.75, 0.5, reset="hard", v_reset=0.25, surrogate="atan")
    expected = lif(x, 0.75, 0.5, reset="hard", v_reset=0.25, surrogate="atan")
    assert torch.equal(neuron(x), expected)


def test_one_parameter_of_each_or_one_a_channel():
    assert {n: p.shape for n, p in FusedLIF().named_parameters()} == {
        "threshold": (1,),
        "leak": (1,),
    }
    neuron = FusedLIF(0.75, 0.5, channels=3)
    assert neuron.threshold.tolist() == [0.75] * 3
    assert neuron.leak.tolist() == [0.5] * 3
    neuron(torch.rand(4, 2, 3, 5)).sum().backward()
    assert neuron.threshold.grad.shape == neuron.leak.grad.shape == (3,)
    with pytest.raises(ValueError, match="threshold: expected 1 element, or C"):
        neuron(torch.rand(4, 2, 4, 5))


def test_what_is_not_learned_is_a_buffer_and_is_saved():
    neuron = FusedLIF(learn_threshold=False, learn_leak=False)
    assert list(neuron.parameters()) == []
    assert set(neuron.state_dict()) == {"threshold", "leak"}
    s = neuron(torch.rand(3, 2, requires_grad=True))
    s.sum().backward()
    assert neuron.threshold.grad is None


def test_learned_and_fixed_neurons_read_each_others_checkpoints():
    fixed = FusedLIF(learn_threshold=False, learn_leak=False)
    fixed.load_state_dict(FusedLIF(0.5, 0.25).state_dict())
    assert (fixed.threshold.item(), fixed.leak.item()) == (0.5, 0.25)


def test_returns_the_membrane_or_packed_spikes():
    x = torch.randn(3, 2, 70) + 0.5
    s, v = FusedLIF(return_v=True)(x)
    assert torch.equal(v, lif(x, return_v=True)[1])
    assert torch.equal(FusedLIF(return_v=True, stateful=True)(x)[1], v)
    with torch.no_grad():
        packed = FusedLIF(packed=True)(x)
    assert isinstance(packed, PackedSpikes)
    assert torch.equal(packed.unpack(), s)


def test_constrain_clamps_in_place_and_nothing_else():
    neuron = FusedLIF(channels=3)
    threshold, leak = neuron.threshold, neuron.leak
    with torch.no_grad():
        threshold.copy_(torch.tensor([-1.0, 1e-6, 2.0]))
        leak.copy_(torch.tensor([1.5, 1.0, -0.5]))
    neuron.constrain_()
    assert neuron.threshold is threshold
    torch.testing.assert_close(threshold.detach(), torch.tensor([1e-3, 1e-3, 2.0]))
    assert leak.tolist() == [1.0, 1.0, -0.5]


def test_prints_what_it_is():
    assert repr(FusedLIF()) == "FusedLIF(threshold=1, leak=1, reset=soft, surrogate=triangle)"
    neuron = FusedLIF(
        0.5,
        0.9,
        channels=2,
        learn_leak=False,
        reset="hard",
        v_reset=-0.1,
        surrogate="atan",
        surrogate_scale=3.0,
        detach_reset=False,
        stateful=True,
        backend="reference",
    )
    with torch.no_grad():
        neuron.threshold[1] = 0.75
    assert repr(neuron) == (
        "FusedLIF(threshold=0.5..0.75, leak=0.9 (fixed), channels=2, reset=hard, v_reset=-0.1, "
        "surrogate=atan(3), detach_reset=False, stateful, backend=reference)"
    )


def test_prints_without_numbers():
    neuron = FusedLIF(channels=2, backend="reference").to("meta")
    assert repr(neuron) == (
        "FusedLIF(threshold=meta, leak=meta, channels=2, reset=soft, surrogate=triangle, "
        "backend=reference)"
    )


@pytest.mark.parametrize("learn", [True, False])
def test_starts_anew_from_the_numbers_of_the_constructor(learn):
    """As modules do that were made on "meta" and given memory."""
    with torch.device("meta"):
        neuron = FusedLIF(0.7, 0.9, channels=3, learn_threshold=learn, learn_leak=learn)
    neuron = neuron.to_empty(device="cpu")
    with torch.no_grad():
        neuron.threshold.fill_(math.nan)
    neuron.reset_parameters()
    assert torch.equal(neuron.threshold, torch.full((3,), 0.7))
    assert torch.equal(neuron.leak, torch.full((3,), 0.9))
    assert neuron.threshold.requires_grad == neuron.leak.requires_grad == learn


def test_compiles_whole():
    neuron = FusedLIF(leak=0.9)
    x = torch.randn(3, 2, 5) + 0.4
    compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), neuron(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "threshold: expected a finite number > 0, got 0.0"),
        ({"threshold": math.inf}, "threshold: expected a finite number > 0, got inf"),
        ({"leak": math.nan}, "leak: expected a finite number, got nan"),
        ({"channels": 0}, "channels: expected None or a number >= 1, got 0"),
        ({"reset": "sharp"}, "reset: expected one of soft, .* got 'sharp'"),
        ({"surrogate": "spline"}, "surrogate: expected one of triangle, .* got 'spline'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedLIF(**arguments)


def test_a_threshold_a_channel_is_asked_for_by_channels():
    with pytest.raises(TypeError, match=r"threshold: expected a number .*channels=C.*, got \(3,\)"):
        FusedLIF(torch.ones(3))
