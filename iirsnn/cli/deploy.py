"""iirsnn deploy | predict | energy: a trained run as an event-driven network, used and counted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ..errors import IirsnnError, RunError, UsageError
from . import watching
from .console import Run, console, timesteps_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..event import EventNetwork
    from ..train.pipeline import Pipeline

#: Images that a deployed network is compared with PyTorch's on.
COMPARED_IMAGES = 256


def deploy(
    run: Run,
    stage: Annotated[str, typer.Option(metavar="T", help="The stage, by its timesteps.")] = "1",
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
    timesteps = timesteps_of(stage)
    pipeline = _open(run)
    net = event_network(pipeline, timesteps, precision)
    images = pipeline.calibration_images(COMPARED_IMAGES)
    model = pipeline.trained(f"T{timesteps}")
    with evaluating(model):
        same = int((net(images).argmax(1) == model(images).cpu().argmax(1)).sum())
    net.notes.update(
        recipe=pipeline.recipe.name,
        class_names=pipeline.splits.class_names,
        images=pipeline.splits.test.preparation.as_json(),
    )
    net.save(out)
    console.print(
        f"Written: {out} ({out.stat().st_size / 1e6:.1f} MB, {precision}, T = {timesteps}); "
        f"predicts as the PyTorch model on {same} of {len(images)} training images",
        highlight=False,
        soft_wrap=True,
    )


def predict(
    net: Annotated[Path, typer.Argument(metavar="NET", help="File that deploy wrote.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files; - reads their paths from stdin."),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Classify every image that is written into DIR."),
    ] = None,
) -> None:
    """The class of each image, and how long it took.

    With --watch, or - for IMAGE, the network stays loaded until Ctrl-C, SIGTERM or stdin's end.
    """
    from ..event import EventNetwork
    from ..runtime.image_files import SUFFIXES
    from ..train.deployment import preparation, read_image

    from_stdin = images == [Path("-")]
    if (watch is None) == (not images) or (not from_stdin and Path("-") in (images or [])):
        raise UsageError("predict: expected IMAGE..., - or --watch DIR, and one of them alone")
    network = EventNetwork.load(net)
    if watch is None and not from_stdin:
        _print_table(network, images or [])
        return

    def begun(path: Path) -> tuple[float, Tensor]:
        return time.perf_counter(), read_image(path, network)

    preparation(network)
    names = _names(network)
    latencies = watching.Latencies()
    with watching.until_stopped():
        if watch is None:
            arriving = watching.named(sys.stdin, begun)
        else:
            arriving = watching.appearing(watch, SUFFIXES, begun)
            print(f"watching {watch}", file=sys.stderr, flush=True)
        for path, given in arriving:
            if isinstance(given, IirsnnError):
                print(f"error: {given}", file=sys.stderr, flush=True)
                continue
            start, image = given
            logits = network(image)
            seconds = time.perf_counter() - start
            latencies.add(seconds)
            odds = f"{float(logits.softmax(1).max()):.1%}"
            name = names[int(logits.argmax())]
            print(path, name, odds, f"{1e3 * seconds:.3f} ms", sep="\t", flush=True)
    print(latencies)


def _names(network: EventNetwork) -> list[str]:
    """Of the classes; a first call touches the weights."""
    from torch import zeros

    from ..train.deployment import class_names

    assert network.image_shape is not None
    return class_names(network, network(zeros(1, *network.image_shape)).shape[1])


def _print_table(network: EventNetwork, images: list[Path]) -> None:
    from ..train.deployment import read_image

    batch: list[tuple[Path, Tensor]] = []
    errors: list[IirsnnError] = []
    for path in images:
        try:
            batch.append((path, read_image(path, network)))
        except IirsnnError as error:
            errors.append(error)
    if not batch:
        raise errors[0]
    names = _names(network)
    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    for column in ("class", "probability", "ms"):
        table.add_column(column, no_wrap=True)
    for path, image in batch:
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
    if errors:
        of_all = f"{len(errors)} of {len(images)} images" if len(errors) > 1 else "one image"
        raise RunError(f"{of_all} could not be classified: {'; '.join(map(str, errors))}")


def energy(
    run: Run,
    stage: Annotated[
        str | None, typer.Option(metavar="T", help="The stage  [default: the last one finished]")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or int8.")] = "fp32",
) -> None:
    """What the engine really does to classify an image, beside the ANN; energy.json, energy.png."""
    from ..report import engine_energy
    from ..train.deployment import finished_timesteps

    asked = None if stage is None else timesteps_of(stage)
    pipeline = _open(run)
    timesteps = finished_timesteps(pipeline)[-1] if asked is None else asked
    report = engine_energy.measure(pipeline, timesteps, precision)
    engine_energy.write(report, run)
    engine_energy.show(report, console)
    console.print(f"Written: {run}/energy.json and energy.png", highlight=False, soft_wrap=True)


def _open(run: Path) -> Pipeline:
    from ..train.pipeline import Pipeline, open_data
    from ..train.run_folder import RunFolder

    folder = RunFolder.read(run)
    return Pipeline(folder, open_data(folder.recipe))
