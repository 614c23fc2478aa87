"""What the event engine really does to classify an image, beside the ANN: a table and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from .. import atomic_files
from ..conversion import fold_batch_norm
from ..measure.energy import (
    ADDITION_PJ,
    MULTIPLY_ACCUMULATE_PJ,
    LayerOperations,
    OperationCounter,
    microjoules,
)
from ..measure.evaluation import count_operations
from ..models import Network
from ..train.deployment import event_network
from ..train.pipeline import COUNTED_IMAGES, Pipeline
from . import plot_files
from .tables import Column, print_table, short


def measure(pipeline: Pipeline, timesteps: int, precision: str) -> dict[str, Any]:
    """What the engine did on test images, and what the ANN does: per image, layer by layer.

    Returns:
        {"timesteps": T, "precision": s, "images": n, "layers": [...], "total": {...}}; each layer
        and the total hold the counts of `LayerStatistics`, "energy_uj", "ann_multiplications",
        "ann_energy_uj". A residual block's shortcut counts with the layer whose current it joins.
    """
    images = pipeline.test_images(COUNTED_IMAGES).cpu()
    net = event_network(pipeline, timesteps, precision)
    sums: list[dict[str, Any]] = []
    for part in images.split(256):
        net(part)
        for index, layer in enumerate(net.statistics()):
            counted = asdict(layer)
            if len(sums) <= index:
                sums.append(counted)
            else:
                for key, value in counted.items():
                    if key not in ("name", "neurons"):
                        sums[index][key] += value
    ann, dense = pipeline.trained("ann"), None
    if isinstance(ann, Network):
        if not pipeline.recipe.neuron.keep_batch_norm:  # modules are numbered as the network's
            fold_batch_norm(ann)
        counter = count_operations(ann, images.to(pipeline.device))
        dense = beside([entry["name"] for entry in sums], counter)
    for entry in sums:
        for key, value in entry.items():
            if key not in ("name", "neurons"):
                entry[key] = value / len(images)
        entry["energy_uj"] = microjoules(entry["multiplications"], entry["additions"])
        if dense is None:  # the names are not the ANN's, but the products of its layers are
            entry["ann_multiplications"] = entry["dense_operations"]
            entry["ann_energy_uj"] = microjoules(entry["dense_operations"], 0)
            continue
        operations = dense.get(entry["name"], [])
        entry["ann_multiplications"] = sum(o.multiplications for o in operations) / len(images)
        entry["ann_energy_uj"] = sum(o.energy_uj for o in operations) / len(images)
    total = {key: sum(layer[key] for layer in sums) for key in sums[0] if key != "name"}
    return {
        "timesteps": timesteps,
        "precision": precision,
        "images": len(images),
        "layers": sums,
        "total": total,
    }


def beside(names: list[str], counter: OperationCounter) -> dict[str, list[LayerOperations]]:
    """What was counted in an ANN by the name of the engine's layer that does the same.

    A shortcut is that of the last layer of its residual block, which `names` has in order.
    """
    last = {name.partition(".main.")[0]: name for name in names}
    found: dict[str, list[LayerOperations]] = {}
    for name, operations in counter.layers.items():
        block, shortcut, _ = name.partition(".shortcut")
        found.setdefault(last[block] if shortcut else name, []).append(operations)
    return found


def write(report: dict[str, Any], path: Path) -> None:
    """Write energy.json and energy.png into a folder.

    Raises:
        RunError: it cannot be written.
    """
    atomic_files.write_text(path / "energy.json", json.dumps(report, indent=2) + "\n")
    plot_files.write(path, {"energy": ((8, 4.5), _plot)}, report)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table of what `measure` returned."""
    headers = ["spikes", "addi-\ntions", "prod-\nucts", "weight\nbytes", "spike\nbytes", "uJ"]
    headers += ["ANN pro-\nducts", "ANN\nuJ", "ANN\n/ this"]
    rows = []
    for row in [*report["layers"], {"name": "total", **report["total"]}]:
        ours, ann = row["energy_uj"], row["ann_energy_uj"]
        rows.append(
            [
                row["name"].removeprefix("layers."),
                short(row["spikes"]),
                short(row["additions"]),
                short(row["multiplications"]),
                short(row["weight_bytes"]),
                short(row["spike_bytes"]),
                f"{ours:.3f}",
                short(row["ann_multiplications"]),
                f"{ann:.3f}",
                f"{ann / ours:.1f}x" if ours and ann else "",
            ]
        )
    print_table(
        console,
        f"One image, T = {report['timesteps']}, {report['precision']} weights",
        [Column("layer", left=True), *map(Column, headers)],
        rows,
        total=True,
    )
    console.print(
        f"Means over {report['images']} test images. Additions the engine made: one for each event "
        "and output it reaches, and those that double and add up the digits of average-pooled "
        f"counts. {MULTIPLY_ACCUMULATE_PJ} pJ a multiply-accumulate, {ADDITION_PJ} pJ an addition "
        "(45 nm, 32-bit float); memory is not in it.",
        style="dim",
        highlight=False,
    )


def _plot(report: dict[str, Any], figure: Figure) -> None:
    layers = [layer for layer in report["layers"] if layer["ann_energy_uj"]]
    axes = figure.subplots()
    places = range(len(layers))
    for shift, key, label, colour in (
        (-0.2, "ann_energy_uj", "ANN, multiply-accumulates", "0.6"),
        (0.2, "energy_uj", f"events, T = {report['timesteps']}", "C2"),
    ):
        axes.bar(
            [place + shift for place in places],
            [layer[key] for layer in layers],
            0.4,
            label=label,
            color=colour,
        )
    axes.set_xticks(list(places), [layer["name"].removeprefix("layers.") for layer in layers])
    axes.set_xlabel("layer")
    axes.set_ylabel("energy per image (µJ)")
    axes.legend()
    total = report["total"]
    axes.set_title(f"{total['energy_uj']:.2f} µJ an image; ANN {total['ann_energy_uj']:.2f} µJ")
