"""One training step of VGG9 and VGG16 on 32x32 images: time, bytes kept, resident memory.

    pytest benchmarks/bench_train_step.py --benchmark-only -s

All contenders have the same weights, and every layer the same density of spikes. Before it is
timed, each of its layers has to be iirsnn's, from the same inputs (see sameness.py).
Weights and images come in torch's own layout, those of the large batch in channels_last too, those
of the sweep in that alone.
"""

import pytest
import torch
import traffic
from networks import Step, batch_of, densities, makers, networks, neurons, same_layers
from one_process import in_subprocess
from sameness import Sameness

ALL = torch.get_num_threads()
DENSITY = 0.15
SAME = 8  # images that layers are compared by
SWEEP = (0.05, 0.10, 0.20, 0.30, 0.40)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Where a step takes long; of the two torch.compile the faster one.
STRONGEST = (
    "limit",
    "iirsnn",
    "iirsnn, spike layers",
    "torch.compile, whole network",
    "SpikingJelly",
)


def prepare(name, timesteps, batch, density, only, layout):
    """(calls, rows, facts) of the contenders' training steps."""
    torch._dynamo.reset()
    torch.set_num_threads(ALL)
    found, _ = networks(name, timesteps, density, only, LAYOUTS[layout])
    images, labels = batch_of(batch)
    images = images.to(memory_format=LAYOUTS[layout])
    calls, rows = {}, {}
    elements = neurons(name) * timesteps * batch

    same = Sameness(found["iirsnn"], images[:SAME])
    for key, network in found.items():
        step = Step(network, images, labels)
        if "torch.compile" in key:  # compiles before anything is counted
            step()
        parameters = [*network.parameters(), *network.buffers(), images, labels]
        with traffic.Traffic() as moved:
            with traffic.Kept(parameters) as kept:
                loss = step.forward()
            step.backward(loss)
        rows[key] = {"kept": kept.bytes / elements, "bytes": moved.bytes / elements}
        if key != "limit":
            rows[key]["difference"] = same_layers(same, key, network)
        del kept, loss
        calls[key] = step
    measured = densities(found["iirsnn"], images)
    return calls, rows, {"measured_density": sum(measured) / len(measured)}


def run(race, name, timesteps, batch, density, sweep, layout, only=(), seconds=8.0, rounds=(3, 11)):
    calls, rows, more = prepare(name, timesteps, batch, density, only, layout)
    facts = {
        "subject": "train_step",
        "network": name,
        "timesteps": timesteps,
        "batch": batch,
        "density": density,
        "sweep": sweep,
        "layout": layout,
        "threads": ALL,
        **more,
    }
    race(calls, facts, rows, seconds, rounds)


@pytest.mark.telling
def test_telling(race):
    """What the full set measures with more contenders, layouts and rounds."""
    only = tuple(name for name in STRONGEST if "compile" not in name)
    run(race, "vgg16", 1, 16, DENSITY, False, "channels_last", only, rounds=(3, 5))


@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize("name", ["vgg9", "vgg16"])
def test_step(race, name, timesteps):
    run(race, name, timesteps, 8, DENSITY, sweep=False, layout="contiguous")


@pytest.mark.parametrize("timesteps", [1, 5])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_large_batch(race, layout, timesteps):
    rounds = (5, 5) if timesteps == 1 else (3, 3)
    only = (*STRONGEST, "iirsnn, spike layers, BatchNormLIF")
    run(race, "vgg16", timesteps, 64, DENSITY, False, layout, only, rounds=rounds)


@pytest.mark.parametrize("density", SWEEP)
@pytest.mark.parametrize(("timesteps", "batch"), [(1, 64), (5, 16)])
def test_density(race, timesteps, batch, density):
    run(race, "vgg16", timesteps, batch, density, True, "channels_last", STRONGEST, rounds=(3, 3))


@pytest.mark.parametrize("contender", list(makers()[0]))
def test_memory(benchmark, keep_group, contender):
    """Resident memory of VGG16's step at T = 5, batch 64, in a process of its own."""
    name, timesteps, batch = "vgg16", 5, 64
    rows = {}

    def measure():
        rows[contender] = in_subprocess(
            "step", contender, name, str(timesteps), str(batch), str(DENSITY)
        )

    benchmark.pedantic(measure, rounds=1, iterations=1)
    facts = {"subject": "memory", "network": name, "timesteps": timesteps, "batch": batch}
    keep_group({**facts, "density": DENSITY, "threads": ALL}, rows)
