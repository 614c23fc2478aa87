"""Two threads while another process keeps one core busy, against one thread with no such neighbour.

    pytest benchmarks/bench_neighbour.py --benchmark-only --full

Threads that wait for each other at fixed halves of the work wait for the slower core. The goal: two
threads with a busy neighbour take at most 1.3 times as long as one thread alone. torch's own
addition stands beside the kernels that share its threads. OpenMP decides when it is loaded whether
a waiting thread spins or sleeps (OMP_WAIT_POLICY), so each measurement is a process of its own.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from event_contenders import at_density, noise
from networks import Step, batch_of, networks

import iirsnn
from iirsnn.event import EventNetwork

ROUNDS, CALLS = 12, 20
ALONE, BOTH, BUSY = "one thread, alone", "two threads, alone", "two threads, busy neighbour"


@contextmanager
def neighbour():
    """A process that keeps the last core of this one busy; yields (wake, rest)."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    try:
        yield (
            lambda: process.send_signal(signal.SIGCONT),
            lambda: process.send_signal(signal.SIGSTOP),
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def engine(batch):
    network = EventNetwork.from_model(at_density("vgg16", 0.15, "average")[1], timesteps=1)
    images = [noise(batch) for _ in range(CALLS)]
    return lambda call: network(images[call])


def both_passes(function):
    """A function's forward and backward over 4 timesteps of half a million numbers."""
    x = torch.randn(4, 2**19, requires_grad=True)
    grad = torch.randn(4, 2**19)

    def call(_):
        x.grad = None
        function(x).backward(grad)

    return call


def training_step(_=None):
    network, _ = networks("vgg16", 1, 0.15, ("iirsnn, spike layers",), torch.channels_last)
    images, labels = batch_of(8)
    step = Step(network["iirsnn, spike layers"], images, labels)
    return lambda _: step()


WORK = {
    "engine, batch 1": (lambda: engine(1), CALLS),
    "engine, batch 16": (lambda: engine(16), 5),
    "FusedLIF, both passes": (lambda: both_passes(iirsnn.functional.lif), CALLS),
    "torch.add, both passes": (lambda: both_passes(lambda x: x + 1), CALLS),
    "training step, spike layers": (training_step, 2),
}


#: OMP_WAIT_POLICY: OpenMP's own default, and what the commands of iirsnn set.
POLICIES = ("", "PASSIVE")


def measure(what):
    """{condition: milliseconds of each call}."""
    make, calls = WORK[what]
    times = {name: [] for name in (ALONE, BOTH, BUSY)}
    with neighbour() as (wake, rest):
        work = make()
        for _ in range(ROUNDS):
            for name, taken in times.items():
                torch.set_num_threads(1 if name == ALONE else 2)
                (wake if name == BUSY else rest)()
                work(0)
                for call in range(calls):
                    start = time.perf_counter()
                    result = work(call)
                    taken.append(1e3 * (time.perf_counter() - start))
                    del result
                rest()
    return times


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: no neighbour to have")
@pytest.mark.parametrize("policy", POLICIES, ids=["spinning", "passive"])
@pytest.mark.parametrize("what", WORK)
def test_neighbour(benchmark, keep_group, say, what, policy):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, __file__, what]

    def run():
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    times = benchmark.pedantic(run, rounds=1)
    least = statistics.median(times[ALONE])
    rows = {}
    for name, taken in times.items():
        p95 = statistics.quantiles(taken, n=20, method="inclusive")[-1]
        rows[name] = {"median_ms": statistics.median(taken), "p95_ms": p95, "most_ms": max(taken)}
        rows[name] |= {"ratio": rows[name]["median_ms"] / least, "rounds": len(taken)}
        ratios = ", ".join(
            f"{value / least:.2f}" for value in (rows[name]["median_ms"], p95, max(taken))
        )
        say(
            f"  {name:<30} {rows[name]['median_ms']:9.3f} ms; median, p95, most: {ratios} x {ALONE}"
        )
    keep_group({"subject": "neighbour", "what": what, "threads": 2, "wait_policy": policy}, rows)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
