"""What the commands share: where they print, and the argument RUN."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import UsageError

#: Paths and names of classes are printed as they are, brackets too.
console = Console(markup=False)


def timesteps_of(stage: str) -> int:
    """T of the spiking stage that --stage names: 1 or T1.

    Raises:
        UsageError: neither.
    """
    digits = stage.removeprefix("T")
    if not (digits.isascii() and digits.isdigit()):
        raise UsageError(f"--stage: expected a number of timesteps, like 1 or T1, got {stage!r}")
    return int(digits)


def stage_named(stage: str | None) -> str | None:
    """The name of the stage that --stage names: T1 for 1."""
    return f"T{stage}" if stage is not None and stage.isdigit() else stage


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
