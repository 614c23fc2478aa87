"""Tests, then times, every GPU kernel on this machine: `make gpu-check`, after the build.

Writes benchmarks/results/gpu-<name>.json. Exits 1 with one line where there is no CUDA device, and
when a test fails: a time of a kernel that is wrong is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_gpu

import iirsnn
from iirsnn.measure.provenance import commit
from iirsnn.ops.environment import installed

ROOT = Path(__file__).resolve().parent.parent


def driver() -> str:
    """The driver's version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def facts() -> dict[str, Any]:
    """The device, the driver, the versions and the commit that a result belongs to."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "device_memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "iirsnn", "spikingjelly")},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def goal(row: dict[str, Any]) -> float | None:
    """The largest ratio that this row should have, where there is a goal for it."""
    if row["implementation"] in ("cuda", "triton"):
        return {"forward": 1.05, "backward": 1.10}.get(row["what"])
    return 1.0 if row["implementation"].endswith("packed") and row["timesteps"] == 1 else None


def print_row(row: dict[str, Any]) -> None:
    most = goal(row)
    verdict = ""
    if most is not None:
        verdict = f"  (goal {most}: {'reached' if row['ratio'] <= most else 'MISSED'})"
    print(
        f"T={row['timesteps']} {row['dtype']:<8} {row['what']:<8} {row['implementation']:<13} "
        f"{row['ms']['p50']:8.3f} ms  {row['bytes_per_second'] / 1e9:7.0f} GB/s  "
        f"{row['ratio']:5.2f} x {row['ratio_to']}{verdict}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", help="of the result file (default: the device's)")
    parser.add_argument("--elements", type=int, default=bench_gpu.ELEMENTS, help="of x")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu-check: no CUDA device found on this machine, nothing was checked", file=sys.stderr
        )
        return 1
    print(iirsnn.env_report(), flush=True)
    # TRITON_INTERPRET would run the kernels on the CPU.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    if subprocess.run(tests, cwd=ROOT, env=environment).returncode != 0:
        print("gpu-check: tests failed, nothing was timed", file=sys.stderr)
        return 1
    _, missing = bench_gpu.implementations()
    for name, reason in missing.items():
        print(f"not timed: {name}: {reason}")
    rows = []
    for timesteps in bench_gpu.TIMESTEPS:
        for dtype in bench_gpu.DTYPES:
            for row in bench_gpu.measure(timesteps, dtype, arguments.elements):
                rows.append(row)
                print_row(row)
    name = arguments.name or re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower())
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**facts(), "tests": "passed", "not_timed": missing, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
