"""EventNetwork against the dense ReLU network of the same topology, and against the same SNN.

    pytest benchmarks/bench_event.py --benchmark-only --full
    python benchmarks/bench_event.py --help          other networks, a trained run, other batches

Every call gets new images. All contenders take turns, so that a busy moment of the machine hits
each of them; medians. ONNX Runtime, OpenVINO and SpikingJelly take part where they are installed
(make bench installs them); who is missing is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import record
import torch
from event_contenders import (
    DENSE_FP32,
    DENSE_INT8,
    STRONGEST,
    Contender,
    Draw,
    at_density,
    contenders,
    noise,
    trained,
)

from iirsnn.event import EventNetwork
from iirsnn.measure.provenance import commit

DENSITIES = (0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.60)
ALL = torch.get_num_threads()


# ---- The measurement ----


def measure(
    functions: dict[str, Contender],
    nets: dict[str, EventNetwork],
    batch: int,
    draw: Draw,
    rounds: int,
    calls: int = 1,
) -> dict[str, dict]:
    """Milliseconds of each, median and least, over new images in turns; fp32 events by layer.

    Of several calls a turn the first is not counted: its weights have to come back into the cache
    that the others' took, as they would not where one network runs alone.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    layers: list[list[dict]] = []
    for _ in range(rounds):
        turn = [draw(batch) for _ in range(calls)]
        for name, function in functions.items():
            for call, images in enumerate(turn):
                start = time.perf_counter()
                result = function(images)
                if call or calls == 1:
                    times[name].append(1e3 * (time.perf_counter() - start))
                del result
        if "events fp32" in functions:
            layers.append([asdict(layer) for layer in nets["fp32"].statistics()])
    found: dict[str, dict] = {
        name: {"median_ms": statistics.median(taken), "least_ms": min(taken)}
        for name, taken in times.items()
    }
    if layers:
        rows = []
        for each in zip(*layers, strict=True):
            row = dict(each[-1], kind=nets["fp32"].layers[len(rows)].kind)
            row["milliseconds"] = statistics.median(layer["milliseconds"] for layer in each)
            row["additions"] = statistics.mean(layer["additions"] for layer in each)
            rows.append(row)
        found["events fp32"]["layers"] = rows
        found["events fp32"]["density"] = nets["fp32"].density()
    return found


def show(found: dict[str, dict], say: Callable[[str], None] = print) -> None:
    ours = found.get("events fp32", {}).get("median_ms")
    for name, taken in found.items():
        ratio = f"{taken['median_ms'] / ours:6.2f} x events fp32" if ours else ""
        say(f"  {name:<26} {taken['median_ms']:9.3f} ms (least {taken['least_ms']:9.3f})  {ratio}")


def crossing(points: list[tuple[float, float]]) -> str:
    """Where times faster than dense, over density, falls below 1."""
    points = sorted(points)
    for (d0, r0), (d1, r1) in pairwise(points):
        if r0 >= 1 > r1:
            return f"dense wins above a density of {d0 + (r0 - 1) / (r0 - r1) * (d1 - d0):.2f}"
    last, ratio = points[-1]
    return f"{ratio:.1f} times faster than dense at the highest density measured, {last:.2f}"


def against_dense(found: dict[str, dict]) -> dict[str, float]:
    """How many times as fast as the best dense network events are: fp32, bf16 and int8."""
    ratios = {}
    for ours, dense in (("fp32", DENSE_FP32), ("bf16", DENSE_FP32), ("int8", DENSE_INT8)):
        times = [found[name]["median_ms"] for name in dense if name in found]
        if times and f"events {ours}" in found:
            ratios[ours] = min(times) / found[f"events {ours}"]["median_ms"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vgg16", help="of random weights, on 32 x 32 images")
    parser.add_argument("--pool", default="average", choices=("average", "max"))
    parser.add_argument("--densities", type=float, nargs="*", default=[5, 10, 15, 20, 30])
    parser.add_argument("--run", type=Path, help="a trained run instead: its own spike rates")
    parser.add_argument("--stage", type=int, default=1, help="T of the run's stage")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, ALL])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3, help="a turn; the first is not counted")
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    here = record.machine()
    results: dict = {**here, "commit": commit(), "torch": torch.__version__}
    results |= {"calls": options.calls, "cases": []}
    only = tuple(options.only.split(",")) if options.only else ()
    cases = [None] if options.run else [percent / 100 for percent in options.densities]
    wins: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for density in cases:
        what, draw = f"{options.run} T = {options.stage}", noise
        if density is None:
            ann, snn, draw = trained(options.run, options.stage)
        else:
            ann, snn = at_density(options.model, density, options.pool)
            what = f"{options.model}, {options.pool} pool, density {density:.0%}"
        with tempfile.TemporaryDirectory() as folder:
            for threads in dict.fromkeys(options.threads):
                torch.set_num_threads(threads)
                for batch in options.batches:
                    made, nets, missing = contenders(ann, snn, batch, threads, Path(folder), only)
                    found = measure(made, nets, batch, draw, options.rounds, options.calls)
                    print(f"\n{what}, batch {batch}, {threads} threads, {here['capability']}")
                    show(found)
                    for name, why in missing.items():
                        print(f"  {name:<26} not measured: {why}")
                    ratios = against_dense(found)
                    if density is not None and "fp32" in ratios:
                        wins.setdefault((batch, threads), []).append((density, ratios["fp32"]))
                    results["cases"].append(
                        {"network": what, "density": density, "batch": batch, "threads": threads,
                         **here, "results": found}
                    )  # fmt: skip
    for (batch, threads), points in wins.items():
        if len(points) > 1:
            print(f"\nbatch {batch}, {threads} threads, fp32: {crossing(points)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def sweep():
    """(density, batch, threads): the telling density with one thread and all, others with one."""
    for density in DENSITIES:
        for batch in (1, 16):
            for threads in sorted({1, ALL}) if density == 0.15 else (1,):
                telling = density == 0.15 and threads == 1
                marks = [pytest.mark.telling] if telling else []
                name = f"{density:.2f}-batch{batch}-{threads}threads"
                yield pytest.param(density, batch, threads, marks=marks, id=name)


@pytest.mark.parametrize(("density", "batch", "threads"), list(sweep()))
def test_vgg16(benchmark, request, keep_group, say, full, tmp_path, density, batch, threads):
    """VGG16, T = 1, average pool; every contender at 15 % spikes, the strongest at others."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        ann, snn = at_density("vgg16", density, "average")
        only = () if full and density == 0.15 else STRONGEST
        made, nets, missing = contenders(ann, snn, batch, threads, tmp_path, only)
        rounds, calls = (15, 3) if batch == 1 else (7, 2)
        arguments = (made, nets, batch, noise, rounds, calls)
        found = benchmark.pedantic(measure, arguments, rounds=1)
    finally:
        torch.set_num_threads(ALL)
    show(found, say)
    facts = {"subject": "event", "network": "vgg16", "timesteps": 1, "batch": batch}
    facts |= {"density": density, "threads": threads, "not_measured": missing}
    facts["times_faster"] = against_dense(found)
    keep_group(facts, found)


if __name__ == "__main__":
    main()
