"""The device of gpu_cases.py, or the processor that stands in for it: times, memory, launches.

The device is kept busy until the host has launched all of a call: what is timed is the device's
work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
#: Clock cycles that the device waits before what is timed: about 1.5 ms, a call of the slowest
#: takes half of that.
AHEAD = 2_500_000


@dataclass
class Device:
    name: str  # "cuda", or "cpu" for a rehearsal

    def __post_init__(self) -> None:
        self.real = self.name == "cuda"
        self.rounds = 20 if self.real else 2
        self.trash = torch.empty(2**28 if self.real else 64, dtype=torch.uint8, device=self.name)

    def synchronise(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def milliseconds(self, call: Call, cold: bool, ahead: bool) -> float:
        if cold:
            self.trash.zero_()
        if ahead and self.real:
            torch.cuda._sleep(AHEAD)
        if not self.real:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end.record()
        end.synchronize()
        return float(start_event.elapsed_time(end))

    def compare(
        self, calls: dict[str, Call], cold: bool = True, ahead: bool = True
    ) -> dict[str, float]:
        """Median milliseconds of each, in turns; `ahead`: of the device's work alone."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            for _ in range(3):
                call()
        for _ in range(self.rounds):
            for name, call in calls.items():
                times[name].append(self.milliseconds(call, cold, ahead))
        return {name: statistics.median(t) for name, t in times.items()}

    def peak_bytes(self, call: Call) -> int:
        """Device memory that one call needs beyond what is there before it."""
        if not self.real:
            call()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> int:
        """Kernels and copies that one call launches."""
        if not self.real:
            return 0
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages())
