"""One measurement in a process of its own: resident memory of a step, cache misses of a neuron.

python benchmarks/one_process.py --help
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from typing import Any


def in_subprocess(*arguments: str) -> dict[str, Any]:
    """`python one_process.py ARGUMENTS` in a process of its own -> the JSON it prints."""
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


# ---- Last-level-cache misses ----

EVENT = "LLC-load-misses"


def perf_count(output: str) -> int | str:
    """The count in `perf stat -x,` output, or why there is none."""
    for row in csv.reader(output.splitlines()):
        if len(row) > 2 and row[2].startswith(EVENT):
            return int(row[0]) if row[0].isdigit() else f"perf: {EVENT} {row[0].strip('<>')}"
    return f"perf: no line for {EVENT} in its output"


def cache_misses(contender: str, timesteps: int, elements: int) -> float | str:
    """LLC load misses of one forward and backward of a neuron, or why they cannot be counted.

    The difference between processes that make many and few calls.
    """
    if shutil.which("perf") is None:
        return "perf is not installed"
    counts = []
    for calls in (2, 22):
        work = ["calls", contender, str(timesteps), str(elements), str(calls)]
        run = subprocess.run(
            ["perf", "stat", "-x,", "-e", EVENT, sys.executable, __file__, *work],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        count = perf_count(run.stderr)
        if isinstance(count, str):
            return count
        counts.append(count)
    return (counts[1] - counts[0]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement in this process, as JSON.")
    parser.add_argument("what", choices=("step", "calls"))
    parser.add_argument("contender")
    parser.add_argument("numbers", nargs="*", help="network T batch density, or T elements calls")
    options = parser.parse_args()
    if options.what == "step":
        import networks
        import traffic

        name, timesteps, batch, density = options.numbers
        size = int(timesteps), int(batch), float(density)
        step = networks.training_step(name, options.contender, *size)
        print(json.dumps(traffic.peak_of(step)))
        return
    import contenders

    timesteps, elements, calls = map(int, options.numbers)
    call = contenders.both_passes(options.contender, timesteps, elements)
    for _ in range(calls):
        call()
    print(json.dumps({"calls": calls}))


if __name__ == "__main__":
    main()
