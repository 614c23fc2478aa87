"""The commands by name. Each imports what it needs when it runs: help and version need no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..versions import installed
from . import deploy, export, results, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train spiking networks and shrink them in time to a single timestep.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"iirsnn {installed('iirsnn')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    pass


def env() -> None:
    """What is installed and built, and which backends can run."""
    from ..ops.environment import env_report

    typer.echo(env_report())


for command in (
    train.train,
    results.evaluate,
    results.report,
    results.compare,
    results.diagnose,
    train.reproduce,
    deploy.deploy,
    deploy.predict,
    deploy.energy,
    export.export,
    env,
):
    app.command()(command)
