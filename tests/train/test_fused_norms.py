"""A norm and its neurons as one: the layers of the network, its state, and the same training."""

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.conversion import NeuronConfig, to_spiking
from iirsnn.models import vgg
from iirsnn.models.resnet import Plan, resnet
from iirsnn.train import stage_training
from iirsnn.train.fused_norms import fuse_norms
from tests.train.tiny_runs import (
    Killed,
    assert_same_outcome,
    kill_after,
    outcome,
    tiny,
    train,
)

KEPT = ("neuron.keep_batch_norm=true", "neuron.surrogate_scale=1")
#: Of one kernel and two modules: statistics and gradients are summed in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def spiking(ann, timesteps):
    return to_spiking(ann, timesteps, NeuronConfig(keep_batch_norm=True))


def kinds(network):
    return [type(module) for module in network.modules()]


@pytest.mark.parametrize(
    ("ann", "norms", "pairs"),
    [
        (vgg([4, "A", 6], 3, (1, 4, 4), hidden=[8], batch_norm=True), 3, 3),
        (vgg([4, "A", 6], 3, (1, 4, 4), hidden=[8]), 0, 0),
        # the norm of a block's second convolution meets the shortcut before the neurons
        (resnet(Plan((4,), True, ((4, 1), (8, 1)), True), 3, (1, 8, 8), batch_norm=True), 6, 3),
    ],
    ids=["vgg", "no norms", "resnet"],
)
@pytest.mark.parametrize("timesteps", [1, 3])
def test_pairs_are_the_network_s_own_layers(ann, norms, pairs, timesteps):
    snn = spiking(ann, timesteps)
    fused = fuse_norms(snn, timesteps)
    assert kinds(snn).count(BatchNormLIF) == 0
    assert sum(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds(snn)) == norms
    # at T > 1 the first norm runs on one timestep
    assert kinds(fused).count(BatchNormLIF) == (max(pairs - 1, 0) if timesteps > 1 else pairs)
    assert {*map(id, fused.parameters())} == {*map(id, snn.parameters())}
    assert {*map(id, fused.buffers())} == {*map(id, snn.buffers())}
    images = torch.rand(5, *ann.image_shape)
    assert torch.equal(fused.eval()(images), snn.eval()(images))


def test_a_network_without_pairs_is_the_same_object():
    for network in (nn.Sequential(nn.BatchNorm2d(2), FusedLIF()), nn.Linear(2, 3)):
        assert fuse_norms(network, 1) is network


@pytest.fixture
def fused_calls(monkeypatch):
    """How often both were trained as one."""
    calls, run = [], BatchNormLIF._trained

    def counted(*arguments):
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(BatchNormLIF, "_trained", counted)
    return calls


@pytest.mark.parametrize(
    "settings",
    [(), ("stages.T1.energy_weight=0.3",), ("snn.accumulate=2", "snn.optimizer=sgd")],
    ids=["plain", "priced", "accumulated"],
)
def test_training_is_that_of_two_modules(tmp_path, monkeypatch, fused_calls, settings):
    train(tmp_path / "fused", tiny(*KEPT, *settings))
    # two pairs at T = 2 for four steps, three at T = 1 for two
    assert len(fused_calls) == (2 * 4 + 3 * 2) * (2 if "snn.accumulate=2" in settings else 1)
    fused_calls.clear()
    monkeypatch.setattr(stage_training, "fuse_norms", lambda network, timesteps: network)
    train(tmp_path / "apart", tiny(*KEPT, *settings))
    assert fused_calls == []
    (found, metrics), (expected, expected_metrics) = map(
        outcome, (tmp_path / "fused", tmp_path / "apart")
    )
    for record, wanted in zip(metrics, expected_metrics, strict=True):
        assert record.pop("stage") == wanted.pop("stage")
        assert record == pytest.approx(wanted, rel=ROUNDING["rtol"])
    for stage, (tensors, *_) in expected.items():
        torch.testing.assert_close(found[stage][0], tensors, **ROUNDING)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "whole", tiny(*KEPT))
    kill_after(monkeypatch, ("T2", 3), ("T1", 1))
    for _ in range(2):
        with pytest.raises(Killed):
            train(tmp_path / "cut", tiny(*KEPT))
    train(tmp_path / "cut")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


def test_only_spiking_stages_with_norms_are_fused(tmp_path, fused_calls):
    train(tmp_path, tiny())
    assert fused_calls == []
