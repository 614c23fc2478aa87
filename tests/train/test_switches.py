"""What a recipe may add to the method: each does what its formula says, and is resumed exactly."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Readout, atomic_files
from iirsnn.conversion import to_spiking
from iirsnn.errors import UsageError
from iirsnn.models import vgg
from iirsnn.train import recipe, stage_training
from iirsnn.train.data import DataConfig, load, train_batches
from iirsnn.train.images import Augmented
from iirsnn.train.objective import Objective
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.recipe import StageConfig
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.schedule import make_optimizer, set_learning_rate
from iirsnn.train.stage_training import StageTraining
from iirsnn.train.weight_average import WeightAverage
from tests.train.tiny_runs import (
    Killed,
    assert_same_outcome,
    kill_after,
    outcome,
    tiny,
    tiny_splits,
    train,
)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("snn.ema=1", r"T2: ema: expected a value in \[0, 1\), got 1"),
        ("ann.mixup_until=2", r"ann: mixup_until: expected a value in \[0, 1\], got 2"),
        ("snn.energy_from=-1", r"T2: energy_from: expected a value in \[0, 1\], got -1"),
        ("snn.shift_rate=-1", "T2: shift_rate: expected a value at least 0, got -1"),
        ("snn.keep=first", "T2: keep: expected one of best, last, got 'first'"),
    ],
)
def test_values_out_of_range(setting, message):
    with pytest.raises(UsageError, match=message):
        tiny(setting)


# The average of the weights


def test_the_average_is_its_formula():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = WeightAverage(network, 0.25)
    expected = network[0].weight.detach().clone()
    for step in range(1, 6):
        network(torch.randn(8, 2))  # moves the statistics
        with torch.no_grad():
            network[0].weight.normal_()
        average.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[0].weight
    torch.testing.assert_close(average.network[0].weight, expected)
    assert not torch.equal(average.network[1].running_mean, network[1].running_mean)
    assert average.network[1].num_batches_tracked == network[1].num_batches_tracked == 5
    assert not any(p.requires_grad for p in average.network.parameters())
    assert network[0].weight.requires_grad


def test_the_average_is_validated_kept_and_handed_on(tmp_path, monkeypatch):
    seen, finish = [], StageTraining._finish_epoch

    def recorded(training, *arguments):
        record = finish(training, *arguments)
        best = training.progress.best_epoch == training.progress.epochs
        seen.append((training.stage.name, best, training.average.network.state_dict()))
        assert not torch.equal(seen[-1][2]["layers.0.weight"], training.network.layers[0].weight)
        return record

    monkeypatch.setattr(StageTraining, "_finish_epoch", recorded)
    train(tmp_path / "run", tiny("ann.ema=0.5", "snn.ema=0.5"))
    assert len(seen) == 5
    for stage in ("ann", "T2", "T1"):
        kept = atomic_files.load(tmp_path / "run" / "stages" / stage / "best.safetensors")[0]
        averages = [state for name, best, state in seen if name == stage and best]
        assert kept.keys() == averages[-1].keys()


@pytest.mark.parametrize(("keep", "kept_epoch"), [("best", 1), ("last", 2)])
def test_the_best_or_the_last_epoch_is_kept(tmp_path, monkeypatch, keep, kept_epoch):
    falling = iter([0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(stage_training, "loss_and_accuracy", lambda *_: (1.0, next(falling)))
    ends, finish = {}, StageTraining._finish_epoch

    def recorded(training, epoch, *arguments):
        weight = training.network.layers[0].weight.detach().clone()
        ends[training.stage.name, epoch + 1] = weight
        return finish(training, epoch, *arguments)

    monkeypatch.setattr(StageTraining, "_finish_epoch", recorded)
    train(tmp_path / "run", tiny(f"ann.keep={keep}", "ann.epochs=2", "timesteps=[1]"))
    stage = tmp_path / "run" / "stages" / "ann"
    kept, header = atomic_files.load(stage / "best.safetensors")
    assert torch.equal(kept["layers.0.weight"], ends["ann", kept_epoch])
    assert not torch.equal(ends["ann", 1], ends["ann", 2])
    result = json.loads((stage / "result.json").read_text())
    assert result["epoch"] == header["epoch"] == kept_epoch
    assert result["validation_accuracy"] == [0.9, 0.8][kept_epoch - 1]


@pytest.mark.parametrize(
    "setting", ["ema=0.9", "mixup_until=0.5", "energy_from=0.5", "shift_rate=10", "erasing"]
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, setting):
    key = "data.erasing=1" if setting == "erasing" else f"snn.{setting}"
    settings = tiny(key, "snn.mixup=0.2", "snn.energy_weight=0.5")
    train(tmp_path / "whole", settings)
    kill_after(monkeypatch, ("T2", 3), ("T1", 1))
    for _ in range(2):
        with pytest.raises(Killed):
            train(tmp_path / "cut", settings)
    train(tmp_path / "cut")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


# Mixed images, priced spikes


def test_images_are_mixed_until_then():
    torch.manual_seed(0)
    objective = Objective(StageConfig(mixup=1.0, mixup_until=0.5), 3)
    images, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    assert objective.targets(images, labels, 0.49)[1].shape == (4, 3)
    assert objective.targets(images, labels, 0.5) == (images, labels)


def test_spikes_are_free_before_then(tmp_path):
    runs = {"never": "0", "later": "0.5", "always": "0", "free": "1"}
    for name, start in runs.items():
        weight = 0 if name == "never" else 20
        train(
            tmp_path / name,
            tiny(f"snn.energy_weight={weight}", f"snn.energy_from={start}", "snn.dropout=0"),
        )
    losses = {
        name: [record["loss"] for record in outcome(tmp_path / name)[1] if record["stage"] == "T2"]
        for name in runs
    }
    assert losses["free"] == losses["never"]
    assert losses["later"][0] == losses["never"][0]  # the first of two epochs
    assert losses["later"][1] > losses["never"][1]
    assert losses["always"][0] > losses["never"][0]


# Shifts of a channel's current


def test_shifts_may_have_a_rate_of_their_own():
    ann = vgg([4, 6], 3, (1, 4, 4), hidden=[8], batch_norm=True)
    network = to_spiking(ann, 2)
    config = StageConfig(learning_rate=0.5, shift_rate=0.1, neuron_rate=2, schedule="cosine")
    optimizer = make_optimizer(network, config)
    set_learning_rate(optimizer, config, 0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            shifts = name == "bias" and not isinstance(module, Readout)
            factor = 2 if isinstance(module, FusedLIF) else 0.1 if shifts else 1
            assert rates[id(parameter)] == pytest.approx(0.5 * factor), (module, name)


def test_a_rate_of_zero_learns_no_shifts(tmp_path):
    train(tmp_path, tiny("snn.shift_rate=0"))
    line = Pipeline(RunFolder.read(tmp_path), tiny_splits())
    before, after = line.trained("T2").layers, line.trained("T1").layers
    assert torch.equal(before[0].bias, after[0].bias)
    assert not torch.equal(before[0].weight, after[0].weight)
    assert not torch.equal(before[-1].bias, after[-1].bias)


# Random erasing


def test_erasing_sets_rectangles_to_the_mean():
    splits = load(DataConfig(), seed=0)
    config = DataConfig(batch_size=2000)
    images, _ = next(iter(train_batches(splits, config, seed=1, epoch=0)))
    config.erasing = 0.5
    erased, _ = next(iter(train_batches(splits, config, seed=1, epoch=0)))
    gone = (images != erased).squeeze(1)
    assert torch.equal((erased == 0).squeeze(1), gone)  # the mean: no pixel has that value
    assert 0.4 < gone.any(2).any(1).float().mean() < 0.6
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), rows * columns)
    again, _ = next(iter(train_batches(splits, config, seed=1, epoch=0)))
    assert torch.equal(erased, again)
    other, _ = next(iter(train_batches(splits, config, seed=1, epoch=1)))
    assert not torch.equal(erased, other)


def test_rectangles_are_of_the_paper_s_sizes_and_inside():
    class Large:
        image_shape = (1, 100, 80)

        def __len__(self):
            return 5000

        def draw(self, rng):
            return None

    (boxes,) = Augmented(Large(), 0, 0, erasing=1.0).boxes
    top, left, bottom, right = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= 100).all()
    assert (right <= 80).all()
    height, width = bottom - top, right - left
    area = height * width / 8000
    assert 0.018 < area.min() < 0.03
    assert 0.3 < area.max() < 0.345
    inside = (height < 100) & (width < 80)  # what a side cuts off is another shape
    ratio = np.log(height / width)[inside]
    assert np.abs(ratio).max() < np.log(1 / 0.3) + 0.2
    assert abs(ratio.mean()) < 0.1
    (none,) = Augmented(Large(), 0, 0, erasing=1e-9).boxes
    assert (none[:, :2] == none[:, 2:]).all()


def test_erasing_out_of_range():
    with pytest.raises(UsageError, match=r"data\.erasing: expected from 0 to 1, got 1\.5"):
        load(DataConfig(erasing=1.5), seed=0)


# All of them, on the digits


def test_every_switch_at_once_trains_a_residual_network_of_currents(iirsnn, tmp_path):
    settings = [
        *("timesteps=[2,1]", "ann.epochs=4", "snn.epochs=2", "stages.T1.epochs=4"),
        "snn.learning_rate=0.01",
        *("model.name=membrane-resnet", "model.layers=[8,8,A,16]", "neuron.keep_batch_norm=true"),
        *("ann.label_smoothing=0.1", "snn.label_smoothing=0.1", "ann.ema=0.9", "snn.ema=0.9"),
        *("ann.mixup=0.2", "ann.mixup_until=0.5", "data.erasing=0.25", "data.pad=1"),
        *("snn.energy_weight=0.3", "snn.energy_budget=0.1", "stages.T1.energy_from=0.5"),
        *("snn.shift_rate=2", "data.batch_size=64", "runtime.threads=1", "runtime.device=cpu"),
    ]
    options = [argument for setting in settings for argument in ("--set", setting)]
    result = iirsnn("train", "digits", *options, "--out", "run")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["engine_missing"] == ""
    assert report["stages"][-1]["test_accuracy"] > 0.3  # by chance: 0.1
    assert recipe.load(str(tmp_path / "run" / "recipe.yaml")).snn.ema == 0.9
