"""The command line: iirsnn train | evaluate | report | compare | reproduce | deploy | ..."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import IirsnnError, RunError, UsageError, check_choice
from ..measure.evaluation import accuracies
from ..ops.environment import env_report
from ..report import activity, compare, run_report
from ..train import data, processes, recipe, table_of_runs
from ..train.pipeline import Pipeline, accelerator, open_data
from ..train.processes import Lost, Processes
from ..train.progress import require_tensorboard
from ..train.run_folder import RunFolder
from ..train.stopping import Stopped
from . import deploy
from .deploy import Run, console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train spiking networks and shrink them in time to a single timestep.",
)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")
]


@app.command()
def train(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")
    ] = None,
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new run  [default: runs/RECIPE]")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves for TensorBoard to RUN/tensorboard.")
    ] = False,
) -> None:
    """Train the ANN, convert it, and shrink T stage by stage; then report.

    SIGTERM or Ctrl-C saves and ends it. Many processes:
    torchrun --nproc-per-node N -m iirsnn train ...
    """
    settings = [*(overrides or []), *(["runtime.tensorboard=true"] if tensorboard else [])]
    with _open_for_training(name, settings, out, resume) as (folder, splits, processes):
        try:
            shown = console if processes.main else Console(quiet=True)
            Pipeline(folder, splits, processes).train(shown)
        except Lost as error:
            raise Lost(
                f"{error}; all are stopped, go on with: "
                f"iirsnn train --resume {shlex.quote(str(folder.path))}"
            ) from error
        if processes.main:
            _report(folder, splits)


@app.command()
def evaluate(
    run: Run,
    stage: Annotated[str | None, typer.Option(help="One stage alone: ann, T5, ...")] = None,
) -> None:
    """Test accuracy of the finished stages, measured again from their checkpoints."""
    folder = RunFolder.read(run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    names = [s.name for s in pipeline.stages if folder.result(s.name) is not None]
    if not names:
        raise RunError(f"run {run}: no stage is finished yet")
    if stage is not None:
        check_choice("stage", stage, names)
        names = [stage]
    networks = [pipeline.trained(name) for name in names]
    batches = data.eval_batches(pipeline.splits.test, folder.recipe.data)
    table = Table("stage", "test accuracy")
    for name, accuracy in zip(
        names, accuracies(networks, batches, pipeline.accelerator.device), strict=True
    ):
        table.add_row(name, f"{accuracy:.2%}")
    console.print(table)


@app.command("report")
def report_command(run: Run) -> None:
    """Time the networks, then write report.json and the plots, and print the table."""
    with RunFolder.resume(run) as folder:
        _report(folder, open_data(folder.recipe))


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, or folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.json, compare.md and two plots.")
    ] = None,
) -> None:
    """Runs side by side; runs that differ in their seed alone are one line."""
    _compare(compare.find(runs), out)


@app.command("reproduce")
def reproduce_command(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="Name of a table, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of its runs  [default: runs/tables/TABLE]")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="These rows.")] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,...", help="Not the table's seeds.")] = "",
    overrides: Set = None,
) -> None:
    """Train all runs of a table, or go on where it stopped; then compare them.

    Several processes may work on one table; each takes what no other has.
    """
    table = table_of_runs.load(name)
    folder = out or Path("runs/tables") / table.name
    chosen = table_of_runs.parse_seeds(seeds)
    runs = table_of_runs.plan(
        table, folder, only=only or [], seeds=chosen, overrides=overrides or []
    )
    failures = table_of_runs.train(runs, folder, console)
    _compare(table_of_runs.started(table, folder), folder, {r.name: r.reason for r in table.rows})
    if failures:
        raise RunError(f"{len(failures)} of the table's runs failed: {'; '.join(failures)}")


deploy.register(app)


@app.command()
def env() -> None:
    """What is installed and built, and which backends can run."""
    typer.echo(env_report())


@contextmanager
def _open_for_training(
    name: str | None, overrides: list[str], out: Path | None, resume: Path | None
) -> Iterator[tuple[RunFolder, data.Splits, Processes]]:
    """The folder of a new or resumed run, its data and its processes; nothing is made on bad input.

    Process 0 locks the folder, the others follow it.
    """
    if resume is None:
        if name is None:
            raise UsageError("train: expected a RECIPE or --resume RUN, got neither")
        wanted = recipe.load(name, overrides)
        path = out or Path("runs") / wanted.name
    else:
        if out is not None:
            raise UsageError("train: --out does not go with --resume; the run has its folder")
        wanted, path = RunFolder.read(resume).recipe, resume
        if name is not None:
            wanted = recipe.load(name, overrides)
        elif overrides:
            wanted = recipe.parse(recipe.dump(wanted), overrides, source=str(resume))
    if wanted.runtime.tensorboard:
        require_tensorboard()
    processes = Processes(accelerator(wanted))
    if resume is None:  # bad data makes no folder
        splits = processes.in_turn(lambda: open_data(wanted))
    folder = processes.first_opens(
        lambda: (
            RunFolder.create(path, wanted) if resume is None else RunFolder.resume(path, wanted)
        ),
        lambda: RunFolder.follow(path, wanted),
    )
    with folder:
        if resume is not None:
            splits = processes.in_turn(lambda: open_data(wanted))
        yield folder, splits, processes


def _report(folder: RunFolder, splits: data.Splits) -> None:
    built = run_report.build(folder, splits)
    run_report.write(built, folder.path)
    if built["stages"]:
        activity.write(Pipeline(folder, splits), folder.path)
    run_report.show(built, console)
    console.print(f"Written: {folder.path}/report.json and plots", highlight=False)


def _compare(runs: list[Path], out: Path | None, reasons: dict[str, str] | None = None) -> None:
    built = compare.build(runs, reasons)
    compare.show(built, console)
    if out is not None:
        compare.write(built, out)
        console.print(f"Written: {out}/compare.json, compare.md and plots", highlight=False)


def main() -> None:
    """Run the command line; an error the user can mend is one line, without a traceback."""
    try:
        app()
    except Stopped as stopped:
        if processes.is_main():
            console.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        processes.leave(0)
    except (IirsnnError, OSError) as error:  # OSError: a full disk, a folder taken away
        if processes.speaks():
            text = f"error: {error}"
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
        processes.leave(getattr(error, "exit_code", 1))
    except Exception:
        if processes.speaks():  # a fault of ours: the traceback, once
            raise
        processes.leave(1)
