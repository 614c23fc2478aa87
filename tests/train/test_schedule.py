"""Optimisers, learning rates, and the seeds of a stage."""

import math

import pytest
import torch

from iirsnn.conversion import to_spiking
from iirsnn.models import vgg
from iirsnn.nn import neurons
from iirsnn.train.recipe import StageConfig
from iirsnn.train.schedule import make_optimizer, set_learning_rate
from iirsnn.train.seeds import derive_seed


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (
            StageConfig(learning_rate=1.0, milestones=[0.6, 0.8, 0.9], decay=5),
            {0: 1, 0.59: 1, 0.6: 0.2, 0.79: 0.2, 0.8: 0.04, 0.9: 0.008, 0.999: 0.008},
        ),
        (StageConfig(learning_rate=2.0, milestones=[]), {0: 2, 0.99: 2}),
        (
            StageConfig(learning_rate=2.0, schedule="cosine"),
            {0: 2, 0.25: 1 + math.sqrt(0.5), 0.5: 1, 0.75: 1 - math.sqrt(0.5)},
        ),
    ],
)
def test_learning_rates(config, rates):
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    optimizer = make_optimizer(network, config)
    for done, rate in rates.items():
        set_learning_rate(optimizer, config, done)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate] * 2)


def test_thresholds_and_leaks_may_have_a_rate_of_their_own():
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    config = StageConfig(learning_rate=0.5, neuron_rate=0.1, milestones=[0.5], decay=10)
    optimizer = make_optimizer(network, config)
    set_learning_rate(optimizer, config, 0.7)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for neuron in neurons(network) for p in neuron.parameters()}
    assert len(own) == 4
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.005 if parameter in own else 0.05)


def test_optimizers_are_the_papers():
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    adam = make_optimizer(network, StageConfig(weight_decay=0.1))
    assert isinstance(adam, torch.optim.Adam)
    assert all(group["amsgrad"] for group in adam.param_groups)
    sgd = make_optimizer(network, StageConfig(optimizer="sgd", momentum=0.8, weight_decay=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.8 for group in sgd.param_groups)
    for optimizer in (adam, sgd):
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        for neuron in neurons(network):
            assert decays.pop(id(neuron.threshold)) == decays.pop(id(neuron.leak)) == 0
        assert len(decays) == len([p for p in network.parameters() if p.dim()]) - 4
        assert set(decays.values()) == {0.1}


def test_seeds_depend_on_every_part():
    seeds = [derive_seed(0, "ann"), derive_seed(0, "T1"), derive_seed(1, "ann"), derive_seed(0)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "ann") == seeds[0]
