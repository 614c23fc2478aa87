"""A stage: what it trains, saves and refuses, and no step into the void."""

import json
import math
import os

import pytest
import torch
from rich.console import Console

from iirsnn import SharedDropout, atomic_files
from iirsnn.conversion import to_spiking
from iirsnn.errors import RunError
from iirsnn.models import vgg
from iirsnn.nn import neurons
from iirsnn.train import data, pipeline
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stage_training import StageTraining
from tests.test_atomic_files import files_of_at_most
from tests.train.tiny_runs import (
    Killed,
    assert_same_outcome,
    kill_after,
    tiny,
    tiny_splits,
    train,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_disks")


def test_another_seed_gives_another_network(tmp_path):
    train(tmp_path / "a", tiny())
    train(tmp_path / "b", tiny("seed=1"))
    with pytest.raises(AssertionError):
        assert_same_outcome(tmp_path / "a", tmp_path / "b")


def test_choices_use_validation_and_the_test_set_is_read_once_a_stage(tmp_path, monkeypatch):
    splits, events, evaluate = tiny_splits(), [], data.eval_batches
    names = {id(splits.train): "training", id(splits.validation): "validation"}
    names[id(splits.test)] = "test"

    def eval_batches(dataset, *arguments):
        events.append(names[id(dataset)])
        return evaluate(dataset, *arguments)

    monkeypatch.setattr(data, "eval_batches", eval_batches)
    with RunFolder.create(tmp_path, tiny()) as folder:
        Pipeline(folder, splits).train(Console(quiet=True))
        assert events == [
            *["validation", "validation", "test"],
            *["validation", "validation", "test"],
            *["validation", "test"],
        ]
        for stage in ("ann", "T2", "T1"):
            accuracies = [r["validation_accuracy"] for r in folder.metrics() if r["stage"] == stage]
            result = folder.result(stage)
            assert result["validation_accuracy"] == max(accuracies)
            assert result["epoch"] == 1 + accuracies.index(max(accuracies))
            _, header = folder.load_checkpoint(stage, "best")
            assert header["epoch"] == result["epoch"]


def training_of(folder, name="T2"):
    """The training of a stage of a run whose stages before it are finished."""
    pipeline = Pipeline(folder, tiny_splits())
    (stage,) = [stage for stage in pipeline.stages if stage.name == name]
    network = pipeline.initial(stage)
    return StageTraining(network, stage, folder, pipeline.splits, pipeline.device)


@pytest.fixture
def with_ann(tmp_path):
    """An open tiny run whose ANN is finished."""
    with RunFolder.create(tmp_path / "run", tiny()) as folder:
        pipeline = Pipeline(folder, tiny_splits())
        pipeline.stages = pipeline.stages[:1]
        pipeline.train(Console(quiet=True))
        yield folder


@pytest.mark.parametrize(("large", "batch_size"), [(10**6, None), (100, 5)])
def test_calibration_images_that_are_large_go_in_batches(with_ann, large, batch_size, monkeypatch):
    sizes, balance = [], pipeline.balance_thresholds

    def balance_thresholds(*arguments, batch_size):
        sizes.append(batch_size)
        return balance(*arguments, batch_size=batch_size)

    monkeypatch.setattr(pipeline, "balance_thresholds", balance_thresholds)
    monkeypatch.setattr(pipeline, "LARGE", large)
    Pipeline(with_ann, tiny_splits()).converted(2)
    assert sizes == [batch_size]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(with_ann, monkeypatch):
    loss, calls = torch.nn.functional.cross_entropy, []

    def diverging(*arguments, **options):
        calls.append(1)
        return loss(*arguments, **options) * (1 if len(calls) < 5 else math.nan)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", diverging)
    last = with_ann.path / "stages" / "T2" / "last.safetensors"
    message = rf"stage T2, step 3: the loss is nan; the last good checkpoint is kept: {last}"
    with pytest.raises(RunError, match=message):
        training_of(with_ann).run(Console(quiet=True))
    tensors, header = atomic_files.load(last)
    assert header["progress"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in tensors.values())
    monkeypatch.undo()
    assert training_of(with_ann).run(Console(quiet=True)).step == 4


def test_the_first_loss_that_is_not_finite_names_the_checkpoint_it_started_from(
    with_ann, monkeypatch
):
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *a, **options: loss(*a, **options) * math.inf
    )
    with pytest.raises(RunError, match=r"stage T2, step 1: the loss is inf; .*that of stage ann"):
        training_of(with_ann).run(Console(quiet=True))
    assert not with_ann.has_checkpoint("T2", "last")
    assert with_ann.has_checkpoint("ann", "best")


@pytest.mark.parametrize(
    ("minutes", "message"),
    [(0, "step 1: the largest weight is nan"), (5, "step 2: the largest weight is nan")],
)
def test_weights_that_are_not_finite_are_never_saved(with_ann, minutes, message):
    with_ann.recipe.runtime.checkpoint_minutes = minutes
    stage = training_of(with_ann)
    bad_step = 1 if minutes == 0 else 2
    weight = stage.network.layers[-1].weight
    weight.register_hook(
        lambda grad: grad * math.nan if stage.progress.step == bad_step - 1 else grad
    )
    with pytest.raises(RunError, match=f"stage T2, {message}"):
        stage.run(Console(quiet=True))
    assert not with_ann.has_checkpoint("T2", "last")
    assert not with_ann.has_checkpoint("T2", "best")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def half_way(with_ann, monkeypatch):
    """A run stopped in its second stage, after step 3 of 4."""
    with monkeypatch.context() as patch:
        kill_after(patch, ("T2", 3))
        with pytest.raises(Killed):
            training_of(with_ann).run(Console(quiet=True))
    folder = with_ann.path / "stages" / "T2"
    return folder / "last.safetensors", folder / "previous.safetensors"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: os.truncate(file, 0)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(with_ann, monkeypatch, damage, capsys):
    whole = training_of(with_ann)
    whole.run(Console(quiet=True))
    for file in (with_ann.path / "stages" / "T2").iterdir():
        file.unlink()
    last, previous = half_way(with_ann, monkeypatch)
    steps = [atomic_files.load(file)[1]["progress"]["step"] for file in (last, previous)]
    assert steps == [3, 2]
    damage(last)
    resumed = training_of(with_ann)
    assert resumed.progress.step == 2
    resumed.run(Console())
    assert capsys.readouterr().out.startswith(f"warning: checkpoint {last}: ")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_two_damaged_checkpoints_stop_a_resumed_run(with_ann, monkeypatch, damage):
    files = half_way(with_ann, monkeypatch)
    for file in files:
        damage(file)
    before = [file.read_bytes() for file in files]
    with pytest.raises(RunError, match=r"checkpoint .*last\.safetensors: "):
        training_of(with_ann)
    assert [file.read_bytes() for file in files] == before


def test_a_full_disk_leaves_both_checkpoints(with_ann, monkeypatch):
    files = half_way(with_ann, monkeypatch)
    before = [file.read_bytes() for file in files]
    message = r"last\.safetensors: cannot be written \(.*File too large"
    with files_of_at_most(len(before[0]) // 2), pytest.raises(RunError, match=message):
        training_of(with_ann).run(Console(quiet=True))
    assert [file.read_bytes() for file in files] == before
    assert training_of(with_ann).run(Console(quiet=True)).step == 4


def test_thresholds_and_leaks_stay_in_range(with_ann):
    with_ann.recipe.snn.learning_rate = 0.5
    stage = training_of(with_ann)
    before = [neuron.leak.item() for neuron in neurons(stage.network)]
    stage.run(Console(quiet=True))
    leaks = [neuron.leak.item() for neuron in neurons(stage.network)]
    assert all(leak <= 1 for leak in leaks)
    assert leaks != before
    assert all(neuron.threshold.item() >= 1e-3 for neuron in neurons(stage.network))


def test_every_weight_of_the_spiking_network_is_trained(with_ann):
    stage = training_of(with_ann)
    before = {name: p.detach().clone() for name, p in stage.network.named_parameters()}
    stage.run(Console(quiet=True))
    for name, p in stage.network.named_parameters():
        if not name.endswith("leak"):  # which may want to be above 1
            assert not torch.equal(p, before[name]), name


def test_a_stage_has_its_own_dropout(tmp_path):
    settings = tiny("ann.dropout=0.3", "snn.dropout=0.1", "stages.T1.dropout=0")
    with RunFolder.create(tmp_path, settings) as folder:
        pipeline = Pipeline(folder, tiny_splits())
        for stage, expected in zip(pipeline.stages, (0.3, 0.1, 0.0), strict=True):
            ann = vgg([4, "A", 6], 3, (1, 4, 4), hidden=[8])
            network = ann if stage.timesteps is None else to_spiking(ann, stage.timesteps)
            StageTraining(network, stage, folder, pipeline.splits, pipeline.device)
            dropouts = [m for m in network.modules() if isinstance(m, SharedDropout)]
            assert [dropout.p for dropout in dropouts] == [expected] * 2


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(tmp_path, accumulate):
    networks = []
    for parts in (1, accumulate):
        settings = tiny(f"ann.accumulate={parts}", "ann.dropout=0", "model.batch_norm=false")
        with RunFolder.create(tmp_path / str(parts), settings) as folder:
            pipeline = Pipeline(folder, tiny_splits())
            stage = StageTraining(
                pipeline.initial(pipeline.stages[0]),
                pipeline.stages[0],
                folder,
                pipeline.splits,
                pipeline.device,
            )
            images, labels = next(iter(data.eval_batches(stage.splits.train, folder.recipe.data)))
            stage._step(images[:5], labels[:5], 0.0)
            networks.append(stage.network.state_dict())
    torch.testing.assert_close(networks[1], networks[0])
    assert stage.progress.seen == 5


def test_every_addition_to_the_method_at_once_reaches_every_neuron(tmp_path):
    settings = tiny(
        "neuron.per_channel=true",
        "neuron.keep_batch_norm=true",
        "snn.teacher=ann",
        "snn.energy_weight=0.5",
        "snn.mixup=0.2",
        "snn.accumulate=2",
        "stages.T1.teacher=previous",
    )
    train(tmp_path / "run", settings)
    result = json.loads((tmp_path / "run" / "stages" / "T1" / "result.json").read_text())
    assert 0 < result["additions"] < math.inf
    pipeline = Pipeline(RunFolder.read(tmp_path / "run"), tiny_splits())
    before, after = (pipeline.trained(name) for name in ("T2", "T1"))
    for first, last in zip(neurons(before), neurons(after), strict=True):
        assert first.threshold.shape == (first.channels,)
        assert not torch.equal(first.threshold, last.threshold)


def test_a_teacher_changes_what_is_learned(tmp_path):
    def trained(name, *settings):
        train(tmp_path / name, tiny(*settings))
        return Pipeline(RunFolder.read(tmp_path / name), tiny_splits()).trained("T1")

    networks = [
        trained("none"),
        trained("ann", "snn.teacher=ann"),
        trained("previous", "snn.teacher=ann", "stages.T1.teacher=previous"),
    ]
    weights = [network.layers[0].weight for network in networks]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_price_on_spikes_makes_fewer_of_them(tmp_path):
    additions = {}
    for weight in (0.0, 20.0):
        path = tmp_path / str(weight)
        train(path, tiny(f"snn.energy_weight={weight}", "snn.learning_rate=0.02"))
        result = json.loads((path / "stages" / "T1" / "result.json").read_text())
        additions[weight] = result["additions"]
    assert additions[20.0] < 0.8 * additions[0.0]
    path = tmp_path / "free"
    train(path, tiny("snn.energy_weight=20", "snn.energy_budget=50", "snn.learning_rate=0.02"))
    result = json.loads((path / "stages" / "T1" / "result.json").read_text())
    assert result["additions"] == additions[0.0]  # within the budget nothing is charged
