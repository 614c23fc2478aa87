"""The runtime section of a recipe: precision, torch.compile, when to save, TensorBoard."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from iirsnn import atomic_files
from iirsnn.errors import UsageError
from iirsnn.train import device, progress, recipe, stage_training
from iirsnn.train.device import memory_format
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stage_training import StageTraining
from tests.train.tiny_runs import (
    Killed,
    assert_same_outcome,
    kill_after,
    outcome,
    tiny,
    train,
)


def test_fp16_needs_a_gpu(iirsnn, tmp_path):
    with pytest.raises(UsageError, match="expected fp32 or bf16 on a CPU, got 'fp16'"):
        device.choose(tiny("runtime.precision=fp16").runtime)
    settings = ["--set", "runtime.precision=fp16", "--set", "runtime.device=cpu"]
    result = iirsnn("train", "digits", *settings)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def with_scaler(monkeypatch):
    """Runs whose loss is scaled as on a GPU in fp16; the step after `overflows` has no gradient."""
    overflows = []

    def overflow(stage):
        weight = stage.network.layers[-1].weight
        here = lambda: (stage.stage.name, stage.progress.step) in overflows  # noqa: E731
        weight.register_hook(lambda grad: grad * math.inf if here() else grad)

    run = StageTraining.run

    def run_with_overflows(stage, *arguments):
        overflow(stage)
        return run(stage, *arguments)

    scaler = lambda place, precision: torch.amp.GradScaler(place.type)  # noqa: E731
    monkeypatch.setattr(stage_training, "grad_scaler", scaler)
    monkeypatch.setattr(StageTraining, "run", run_with_overflows)
    return overflows


def scale(path, stage):
    return atomic_files.load(path / "stages" / stage / "last.safetensors")[1]["scaler"]["scale"]


def test_the_scale_of_a_loss_is_a_stages_own_and_goes_on(tmp_path, with_scaler, monkeypatch):
    with_scaler += [("ann", 1), ("T2", 1), ("T2", 2)]
    train(tmp_path / "whole", tiny())
    scales = {("ann", 3): 2.0**15, ("T2", 3): 2.0**14, ("T1", 1): 2.0**16}
    kill_after(monkeypatch, *scales)
    for (stage, _), expected in scales.items():
        with pytest.raises(Killed):
            train(tmp_path / "cut", tiny())
        assert scale(tmp_path / "cut", stage) == expected
    train(tmp_path / "cut", tiny())
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


def test_a_step_that_overflows_is_left_out(tmp_path, with_scaler):
    train(tmp_path / "plain", tiny())
    with_scaler += [("ann", 2)]
    train(tmp_path / "skipped", tiny())
    assert outcome(tmp_path / "plain")[1][0] == outcome(tmp_path / "skipped")[1][0]
    assert outcome(tmp_path / "plain")[1][1] != outcome(tmp_path / "skipped")[1][1]
    best = atomic_files.load(tmp_path / "skipped" / "stages" / "T1" / "best.safetensors")[0]
    assert all(value.isfinite().all() for value in best.values())


def test_training_is_compiled_when_asked_for(tmp_path, monkeypatch):
    compiled, compile_ = [], torch.compile

    def with_kernels_of_torch(model):
        compiled.append(model)
        return compile_(model, backend="eager")  # Dynamo's graph, but the same bits as without

    train(tmp_path / "plain", tiny())
    monkeypatch.setattr(torch, "compile", with_kernels_of_torch)
    train(tmp_path / "compiled", tiny("runtime.compile=true"))
    assert len(compiled) == 3
    (found, metrics), (expected, expected_metrics) = map(
        outcome, (tmp_path / "compiled", tmp_path / "plain")
    )
    assert metrics == expected_metrics
    for stage, (tensors, *_) in expected.items():
        for name, value in tensors.items():
            assert torch.equal(found[stage][0][name], value), f"{stage}: {name}"


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["runtime.checkpoint_steps=3"], [3, 5, 5, 8, 10, 10]),
        (["runtime.checkpoint_steps=0"], [5, 5, 10, 10]),
        (
            ["runtime.checkpoint_steps=2", "runtime.checkpoint_minutes=0"],
            [*range(1, 6), *range(5, 11), 10],
        ),
    ],
)
def test_checkpoints_come_after_so_many_steps_and_around_each_validation(
    tmp_path, monkeypatch, settings, steps
):
    saved, save = [], RunFolder.save_checkpoint

    def recorded(folder, stage, name, tensors, header):
        if name == "last" and stage == "ann":
            saved.append(header["progress"]["step"])
        save(folder, stage, name, tensors, header)

    monkeypatch.setattr(RunFolder, "save_checkpoint", recorded)
    train(tmp_path / "run", tiny("runtime.checkpoint_minutes=5", "data.batch_size=3", *settings))
    # 16 images: five batches of 3, and a last one of 1 that is left out
    assert saved == steps


def curves(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_metrics_of_a_resumed_run_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, ("ann", 3))
        with pytest.raises(Killed):
            train(tmp_path, tiny("runtime.tensorboard=true"))
    train(tmp_path)
    metrics = RunFolder.read(tmp_path).metrics()
    for stage in ("ann", "T2", "T1"):
        found = curves(tmp_path / "tensorboard" / stage)
        records = [record for record in metrics if record["stage"] == stage]
        for tag in ("loss", "validation_accuracy"):
            expected = [(r["step"], pytest.approx(r[tag])) for r in records]
            assert found[tag] == expected
        assert {"learning_rate", "images_per_second"} <= found.keys()
        neurons = [tag for tag in found if tag.startswith(("threshold/", "leak/"))]
        assert len(neurons) == (0 if stage == "ann" else 6)


def test_tensorboard_that_is_not_installed(iirsnn, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    result = iirsnn("train", "digits", "--tensorboard")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: runtime.tensorboard: expected the package tensorboard, which is not installed; "
        "pip install 'iirsnn[tensorboard]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_options_are_in_every_recipe():
    runtime = recipe.load("digits").runtime
    assert (runtime.compile, runtime.tensorboard, runtime.checkpoint_steps) == (False, False, 0)
    with pytest.raises(UsageError, match=r"runtime\.checkpoint_steps: expected a value at least 0"):
        recipe.load("digits", ["runtime.checkpoint_steps=-1"])


@pytest.mark.parametrize(
    ("channels", "stride", "device", "expected"),
    [
        (4, 2, "cpu", torch.contiguous_format),  # oneDNN writes outside its memory
        (8, 2, "cpu", torch.channels_last),
        (4, 1, "cpu", torch.channels_last),
        (4, 2, "cuda", torch.channels_last),
    ],
)
def test_channels_last_where_it_is_safe(channels, stride, device, expected):
    network = nn.Sequential(nn.Conv2d(channels, 16, 1, stride))
    assert memory_format(network, True, torch.device(device)) == expected
    assert memory_format(network, False, torch.device(device)) == torch.contiguous_format
