"""iirsnn train | reproduce: a run, or all runs of a table, from the ANN to the last T."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import Lost, RunError, UsageError
from .console import console
from .results import write_comparison, write_report

if TYPE_CHECKING:
    from ..train.data import Splits
    from ..train.processes import Processes
    from ..train.run_folder import RunFolder

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")
]


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
    from ..train.pipeline import Pipeline

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
            write_report(folder, splits)


def reproduce(
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
    from ..train import table_of_runs

    table = table_of_runs.load(name)
    folder = out or Path("runs/tables") / table.name
    chosen = table_of_runs.parse_seeds(seeds)
    runs = table_of_runs.plan(
        table, folder, only=only or [], seeds=chosen, overrides=overrides or []
    )
    failures = table_of_runs.train(runs, folder, console)
    write_comparison(
        table_of_runs.started(table, folder), folder, {r.name: r.reason for r in table.rows}
    )
    if failures:
        raise RunError(f"{len(failures)} of the table's runs failed: {'; '.join(failures)}")


@contextmanager
def _open_for_training(
    name: str | None, overrides: list[str], out: Path | None, resume: Path | None
) -> Iterator[tuple[RunFolder, Splits, Processes]]:
    """The folder of a new or resumed run, its data and its processes; nothing is made on bad input.

    Process 0 locks the folder, the others follow it.
    """
    from ..train import device, recipe
    from ..train.pipeline import open_data
    from ..train.processes import Processes
    from ..train.progress import require_tensorboard
    from ..train.run_folder import RunFolder

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
    recipe.check_stages_named(wanted, overrides)
    if wanted.runtime.tensorboard:
        require_tensorboard()
    processes = Processes(device.choose(wanted.runtime))
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
