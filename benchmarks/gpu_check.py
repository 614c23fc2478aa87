"""Tests, then times, every GPU kernel on this machine: `make gpu-check`, after the build.

Each case (gpu_cases.py) is a process of its own with a time limit, so that a kernel that breaks or
hangs costs its case alone. Results are written as they come to
benchmarks/results/gpu-<name>.json; a second call leaves out what this commit has already. At the
end: a table (.md) and two plots (.svg) beside it, and the five times that are furthest from what
docs/performance.md predicts. Needs nothing beside torch, triton, numpy, pytest and safetensors.

Exits 1 with one line where there is no CUDA device, and where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_cases import ROOT, Case, Row, cases

import iirsnn
from iirsnn.measure.provenance import commit
from iirsnn.versions import installed

#: Processes that import what they need while a case runs before them, on the device alone.
AHEAD = min(3, (os.cpu_count() or 1) - 1)
SCRIPT = Path(__file__).resolve().parent / "gpu_cases.py"
#: Share of an H100's issue slots (docs/performance.md) where there are too few: sums backward of
#: BatchNormLIF in 16 bits, T > 1, whose bytes are two fifths of those that backward moves.
SLOTS = {"contiguous": 1.18, "channels_last": 1.37}
OURS = ("cuda", "triton", "cuda, fixed", "triton, fixed", "cuda, fused", "triton, fused")


def facts(device: str) -> Row:
    """The device, the driver, the versions and the commit that a result belongs to."""
    names = ("torch", "triton", "iirsnn", "spikingjelly", "snntorch")
    found: Row = {
        "python": platform.python_version(),
        **{name: installed(name) for name in names},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device != "cuda":
        return {"device": "a rehearsal on the processor", **found}
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown: {error}"
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "device_memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        **found,
    }


def without_interpreter() -> dict[str, str]:
    """The environment; TRITON_INTERPRET would run the kernels on the CPU."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def start(case: Case, device: str) -> subprocess.Popen[str]:
    """The process of a case, which imports what it needs and then waits for a line of input."""
    command, pipe = [sys.executable, str(SCRIPT), json.dumps(asdict(case)), device], subprocess.PIPE
    return subprocess.Popen(
        command,
        **{"cwd": ROOT, "env": without_interpreter(), "text": True},
        **{"stdin": pipe, "stdout": pipe, "stderr": pipe},
    )


def run_case(process: subprocess.Popen[str], seconds: float) -> Row:
    """{"rows"} of a case that was started, or {"failed"}: why there are none."""
    begin = time.monotonic()
    try:
        output, errors = process.communicate("\n", seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"not done after {seconds:.0f} s"}
    took = round(time.monotonic() - begin, 1)
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        return {"failed": f"exit {process.returncode}: {last}", "seconds": took}
    return {"rows": json.loads(output.strip().splitlines()[-1]), "seconds": took}


def leave_compiled(chosen: list[Case], device: str, processes: int, seconds: float) -> float:
    """Run the cases once, in `processes` side by side, so that none compiles while it is timed.

    Ends after `seconds` in any case. Returns how many it took.
    """
    told = [asdict(case) for case in chosen if case.kind != "test"]
    begin = time.monotonic()
    parts = [part for number in range(processes) if (part := told[number::processes])]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(part), device],
            **{"cwd": ROOT, "env": without_interpreter()},
        )
        for part in parts
    ]
    for process in running:
        try:
            process.wait(max(seconds - (time.monotonic() - begin), 0))
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() != 0:
            print(f"gpu-check: exit {process.returncode} ahead: some cases compile when timed")
    spent = time.monotonic() - begin
    print(f"gpu-check: compiled ahead in {spent:.0f} s", flush=True)
    return spent


def write(path: Path, results: Row) -> None:
    """Whole or not at all: a machine may be gone at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def kept(path: Path, results: Row) -> Row:
    """The cases in a file of before that are of this commit and device, and lack no library that
    is installed now."""
    try:
        before = json.loads(path.read_text())
        if any(before[key] != results[key] for key in ("commit", "device")):
            return {}
        same = all(before.get(name) == results[name] for name in ("spikingjelly", "snntorch"))
        return {
            name: found
            for name, found in before["cases"].items()
            if same or not any("missing" in row for row in found.get("rows", []))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        sys.exit(f"gpu-check: {path}: expected results of a call before, or no file, got {why}")


def check(path: Path, device: str, chosen: list[Case], seconds: float) -> Row:
    """Run the cases that `path` does not have of this commit, while there is time."""
    results: Row = {**facts(device), "cases": {}}
    if path.is_file():
        results["cases"] = kept(path, results)
    left_out = [case for case in chosen if "rows" not in results["cases"].get(case.name, {})]
    end = time.monotonic() + seconds
    started: deque[subprocess.Popen[str]] = deque()
    for number, case in enumerate(left_out):
        left = end - time.monotonic()
        if left < 5:
            print(f"gpu-check: {len(left_out) - number} cases are left: call again for them")
            break
        print(f"[{number + 1}/{len(left_out)}] {case.name}: ", end="", flush=True)
        near = left_out[number : number + 1 + AHEAD]
        ahead = next((n for n, one in enumerate(near) if one.of_host), AHEAD)
        for following in left_out[number + len(started) : number + 1 + ahead]:
            started.append(start(following, device))
        found = run_case(started.popleft(), min(case.seconds, left))
        if "seconds" not in found and left < case.seconds:  # it is no failure to be out of time
            print(f"not done: {len(left_out) - number} cases are left: call again for them")
            break
        results["cases"][case.name] = found
        write(path, results)
        print(summary(found), flush=True)
    for process in started:
        process.kill()
        process.communicate()
    return results


def summary(found: Row) -> str:
    if "failed" in found:
        return f"FAILED: {found['failed']}"
    told = [
        f"{row['implementation']} {row['what']} {row['ratio']:.2f}"
        for row in found["rows"]
        if row.get("implementation") in OURS and row.get("cache") == "cold"
    ]
    told += [f"{row['implementation']} {row['us']:.1f} us" for row in found["rows"] if "us" in row]
    told += [f"{row['what']} {row['ms']:.2f} ms" for row in found["rows"] if "launches" in row]
    told += [row["result"] for row in found["rows"] if "result" in row]
    return ", ".join(told) or f"{len(found['rows'])} rows"


def broken(results: Row) -> list[str]:
    """Cases that failed, or whose tests did."""
    return [
        name
        for name, found in results["cases"].items()
        if "failed" in found or not all(row.get("passed", True) for row in found["rows"])
    ]


def rows_of(
    results: Row, kinds: tuple[str, ...] = ("lif", "bn_lif"), unit: str = "ms"
) -> list[Row]:
    """Rows with a time, each with the name of its case."""
    return [
        {**row, "case": name}
        for name, found in results["cases"].items()
        for row in found.get("rows", [])
        if row["kind"] in kinds and unit in row
    ]


def predicted(row: Row) -> float:
    """Time over that of the same bytes: memory decides, but for SLOTS."""
    narrow = row["dtype"] in ("bf16", "fp16") and row["timesteps"] > 1
    if row["kind"] == "bn_lif" and row["what"] == "backward" and narrow:
        return (2 * SLOTS[row["layout"]] + 3) / 5
    return 1.0


def deviations(results: Row, most: int = 5) -> list[str]:
    """Times of iirsnn's kernels, out of cache, that are furthest from the prediction."""
    found = [
        (row["ratio"] / predicted(row), row)
        for row in rows_of(results)
        if row["implementation"] in OURS and row["cache"] == "cold"
    ]
    found.sort(key=lambda pair: max(pair[0], 1 / pair[0]), reverse=True)
    return [
        f"{row['case']}, {row['what']}, {row['implementation']}: {row['ratio']:.2f} times the time "
        f"of the same bytes, {predicted(row):.2f} predicted"
        for _, row in found[:most]
    ]


def table(results: Row) -> str:
    """Markdown: what it was measured on, and every time."""
    head = [
        f"{key} {results[key]}"
        for key in ("device", "driver", "torch", "triton", "commit")
        if results.get(key)
    ]
    lines = [
        ", ".join(head),
        "",
        "| case | what | cache | implementation | ms | of the same bytes |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows_of(results, ("lif", "bn_lif", "compiled")):
        lines.append(
            f"| {row['case']} | {row['what']} | {row['cache']} | {row['implementation']} "
            f"| {row['ms']:.4f} | {row['ratio']:.2f} |"
        )
    lines += ["", "| call on 64 numbers | what | implementation | us | of torch.relu's |"]
    lines.append("|---|---|---|---|---|")
    for row in rows_of(results, ("call",), "us"):
        lines.append(
            f"| {row['case']} | {row['what']} | {row['implementation']} "
            f"| {row['us']:.1f} | {row['ratio']:.2f} |"
        )
    lines += ["", "| network | what | ms | of its bytes by clone | MiB at the peak | launches |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows_of(results, ("network",)):
        lines.append(
            f"| {row['case']} | {row['what']} | {row['ms']:.2f} "
            f"| {row['ms'] / row['memory_ms']:.2f} | {row['peak_bytes'] >> 20} "
            f"| {row['launches']} |"
        )
    without = dict.fromkeys(
        f"{word}: {row['implementation']} ({row['kind']}): {row[word]}"
        for found in results["cases"].values()
        for row in found.get("rows", [])
        for word in ("missing", "failed")
        if word in row
    )
    for line in without:
        lines += ["", line]
    for name in broken(results):
        found = results["cases"][name]
        why = found.get("failed") or found["rows"][0].get("result")
        lines += ["", f"FAILED: {name}: {why}"]
    return "\n".join(lines) + "\n"


def plot(results: Row, kind: str) -> str:
    """An SVG of bars: time over that of the same bytes, out of cache, for each case."""
    rows = [row for row in rows_of(results, (kind,)) if row["cache"] == "cold"]
    rows = [row for row in rows if row["implementation"] not in ("clone", "add")]
    wide, line, left = 900, 16, 470
    longest = max((min(row["ratio"], 8.0) for row in rows), default=1.0)
    scale = (wide - left - 60) / longest
    height = line * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{height}" fill="white"/>',
        f'<line x1="{left + scale}" x2="{left + scale}" y1="0" y2="{height}" stroke="#999"/>',
        f'<text x="{left + scale + 4}" y="{height - 6}">1: the same bytes by clone or add</text>',
    ]
    for number, row in enumerate(rows):
        y = line * (number + 1)
        color = "#c1121f" if row["implementation"] in OURS else "#8d99ae"
        label = f"{row['case']}, {row['what']}, {row['implementation']}"
        length = scale * min(row["ratio"], 8.0)
        parts += [
            f'<text x="{left - 6}" y="{y}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y - 9}" width="{length:.1f}" height="11" fill="{color}"/>',
            f'<text x="{left + length + 4:.1f}" y="{y}">{row["ratio"]:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(path: Path, results: Row) -> None:
    path.with_suffix(".md").write_text(table(results))
    for kind in ("lif", "bn_lif"):
        path.with_name(f"{path.stem}-{kind.replace('_', '-')}.svg").write_text(plot(results, kind))
    print(f"wrote {path.with_suffix('')}.json, .md, -lif.svg and -bn-lif.svg")
    for line in deviations(results):
        print(f"furthest from the prediction: {line}")
    for name in broken(results):
        print(f"FAILED: {name}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", help="of the result file (default: the device's)")
    parser.add_argument("--seconds", type=float, default=3600, help="after which to stop")
    processes = {"type": int, "default": 0, "choices": range(65), "metavar": "PROCESSES"}
    parser.add_argument("--ahead", help="compile for all cases first, in so many", **processes)
    parser.add_argument("--only", default="", help="a regular expression in the names of cases")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rehearse", action="store_true", help="on the processor, in small")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "gpu-check: no CUDA device found on this machine, nothing was checked", file=sys.stderr
        )
        return 1
    print(iirsnn.env_report(), flush=True)
    device = "cpu" if arguments.rehearse else "cuda"
    name = arguments.name or ("rehearsal" if arguments.rehearse else torch.cuda.get_device_name(0))
    name = re.sub(r"[^a-z0-9]+", "-", name.lower())
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"gpu-{name}.json"
    chosen = [case for case in cases() if re.search(arguments.only, case.name)]
    left = arguments.seconds
    if arguments.ahead:
        left -= leave_compiled(chosen, device, arguments.ahead, left)
    results = check(path, device, chosen, left)
    report(path, results)
    return 1 if broken(results) else 0


if __name__ == "__main__":
    sys.exit(main())
