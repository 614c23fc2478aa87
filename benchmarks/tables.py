"""A results file as Markdown: a table for each subject, and goals beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from record import (
    CHOICES,
    PLACES,
    Group,
    chosen,
    contender_names,
    fastest_other,
    layout,
    origin,
    regret,
)

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


def table(results: dict[str, Any]) -> str:
    """The whole file as Markdown."""
    commits = sorted({group["commit"] for group in results["groups"].values()})
    lines = [
        f"# Benchmarks: {origin(results)}",
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
    tables = (_network_tables, _choice_tables, _event_tables, _batch_norm_table)
    tables += (_neighbour_table, _lif_tables)
    return "\n".join(lines + [line for make in tables for line in make(results)])


def _markdown(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


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
        for name in contender_names(groups):
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


def _network_tables(results: dict[str, Any]) -> list[str]:
    lines = []
    for subject, title in (("train_step", "Training step"), ("inference", "Inference")):
        for group in chosen(results, subject=subject):
            lines += [
                f"### {title}: {group['network']}, T = {group['timesteps']}, batch "
                f"{group['batch']}, {group['density']:.0%} spikes, {group['threads']} threads, "
                + results["capability"]
                + layout(group),
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
            for name in contender_names(groups)
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


def _neighbour_table(results: dict[str, Any]) -> list[str]:
    """Median, 95th percentile and largest time, as multiples of the first contender's median."""
    rows = []
    for group in chosen(results, subject="neighbour"):
        least = next(iter(group["contenders"].values()))["median_ms"]
        for name, row in group["contenders"].items():
            ratios = (_number(row[key] / least) for key in ("median_ms", "p95_ms", "most_ms"))
            rows.append([group["what"], name, _number(row["median_ms"]), *ratios])
    header = ["what", "threads", "median, ms", "ratio", "95th percentile", "largest"]
    title = f"### A busy process on the other core, {results['capability']}"
    return [title, "", *_markdown(header, rows)] if rows else []


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
        name += layout(group)
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
