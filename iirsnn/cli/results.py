"""iirsnn evaluate | report | compare | diagnose: what finished runs have reached, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import RunError, check_choice
from .console import Run, console, stage_named

if TYPE_CHECKING:
    from ..train.data import Splits
    from ..train.run_folder import RunFolder


def evaluate(
    run: Run,
    stage: Annotated[str | None, typer.Option(help="One stage alone: ann, T5, ...")] = None,
) -> None:
    """Test accuracy of the finished stages, measured again from their checkpoints."""
    from ..measure.evaluation import accuracies
    from ..train import data
    from ..train.pipeline import Pipeline, open_data
    from ..train.run_folder import RunFolder

    folder = RunFolder.read(run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    names = [s.name for s in pipeline.stages if folder.result(s.name) is not None]
    if not names:
        raise RunError(f"run {run}: no stage is finished yet")
    stage = stage_named(stage)
    if stage is not None:
        check_choice("stage", stage, names)
        names = [stage]
    networks = [pipeline.trained(name) for name in names]
    batches = data.eval_batches(pipeline.splits.test, folder.recipe.data)
    table = Table("stage", "test accuracy")
    for name, accuracy in zip(names, accuracies(networks, batches, pipeline.device), strict=True):
        table.add_row(name, f"{accuracy:.2%}")
    console.print(table)


def report(run: Run) -> None:
    """Time the networks, write report.html, report.json and the plots, and print the tables."""
    from ..train.pipeline import open_data
    from ..train.run_folder import RunFolder

    with RunFolder.resume(run) as folder:
        write_report(folder, open_data(folder.recipe))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, or folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.json, compare.md and two plots.")
    ] = None,
) -> None:
    """Runs side by side; runs that differ in their seed alone are one line."""
    from ..report.compare import find

    write_comparison(find(runs), out)


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, or folders of runs.")],
    stage: Annotated[str | None, typer.Option(help="T5, ...; the last by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for diagnosis.json, diagnosis.md and a plot.")
    ] = None,
) -> None:
    """Rates, silent neurons and gradients by layer, before and after a stage's training."""
    from ..report import compare, diagnosis
    from ..train.pipeline import Pipeline, open_data
    from ..train.run_folder import RunFolder

    found = []
    for path in compare.find(runs):
        folder = RunFolder.read(path)
        pipeline = Pipeline(folder, open_data(folder.recipe))
        found.append(diagnosis.build(pipeline, stage_named(stage)))
    groups = diagnosis.compare(found)
    diagnosis.show(groups, console)
    if out is not None:
        diagnosis.write(groups, out)
        console.print(f"Written: {out}/diagnosis.json, diagnosis.md and a plot", highlight=False)


def write_report(folder: RunFolder, splits: Splits) -> None:
    """Write report.json, report.html and the plots of a run, and print its tables."""
    from ..report import activity, run_report
    from ..train.pipeline import Pipeline

    built = run_report.build(folder, splits)
    run_report.write(built, folder.path)
    if built["stages"]:
        activity.write(Pipeline(folder, splits), folder.path)
    run_report.write_page(built, folder.path)
    run_report.show(built, console)
    console.print(
        f"Written: {folder.path}/report.json, report.html and plots",
        highlight=False,
        soft_wrap=True,
    )


def write_comparison(
    runs: list[Path], out: Path | None, reasons: dict[str, str] | None = None
) -> None:
    """Print runs side by side, and write the comparison to a folder where one is given."""
    from ..report import compare

    built = compare.build(runs, reasons)
    compare.show(built, console)
    if out is not None:
        compare.write(built, out)
        console.print(f"Written: {out}/compare.json, compare.md and plots", highlight=False)
