"""Networks of torchvision and timm as spiking ones: how well their rates track the ANN's logits.

    python benchmarks/conversion.py                   the table of rates in docs/conversion.md
    python benchmarks/conversion.py resnet18 ...      some rows of it
    python benchmarks/conversion.py --engine ...      the table of engines there: spikes at T = 1

Weights are random (Kaiming's), norms have the statistics of random images, and nothing is trained:
what is shown is the conversion: soft reset, leak 1, the 99.9th percentile, converted anew for each
T. Two correlations with the ANN's logits: of all of them, and of what sets an image apart from the
mean of the images. 0 where nothing spikes. The engine runs each network at T = 1 and the 90th
percentile, as a training would start.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iirsnn
from iirsnn.event import EventNetwork
from iirsnn.event.flips import trace_flips
from iirsnn.nn import neurons

TORCHVISION = (
    *("vgg11_bn", "vgg16", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "googlenet"),
    *("squeezenet1_1", "shufflenet_v2_x1_0"),
)
TIMM = ("resnet18", "vgg11", "mobilenetv2_100")
NETWORKS = tuple(f"torchvision/{name}" for name in TORCHVISION) + tuple(f"timm/{n}" for n in TIMM)
STEPS = (1, 8, 64)


@dataclass(frozen=True)
class Tracking:
    """Attributes: all, between: correlations with the ANN's logits after each of STEPS."""

    network: str
    neurons: int
    all: tuple[float, ...]
    between: tuple[float, ...]


@dataclass(frozen=True)
class InEngine:
    """Attributes:
    layers: of the engine.
    neurons, spikes: of all images.
    roots, consequences, unexplained: spikes that are not PyTorch's, see `trace_flips`.
    classes_that_differ: images.
    """

    network: str
    layers: int
    neurons: int
    spikes: int
    roots: int
    consequences: int
    unexplained: int
    classes_that_differ: int


def network(name: str, **options: Any) -> nn.Module:
    """A network with random weights, in eval mode, its norms with statistics of random images."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        ann = timm.create_model(model, **options)
    else:
        import torchvision

        if model.startswith(("vgg", "googlenet")):
            options = {"init_weights": False, **options}
        ann = getattr(torchvision.models, model)(**options)
    return standardised(ann)


def standardised(ann: nn.Module) -> nn.Module:
    """The network with Kaiming's weights and running statistics of random images, in eval mode."""
    for module in ann.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches seen
    with torch.no_grad():
        ann.train()(random_images(8, seed=1))
    return ann.eval()


def random_images(count: int, seed: int, size: int = 64) -> Tensor:
    """Blurred noise and a little sharp one: [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic") + 0.3 * fine


@torch.no_grad()
def tracking(name: str, ann: nn.Module, images: int = 2, steps: Sequence[int] = STEPS) -> Tracking:
    """Converts the ANN and compares the logits of random images."""
    calibration, shown = random_images(images, seed=2), random_images(images, seed=3)
    expected = ann(shown)
    everything, apart = [], []
    for timesteps in steps:
        snn = iirsnn.convert(ann, calibration, 99.9, timesteps=timesteps).eval()
        logits = snn(shown)
        everything.append(_correlation(expected, logits))
        apart.append(_correlation(_apart(expected), _apart(logits)))
    return Tracking(name, len(neurons(snn)), tuple(everything), tuple(apart))


@torch.no_grad()
def in_engine(name: str, ann: nn.Module, images: int = 2) -> InEngine:
    """Converts the ANN and compares the engine's spikes of random images with PyTorch's."""
    snn = iirsnn.convert(ann, random_images(images, seed=2), 90.0, timesteps=1).eval()
    net = EventNetwork.from_model(snn)
    shown = random_images(images, seed=3)
    different = int((net(shown).argmax(1) != snn(shown).argmax(1)).sum())
    layers = net.statistics()
    flips = trace_flips(net, snn, shown)
    roots = sum(flip.root for flip in flips)
    return InEngine(
        network=name,
        layers=len(layers),
        neurons=images * sum(layer.neurons for layer in layers),
        spikes=sum(layer.spikes for layer in layers),
        roots=roots,
        consequences=len(flips) - roots,
        unexplained=sum(not flip.explained for flip in flips),
        classes_that_differ=different,
    )


def _apart(logits: Tensor) -> Tensor:
    return logits - logits.mean(0)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].nan_to_num())


def _rates(name: str) -> list[str]:
    row = tracking(name, network(name))
    return [str(row.neurons), *(f"{value:.3f}" for value in (*row.all, *row.between))]


def _spikes(name: str) -> list[str]:
    row = in_engine(name, network(name))
    counts = (row.layers, row.neurons, row.spikes, row.roots, row.consequences, row.unexplained)
    return [f"{count:,}" for count in (*counts, row.classes_that_differ)]


RATES = "network | neuron layers | all logits: T = 1 | 8 | 64 | between images: T = 1 | 8 | 64"
SPIKES = (
    "network | layers | neurons | spikes | differ: roots | consequences | unexplained | classes"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; all of them without any")
    parser.add_argument("--engine", action="store_true", help="spikes of the engine at T = 1")
    options = parser.parse_args()
    title, row = (SPIKES, _spikes) if options.engine else (RATES, _rates)
    print(f"| {title} |")
    print("|---" * len(title.split(" | ")) + "|")
    for name in NETWORKS:
        if not options.names or any(part in name for part in options.names):
            print("|", " | ".join([name, *row(name)]), "|", flush=True)


if __name__ == "__main__":
    main()
