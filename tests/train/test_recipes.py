"""The recipes that ship: each is read, and describes the network that was counted by hand."""

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from iirsnn.conversion import to_spiking
from iirsnn.measure.energy import OperationCounter
from iirsnn.models import build
from iirsnn.train import recipe
from tests.train.test_recipe import SHAPES


def conv(size, *channels):
    """[weights, multiply-accumulates] of 3x3 convolutions in a row, on size x size maps."""
    weights = [9 * a * b for a, b in pairwise(channels)]
    return [sum(weights), sum(weights) * size * size]


def linear(*units):
    weights = sum(a * b for a, b in pairwise(units))
    return [weights, weights]


def total(*parts):
    return [sum(column) for column in zip(*parts, strict=True)]


def vgg16(size, features, classes, last):
    return total(
        conv(size, 3, 64, 64),
        conv(size // 2, 64, 128, 128),
        conv(size // 4, 128, 256, 256, 256),
        conv(size // 8, 256, 512, 512, 512),
        conv(size // 16, 512, 512, 512, 512),
        linear(features, *last, classes),
    )


def resnet20(classes):
    """A stem of three convolutions at 32 x 32, a pool, and 2, 2, 2, 2 blocks of two."""
    shortcuts = [
        [a * b, a * b * size * size] for a, b, size in ((64, 128, 8), (128, 256, 4), (256, 512, 2))
    ]
    return total(
        conv(32, 3, 64, 64, 64),
        conv(16, 64, 64, 64, 64, 64),
        conv(8, 64, 128, 128, 128, 128),
        conv(4, 128, 256, 256, 256, 256),
        conv(2, 256, 512, 512, 512, 512),
        *shortcuts,
        linear(2048, classes),
    )


FC = (4096, 4096)
BY_HAND = {
    "cifar10-vgg16": vgg16(32, 2048, 10, FC),
    "cifar100-vgg16": vgg16(32, 2048, 100, FC),
    "imagenet-vgg16": vgg16(224, 25088, 1000, FC),
    "cifar10-resnet20": resnet20(10),
    "cifar100-resnet20": resnet20(100),
    "cifar10-vgg6": total(conv(32, 3, 64), conv(16, 64, 128, 128), linear(8192, *FC, 10)),
}
#: Figures that the literature gives, so that a slip in the formulas shows.
FIGURES = {
    "cifar10-vgg16": (39.92e6, 338.4e6),
    "imagenet-vgg16": (138.34e6, 15.47e9),
    "cifar10-resnet20": (11.253e6, None),
}
STAGES = {"cifar": (300, 500, 64, 1e-4, 5.0), "image": (101, 25, 128, 2e-5, 10.0)}
PAPER = sorted(BY_HAND)


def network(loaded):
    """The recipe's ANN, without memory: torch's meta device has shapes alone."""
    classes, image_shape = SHAPES[loaded.data.name]
    with torch.device("meta"):
        return build(loaded.model, classes, image_shape), torch.zeros(
            1, *image_shape, device="meta"
        )


@pytest.mark.parametrize("name", [*PAPER, *(f"{name}-plus" for name in PAPER)])
def test_networks_have_the_weights_and_operations_counted_by_hand(name):
    ann, images = network(recipe.load(name))
    by_hand = BY_HAND[name.removesuffix("-plus")]
    weights = sum(p.numel() for p in ann.parameters() if p.dim() > 1)
    counter = OperationCounter(ann)
    with counter.watching():
        ann.eval()(images)
    assert [weights, counter.multiplications] == by_hand


@pytest.mark.parametrize("name", FIGURES)
def test_counts_by_hand_are_those_of_the_literature(name):
    for ours, theirs in zip(BY_HAND[name], FIGURES[name], strict=True):
        assert theirs is None or ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("name", recipe.names())
def test_each_recipe_that_ships_converts_and_runs_at_each_t(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    plus = name.endswith("-plus") and name != "fashion-mnist-plus"
    straight = plus or name == "fashion-mnist-membrane"  # from the ANN to T = 1
    assert (loaded.timesteps[0], loaded.timesteps[-1]) == (1 if straight else 5, 1)
    classes, image_shape = SHAPES[loaded.data.name]
    if loaded.data.name == "imagenet":  # its real network takes gigabytes
        loaded.model.hidden, image_shape = [8], (3, 32, 32)
    elif loaded.model.name != "vgg":
        loaded.model.hidden = [8]
    ann = build(loaded.model, classes, image_shape)
    snn = to_spiking(ann, 5, loaded.neuron).eval()
    for snn.timesteps in (5, 1):
        assert snn(torch.zeros(1, *image_shape)).shape == (1, classes)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_settings(name):
    """One row a fact of the paper's public code, apart from the recipe that has to agree."""
    loaded = recipe.load(name)
    assert loaded.timesteps == [5, 4, 3, 2, 1]
    ann_epochs, epochs, batch, rate, decay = STAGES[name[:5]]
    ann = loaded.stage_config("ann")
    assert (ann.optimizer, ann.learning_rate, ann.momentum, ann.weight_decay) == (
        *("sgd", 1e-2, 0.9, 5e-4),
    )
    assert (ann.epochs, ann.milestones, ann.decay, ann.dropout) == (
        *(ann_epochs, [0.45, 0.7, 0.9], decay, 0.5),
    )
    for stage in ("T5", "T4", "T3", "T2", "T1"):
        snn = loaded.stage_config(stage)
        assert (snn.optimizer, snn.learning_rate, snn.weight_decay) == ("adam", rate, 0.0)
        assert (snn.epochs, snn.milestones, snn.decay) == (epochs, [0.6, 0.8, 0.9], 5.0)
        assert (snn.dropout, snn.teacher, snn.energy_weight, snn.mixup) == (0.2, "none", 0.0, 0.0)
    assert loaded.data.batch_size == batch
    assert loaded.model.pool == "average"
    assert loaded.model.batch_norm == (name != "imagenet-vgg16")
    neuron = asdict(loaded.neuron)
    assert (neuron["leak"], neuron["reset"], neuron["surrogate"]) == (1.0, "soft", "triangle")
    assert not neuron["per_channel"]
    assert not neuron["keep_batch_norm"]
    assert (loaded.conversion.percentile, loaded.conversion.scale) == (90.0, 1.0)


#: Times less energy than the ANN that each energy_budget stands for.
LESS_ENERGY = dict.fromkeys(PAPER, 33) | {"cifar10-vgg6": 25}


@pytest.mark.parametrize("name", PAPER)
def test_the_budget_of_a_plus_recipe_is_the_energy_that_it_says(name):
    """At the budget: layer 1's multiply-accumulates, and additions for the rest."""
    loaded = recipe.load(f"{name}-plus")
    _, operations = BY_HAND[name]
    size = SHAPES[loaded.data.name][1][1]
    first = conv(size, 3, 64)[1]
    additions = loaded.stage_config("T1").energy_budget * operations
    energy = 4.6 * first + 0.9 * additions
    assert LESS_ENERGY[name] <= 4.6 * operations / energy < 1.1 * LESS_ENERGY[name]


@pytest.mark.parametrize("name", PAPER)
def test_a_plus_recipe_has_the_data_and_the_network_of_its_twin(name):
    plain, plus = recipe.load(name), recipe.load(f"{name}-plus")
    assert plus.data.name == plain.data.name
    assert (plus.model.name, plus.model.layers, plus.model.hidden) == (
        *(plain.model.name, plain.model.layers, plain.model.hidden),
    )
