"""iirsnn deploy | predict | energy: a trained run as an event-driven network, used and counted."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from .. import atomic_files
from ..conversion import fold_batch_norm
from ..errors import RunError, UsageError
from ..event import EventNetwork
from ..measure.energy import (
    ADDITION_PJ,
    MULTIPLY_ACCUMULATE_PJ,
    LayerOperations,
    OperationCounter,
    microjoules,
)
from ..measure.evaluation import count_operations, evaluating
from ..report import plot_files
from ..train.data import ImageFiles, ImageSet, MemoryImages
from ..train.pipeline import COUNTED_IMAGES, Pipeline, open_data
from ..train.run_folder import RunFolder

#: Images that a deployed network is compared with PyTorch's on.
COMPARED_IMAGES = 256

console = Console()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def register(app: typer.Typer) -> None:
    """Add the three commands to the command line."""
    for command in (deploy, predict, energy):
        app.command()(command)


def deploy(
    run: Run,
    stage: Annotated[int, typer.Option(metavar="T", help="The stage, by its timesteps.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="File of the network.")
    ] = Path("net.iirsnn"),
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or int8.")] = "fp32",
) -> None:
    """Write a trained stage as an event-driven network that stands alone."""
    pipeline = _open(run)
    net = _event_network(pipeline, stage, precision)
    images = pipeline.calibration_images(COMPARED_IMAGES)
    model = pipeline.trained(f"T{stage}")
    with evaluating(model):
        same = int((net(images).argmax(1) == model(images).cpu().argmax(1)).sum())
    net.notes.update(
        recipe=pipeline.recipe.name,
        class_names=pipeline.splits.class_names,
        images=_preparation(pipeline.splits.test),
    )
    net.save(out)
    console.print(
        f"Written: {out} ({out.stat().st_size / 1e6:.1f} MB, {precision}, T = {stage}); "
        f"predicts as the PyTorch model on {same} of {len(images)} training images",
        highlight=False,
        soft_wrap=True,
    )


def predict(
    net: Annotated[Path, typer.Argument(metavar="NET", help="File that deploy wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
) -> None:
    """The class of each image, and how long it took."""
    network = EventNetwork.load(net)
    names = network.notes.get("class_names")
    batch = [_read(path, network) for path in images]
    network(batch[0])  # touches the weights once
    table = Table("image", "class", "probability", "ms", box=box.SIMPLE)
    for path, image in zip(images, batch, strict=True):
        start = time.perf_counter()
        logits = network(image)
        milliseconds = 1e3 * (time.perf_counter() - start)
        index = int(logits.argmax())
        name = names[index] if names else str(index)
        table.add_row(
            str(path), name, f"{float(logits.softmax(1).max()):.1%}", f"{milliseconds:.3f}"
        )
    console.print(table)


def energy(
    run: Run,
    stage: Annotated[
        int | None, typer.Option(metavar="T", help="The stage  [default: the last one finished]")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or int8.")] = "fp32",
) -> None:
    """What the engine really does to classify an image, beside the ANN; energy.json, energy.png."""
    pipeline = _open(run)
    report = measure(pipeline, _finished(pipeline)[-1] if stage is None else stage, precision)
    atomic_files.write_text(run / "energy.json", json.dumps(report, indent=2) + "\n")
    plot_files.write(run, {"energy": ((8, 4.5), _plot)}, report)
    _show(report)
    console.print(f"Written: {run}/energy.json and energy.png", highlight=False, soft_wrap=True)


def measure(pipeline: Pipeline, timesteps: int, precision: str) -> dict[str, Any]:
    """What the engine did on test images, and what the ANN does: per image, layer by layer.

    Returns:
        {"timesteps": T, "precision": s, "images": n, "layers": [...], "total": {...}}; each layer
        and the total hold the counts of `LayerStatistics`, "energy_uj", "ann_multiplications",
        "ann_energy_uj". A residual block's shortcut counts with the layer whose current it joins.
    """
    images = pipeline.test_images(COUNTED_IMAGES).cpu()
    net = _event_network(pipeline, timesteps, precision)
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
    ann = pipeline.trained("ann")
    if not pipeline.recipe.neuron.keep_batch_norm:  # modules are numbered as the network's
        fold_batch_norm(ann)
    counter = count_operations(ann, images.to(pipeline.accelerator.device))
    dense = beside([entry["name"] for entry in sums], counter)
    for entry in sums:
        for key, value in entry.items():
            if key not in ("name", "neurons"):
                entry[key] = value / len(images)
        entry["energy_uj"] = microjoules(entry["multiplications"], entry["additions"])
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


def _open(run: Path) -> Pipeline:
    folder = RunFolder.read(run)
    return Pipeline(folder, open_data(folder.recipe))


def _event_network(pipeline: Pipeline, timesteps: int, precision: str) -> EventNetwork:
    finished = _finished(pipeline)
    if timesteps not in finished:
        raise UsageError(
            f"stage: expected one of {', '.join(map(str, finished))} timesteps, got {timesteps}"
        )
    return EventNetwork.from_model(
        pipeline.trained(f"T{timesteps}"), timesteps, precision=precision
    )


def _finished(pipeline: Pipeline) -> list[int]:
    """T of the spiking stages that are finished, in order."""
    folder = pipeline.folder
    found = [s.timesteps for s in pipeline.stages if s.timesteps and folder.result(s.name)]
    if not found:
        raise RunError(f"run {folder.path}: no spiking stage is finished yet")
    return found


def _preparation(images: ImageSet) -> dict[str, Any]:
    """How an image file becomes what the network was trained on."""
    if isinstance(images, MemoryImages):
        mean, std = images.normalise.mean, images.normalise.std
        return {"mean": list(mean), "std": list(std)}
    if isinstance(images, ImageFiles):
        return {"mean": list(images.mean), "std": list(images.std), "resize": 256}
    raise UsageError(f"data: expected images with a normalisation, got {type(images).__name__}")


def _read(path: Path, network: EventNetwork) -> Tensor:
    """An image file as [1, C, H, W]."""
    assert network.image_shape is not None
    channels, height, width = network.image_shape
    wanted = network.notes.get("images")
    if wanted is None:
        raise UsageError("net: says nothing about its images; expected a file that deploy wrote")
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise RunError(f"image {path}: no such file") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
        raise RunError(f"image {path}: cannot be read ({error})") from error
    pixels = transforms.pil_to_tensor(image)
    if "resize" in wanted:
        pixels = transforms.center_crop(
            transforms.resize(pixels, [wanted["resize"]]), [height, width]
        )
    if tuple(pixels.shape[1:]) != (height, width):
        got = " x ".join(map(str, pixels.shape[1:]))
        raise UsageError(f"image {path}: expected {height} x {width} pixels, got {got}")
    return transforms.normalize(pixels.float() / 255, wanted["mean"], wanted["std"])[None]


def _show(report: dict[str, Any]) -> None:
    table = Table(
        title=f"One image, T = {report['timesteps']}, {report['precision']} weights",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    columns = ["layer", "spikes", "addi-\ntions", "prod-\nucts", "weight\nbytes", "spike\nbytes"]
    for column in [*columns, "uJ", "ANN pro-\nducts", "ANN\nuJ", "ANN\n/ this"]:
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for row in [*report["layers"], {"name": "total", **report["total"]}]:
        if row["name"] == "total":
            table.add_section()
        ours, ann = row["energy_uj"], row["ann_energy_uj"]
        table.add_row(
            row["name"].removeprefix("layers."),
            _short(row["spikes"]),
            _short(row["additions"]),
            _short(row["multiplications"]),
            _short(row["weight_bytes"]),
            _short(row["spike_bytes"]),
            f"{ours:.3f}",
            _short(row["ann_multiplications"]),
            f"{ann:.3f}",
            f"{ann / ours:.1f}x" if ours and ann else "",
        )
    console.print(table)
    console.print(
        f"Means over {report['images']} test images. Additions the engine made: one for each event "
        "and output it reaches, and those that double and add up the digits of average-pooled "
        f"counts. {MULTIPLY_ACCUMULATE_PJ} pJ a multiply-accumulate, {ADDITION_PJ} pJ an addition "
        "(45 nm, 32-bit float); memory is not in it.",
        style="dim",
        highlight=False,
    )


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


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
