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
    BYTE_PJ,
    MULTIPLY_ACCUMULATE_PJ,
    LayerOperations,
    OperationCounter,
    microjoules,
    with_memory,
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
        and the total hold what `counted` returns, "energy_uj", "ann_multiplications" and
        "ann_energy_uj". A residual block's shortcut counts with the layer whose current it joins.
        The total holds "ann_bytes" too, and "energy_with_memory_uj" and
        "ann_energy_with_memory_uj" as `measure.energy.with_memory` returns them.
    """
    layers = counted(pipeline, timesteps, precision)
    operations = ann_operations(pipeline)
    dense = None
    if isinstance(operations.model, Network):
        dense = beside([layer["name"] for layer in layers], operations)
    for layer in layers:
        layer["energy_uj"] = microjoules(layer["multiplications"], layer["additions"])
        if dense is None:  # the names are not the ANN's, but the products of its layers are
            layer["ann_multiplications"] = layer["dense_operations"]
            layer["ann_energy_uj"] = microjoules(layer["dense_operations"], 0)
            continue
        same = dense.get(layer["name"], [])
        layer["ann_multiplications"] = sum(each.multiplications for each in same)
        layer["ann_energy_uj"] = sum(each.energy_uj for each in same)
    total: dict[str, Any] = {
        key: sum(layer[key] for layer in layers) for key in layers[0] if key != "name"
    }
    total["ann_bytes"] = operations.dense_bytes
    for whose in ("", "ann_"):
        energy, moved = total[f"{whose}energy_uj"], total[f"{whose}bytes"]
        total[f"{whose}energy_with_memory_uj"] = with_memory(energy, moved)
    return {
        "timesteps": timesteps,
        "precision": precision,
        "images": len(pipeline.test_images(COUNTED_IMAGES)),
        "layers": layers,
        "total": total,
    }


def counted(pipeline: Pipeline, timesteps: int, precision: str) -> list[dict[str, Any]]:
    """What the engine did in each layer: the counts of `LayerStatistics` per test image, and bytes.

    "bytes" are those of weights, spikes and real values together; the first layer's hold the image.

    Raises:
        UsageError: see `event_network`.
    """
    images = pipeline.test_images(COUNTED_IMAGES).cpu()
    net = event_network(pipeline, timesteps, precision)
    layers: list[dict[str, Any]] = []
    for part in images.split(256):
        net(part)
        for index, statistics in enumerate(net.statistics()):
            found = asdict(statistics)
            if len(layers) <= index:
                layers.append(found)
                continue
            for key in found.keys() - {"name", "neurons"}:
                layers[index][key] += found[key]
    for layer in layers:
        for key in layer.keys() - {"name", "neurons"}:
            layer[key] /= len(images)
        layer["bytes"] = layer["weight_bytes"] + layer["spike_bytes"] + layer["value_bytes"]
    layers[0]["bytes"] += 4 * images[0].numel()
    return layers


def ann_operations(pipeline: Pipeline) -> OperationCounter:
    """What the trained ANN does for an image, whichever it is."""
    ann = pipeline.trained("ann")
    if isinstance(ann, Network) and not pipeline.recipe.neuron.keep_batch_norm:
        fold_batch_norm(ann)  # so that modules are numbered as the spiking network's
    return count_operations(ann, pipeline.test_images(1))


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
    headers = ["spikes", "addi-\ntions", "prod-\nucts", "weight\nbytes", "spike\nbytes", "bytes"]
    headers += ["uJ", "ANN pro-\nducts", "ANN\nuJ", "ANN\n/ this"]
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
                short(row["bytes"]),
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
    total = report["total"]
    energies = {"operations": (total["energy_uj"], total["ann_energy_uj"])}
    for place, ours in total["energy_with_memory_uj"].items():
        energies[f"and bytes in {place.upper()}"] = (
            ours,
            total["ann_energy_with_memory_uj"][place],
        )
    print_table(
        console,
        "Modelled energy of one image, uJ",
        [Column("", left=True), Column("events"), Column("ANN"), Column("ANN\n/ events")],
        [
            [name, f"{ours:.2f}", f"{ann:.2f}", f"{ann / ours:.1f}x"]
            for name, (ours, ann) in energies.items()
        ],
    )
    console.print(
        f"Means over {report['images']} test images. Additions the engine made: one for each event "
        "and output it reaches, and those that double and add up the digits of average-pooled "
        f"counts. Energy is modelled: {MULTIPLY_ACCUMULATE_PJ} pJ a multiply-accumulate, "
        f"{ADDITION_PJ} pJ an addition (45 nm, 32-bit float); with memory, {BYTE_PJ['sram']} pJ "
        f"(SRAM of 8 KB) or {BYTE_PJ['dram']:.0f} pJ (DRAM) for each byte.",
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
