"""iirsnn deploy | predict | energy: a trained run as an event-driven network, used and counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .console import Run, console

if TYPE_CHECKING:
    from ..train.pipeline import Pipeline

#: Images that a deployed network is compared with PyTorch's on.
COMPARED_IMAGES = 256


def deploy(
    run: Run,
    stage: Annotated[int, typer.Option(metavar="T", help="The stage, by its timesteps.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="File of the network.")
    ] = Path("net.iirsnn"),
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or int8.")] = "fp32",
    force: Annotated[
        bool, typer.Option("--force", help="Write over a FILE that deploy has not written.")
    ] = False,
) -> None:
    """Write a trained stage as an event-driven network that stands alone."""
    from ..measure.evaluation import evaluating
    from ..train.deployment import event_network, may_be_written

    may_be_written(out, force)
    pipeline = _open(run)
    net = event_network(pipeline, stage, precision)
    images = pipeline.calibration_images(COMPARED_IMAGES)
    model = pipeline.trained(f"T{stage}")
    with evaluating(model):
        same = int((net(images).argmax(1) == model(images).cpu().argmax(1)).sum())
    net.notes.update(
        recipe=pipeline.recipe.name,
        class_names=pipeline.splits.class_names,
        images=pipeline.splits.test.preparation.as_json(),
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
    from ..event import EventNetwork
    from ..train.deployment import class_names, read_image

    network = EventNetwork.load(net)
    batch = [read_image(path, network) for path in images]
    classes = network(batch[0]).shape[1]  # touches the weights once
    names = class_names(network, classes)
    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    for column in ("class", "probability", "ms"):
        table.add_column(column, no_wrap=True)
    for path, image in zip(images, batch, strict=True):
        start = time.perf_counter()
        logits = network(image)
        milliseconds = 1e3 * (time.perf_counter() - start)
        name = names[int(logits.argmax())]
        table.add_row(
            Text(str(path)),
            Text(name),
            f"{float(logits.softmax(1).max()):.1%}",
            f"{milliseconds:.3f}",
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
    from ..report import engine_energy
    from ..train.deployment import finished_timesteps

    pipeline = _open(run)
    timesteps = finished_timesteps(pipeline)[-1] if stage is None else stage
    report = engine_energy.measure(pipeline, timesteps, precision)
    engine_energy.write(report, run)
    engine_energy.show(report, console)
    console.print(f"Written: {run}/energy.json and energy.png", highlight=False, soft_wrap=True)


def _open(run: Path) -> Pipeline:
    from ..train.pipeline import Pipeline, open_data
    from ..train.run_folder import RunFolder

    folder = RunFolder.read(run)
    return Pipeline(folder, open_data(folder.recipe))
