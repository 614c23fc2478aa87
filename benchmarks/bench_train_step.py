"""One training step of VGG9 and VGG16 on 32x32 images: time, bytes kept, resident memory.

    pytest benchmarks/bench_train_step.py --benchmark-only -s

All contenders have the same weights, and every layer the same density of spikes. Before it is
timed, each has to give the loss of the first and its gradient for the first layer's weights.
"""

import pytest
import torch
import traffic
from networks import batch_of, densities, makers, networks, neurons, step_of

ALL = torch.get_num_threads()
DENSITY = 0.15
SWEEP = (0.05, 0.10, 0.20, 0.30, 0.40)
#: In a sweep, and where a step takes seconds.
STRONGEST = (
    "limit",
    "iirsnn",
    "torch.compile",
    "torch.compile, whole network",
    "SpikingJelly",
)
TOLERANCE = 1e-2  # rounding of a fused BatchNorm can move a current across the threshold


def compare(name, loss, grad, expected):
    """Relative difference of the first layer's gradient; raises where it is another network."""
    difference = float((grad - expected[1]).norm() / expected[1].norm())
    if abs(float(loss - expected[0])) > TOLERANCE * abs(expected[0]) or difference > 0.2:
        raise AssertionError(
            f"{name}: not the same network: loss {float(loss):.6f}, not {float(expected[0]):.6f}; "
            f"gradient differs by {difference:.2g}"
        )
    return difference


def prepare(name, timesteps, batch, density, only):
    """(calls, rows, measured density) of the contenders' training steps."""
    torch._dynamo.reset()
    torch.set_num_threads(ALL)
    found, _ = networks(name, timesteps, density, only)
    images, labels = batch_of(batch)
    calls, rows, expected = {}, {}, None
    elements = neurons(name) * timesteps * batch
    order = ["iirsnn", *(key for key in found if key != "iirsnn")]
    for key in order:
        network = found[key]
        step = step_of(network, images, labels)
        if "torch.compile" in key:  # compiles before anything is counted
            step()
        parameters = [*network.parameters(), *network.buffers(), images, labels]
        with traffic.Kept(parameters) as kept, traffic.Traffic() as moved:
            loss = step()
        inner = getattr(network, "_orig_mod", network)
        grad = inner.get_parameter("layers.0.weight").grad.clone()
        expected = expected or (loss, grad)
        rows[key] = {"kept": kept.bytes / elements, "bytes": moved.bytes / elements}
        if key != "limit":
            rows[key]["difference"] = compare(key, loss, grad, expected)
        del kept, grad
        calls[key] = step
    found_densities = densities(found["iirsnn"], images)
    return calls, rows, sum(found_densities) / len(found_densities)


def run(race, name, timesteps, batch, density, sweep, only=(), seconds=8.0, rounds=(3, 11)):
    calls, rows, measured = prepare(name, timesteps, batch, density, only)
    facts = {
        "subject": "train_step",
        "network": name,
        "timesteps": timesteps,
        "batch": batch,
        "density": density,
        "measured_density": measured,
        "sweep": sweep,
        "threads": ALL,
    }
    race(calls, facts, rows, seconds, rounds)


@pytest.mark.parametrize("timesteps", [pytest.param(1, marks=pytest.mark.quick), 2, 5])
@pytest.mark.parametrize("name", ["vgg9", "vgg16"])
def test_step(race, name, timesteps):
    run(race, name, timesteps, 8, DENSITY, sweep=False)


@pytest.mark.parametrize("timesteps", [1, 5])
def test_large_batch(race, timesteps):
    run(race, "vgg16", timesteps, 64, DENSITY, sweep=False, only=STRONGEST)


@pytest.mark.parametrize("density", SWEEP)
@pytest.mark.parametrize(("timesteps", "batch"), [(1, 64), (5, 16)])
def test_density(race, timesteps, batch, density):
    run(race, "vgg16", timesteps, batch, density, sweep=True, only=STRONGEST)


@pytest.mark.parametrize("contender", list(makers()[0]))
def test_memory(benchmark, keep_group, contender):
    """Resident memory of VGG16's step at T = 5, batch 64, in a process of its own."""
    name, timesteps, batch = "vgg16", 5, 64
    rows = {}

    def measure():
        rows[contender] = traffic.in_subprocess(
            "step", contender, name, str(timesteps), str(batch), str(DENSITY)
        )

    benchmark.pedantic(measure, rounds=1, iterations=1)
    facts = {"subject": "memory", "network": name, "timesteps": timesteps, "batch": batch}
    keep_group({**facts, "density": DENSITY, "threads": ALL}, rows)
