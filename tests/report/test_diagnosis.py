"""Why a stage learns: figures of each layer against what is counted by hand."""

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from iirsnn import FusedLIF, record
from iirsnn.errors import RunError, UsageError
from iirsnn.models import Network
from iirsnn.nn import Readout
from iirsnn.report import diagnosis


@pytest.mark.parametrize("timesteps", [1, 3])
def test_each_figure_is_that_counted_by_hand(timesteps):
    first, second = FusedLIF(0.8, 0.9), FusedLIF(0.5, 0.9, channels=6)
    layers = [nn.Flatten(), nn.Linear(4, 5), first, nn.Linear(5, 6), second, Readout(6, 3)]
    network = Network(layers, (1, 2, 2))
    network.timesteps = timesteps
    with torch.no_grad():
        layers[1].bias[0], layers[1].bias[1] = -100.0, 100.0  # one never fires, one always
    images, labels = torch.randn(300, 1, 2, 2), torch.randint(3, (300,))
    found = diagnosis.diagnose(network, images, labels)
    currents = {}

    def keep(name):
        def hook(_, inputs, __):
            inputs[0].retain_grad()
            currents[name] = inputs[0]

        return hook

    hooks = [n.register_forward_hook(keep(f"layers.{i}")) for i, n in ((2, first), (4, second))]
    with record(network) as recorded:
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(found) == 2
    for layer, (name, spikes) in zip(found, recorded.spikes.items(), strict=True):
        assert layer.layer == name
        assert layer.rate == pytest.approx(float(spikes.mean()))
        neurons = spikes.sum((0, 1))
        assert layer.never == pytest.approx(float((neurons == 0).float().mean()))
        assert layer.always == pytest.approx(float((neurons == timesteps * 300).float().mean()))
        threshold = dict(network.named_modules())[name].threshold
        inside = (recorded.membranes[name] / threshold - 1).abs() < 1  # of the triangle
        assert layer.learning == pytest.approx(float(inside.float().mean()))
    for layer, current in zip(found, currents.values(), strict=True):
        by_image = current.grad.square().sum((0, 2)).sqrt()  # of a mean over 300 images
        assert layer.gradient == pytest.approx(300 * float(by_image.mean()), rel=1e-4)
    assert found[0].never >= 0.2
    assert found[0].always >= 0.2


def test_a_network_and_its_gradients_are_left_as_they_were(pipeline):
    network = pipeline.spiking("T1").train()
    frozen = next(iter(network.parameters()))
    frozen.requires_grad_(False)
    images, labels = pipeline.validation_images(64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    diagnosis.diagnose(network, images, labels)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_before_and_after_training(pipeline):
    built = diagnosis.build(pipeline, "T1")
    assert (built["stage"], built["images"]) == ("T1", len(pipeline.splits.validation))
    start = diagnosis.diagnose(
        pipeline.initial(pipeline.stages[-1]), *pipeline.validation_images(2048)
    )
    assert [layer["rate"] for layer in built["before"]] == [layer.rate for layer in start]
    assert built["before"] != built["after"]
    assert diagnosis.build(pipeline) == built  # the last stage by default
    with pytest.raises(UsageError, match="stage: expected one of T2, T1, got 'T4'"):
        diagnosis.build(pipeline, "T4")


def test_runs_of_one_name_become_their_mean(pipeline):
    one = diagnosis.build(pipeline, "T1")
    other = json.loads(json.dumps(one))
    other["after"][0]["rate"] += 0.5
    (group,) = diagnosis.compare([one, other])
    assert group["after"][0]["rate"] == pytest.approx(one["after"][0]["rate"] + 0.25)
    assert group["before"] == one["before"]
    other["after"].pop()
    with pytest.raises(RunError, match="expected the same layers in all runs named"):
        diagnosis.compare([one, other])


def test_the_command_prints_and_writes(finished, iirsnn, tmp_path):
    done = iirsnn("diagnose", finished, "--out", tmp_path / "why")
    assert done.code == 0
    assert "neurons that never fire" in done.out
    names = {file.name for file in (tmp_path / "why").iterdir()}
    assert names == {"diagnosis.json", "diagnosis.md", "diagnosis.png"}
    (group,) = json.loads((tmp_path / "why" / "diagnosis.json").read_text())
    assert group["stage"] == "T1"
    assert f"{group['after'][0]['rate']:.3f}" in (tmp_path / "why" / "diagnosis.md").read_text()
    with Image.open(tmp_path / "why" / "diagnosis.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 20
