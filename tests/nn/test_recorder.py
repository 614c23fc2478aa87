"""What `record` finds is what the neurons did."""

import pytest
import torch
from torch import nn

import iirsnn
from iirsnn import BatchNormLIF, FusedLIF, Readout, TimeSequential
from iirsnn.functional import lif
from iirsnn.ops.reference import RESETS


def network(**options):
    torch.manual_seed(0)
    return TimeSequential(
        nn.Linear(6, 8),
        BatchNormLIF(nn.BatchNorm1d(8), FusedLIF(0.5, 0.9, channels=8, **options)),
        nn.Linear(8, 8),
        FusedLIF(0.2, **options),
        Readout(8, 3),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_spikes_membranes_and_rates_by_name(training):
    net = network().train(training)
    x, fired = torch.randn(4, 5, 6), []
    hook = net[3].register_forward_hook(lambda _, args, s: fired.append(s))
    with iirsnn.record(net) as found:
        net(x)
    hook.remove()
    assert list(found.spikes) == list(found.membranes) == list(found.rates) == ["1.neuron", "3"]
    (spikes,) = fired
    assert torch.equal(found.spikes["3"], spikes)
    assert torch.equal(found.membranes["3"] > net[3].threshold, spikes > 0)
    assert found.rates["3"] == pytest.approx(spikes.mean().item())
    assert found.spikes["1.neuron"].shape == (4, 5, 8)
    assert not found.spikes["3"].requires_grad
    net(x)
    assert len(found.spikes) == 2  # and nothing more is recorded


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("stateful", [False, True], ids=["sequence", "stream"])
def test_membranes_are_those_of_the_kernel(reset, stateful):
    neuron = FusedLIF(0.5, 0.9, reset=reset, v_reset=-0.1, stateful=stateful)
    with torch.no_grad(), iirsnn.record(neuron) as found:
        for _ in range(2):
            x = torch.randn(5, 3, 7) + 0.2
            before = None if neuron.state is None else neuron.state.clone()
            neuron(x)
            h = found.membranes[""]
            for t in range(5):  # the membrane before reset at the end of each sequence
                options = {"reset": reset, "v_reset": -0.1, "return_v": True}
                s, v = lif(x[: t + 1], 0.5, 0.9, before, **options)
                assert torch.equal(found.spikes[""][t], s[t])
                after = {"soft": h[t] - 0.5 * s[t], "hard": torch.where(s[t] > 0, -0.1, h[t])}
                assert torch.equal(after.get(reset, h[t]), v)


def test_rates_are_of_all_calls_and_can_be_cleared():
    neuron = FusedLIF()
    with iirsnn.record(neuron) as found:
        neuron(torch.full((2, 3), 2.0))
        neuron(torch.zeros(6, 3))
        assert found.rates == {"": 0.25}
        found.clear()
        assert found.spikes == found.membranes == found.rates == {}


def test_the_current_may_be_named():
    neuron, x = FusedLIF(0.5), torch.randn(3, 4)
    with iirsnn.record(neuron) as found:
        s = neuron(x=x)
    assert torch.equal(found.spikes[""], s)


def test_packed_spikes_and_membranes_returned():
    x = torch.randn(3, 2, 70) + 0.5
    for options in ({"packed": True}, {"return_v": True}, {"packed": True, "return_v": True}):
        neuron = FusedLIF(**options)
        with torch.no_grad(), iirsnn.record(neuron) as found:
            neuron(x)
        assert torch.equal(found.spikes[""], lif(x))


def test_a_compiled_network_runs_eagerly_meanwhile():
    net = network().eval()
    x = torch.randn(4, 5, 6)
    compiled = torch.compile(net, backend="aot_eager")
    wanted = compiled(x)
    with iirsnn.record(compiled) as found:
        assert torch.equal(compiled(x), wanted)
    assert list(found.spikes) == ["1.neuron", "3"]
    assert torch.equal(compiled(x), wanted)
