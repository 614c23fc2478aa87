"""Plots of a results file: LIF and training steps over T, training steps over density."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from record import LIMIT, PLACES, Group, chosen, contender_names, fastest_other, layout, origin

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


def _lines(axis: Any, groups: list[Group], value: Any, scale: str = "log") -> None:
    for name in contender_names(groups):
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
    figure.suptitle(f"LIF, fp32, {PLACES[size]}; {origin(results)}")
    figure.savefig(path, dpi=110)


def plot_steps(results: dict[str, Any], path: Path) -> None:
    """A training step's time and what it keeps, over T, for each network and batch."""
    from matplotlib.figure import Figure

    steps = chosen(results, subject="train_step", sweep=False)
    cases = sorted({(g["network"], g["batch"], layout(g)) for g in steps})
    figure = Figure(figsize=(4.4 * len(cases), 8), layout="constrained")
    axes = figure.subplots(2, len(cases), squeeze=False)
    for column, case in enumerate(cases):
        groups = [g for g in steps if (g["network"], g["batch"], layout(g)) == case]
        _lines(axes[0][column], groups, lambda g, own: own["ratio"], "linear")
        axes[0][column].set_title(f"{case[0]}, batch {case[1]}{case[2]}: step / limit")
        _lines(axes[1][column], groups, lambda g, own: own.get("kept"), "linear")
        axes[1][column].set_title("bytes kept per neuron and timestep")
    _legend(figure)
    figure.suptitle(f"Training step, fp32; {origin(results)}")
    figure.savefig(path, dpi=110)


def plot_density(results: dict[str, Any], path: Path) -> None:
    """A step's time over the density of spikes, as a ratio to the fastest other library's."""
    from matplotlib.figure import Figure

    sweep = chosen(results, subject="train_step", sweep=True)
    cases = sorted({(g["network"], g["timesteps"], g["batch"]) for g in sweep})
    figure = Figure(figsize=(5.5 * len(cases), 4.5), layout="constrained")
    for axis, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        groups = [g for g in sweep if (g["network"], g["timesteps"], g["batch"]) == case]
        for name in contender_names(groups):
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
        axis.set_title(f"{case[0]}, T = {case[1]}, batch {case[2]}{layout(groups[0])}: a step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def break_even(points: list[tuple[float, float]]) -> str:
    """From (density, time / the best other's time): where it stops being faster."""
    points = sorted(points)
    for (d0, r0), (d1, r1) in pairwise(points):
        if r0 <= 1 < r1:
            return f"faster up to a density of {d0 + (1 - r0) / (r1 - r0) * (d1 - d0):.0%}"
    if points[0][1] > 1:
        return f"slower at every density measured, from {points[0][0]:.0%}"
    return f"faster at every density measured, up to {points[-1][0]:.0%}"
