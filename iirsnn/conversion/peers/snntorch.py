"""snnTorch: Leaky and Lapicque, one step a call, with or without a hidden state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from snntorch import Lapicque, Leaky, SpikingNeuron, surrogate
from torch import Tensor, nn

from .equation import (
    Equation,
    NoEqualError,
    Surrogate,
    derivative_of,
    fires_at_threshold,
    number_or_learned,
)


def is_neuron(module: nn.Module) -> bool:
    """Whether it is one of the library's."""
    return isinstance(module, SpikingNeuron)


def equation(cell: Any) -> Equation:
    """Raises NoEqualError for options that have no equal here."""
    if cell.inhibition:
        raise NoEqualError("inhibition: its neurons are not independent of each other")
    if cell.state_quant:
        raise NoEqualError("state_quant: its membrane is quantised")
    made_for = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
    if made_for.get(cell.state_function.__name__) != cell.reset_mechanism:
        raise NoEqualError(
            f"reset_mechanism was changed to {cell.reset_mechanism!r} after it was made"
        )
    gain: float | Tensor = 1.0
    if isinstance(cell, Lapicque):
        if cell.C.requires_grad or cell.R.requires_grad:
            raise NoEqualError("its R or C was computed from a learned beta")
        leak = number_or_learned(1 - cell.time_step / (cell.R * cell.C))
        gain = number_or_learned(cell.R * (1 / (cell.R * cell.C)) * cell.time_step)
    else:
        leak = number_or_learned(cell.beta.clamp(0, 1))
    return Equation(
        threshold=number_or_learned(cell.threshold),
        surrogate=_surrogate(cell.spike_grad),
        leak=leak,
        gain=gain,
        reset="soft_delayed" if cell.reset_mechanism == "subtract" else "none",
    )


@functools.lru_cache(maxsize=256)
def _surrogate(spike: Callable[[Tensor], Tensor]) -> Surrogate:
    derivative = derivative_of(spike)
    made_by = getattr(spike, "__qualname__", "").split(".")[0]
    known = getattr(spike, "__module__", None) == surrogate.__name__
    if known and made_by in ("atan", "sigmoid", "fast_sigmoid"):
        (slope,) = (cell.cell_contents for cell in spike.__closure__ or ())
        return Surrogate(derivative, name=made_by, slope=slope)
    return Surrogate(derivative, fires_at_threshold(spike))


class _Fused(SpikingNeuron):
    """The step of both: what is left of a reset is torch's, beside one call of the kernels."""

    def reset_state(self) -> None:
        self.reset_mem()

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        if mem is not None:
            if self.init_hidden:
                raise TypeError("mem: expected none with init_hidden=True, got a membrane")
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_)
        s, self.mem = self._step(input_, self.mem)
        factor = number_or_learned(self.graded_spikes_factor)
        s = s if factor == 1 and not isinstance(factor, Tensor) else s * factor
        return s if self.init_hidden and not self.output else (s, self.mem)

    def _step(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        wanted = equation(self)
        at_once = not getattr(self, "reset_delay", True)
        zeroed = self.reset_mechanism == "zero"
        above = torch.ge if wanted.surrogate.at_threshold else torch.gt
        fired: Any = None
        if zeroed or at_once:
            fired = above(mem.detach(), self.threshold.detach())
        if zeroed:
            mem = mem.masked_fill(fired, 0)
            if isinstance(self, Lapicque):  # it resets the current of that step as well
                x = x.masked_fill(fired, 0)
        s, h = wanted.run(x.unsqueeze(0), mem)
        s, h = s[0], h.to(x.dtype)
        if at_once and self.reset_mechanism != "none":
            h = h - (s - fired.to(h.dtype)) * (h if zeroed else self.threshold)
        return s, h


class FusedLeaky(_Fused, Leaky):
    """Leaky by iirsnn's kernels."""


class FusedLapicque(_Fused, Lapicque):
    """Lapicque by iirsnn's kernels."""


FUSED = {Leaky: FusedLeaky, Lapicque: FusedLapicque}


def unroll(cell: Any, x: Tensor) -> tuple[Tensor, ...]:
    """A fresh cell on x [T, B, ...]: spikes and membranes [T, B, ...]."""
    cell.mem = torch.zeros(0)
    spikes, membranes, mem = [], [], None
    for x_t in x:
        out = cell(x_t) if cell.init_hidden else cell(x_t, mem)
        s, mem = (out, cell.mem) if isinstance(out, Tensor) else out
        spikes.append(s)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


def parameter_shapes(cell: Any) -> list[torch.Size]:
    names = ("threshold", "beta", "R", "C", "graded_spikes_factor")
    return [p.shape for p in (getattr(cell, name, None) for name in names) if p is not None]
