"""A run that is asked to stop: the signals of schedulers and of Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line imports this file before it needs torch
    from torch import Tensor
    from torch.utils.data import DataLoader

    from .processes import Processes


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on; the message says how."""


class StopRequest:
    """Takes SIGTERM and the first SIGINT as a request, to be met before the next batch.

    Use as a context manager. A second SIGINT interrupts as ever. Outside the main thread, where
    Python allows no handlers, nothing is taken.

    Attributes:
        signal: the name of the signal that asked, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stopped(self, stage: str, where: str, run: Path) -> Stopped:
        """What to raise in a stage of the run in a folder; `where` is "after step 5 of 9"."""
        return Stopped(
            f"stopped by {self.signal or 'a signal'} in stage {stage} {where}; go on with: "
            f"iirsnn train --resume {shlex.quote(str(run))}"
        )

    def meet(self, stopped: Callable[[], Stopped]) -> None:
        """Raises what `stopped` makes, if there was a signal."""
        if self.signal is not None:
            raise stopped()

    def between(
        self,
        loader: DataLoader[Any],
        rounds: int,
        processes: Processes,
        stopped: Callable[[], Stopped],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a loader; before each of them all processes ask whether to stop.

        Args:
            loader: this process's batches.
            rounds: the most batches that any process has.
            processes: that go through their batches together.
            stopped: makes the exception to raise.

        Raises:
            Stopped: a process was asked to.
        """
        batches = iter(loader)
        for _ in range(rounds):
            try:
                batch = next(batches, None)
            except RuntimeError:
                if not self.signal:  # a scheduler may have ended the loader's workers as well
                    raise
                batch = None
            if processes.any(self.signal is not None)[0]:
                raise stopped()
            if batch is not None:
                yield batch

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker: it ends with its parent, which needs it until then
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
