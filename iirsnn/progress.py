"""What a training shows: a live bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class StageProgress:
    """The progress of one stage. Use as a context manager.

    Args:
        console: to print on.
        stage: its name.
        epochs: of the stage.
        steps: of the stage.
        done: steps done before, of a resumed stage.
    """

    def __init__(self, console: Console, stage: str, epochs: int, steps: int, done: int) -> None:
        self._console, self._stage, self._epochs = console, stage, epochs
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TextColumn("{task.fields[speed]:.0f} images/s"),
            TextColumn("accuracy {task.fields[accuracy]:.2%}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            stage, total=steps, completed=done, epoch=1, epochs=epochs, speed=0.0, accuracy=0.0
        )
        self._images, self._start = 0, time.perf_counter()

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, epoch: int, images: int, accuracy: float) -> None:
        """One optimiser step done on so many images; `accuracy` is the epoch's so far."""
        self._images += images
        self._bar.update(
            self._task, advance=1, epoch=epoch + 1, speed=self.images_per_second, accuracy=accuracy
        )

    @property
    def images_per_second(self) -> float:
        """Mean speed of this process in this stage."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def epoch(self, epoch: int, loss: float, training: float, validation: float) -> None:
        """One line about a finished epoch."""
        self._console.print(
            f"{self._stage:>4}  epoch {epoch + 1:3}/{self._epochs}  loss {loss:.4f}  "
            f"training {training:.2%}  validation {validation:.2%}  "
            f"{self.images_per_second:.0f} img/s",
            highlight=False,
            soft_wrap=True,
        )
