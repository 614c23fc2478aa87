"""Each recipe that ships trains: ten steps a stage at its real size, on a few random images."""

import pytest
import torch
from rich.console import Console

from iirsnn.nn import neurons
from iirsnn.train import pipeline, recipe
from iirsnn.train.data import Splits
from iirsnn.train.images import MemoryImages
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stage_order import Stage
from iirsnn.train.stage_training import StageTraining
from tests.train.test_recipe import SHAPES

STEPS = 10
#: One thread is faster than two for small networks, and fp32 than bf16 on a CPU without its units.
SMALL = [
    "data.test_batch_size=2",
    "data.workers=0",
    "ann.epochs=1",
    "snn.epochs=1",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "runtime.threads=1",
]
#: Their networks have tens of millions of weights, or images of 224 x 224.
SLOW = ("cifar", "imagenet")


def random_splits(name, batch):
    """As many images as `STEPS` batches take, and a few others."""
    classes, shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def part(count):
        pixels = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % classes
        return MemoryImages(pixels, labels, [0.5] * shape[0], [0.25] * shape[0], pad=1, flip=True)

    return Splits(part(STEPS * batch), part(4), part(2), [str(i) for i in range(classes)])


def train(line, stage, network):
    """Ten steps of a stage, after which its last layer has learned, and its first one at T > 1.

    At T = 1 the paper's deep networks are silent where they were not trained at each T before.
    """
    before = [p.detach().clone() for p in network.parameters()]
    training = StageTraining(
        line._by_events(network), stage, line.folder, line.splits, line.device, line.teacher(stage)
    )
    assert training.run(Console(quiet=True)).step == STEPS
    after = list(network.parameters())
    assert not torch.equal(after[-1], before[-1])
    if stage.timesteps != 1:
        assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ())
        for name in recipe.names()
    ],
)
def test_each_recipe_trains_at_its_real_size(name, tmp_path, monkeypatch):
    batch = 2 if name.startswith("imagenet") else 4
    sizes = [f"data.batch_size={batch}", f"conversion.images={batch}", "snn.accumulate=1"]
    loaded = recipe.load(name, [*SMALL, *sizes])
    for settings in loaded.stages.values():
        settings |= {"epochs": 1, "accumulate": 1}  # a norm needs two images
    splits = random_splits(loaded.data.name, batch)
    # two batches of calibration images
    monkeypatch.setattr(pipeline, "LARGE", batch // 2 * splits.train[0][0].numel())
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *arguments: None)  # gigabytes
    with RunFolder.create(tmp_path / "run", loaded) as folder:
        line = Pipeline(folder, splits)
        first, *_, last = line.stages
        ann = line.initial(first)
        train(line, first, ann)
        monkeypatch.setattr(line, "trained", lambda stage: ann)
        network = line.converted(loaded.timesteps[0])
        assert all(0 < neuron.threshold.min() < torch.inf for neuron in neurons(network))
        for stage in (line.stages[1], Stage(last.name, last.timesteps, "ann")):
            network.timesteps = stage.timesteps
            train(line, stage, network)
