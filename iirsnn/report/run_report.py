"""The report of a run: report.json, a console table and plots of accuracy and spike rates."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

from .. import atomic_files
from ..errors import RunError
from ..measure.evaluation import latencies
from ..measure.provenance import commit, machine
from ..train.data import Splits
from ..train.pipeline import Pipeline
from ..train.run_folder import RunFolder
from . import plot_files
from .tables import Column, print_table, short

#: Images of one timed forward pass.
TIMED_BATCH = 64


def build(folder: RunFolder, splits: Splits) -> dict[str, Any]:
    """The report of the stages finished so far; times each network, round robin, in this call.

    Returns:
        {"ann": {...}, "stages": [{...}, ...], "ann_energy_uj": f, "commit": s, "machine": s, ...};
        accuracies are fractions, energies microjoules an image, operations per image, spike rates
        spikes per neuron and image summed over the timesteps, in the order of the layers.

    Raises:
        RunError: the ANN is not finished.
    """
    pipeline = Pipeline(folder, splits)
    finished = [s for s in pipeline.stages if folder.result(s.name) is not None]
    if not finished:
        raise RunError(f"run {folder.path}: no stage is finished yet")
    networks = [pipeline.trained(stage.name) for stage in finished]
    times = latencies(networks, pipeline.test_images(TIMED_BATCH))
    entries = []
    for stage, milliseconds in zip(finished, times, strict=True):
        entry = {"name": stage.name, **(folder.result(stage.name) or {})}
        entry["milliseconds_per_image"] = milliseconds
        entries.append(entry)
    ann, *stages = entries
    return {
        "recipe": folder.recipe.name,
        "ann": ann,
        "stages": stages,
        "ann_energy_uj": ann["energy_uj"],
        "timed_batch": TIMED_BATCH,
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("iirsnn", "torch", "torchvision", "numpy")},
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write report.json, accuracy.png and spike_rates.png into a folder.

    Raises:
        RunError: the folder cannot be written.
    """
    atomic_files.write_text(path / "report.json", json.dumps(report, indent=2) + "\n")
    if report["stages"]:
        plots = {"accuracy": ((6.4, 4), _plot_accuracy), "spike_rates": ((9.6, 4), _plot_rates)}
        plot_files.write(path, plots, report)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table of a report."""
    ann, stages = report["ann"], report["stages"]
    if not stages:
        console.print(f"{report['recipe']}: ANN {ann['test_accuracy']:.2%} on the test set")
        return
    title = f"{report['recipe']}: from the ANN to T = {stages[-1]['timesteps']}"
    columns = [
        Column(""),
        Column("test\naccuracy", style="bold"),
        Column("not re-\ntrained"),
        Column("spikes/\nneuron"),
        Column("additions"),
        Column("multipli-\ncations"),
        Column("energy\nuJ"),
        Column("ANN\n/ this"),
        Column("ms"),
    ]
    rows = []
    for entry in (ann, *stages):
        spiking = "timesteps" in entry
        rows.append(
            [
                f"T={entry['timesteps']}" if spiking else "ANN",
                f"{entry['test_accuracy']:.2%}",
                f"{entry['converted_without_retraining_accuracy']:.2%}" if spiking else "",
                f"{mean_rate(entry):.3f}" if spiking else "",
                short(entry["additions"]),
                short(entry["multiplications"]),
                _brief(entry["energy_uj"], 2),
                f"{report['ann_energy_uj'] / entry['energy_uj']:.1f}x",
                _brief(entry["milliseconds_per_image"], 3),
            ]
        )
    print_table(console, title, columns, rows)
    layers = zip(*(entry["spike_rates"] for entry in stages), strict=True)
    print_table(
        console,
        "Spikes per neuron and image",
        [Column("layer"), *(Column(f"T={entry['timesteps']}") for entry in stages)],
        [
            [str(number), *(f"{rate:.3f}" for rate in layer)]
            for number, layer in enumerate(layers, start=1)
        ],
    )
    console.print(
        "All per image. Not retrained: the ANN converted to that T and left so. Energy: 4.6 pJ a "
        "multiply-accumulate, 0.9 pJ an addition (45 nm); each sub-spike of an average-pooled "
        f"value is an addition. Times: batches of {report['timed_batch']}, medians, round robin, "
        f"{report['machine']}.",
        style="dim",
        highlight=False,
    )


def mean_rate(entry: dict[str, Any]) -> float:
    """Mean over the layers of a stage's spikes per neuron and image."""
    return sum(entry["spike_rates"]) / len(entry["spike_rates"])


def _brief(value: float, decimals: int) -> str:
    return f"{value:.{0 if value >= 100 else decimals}f}"


def _plot_accuracy(report: dict[str, Any], figure: Figure) -> None:
    axes = figure.subplots()
    stages = report["stages"]
    timesteps = [entry["timesteps"] for entry in stages]
    axes.axhline(
        100 * report["ann"]["test_accuracy"], color="0.4", linestyle="--", label="ANN (ReLU)"
    )
    axes.plot(
        timesteps,
        [100 * entry["test_accuracy"] for entry in stages],
        "o-",
        color="C0",
        label="IIR: each stage from the one before",
    )
    axes.plot(
        timesteps,
        [100 * entry["converted_without_retraining_accuracy"] for entry in stages],
        "s:",
        color="C1",
        label="converted, not retrained",
    )
    axes.set_xlabel("timesteps T")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xticks(timesteps)
    axes.invert_xaxis()
    energy = axes.twinx()
    energy.plot(
        timesteps,
        [entry["energy_uj"] for entry in stages],
        "^-",
        color="C2",
        label=f"energy (ANN: {report['ann_energy_uj']:.1f} µJ)",
    )
    energy.set_ylabel("energy per image (µJ)")
    energy.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *energy.get_lines()]
    axes.legend(
        lines, [str(line.get_label()) for line in lines], loc="lower left", fontsize="small"
    )
    axes.set_title(f"{report['recipe']}: accuracy and energy over T")


def _plot_rates(report: dict[str, Any], figure: Figure) -> None:
    """By layer, all timesteps together; and over T, a timestep's mean, a line for each layer."""
    by_layer, over_time = figure.subplots(1, 2)
    stages = report["stages"]
    for entry in stages:
        layers = range(1, 1 + len(entry["spike_rates"]))
        by_layer.plot(layers, entry["spike_rates"], "o-", label=f"T = {entry['timesteps']}")
        by_layer.set_xticks(layers)
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel("spikes per neuron and image, all timesteps")
    timesteps = [entry["timesteps"] for entry in stages]
    rates = [[rate / entry["timesteps"] for rate in entry["spike_rates"]] for entry in stages]
    for index, layer in enumerate(zip(*rates, strict=True)):
        color = colormaps["viridis"](index / max(len(rates[0]) - 1, 1))
        over_time.plot(timesteps, layer, "o-", color=color, label=f"layer {index + 1}")
    over_time.set_xlabel("timesteps T")
    over_time.set_ylabel("spikes per neuron and timestep")
    over_time.set_xticks(timesteps)
    over_time.invert_xaxis()
    for axes in (by_layer, over_time):
        axes.set_ylim(bottom=0)
    by_layer.legend(fontsize="small")
    over_time.legend(fontsize="small", ncols=3, loc="lower left")
    figure.suptitle(f"{report['recipe']}: spike rates by layer and over T")
