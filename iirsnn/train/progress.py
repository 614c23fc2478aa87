"""What a training shows: a live bar on a terminal, a line an epoch elsewhere; TensorBoard."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..errors import UsageError
from ..nn import FusedLIF


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

    def step(self, epoch: int, images: int, accuracy: float | None) -> None:
        """One optimiser step done on so many images; `accuracy` is the epoch's so far, if known."""
        self._images += images
        self._bar.update(self._task, advance=1, epoch=epoch + 1, speed=self.images_per_second)
        if accuracy is not None:
            self._bar.update(self._task, accuracy=accuracy)

    @property
    def images_per_second(self) -> float:
        """Mean speed in this stage since the run was started or resumed, all processes together."""
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


class Board:
    """TensorBoard's curves of one stage, in FOLDER/tensorboard/STAGE. Use as a context manager.

    Args:
        folder: of the run.
        stage: its name.
        step: steps done before; a curve that went on after that is cut off there.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard" / stage, purge_step=step + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def log(
        self, record: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add a finished epoch: its record of metrics.jsonl, learning rate, thresholds and leaks.

        Thresholds and leaks are means over a layer.
        """
        values = {name: v for name, v in record.items() if isinstance(v, float)}
        values["learning_rate"] = optimizer.param_groups[0]["lr"]
        for name, module in network.named_modules():
            if isinstance(module, FusedLIF):
                values[f"threshold/{name}"] = module.threshold.mean().item()
                values[f"leak/{name}"] = module.leak.mean().item()
        for name, value in values.items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()


def require_tensorboard() -> None:
    """Raises UsageError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UsageError(
            "runtime.tensorboard: expected the package tensorboard, which is not installed; "
            "pip install 'iirsnn[tensorboard]'"
        )
