"""Plots of a run as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .. import atomic_files

#: Of a plot: its width and height in inches, and what draws something into an empty figure.
Plot = tuple[tuple[float, float], Callable[[Any, Figure], None]]

#: One look for each group: colours run out after ten, markers do not come in step with them.
STYLES: list[dict[str, Any]] = [
    {"color": f"C{i % 10}", "marker": "os^vDPX*"[i % 8]} for i in range(40)
]


def write(folder: Path, plots: Mapping[str, Plot], shown: Any, *, run: str = "") -> None:
    """Draw `shown` into FOLDER/NAME.png of each plot, 150 dots an inch; `run` begins the title.

    Raises:
        RunError: a file cannot be written.
    """
    for name, (size, draw) in plots.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(shown, figure)
        if run:
            figure.suptitle(f"{run}: {figure.get_suptitle()}")
        save = partial(figure.savefig, dpi=150, format="png")
        atomic_files.write_atomically(folder / f"{name}.png", save)
