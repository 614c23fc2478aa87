"""Whole networks of spike layers: the same parameters, gradients and results as of torch's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import iirsnn
import iirsnn.event
from iirsnn import FusedLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_spike_layers
from iirsnn.nn import use_plain_layers

pytest.importorskip("iirsnn._C", reason="spike layers by events need iirsnn._C")


pytestmark = pytest.mark.usefixtures("built_in_costs")


def network():
    torch.manual_seed(0)
    ann = iirsnn.models.vgg([8, 16, "A", 24, "A"], 5, (3, 8, 8), hidden=[20], dropout=0.1)
    return iirsnn.convert(ann, torch.randn(16, 3, 8, 8), timesteps=3)


def test_network():
    plain, swapped = network().to(memory_format=torch.channels_last), network()  # same dropout
    use_spike_layers(swapped, "events")
    assert swapped.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    kinds = [type(m) for m in swapped.layers]
    assert kinds.count(SpikeConv2d) == 2
    assert type(swapped.layers[0]) is nn.Conv2d
    assert SpikeLinear in kinds
    assert SpikeAvgPool2d in kinds
    assert list(swapped.state_dict()) == list(plain.state_dict())
    images = torch.randn(6, 3, 8, 8)
    for model in (plain, swapped):
        torch.manual_seed(1)
        model(images).square().sum().backward()
    for ours, theirs in zip(swapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    decisions = [
        m.decision.kept for m in swapped.layers if isinstance(m, SpikeConv2d | SpikeLinear)
    ]
    assert decisions == ["bits", "counts", "counts"]
    assert [type(m) for m in use_plain_layers(swapped).layers] == [type(m) for m in plain.layers]
    assert any(isinstance(m, FusedLIF) for m in swapped.layers)


def test_training_uses_them(monkeypatch):
    from iirsnn.train import pipeline
    from iirsnn.train.recipe import load
    from iirsnn.train.stage_order import stages

    seen = []
    recipe = load("digits")
    line = pipeline.Pipeline.__new__(pipeline.Pipeline)
    line.recipe, line.folder, line.splits = recipe, None, None
    line.processes = SimpleNamespace(main=False)
    line.device = torch.device("cpu")
    line.initial, line.teacher = lambda stage: network(), lambda stage: None

    def stop(given, *rest):
        seen.append({type(m) for m in given.layers})
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "StageTraining", stop)
    for choice in ("auto", "always", "never"):
        recipe.runtime.spike_layers = choice
        with pytest.raises(KeyboardInterrupt):
            line.train_stage(stages([2, 1])[1], None)
    assert [SpikeConv2d in kinds for kinds in seen] == [True, True, False]


def test_event_network_of_spike_layers():
    images = torch.randn(4, 3, 8, 8)
    plain = iirsnn.event.EventNetwork.from_model(network(), 3)
    swapped = iirsnn.event.EventNetwork.from_model(use_spike_layers(network()), 3)
    assert torch.equal(plain(images), swapped(images))
