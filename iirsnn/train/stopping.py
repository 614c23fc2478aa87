"""A run that is asked to stop: the signals of schedulers and of Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on; the message says how."""


class StopRequest:
    """Takes SIGTERM and the first SIGINT as a request, to be met at the next step.

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

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker: it ends with its parent, which needs it until then
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
