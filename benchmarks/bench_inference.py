"""Inference of VGG9 and VGG16 on 32x32 images in torch, at T = 1, 2, 5.

    pytest benchmarks/bench_inference.py --benchmark-only -s

The engine that runs on events alone has a file of its own, bench_event.py.
"""

import pytest
import torch
from networks import batch_of, densities, networks, neurons, same_layers
from sameness import Sameness
from traffic import Traffic

ALL = torch.get_num_threads()
DENSITY = 0.15
BATCH = 8


@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize("name", ["vgg9", "vgg16"])
def test_inference(race, name, timesteps):
    torch._dynamo.reset()
    torch.set_num_threads(ALL)
    found, _ = networks(name, timesteps, DENSITY)
    images, _ = batch_of(BATCH)
    elements = neurons(name) * timesteps * BATCH
    calls, rows = {}, {}
    for module in found["iirsnn"].modules():  # its statistics, which all share, become the images'
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.momentum = 1.0
    with torch.no_grad():
        found["iirsnn"](images)
        found["iirsnn"].eval()
    same = Sameness(found["iirsnn"], images)
    for key in found:
        network = found[key].eval()

        def call(network=network):
            with torch.no_grad():
                return network(images)

        if "torch.compile" in key:
            call()
        with Traffic() as moved:
            call()
        rows[key] = {"bytes": moved.bytes / elements}
        if key != "limit":
            rows[key]["difference"] = same_layers(same, key, network)
        calls[key] = call
    measured = densities(found["iirsnn"], images)
    facts = {
        "subject": "inference",
        "network": name,
        "timesteps": timesteps,
        "batch": BATCH,
        "density": DENSITY,
        "measured_density": sum(measured) / len(measured),
        "threads": ALL,
    }
    race(calls, facts, rows, seconds=4.0, rounds=(5, 31))
