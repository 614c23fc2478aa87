"""The compiled extension (csrc/module.cpp, csrc/event/bind.cpp). Importing it registers the ops."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Floats = NDArray[np.float32]
#: Kernel, stride, dilation, padding before and after: rows and columns of each.
_Window = Sequence[int]
#: (source, weight [outputs, channels / groups, rows, columns], groups, window).
_Synapses = tuple[int, _Floats, int, _Window]
#: (source, unit): spikes or counts of a layer that join a current.
_Skip = tuple[int, float]
#: (channels, rows, columns).
_Shape = tuple[int, int, int]

def build_info() -> dict[str, Any]: ...
def set_cpu_capability(name: str) -> None: ...
def lif_call(
    backend: str,
    x: Tensor,
    threshold: float | Tensor,
    leak: float | Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float | None,
    return_v: bool,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...

class event_plan:  # a submodule
    @staticmethod
    def tasks(
        out: _Shape, images: int, steps: int, precision: str, rows: bool, threads: int
    ) -> list[tuple[int, int, int, int, int, int]]: ...
    @staticmethod
    def carries(weight: _Floats, groups: int, most: int) -> list[int]: ...
    @staticmethod
    def taps(
        shape: _Shape, window: _Window, top: int, bottom: int
    ) -> list[tuple[int, int, int, int]]: ...

class EventCall:
    def report(self) -> list[dict[str, Any]]: ...

class EventEngine:
    def __init__(self, channels: int, height: int, width: int, timesteps: int) -> None: ...
    def add_neurons(
        self,
        synapses: Sequence[_Synapses],
        skips: Sequence[_Skip],
        precision: str,
        bias: _Floats,
        scale: _Floats,
        threshold: _Floats,
        leak: _Floats,
        reset: str,
        v_reset: float,
    ) -> int: ...
    def add_max_pool(self, source: int, window: _Window) -> int: ...
    def add_average_pool(self, source: int, window: _Window) -> int: ...
    def add_currents(
        self,
        synapses: Sequence[_Synapses],
        skips: Sequence[_Skip],
        precision: str,
        bias: _Floats,
        scale: _Floats,
    ) -> int: ...
    def add_adaptive_pool(self, source: int, height: int, width: int) -> int: ...
    def add_channels(self, parts: Sequence[tuple[int, int, int, float]]) -> int: ...
    def add_sum(self, terms: Sequence[tuple[int, int]]) -> int: ...
    def add_readout(
        self, synapses: _Synapses, precision: str, bias: _Floats, scale: _Floats
    ) -> None: ...
    def add_output(self, source: int, unit: float) -> None: ...
    def shape(self, source: int) -> _Shape: ...
    def run(self, images: _Floats, threads: int) -> tuple[_Floats, EventCall]: ...
    def bits(self, call: EventCall, source: int) -> NDArray[np.uint64]: ...
