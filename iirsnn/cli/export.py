"""iirsnn export: a trained stage as a file of another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Run, console, timesteps_of


def export(
    run: Run,
    format: Annotated[str, typer.Option(metavar="nir|onnx", help="Of the file.")] = "onnx",
    stage: Annotated[str, typer.Option(metavar="T", help="The stage, by its timesteps.")] = "1",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file  [default: net.nir, net.onnx]"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a FILE that is there.")
    ] = False,
) -> None:
    """Write a trained stage as NIR, or at T = 1 as ONNX of plain operators."""
    from importlib import import_module

    from ..conversion import to_nir, to_onnx
    from ..errors import RunError, UsageError, check_choice
    from ..train.deployment import finished_timesteps
    from ..train.pipeline import Pipeline, open_data
    from ..train.run_folder import RunFolder

    check_choice("--format", format, ("nir", "onnx"))
    timesteps = timesteps_of(stage)
    if format == "onnx" and timesteps != 1:
        raise UsageError(f"--stage: expected 1 for ONNX, which has no time, got {timesteps}")
    out = out or Path(f"net.{format}")
    if out.exists() and not force:
        raise UsageError(f"--out {out}: is there already; --force writes over it")
    try:
        package = import_module(format)
    except ModuleNotFoundError as error:
        raise RunError(f"iirsnn export needs the package {format}: pip install {format}") from error
    folder = RunFolder.read(run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    finished = finished_timesteps(pipeline)
    if timesteps not in finished:
        wanted = ", ".join(map(str, finished))
        raise UsageError(f"--stage: expected one of {wanted} timesteps, got {timesteps}")
    network = pipeline.trained(f"T{timesteps}").eval().cpu()
    shape = pipeline.splits.image_shape
    try:
        if format == "onnx":
            to_onnx(network, out, shape)
        else:
            package.write(str(out), to_nir(network, shape))
    except ValueError as error:
        raise UsageError(str(error)) from error
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    console.print(f"Written: {out} ({size}, T = {timesteps})", highlight=False, soft_wrap=True)
