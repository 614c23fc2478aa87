"""What the commands share: where they print, and the argument RUN."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
