"""What spike_layers=auto chooses against always (events) and never (dense), over the density.

    pytest benchmarks/bench_choice.py --benchmark-only --full

Of single layers of VGG16's shapes, forward and backward, and of a training step of VGG16. The goal:
auto takes at most 1.03 times the time of the better of the two.
"""

import copy

import pytest
import torch
from networks import Step, batch_of, networks
from torch import nn

from iirsnn import use_spike_layers
from iirsnn.nn.spike_layers import _SPIKE_LAYERS

ALL = torch.get_num_threads()
DENSITIES = (0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.60)
MODES = {"auto": "auto", "always": "events"}
#: (images, channels, outputs, height = width); the last one is linear.
SHAPES = {
    "64-32x32": (16, 64, 64, 32),
    "128-16x16": (16, 128, 128, 16),
    "256-8x8": (16, 256, 256, 8),
    "512-4x4": (16, 512, 512, 4),
    "512-2x2": (16, 512, 512, 2),
    "linear-4096": (16, 4096, 4096, 0),
}


def layers(channels, outputs, size):
    """{never, auto, always}: the same layer."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, outputs, 3, padding=1) if size else nn.Linear(channels, outputs)
    plain = plain.to(memory_format=torch.channels_last)
    made = {"never": plain}
    for name, mode in MODES.items():
        made[name] = copy.deepcopy(plain)
        made[name].__class__ = _SPIKE_LAYERS[type(plain)]
        made[name].set_mode(mode)
    return made


def facts_of(what, density, **more):
    return {"subject": "choice", "what": what, "timesteps": 1, "density": density, **more}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(race, shape, density):
    torch.set_num_threads(ALL)
    images, channels, outputs, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(images, channels, size or 1, size or 1, generator=generator) < density).float()
    x = x.contiguous(memory_format=torch.channels_last) if size else x.flatten(1)
    x.requires_grad_()
    made = layers(channels, outputs, size)
    grad = torch.randn(made["never"](x).shape, generator=generator)

    def step(layer):
        def call():
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(grad)

        return call

    calls = {name: step(layer) for name, layer in made.items()}
    for call in calls.values():
        call()
    chosen = made["auto"].decision
    rows = {"auto": {"chosen": [chosen.forward, chosen.weight_grad, chosen.input_grad]}}
    facts = facts_of(f"layer {shape}", density, batch=images, threads=ALL)
    race(calls, facts, rows, 1.5, (5, 31), limit="never")


def cases():
    for density in DENSITIES:
        marks = [pytest.mark.telling] if density in (0.15, 0.60) else []
        yield pytest.param(density, marks=marks)


@pytest.mark.parametrize("density", list(cases()))
def test_step(race, density):
    torch.set_num_threads(ALL)
    found, _ = networks("vgg16", 1, density, ("iirsnn",), torch.channels_last)
    images, labels = batch_of(16)
    images = images.to(memory_format=torch.channels_last)
    made = {"never": found["iirsnn"]}
    for name, mode in MODES.items():
        made[name] = use_spike_layers(copy.deepcopy(found["iirsnn"]), mode)
    calls = {name: Step(network, images, labels) for name, network in made.items()}
    for call in calls.values():
        call()
    facts = facts_of("training step, vgg16", density, batch=16, threads=ALL)
    race(calls, facts, {}, 8.0, (5, 9), limit="never")
