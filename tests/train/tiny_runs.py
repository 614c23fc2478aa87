"""Whole runs of seconds on images made here, and their outcomes compared bit for bit."""

import json

import torch
from rich.console import Console

from iirsnn import atomic_files
from iirsnn.train import recipe
from iirsnn.train.data import Splits
from iirsnn.train.images import MemoryImages
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stage_training import StageTraining

#: Five epochs of two steps with a checkpoint after each step, on images of `tiny_splits`.
TINY = """
name: tiny
timesteps: [2, 1]
data: {batch_size: 8, test_batch_size: 5}
model: {layers: [4, A, 6], hidden: [8]}
conversion: {images: 12}
ann: {epochs: 2, learning_rate: 0.05}
snn: {epochs: 2, learning_rate: 0.01}
stages: {T1: {epochs: 1}}
runtime: {threads: 1, device: cpu, checkpoint_minutes: 0}
"""


def tiny(*overrides):
    return recipe.parse(TINY, overrides, source="tiny")


def tiny_splits():
    """Three classes of noisy 1x4x4 images: 16 to train on, 9 for validation, 9 for the test."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (3, 1, 4, 4), generator=generator)

    def part(count):
        labels = torch.arange(count) % 3
        noise = torch.randint(-90, 90, (count, 1, 4, 4), generator=generator)
        pixels = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
        return MemoryImages(pixels, labels, [0.5], [0.3], pad=1, flip=True)

    return Splits(part(16), part(9), part(9), ["a", "b", "c"])


def train(path, settings=None):
    """Train the run in a folder to its end, from wherever it is."""
    started = (path / "recipe.yaml").exists()
    with RunFolder.resume(path) if started else RunFolder.create(path, settings) as folder:
        Pipeline(folder, tiny_splits()).train(Console(quiet=True))


def outcome(path):
    """All that a run is to repeat bit for bit: weights, accuracies, metrics."""
    timed = ("seconds", "images_per_second", "commit", "machine")

    def untimed(record):
        return {key: value for key, value in record.items() if key not in timed}

    found = {}
    for folder in sorted((path / "stages").iterdir()):
        tensors, header = atomic_files.load(folder / "best.safetensors")
        result = untimed(json.loads((folder / "result.json").read_text()))
        found[folder.name] = (tensors, header, result)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return found, [untimed(json.loads(line)) for line in lines]


def assert_same_outcome(path, expected_path):
    (found, metrics), (expected, expected_metrics) = outcome(path), outcome(expected_path)
    assert found.keys() == expected.keys()
    for stage, (tensors, header, result) in expected.items():
        assert found[stage][0].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found[stage][0][name], value), f"{stage}: {name}"
        assert found[stage][1] == header
        assert found[stage][2] == result
    assert metrics == expected_metrics
    leftovers = [*path.rglob("*.tmp"), *path.rglob("last.*"), *path.rglob("previous.*")]
    assert not leftovers


class Killed(BaseException):
    """What no code of the package may catch."""


def kill_after(patch, *places):
    """Trainings die after these (stage, step), once after each."""
    left, step = set(places), StageTraining._step

    def step_or_die(stage, *arguments):
        place = (stage.stage.name, stage.progress.step)
        if place in left:
            left.remove(place)
            raise Killed
        step(stage, *arguments)

    patch.setattr(StageTraining, "_step", step_or_die)


def steps_done(file):
    """The step of a resume checkpoint, from one look at the file; 0 where there is none."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            metadata = json.loads(opened.read(size))["__metadata__"]["iirsnn"]
    except FileNotFoundError:
        return 0
    return json.loads(metadata)["progress"]["step"]
