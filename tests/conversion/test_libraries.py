"""Networks of torchvision and timm: converted whole, and rates that come closer with T."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import conversion as benchmark

#: Neuron layers, and what the correlation of all logits at T = 8 has to pass (docs/conversion.md
#: has the values, and those at T = 64).
EXPECTED = {
    "torchvision/vgg11_bn": (10, 0.7),
    "torchvision/vgg16": (15, 0.6),
    "torchvision/resnet18": (17, 0.6),
    "torchvision/resnet50": (49, 0.5),
    "torchvision/mobilenet_v2": (35, 0.4),
    "torchvision/densenet121": (121, 0.45),
    "torchvision/googlenet": (57, 0.3),
    "torchvision/squeezenet1_1": (26, 0.7),
    "torchvision/shufflenet_v2_x1_0": (37, 0.3),
    "timm/resnet18": (17, 0.5),
    "timm/vgg11": (10, 0.7),
    "timm/mobilenetv2_100": (35, 0.35),
}


def test_every_network_of_the_table_is_here():
    assert set(EXPECTED) == set(benchmark.NETWORKS)


QUICK = ("torchvision/squeezenet1_1",)
QUICK_IN_ENGINE = ("torchvision/squeezenet1_1", "timm/resnet18")


def networks(quick):
    """All of the table; those that take long only by `make test-slow`."""
    marks = {name: () if name in quick else pytest.mark.slow for name in benchmark.NETWORKS}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("name", networks(QUICK))
def test_networks_are_converted_whole_and_track_their_ann(name):
    layers, bound = EXPECTED[name]
    row = benchmark.tracking(name, benchmark.network(name), steps=(1, 8))
    assert row.neurons == layers
    assert row.all[1] > bound
    assert row.all[1] > row.all[0]


@pytest.mark.parametrize("name", networks(QUICK_IN_ENGINE))
def test_the_engine_gives_the_spikes_of_pytorch(name):
    """At T = 1; what differs follows from a current within rounding of its threshold."""
    row = benchmark.in_engine(name, benchmark.network(name))
    assert 0.01 < row.spikes / row.neurons < 0.5, "the case says nothing"
    assert row.unexplained == 0
    assert row.roots + row.consequences < 1e-3 * row.neurons
