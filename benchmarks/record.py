"""The results file: one JSON of groups, its table and plots, and the comparison of two of them.

    python benchmarks/record.py name                    this machine's committed results
    python benchmarks/record.py report FILE.json        FILE.md and FILE-*.png beside it
    python benchmarks/record.py check NEW.json ...       exit code 1 where iirsnn lost in each

A group is what was timed in turns: {"subject", "what", "timesteps", ..., "commit", "contenders":
{name: {"median_ms", "p20_ms", "p80_ms", "ratio", ...}}}. Its ratios are to the contender "limit".
Groups are written one by one, so a run that was cut short goes on where it was (--resume).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
BUILD = FOLDER.parent.parent / "build" / "bench"  # of runs that are not to be committed
LIMIT = "limit"
PLACES = {"in": "in cache", "out": "out of cache"}
#: Best dense / events at 15 % spikes, by capability, precision and batch.
GOALS_EVENT = {
    ("avx2", "fp32", 1): ">= 3.2",
    ("avx2", "fp32", 16): ">= 3.0",
    ("avx2", "bf16", 1): ">= 4",
    ("avx2", "int8", 1): ">= 3.2",
    ("avx2", "int8", 16): ">= 2.9",
    ("avx512", "fp32", 1): ">= 4.8",
    ("avx512", "fp32", 16): ">= 3.6",
    ("avx512", "bf16", 1): ">= 6",
    ("avx512", "int8", 1): ">= 2.5",
    ("avx512", "int8", 16): ">= 2",
}
LOSS = 0.25  # a ratio may be this much larger than the committed one
COLORS = {
    "iirsnn": "#c1121f",
    "iirsnn, learned threshold and leak": "#e5989b",
    "iirsnn, spike layers": "#7b2cbf",
    "iirsnn, spike layers, BatchNormLIF": "#ff006e",
    "limit, memory reused": "#555555",
    "reference": "#8d99ae",
    "torch.compile": "#003049",
    "torch.compile, whole network": "#3a86ff",
    "SpikingJelly": "#2a9d8f",
    "snnTorch": "#e9c46a",
    "Norse": "#9b5de5",
    "sinabs": "#f4a261",
    LIMIT: "#000000",
}

Group = dict[str, Any]


def machine() -> dict[str, str]:
    """What a time belongs to: machine (with threads), processor (with its model), capability."""
    from iirsnn.measure import provenance

    name = provenance.machine()
    return {"machine": name, "processor": processor(), "capability": capability()}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first processor's name, family and model: one name may stand for several."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    rows = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in lines)}
    name = rows.get("model name", platform.machine())
    parts = [f"{key.split()[-1]} {rows[key]}" for key in ("cpu family", "model") if key in rows]
    return f"{name} ({', '.join(parts)})" if parts else name


def capability() -> str:
    """The instruction set that the CPU kernels use; "none" where they are not compiled."""
    from iirsnn.ops.backend import why_not

    if why_not("cpu", "cpu") is not None:
        return "none"
    return importlib.import_module("iirsnn._C").build_info()["cpu_capability"]


def default_file(folder: Path = FOLDER) -> Path:
    """<machine>-<capability>.json in the folder, for the machine this runs on."""
    here = machine()
    name = f"{here['machine']} {here['capability']}".lower()
    return folder / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def load(path: Path) -> dict[str, Any]:
    """{"machine", "groups": {id: group}, ...}; empty where there is no file yet."""
    if not path.exists():
        return {"groups": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def store(path: Path, facts: dict[str, Any], key: str, group: Group) -> None:
    """Adds one group to the file, or replaces it; a kill leaves the old file or the new one."""
    groups = load(path)["groups"]
    groups[key] = group
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "groups": dict(sorted(groups.items()))}, indent=1) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def summary(times: dict[str, list[float]], limit: str = LIMIT) -> dict[str, dict[str, Any]]:
    """Seconds of each round -> median, p20 and p80 in ms, and the median's ratio to the limit."""
    found = {}
    for name, taken in times.items():
        cuts = (
            statistics.quantiles(taken, n=10, method="inclusive") if len(taken) > 1 else taken * 9
        )
        found[name] = {
            "median_ms": 1e3 * statistics.median(taken),
            "p20_ms": 1e3 * cuts[1],
            "p80_ms": 1e3 * cuts[7],
            "rounds": len(taken),
        }
    least = found[limit]["median_ms"]
    for row in found.values():
        row["ratio"] = row["median_ms"] / least
    return found


# ---- The regression guard ----


def compare(
    committed: dict[str, Any], measured: dict[str, Any], loss: float = LOSS
) -> tuple[list[str], list[str]]:
    """(what iirsnn lost, what could not be compared), a line each; times play no part.

    A contender of ours loses where its ratio to the limit of the same run grew by more than
    `loss`, for every group that was measured.
    """
    lost, unknown = [], []
    for key, group in measured["groups"].items():
        if LIMIT not in group["contenders"]:
            continue
        before = committed["groups"].get(key)
        if before is None:
            unknown.append(f"{key}: not in the committed results")
            continue
        ours = {name for name in group["contenders"] if name.startswith("iirsnn")}
        ours |= {name for name in before["contenders"] if name.startswith("iirsnn")}
        for name in sorted(ours):
            rows = [g["contenders"].get(name) for g in (before, group)]
            if rows[0] is None or rows[1] is None:
                side = "committed results" if rows[0] is None else "new run"
                unknown.append(f"{key}: {name} is not in the {side}")
            elif rows[1]["ratio"] > (1 + loss) * rows[0]["ratio"]:
                lost.append(
                    f"{key}: {name} takes {rows[1]['ratio']:.2f} x the limit, "
                    f"committed {rows[0]['ratio']:.2f}"
                )
    return lost, unknown


def least(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Runs as one: of each group and contender the row with the smallest ratio to the limit."""
    groups: dict[str, Group] = {}
    for run in runs:
        for key, group in run["groups"].items():
            contenders = groups.setdefault(key, {**group, "contenders": {}})["contenders"]
            for name, row in group["contenders"].items():
                contenders[name] = min(contenders.get(name, row), row, key=lambda r: r["ratio"])
    return {"groups": groups}


def check(committed: Path, *new: Path) -> int:
    measured = least(map(load, new))
    if not measured["groups"]:
        print(f"bench-check: {', '.join(map(str, new))} holds no group", file=sys.stderr)
        return 2
    lost, unknown = compare(load(committed), measured)
    for line in unknown:
        print(f"bench-check: not compared: {line}")
    for line in lost:
        print(f"bench-check: lost: {line}")
    compared = len(measured["groups"]) - len({line.split(":")[0] for line in unknown})
    print(f"bench-check: {compared} groups compared with {committed.name}, {len(lost)} losses")
    return 1 if lost or not compared else 0


# ---- The table ----


def _markdown(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _names(groups: Iterable[Group]) -> list[str]:
    seen: dict[str, None] = {}
    for group in groups:
        seen.update(dict.fromkeys(group["contenders"]))
    return list(seen)


def chosen(results: dict[str, Any], **wanted: Any) -> list[Group]:
    """Groups whose keys have these values, in order of T and then of density."""
    found = [
        group
        for group in results["groups"].values()
        if all(group.get(key) == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda g: (g["timesteps"], g.get("density") or 0))


def _lif_tables(results: dict[str, Any]) -> list[str]:
    lines = []
    lif = chosen(results, subject="lif")
    cases = {(g["what"], g["size"], g["dtype"], g["threads"]): None for g in lif}
    for what, size, dtype, threads in sorted(cases):
        groups = chosen(results, subject="lif", what=what, size=size, dtype=dtype, threads=threads)
        conditions = f"{dtype}, {threads} threads, {results['capability']}"
        mebibytes = groups[0]["elements"] * groups[0]["element_size"] / 2**20
        lines += [f"### LIF {what}, {PLACES[size]}, {conditions}", ""]
        lines += [
            f"x of about {mebibytes:.0f} MiB. Ratio to the limit's time (ns per neuron and "
            "timestep); bytes read and written per neuron and timestep, + kept for backward.",
            "",
        ]
        rows = []
        for name in _names(groups):
            row = [name]
            for group in groups:
                own = group["contenders"].get(name)
                if own is None:
                    row.append("")
                    continue
                nanoseconds = 1e6 * own["median_ms"] / group["elements"]
                text = f"{own['ratio']:.2f} ({nanoseconds:.2f})"
                if "bytes" in own:
                    text += f"; {own['bytes']:.1f} B"
                if "kept" in own:
                    text += f" + {own['kept']:.1f}"
                row.append(text)
            rows.append(row)
        lines += _markdown(["", *[f"T = {g['timesteps']}" for g in groups]], rows)
    return lines


def _layout(group: Group) -> str:
    return ", channels_last" if group.get("layout") == "channels_last" else ""


def _network_tables(results: dict[str, Any]) -> list[str]:
    lines = []
    for subject, title in (("train_step", "Training step"), ("inference", "Inference")):
        for group in chosen(results, subject=subject):
            lines += [
                f"### {title}: {group['network']}, T = {group['timesteps']}, batch "
                f"{group['batch']}, {group['density']:.0%} spikes, {group['threads']} threads, "
                + results["capability"]
                + _layout(group),
                "",
            ]
            rows = [
                [
                    name,
                    _number(own["median_ms"], 1),
                    _number(own["ratio"]),
                    _number(own.get("bytes"), 1),
                    _number(own.get("kept"), 1),
                    _number(own.get("difference"), 6),
                ]
                for name, own in group["contenders"].items()
            ]
            header = ["", "ms", "/ limit", "bytes moved", "bytes kept", "difference"]
            lines += _markdown(header, rows)
    memory = chosen(results, subject="memory")  # a group for each contender
    if memory:
        group = memory[0]
        lines += [
            f"### Resident memory of a training step: {group['network']}, T = "
            f"{group['timesteps']}, batch {group['batch']}",
            "",
        ]
        rows = [
            [name, _mebibytes(own["peak"]), _mebibytes(own["peak"] - own["before"])]
            for group in memory
            for name, own in group["contenders"].items()
        ]
        lines += _markdown(["", "peak, MiB", "above the start, MiB"], rows)
    return lines


def _event_tables(results: dict[str, Any]) -> list[str]:
    """Milliseconds over the density, a table for each batch and number of threads."""
    lines = []
    events = chosen(results, subject="event")
    for batch, threads in sorted({(g["batch"], g["threads"]) for g in events}):
        groups = [g for g in events if (g["batch"], g["threads"]) == (batch, threads)]
        lines += [
            f"### EventNetwork: {groups[0]['network']}, T = 1, batch {batch}, {threads} threads, "
            + results["capability"],
            "",
            "Milliseconds; below, the best dense network's time / that of events, of one precision "
            "(bf16 against fp32).",
            "",
        ]
        rows = [
            [
                name,
                *(_number(g["contenders"].get(name, {}).get("median_ms"), 3) for g in groups),
            ]
            for name in _names(groups)
        ]
        rows += [
            [f"best dense / events {name}", *(_number(g["times_faster"].get(name)) for g in groups)]
            for name in ("fp32", "bf16", "int8")
        ]
        lines += _markdown(["", *(f"{g['density']:.0%}" for g in groups)], rows)
    return lines


def _choice_tables(results: dict[str, Any]) -> list[str]:
    """What spike_layers=auto takes beside always and never."""
    lines = []
    choices = chosen(results, subject="choice")
    for what in dict.fromkeys(group["what"] for group in choices):
        groups = [group for group in choices if group["what"] == what]
        batch, threads = groups[0]["batch"], groups[0]["threads"]
        title = f"### spike_layers: {what}, batch {batch}, {threads} threads, "
        lines += [title + results["capability"], ""]
        rows = [
            [
                f"{group['density']:.0%}",
                *(_number(group["contenders"][name]["median_ms"]) for name in CHOICES),
                _number(regret(group)),
            ]
            for group in groups
        ]
        header = ["density", *(f"{name}, ms" for name in CHOICES), "auto / better of the others"]
        lines += _markdown(header, rows)
    return lines


CHOICES = ("auto", "always", "never")


def regret(group: Group) -> float:
    """Time of auto as a fraction of the better one's of always and never."""
    times = {name: group["contenders"][name]["median_ms"] for name in CHOICES}
    return times["auto"] / min(times["always"], times["never"])


def _batch_norm_table(results: dict[str, Any]) -> list[str]:
    groups = chosen(results, subject="batch_norm")
    rows = [
        [
            f"{g['timesteps']} x {g['batch']} x {g['channels']} x {g['size']} x {g['size']}",
            g["layout"],
            g["dtype"],
            *(_number(row["median_ms"]) for row in g["contenders"].values()),
            _number(g["contenders"]["BatchNormLIF"]["ratio"]),
        ]
        for g in groups
    ]
    header = ["T, B, C, H, W", "layout", "dtype", "two modules, ms", "BatchNormLIF, ms", "ratio"]
    title = f"### BatchNormLIF, {results['capability']}"
    return [title, "", *_markdown(header, rows)] if rows else []


def break_even(points: list[tuple[float, float]]) -> str:
    """From (density, time / the best other's time): where it stops being faster."""
    points = sorted(points)
    for (d0, r0), (d1, r1) in pairwise(points):
        if r0 <= 1 < r1:
            return f"faster up to a density of {d0 + (1 - r0) / (r1 - r0) * (d1 - d0):.0%}"
    if points[0][1] > 1:
        return f"slower at every density measured, from {points[0][0]:.0%}"
    return f"faster at every density measured, up to {points[-1][0]:.0%}"


def _worst(groups: list[Group]) -> tuple[float, int] | None:
    """The largest ratio of iirsnn to the limit, and its T."""
    found = [(g["contenders"]["iirsnn"]["ratio"], g["timesteps"]) for g in groups]
    return max(found, default=None)


def goals(results: dict[str, Any]) -> list[list[str]]:
    """Rows of [what, goal, measured] for every goal that the file has groups for."""
    rows = []
    threads = max((g["threads"] for g in chosen(results, subject="lif")), default=1)
    for dtype, sizes in (
        ("float32", {"out": (1.10, 1.20), "in": (1.3, 1.6)}),
        ("bfloat16", {"out": (1.3, 1.3), "in": (1.3, 1.3)}),
    ):
        for size, wanted in sizes.items():
            for what, goal in zip(("forward", "backward"), wanted, strict=True):
                case = {"what": what, "size": size, "dtype": dtype, "threads": threads}
                groups = chosen(results, subject="lif", **case)
                found = _worst([g for g in groups if g["timesteps"] <= 5])
                if found is not None:
                    limit = "clone" if what == "forward" else "add"
                    rows.append(
                        [
                            f"{what}, {dtype}, {PLACES[size]}, time / {limit}",
                            f"<= {goal:.2f}",
                            f"{found[0]:.2f} at worst (T = {found[1]})",
                        ]
                    )
    large = {"network": "vgg16", "batch": 64}
    for group in chosen(results, subject="train_step", sweep=False, **large):
        name = f"VGG16, T = {group['timesteps']}, batch 64, {group['density']:.0%} spikes"
        name += _layout(group)
        ours = {n: c for n, c in group["contenders"].items() if n.startswith("iirsnn")}
        best = min(ours, key=lambda n: ours[n]["median_ms"])
        other = fastest_other(group)
        rows.append(
            [
                f"{name}: step, {best} / fastest other",
                f"<= 1; <= {0.6 if results['capability'] == 'avx2' else 0.62} by events",
                f"{ours[best]['median_ms'] / other:.2f}",
            ]
        )
        if "SpikingJelly" not in group["contenders"]:
            continue
        kept = {n: c["kept"] / group["contenders"]["SpikingJelly"]["kept"] for n, c in ours.items()}
        least = min(kept, key=kept.__getitem__)
        rows.append(
            [f"{name}: kept for backward, {least} / SpikingJelly", "<= 0.4", f"{kept[least]:.2f}"]
        )
    choices = chosen(results, subject="choice")
    if choices:
        worst = max(choices, key=regret)
        found = f"{regret(worst):.2f} at worst ({worst['what']}, {worst['density']:.0%})"
        rows.append(["spike_layers=auto / better of always and never", "<= 1.03", found])
    rows += [
        [
            f"VGG16 by events, T = 1, batch {group['batch']}, {group['density']:.0%}, "
            f"{group['threads']} threads, {name}: best dense / events",
            GOALS_EVENT.get((results["capability"], name, group["batch"]), ""),
            f"{ratio:.2f}",
        ]
        for group in chosen(results, subject="event", density=0.15, threads=1)
        for name, ratio in group["times_faster"].items()
    ]
    peaks = {
        name: own["peak"]
        for group in chosen(results, subject="memory")
        for name, own in group["contenders"].items()
    }
    ours_peaks = {name: peak for name, peak in peaks.items() if name.startswith("iirsnn")}
    if ours_peaks and "SpikingJelly" in peaks:
        least = min(ours_peaks, key=ours_peaks.__getitem__)
        ratio = ours_peaks[least] / peaks["SpikingJelly"]
        rows.append(
            [
                f"VGG16, T = 5, batch 64: peak resident memory, {least} / SpikingJelly",
                "<= 0.6",
                f"{ratio:.2f}",
            ]
        )
    return rows


def _of(results: dict[str, Any]) -> str:
    """Machine, processor and capability, in words."""
    return f"{results['machine']}, {results['capability']} ({results['processor']})"


def table(results: dict[str, Any]) -> str:
    """The whole file as Markdown."""
    commits = sorted({group["commit"] for group in results["groups"].values()})
    lines = [
        f"# Benchmarks: {_of(results)}",
        "",
        f"`make bench` at commit {', '.join(commits)}; "
        + ", ".join(f"{key} {value}" for key, value in results["versions"].items())
        + ".",
        "",
        "Contenders of a table took turns in one process; medians. limit: forward x.clone(), "
        "backward torch.add(x, g), in a network these in place of the neurons. Bytes are per "
        "neuron and timestep, as ops ask for them (benchmarks/traffic.py).",
        "",
    ]
    if any(group.get("allocator") == "retain" for group in results["groups"].values()):
        lines += [
            "Freed memory stayed with the process (--allocator retain, as in `iirsnn train`), for "
            "every contender and for the limit: without that, results of 32 MiB and more pay for "
            "page faults with several times the time of the arithmetic.",
            "",
        ]
    for name, reason in results.get("missing", {}).items():
        lines.append(f"- {name} did not take part: {reason}")
    for name, note in results.get("notes", {}).items():
        lines.append(f"- {name}: {note}")
    misses = results.get("cache_misses")
    if misses is not None:
        lines.append(f"- Last-level-cache misses: {misses}")
    lines.append("")
    lines += ["### Goals", "", *_markdown(["", "goal", "measured"], goals(results))]
    tables = (_network_tables, _choice_tables, _event_tables, _batch_norm_table, _lif_tables)
    return "\n".join(lines + [line for make in tables for line in make(results)])


# ---- The plots ----


def _lines(axis: Any, groups: list[Group], value: Any, scale: str = "log") -> None:
    for name in _names(groups):
        points = [
            (g["timesteps"], value(g, g["contenders"][name]))
            for g in groups
            if name in g["contenders"]
        ]
        points = [(t, y) for t, y in points if y is not None]
        if points:
            style = {"linestyle": "--", "marker": ""} if name.startswith(LIMIT) else {"marker": "o"}
            width = 2.5 if name == "iirsnn" else 1.3
            axis.plot(
                *zip(*points, strict=True), label=name, color=COLORS.get(name), lw=width, **style
            )
    axis.set_xlabel("timesteps T")
    axis.set_xticks([g["timesteps"] for g in groups])
    axis.set_yscale(scale)
    axis.grid(alpha=0.3, which="both")


def _legend(figure: Any) -> None:
    """One for all axes, below them."""
    found = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=5, frameon=False)


def plot_lif(results: dict[str, Any], path: Path, size: str = "out") -> None:
    """Time, bytes and ratio to the limit over T; forward above backward."""
    from matplotlib.figure import Figure

    threads = max(g["threads"] for g in chosen(results, subject="lif"))
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, what in zip(axes, ("forward", "backward"), strict=True):
        groups = chosen(
            results, subject="lif", what=what, size=size, dtype="float32", threads=threads
        )
        _lines(row[0], groups, lambda g, own: 1e6 * own["median_ms"] / g["elements"])
        row[0].set_title(f"{what}: ns per neuron and timestep")
        _lines(row[1], groups, lambda g, own: own.get("bytes"))
        row[1].set_title(f"{what}: bytes per neuron and timestep")
        _lines(row[2], groups, lambda g, own: own["ratio"])
        limit = "x.clone()" if what == "forward" else "torch.add(x, g)"
        row[2].set_title(f"{what}: time / time of {limit}")
    _legend(figure)
    figure.suptitle(f"LIF, fp32, {PLACES[size]}; {_of(results)}")
    figure.savefig(path, dpi=110)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """A training step's time and what it keeps, over T, for each network and batch."""
    from matplotlib.figure import Figure

    steps = chosen(results, subject="train_step", sweep=False)
    cases = sorted({(g["network"], g["batch"], _layout(g)) for g in steps})
    figure = Figure(figsize=(4.4 * len(cases), 8), layout="constrained")
    axes = figure.subplots(2, len(cases), squeeze=False)
    for column, case in enumerate(cases):
        groups = [g for g in steps if (g["network"], g["batch"], _layout(g)) == case]
        _lines(axes[0][column], groups, lambda g, own: own["ratio"], "linear")
        axes[0][column].set_title(f"{case[0]}, batch {case[1]}{case[2]}: step / limit")
        _lines(axes[1][column], groups, lambda g, own: own.get("kept"), "linear")
        axes[1][column].set_title("bytes kept per neuron and timestep")
    _legend(figure)
    figure.suptitle(f"Training step, fp32; {_of(results)}")
    figure.savefig(path, dpi=110)


def fastest_other(group: Group) -> float:
    """ms of the fastest contender that is not of this package."""
    return min(
        own["median_ms"]
        for name, own in group["contenders"].items()
        if not name.startswith(("iirsnn", LIMIT))
    )


def plot_density(results: dict[str, Any], path: Path) -> None:
    """A step's time over the density of spikes, as a ratio to the fastest other library's."""
    from matplotlib.figure import Figure

    sweep = chosen(results, subject="train_step", sweep=True)
    cases = sorted({(g["network"], g["timesteps"], g["batch"]) for g in sweep})
    figure = Figure(figsize=(5.5 * len(cases), 4.5), layout="constrained")
    for axis, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        groups = [g for g in sweep if (g["network"], g["timesteps"], g["batch"]) == case]
        for name in _names(groups):
            if name.startswith(LIMIT):
                continue
            points = [
                (g["density"], g["contenders"][name]["median_ms"] / fastest_other(g))
                for g in groups
                if name in g["contenders"]
            ]
            text = f"{name}: {break_even(points)}" if name.startswith("iirsnn") else name
            axis.plot(*zip(*points, strict=True), marker="o", label=text, color=COLORS.get(name))
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xlabel("density: spikes per neuron and timestep")
        axis.set_ylabel("time / fastest other contender")
        axis.set_title(f"{case[0]}, T = {case[1]}, batch {case[2]}{_layout(groups[0])}: a step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def report(path: Path) -> list[Path]:
    """Writes FILE.md and the plots that FILE.json has groups for."""
    results = load(path)
    markdown = path.with_suffix(".md")
    markdown.write_text(table(results), encoding="utf-8")
    written = [markdown]
    for suffix, plot, wanted in (
        ("lif", plot_lif, {"subject": "lif"}),
        ("train", plot_steps, {"subject": "train_step", "sweep": False}),
        ("density", plot_density, {"subject": "train_step", "sweep": True}),
    ):
        if chosen(results, **wanted):
            written.append(path.with_name(f"{path.stem}-{suffix}.png"))
            plot(results, written[-1])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables, plots and comparison of results.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("name", help="print this machine's committed results file")
    reporting = commands.add_parser("report", help="write FILE.md and plots")
    reporting.add_argument("file", type=Path, nargs="?", help="default: this machine's")
    checking = commands.add_parser("check", help="compare ratios; exit code 1 on a loss")
    checking.add_argument("file", type=Path, nargs="+", help="of new runs; the least ratio counts")
    checking.add_argument("--committed", type=Path, help="default: this machine's")
    options = parser.parse_args()
    if options.command == "name":
        print(default_file())
        return 0
    if options.command == "check":
        return check(options.committed or default_file(), *options.file)
    for written in report(options.file or default_file()):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
