"""The report of a run: report.json, tables on the console and in report.html, and its plots."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

from .. import atomic_files
from ..errors import RunError
from ..measure.energy import BYTE_PJ, with_memory
from ..measure.provenance import commit, machine
from ..train.data import Splits
from ..train.pipeline import Pipeline
from ..train.run_folder import RunFolder
from ..versions import installed
from . import engine_energy, html_page, plot_files, run_times
from .run_times import ENGINE, PYTORCH, fastest
from .tables import Column, print_table, short

#: Images of a forward pass that "milliseconds_per_image" is of.
TIMED_BATCH = 64
#: The plots of a run, as report.html shows them: file and what it says.
PICTURES = {
    "accuracy": "Test accuracy and modelled energy over T",
    "times": "Time an image: the ANN's best dense path beside the engine",
    "spike_rates": "Spikes by layer and over T",
    "raster": "Spikes of one test image",
    "membranes": "Membranes before reset, in thresholds",
    "thresholds": "Learned thresholds and leaks",
}


def build(folder: RunFolder, splits: Splits) -> dict[str, Any]:
    """The report of the stages finished so far; times each network, round robin, in this call.

    Returns:
        {"ann": {...}, "stages": [{...}, ...], "ann_energy_uj": f, "commit": s, "machine": s, ...};
        accuracies are fractions, energies microjoules an image, operations per image, spike rates
        spikes per neuron and image summed over the timesteps, in the order of the layers. "times"
        of an entry is what `run_times.measure` returns for it; "milliseconds_per_image" is
        PyTorch's at `TIMED_BATCH`. Where there is an engine, "bytes" of an entry are those moved
        for an image and "energy_with_memory_uj" is {"sram": f, "dram": f}, see `with_memory`.

    Raises:
        RunError: the ANN is not finished.
    """
    pipeline = Pipeline(folder, splits)
    names = [s.name for s in pipeline.stages if folder.result(s.name) is not None]
    if not names:
        raise RunError(f"run {folder.path}: no stage is finished yet")
    times, missing = run_times.measure(pipeline, names)
    ann, *stages = (
        {
            "name": name,
            **(folder.result(name) or {}),
            "milliseconds_per_image": times[name][str(TIMED_BATCH)][PYTORCH],
            "times": times[name],
        }
        for name in names
    )
    if not missing:
        _add_memory(pipeline, ann, stages)
    return {
        "recipe": folder.recipe.name,
        "ann": ann,
        "stages": stages,
        "ann_energy_uj": ann["energy_uj"],
        "timed_batch": TIMED_BATCH,
        "engine_missing": missing,
        "commit": commit(),
        "machine": machine(),
        "versions": {name: installed(name) for name in ("iirsnn", "torch", "torchvision", "numpy")},
    }


def _add_memory(pipeline: Pipeline, ann: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """The bytes that the engine moved for a stage, the dense layers of the ANN's, their energy."""
    ann["bytes"] = engine_energy.ann_operations(pipeline).dense_bytes
    with warnings.catch_warnings():  # that a dense network is faster: the table of times shows it
        warnings.simplefilter("ignore", RuntimeWarning)
        for entry in stages:
            layers = engine_energy.counted(pipeline, entry["timesteps"], "fp32")
            entry["bytes"] = sum(layer["bytes"] for layer in layers)
    for entry in (ann, *stages):
        entry["energy_with_memory_uj"] = with_memory(entry["energy_uj"], entry["bytes"])


def write(report: dict[str, Any], path: Path) -> None:
    """Write report.json, accuracy.png, spike_rates.png and times.png into a folder.

    Raises:
        RunError: the folder cannot be written.
    """
    atomic_files.write_text(path / "report.json", json.dumps(report, indent=2) + "\n")
    if report["stages"]:
        plots: dict[str, plot_files.Plot] = {
            "accuracy": ((6.4, 4), _plot_accuracy),
            "spike_rates": ((9.6, 4), _plot_rates),
            "times": ((9.6, 4), _plot_times),
        }
        plot_files.write(path, plots, report)


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write report.html into a folder: the tables, and the plots that are there, in one file.

    Raises:
        RunError: the folder cannot be written.
    """
    shown = tables(report) if report["stages"] else []
    page = html_page.render(
        title=f"{report['recipe']}: a run of iirsnn",
        tables=shown,
        notes=[*(notes(report) if shown else []), f"Trained and reported at {report['commit']}."],
        pictures={
            text: path / f"{name}.png"
            for name, text in PICTURES.items()
            if (path / f"{name}.png").is_file()
        },
    )
    atomic_files.write_text(path / "report.html", page)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    if not report["stages"]:
        ann = report["ann"]
        console.print(f"{report['recipe']}: ANN {ann['test_accuracy']:.2%} on the test set")
        return
    for title, columns, rows in tables(report):
        print_table(console, title, columns, rows)
    for note in notes(report):
        console.print(note, style="dim", highlight=False)


def tables(report: dict[str, Any]) -> list[tuple[str, list[Column], list[list[str]]]]:
    """(title, columns, rows) of each table: the stages, times, energy, spikes by layer."""
    stages = report["stages"]
    layers = zip(*(entry["spike_rates"] for entry in stages), strict=True)
    return [
        (
            f"{report['recipe']}: from the ANN to T = {stages[-1]['timesteps']}",
            [
                Column(""),
                Column("test\naccuracy", style="bold"),
                Column("not re-\ntrained"),
                Column("spikes/\nneuron"),
                Column("additions"),
                Column("multipli-\ncations"),
                Column("energy\nuJ"),
                Column("ANN\n/ this"),
            ],
            [_stage_row(report, entry) for entry in (report["ann"], *stages)],
        ),
        ("Milliseconds an image", *_times(report)),
        *([("Modelled energy of an image, uJ", *_energies(report))] if _has_memory(report) else []),
        (
            "Spikes per neuron and image",
            [Column("layer"), *(Column(f"T={entry['timesteps']}") for entry in stages)],
            [
                [str(number), *(f"{rate:.3f}" for rate in layer)]
                for number, layer in enumerate(layers, start=1)
            ],
        ),
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What the tables do not say: how each figure came about, and on which machine."""
    best = [
        f"{path} ({_batch(batch)})"
        for batch, (path, _) in ((b, fastest(report["ann"]["times"], b)) for b in _batches(report))
    ]
    missing = f" No engine: {report['engine_missing']}." if report["engine_missing"] else ""
    memory = (
        f" With memory: {BYTE_PJ['sram']} pJ (SRAM of 8 KB) or {BYTE_PJ['dram']:.0f} pJ (DRAM) for "
        "each byte that the engine moves, or the ANN's layers: a weight for each operation, spikes "
        "and values."
    )
    return [
        "All per image. Not retrained: the ANN converted to that T and left so. Energy is modelled:"
        " 4.6 pJ a multiply-accumulate, 0.9 pJ an addition (45 nm); each sub-spike of an "
        f"average-pooled value is an addition.{memory if _has_memory(report) else ''}",
        "Times: medians, round robin. ANN's best is the fastest of "
        f"{len(report['ann']['times'][_batches(report)[0]])} dense paths: {'; '.join(best)}. "
        "PyTorch runs a T as it was trained; the engine (iirsnn deploy, fp32 weights, on the CPU) "
        f"adds a row of weights for each spike.{missing} {report['machine']}.",
    ]


def _stage_row(report: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    spiking = "timesteps" in entry
    return [
        _label(entry),
        f"{entry['test_accuracy']:.2%}",
        f"{entry['converted_without_retraining_accuracy']:.2%}" if spiking else "",
        f"{mean_rate(entry):.3f}" if spiking else "",
        short(entry["additions"]),
        short(entry["multiplications"]),
        _brief(entry["energy_uj"], 2),
        f"{report['ann_energy_uj'] / entry['energy_uj']:.1f}x",
    ]


def _times(report: dict[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """The columns and rows of the times; the ANN has its best in the columns of both paths."""
    columns = [Column("")]
    rows = [["ANN's best"], *([_label(entry)] for entry in report["stages"])]
    for batch in _batches(report):
        where = _batch(batch)
        columns += [
            Column(f"{PYTORCH}\n{where}"),
            Column(f"{ENGINE}\n{where}", style="bold"),
            Column(f"ANN's best\n/ {ENGINE}"),
        ]
        _, best = fastest(report["ann"]["times"], batch)
        rows[0] += [_brief(best, 3), "", ""]
        for row, entry in zip(rows[1:], report["stages"], strict=True):
            own = entry["times"][batch]
            engine = own.get(ENGINE)
            row.append(_brief(own[PYTORCH], 3))
            row += ["", ""] if engine is None else [_brief(engine, 3), f"{best / engine:.1f}x"]
    return columns, rows


def _has_memory(report: dict[str, Any]) -> bool:
    return "energy_with_memory_uj" in report["ann"]


def _energies(report: dict[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """The columns and rows of modelled energy: operations alone, and with the bytes they take."""
    columns, rows = [Column("")], [[_label(entry)] for entry in (report["ann"], *report["stages"])]
    for place in (None, *BYTE_PJ):
        title = "operations" if place is None else f"and bytes\nin {place.upper()}"
        columns += [Column(title), Column("ANN\n/ this")]
        energies = [
            entry["energy_uj"] if place is None else entry["energy_with_memory_uj"][place]
            for entry in (report["ann"], *report["stages"])
        ]
        for row, energy in zip(rows, energies, strict=True):
            row += [_brief(energy, 2), f"{energies[0] / energy:.1f}x"]
    return columns, rows


def _batches(report: dict[str, Any]) -> list[str]:
    return list(report["ann"]["times"])


def _batch(images: str) -> str:
    return f"batch {images}"


def _label(entry: dict[str, Any]) -> str:
    return f"T={entry['timesteps']}" if "timesteps" in entry else "ANN"


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


def _plot_times(report: dict[str, Any], figure: Figure) -> None:
    """A panel for each batch: bars of the ANN's best and of each T by PyTorch and by the engine."""
    batches = _batches(report)
    for axes, batch in zip(figure.subplots(1, len(batches)), batches, strict=True):
        _, best = fastest(report["ann"]["times"], batch)
        axes.axhline(best, color="0.4", linestyle="--", label="ANN's best")
        places = range(len(report["stages"]))
        for shift, path, color in ((-0.2, PYTORCH, "C1"), (0.2, ENGINE, "C0")):
            bars = [
                (place + shift, entry["times"][batch][path])
                for place, entry in zip(places, report["stages"], strict=True)
                if path in entry["times"][batch]
            ]
            if bars:
                axes.bar(*zip(*bars, strict=True), 0.4, color=color, label=path)
        axes.set_xticks(list(places), [_label(entry) for entry in report["stages"]])
        axes.set_ylabel("milliseconds an image")
        axes.set_title(_batch(batch))
        axes.legend(fontsize="small")
    figure.suptitle(f"{report['recipe']}: time of an image")
