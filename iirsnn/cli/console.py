"""What the commands share: where they print, and the argument RUN."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

#: Paths and names of classes are printed as they are, brackets too.
console = Console(markup=False)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
