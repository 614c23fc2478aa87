"""Norse: LIFBoxCell, LIFCell and LIF, and Lift around the two cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from norse.torch.functional import reset as resets
from norse.torch.functional.lif import LIFFeedForwardState
from norse.torch.functional.lif_box import LIFBoxFeedForwardState
from norse.torch.functional.threshold import threshold
from norse.torch.module.lif import LIF, LIFCell
from norse.torch.module.lif_box import LIFBoxCell
from norse.torch.module.lift import Lift
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn

from .equation import Equation, NoEqualError, Surrogate, derivative_of
from .synapse import filtered

_NEURONS = (SNNCell, SNN, SNNRecurrentCell, SNNRecurrent)


def is_neuron(module: nn.Module) -> bool:
    """Whether it is one of the library's, or Lift around a cell that may be exchanged."""
    if isinstance(module, Lift):
        return type(module.lifted_module) in (LIFBoxCell, LIFCell)
    return isinstance(module, _NEURONS)


class _Parameters(NamedTuple):
    """Those of a module that all have, as the library rounds them."""

    per_step: float  # dt / tau_mem
    v_leak: float
    v_th: float
    v_reset: float


def _parameters(module: Any) -> _Parameters:
    p = module.p
    numbers = {}
    for name, value in p._asdict().items():
        if isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):
            raise NoEqualError(f"its parameter {name} is learned or not one number")
        numbers[name] = value
    per_step = float(module.dt * torch.as_tensor(p.tau_mem_inv))
    return _Parameters(per_step, *(float(numbers[name]) for name in _Parameters._fields[1:]))


def equation(module: Any) -> Equation:
    """Raises NoEqualError for options that have no equal here."""
    if isinstance(module, Lift):
        return equation(module.lifted_module)
    if getattr(module, "record_states", False):
        raise NoEqualError("record_states: it returns the membranes of all timesteps")
    p, (per_step, v_leak, v_th, v_reset) = module.p, _parameters(module)
    if p.method == "adjoint":
        raise NoEqualError("method 'adjoint': its gradient is not that of its equation")
    how = getattr(p, "reset_method", resets.reset_value)
    if how not in (resets.reset_value, resets.reset_subtract):
        raise NoEqualError("it has a reset_method of its own")
    return Equation(
        threshold=v_th,
        surrogate=_surrogate(p.method, p.alpha),
        leak=1 - per_step,
        gain=per_step,
        rest=v_leak,
        reset="hard" if how is resets.reset_value else "soft",
        v_reset=v_reset if how is resets.reset_value else 0.0,
        detach_reset=False,
    )


def _surrogate(method: str, alpha: Any) -> Surrogate:
    derivative = derivative_of(lambda u: threshold(u, method, alpha))
    if method == "super":
        return Surrogate(derivative, name="fast_sigmoid")  # the library does not use alpha
    if method == "triangle":
        return Surrogate(derivative, name="triangle", peak=float(alpha))
    return Surrogate(derivative)


class _Box:
    """Over time on x [T, B, ...], with the state of the library."""

    def steps(self, x: Tensor, state: Any) -> tuple[Tensor, LIFBoxFeedForwardState]:
        s, v = equation(self).run(x, None if state is None else _expanded(state.v, x))
        return s, LIFBoxFeedForwardState(v=v)


class _Synaptic:
    """The same behind a synaptic current."""

    p: Any
    dt: float

    def steps(self, x: Tensor, state: Any) -> tuple[Tensor, LIFFeedForwardState]:
        v, i = (None, None) if state is None else (_expanded(state.v, x), _expanded(state.i, x))
        decay = 1 - float(self.dt * torch.as_tensor(self.p.tau_syn_inv))
        current = filtered(x, i, decay)
        s, v = equation(self).run(current, v)
        return s, LIFFeedForwardState(v=v, i=decay * current[-1])


def _expanded(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value, device=x.device).expand(x.shape[1:])


class _Cell(SNNCell):
    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        if input_tensor.is_sparse:
            return super().forward(input_tensor, state)
        s, state = self.steps(input_tensor.unsqueeze(0), state)
        return s[0], state


class FusedLIFBoxCell(_Box, _Cell, LIFBoxCell):
    """LIFBoxCell by iirsnn's kernels."""


class FusedLIFCell(_Synaptic, _Cell, LIFCell):
    """LIFCell by iirsnn's kernels."""


class FusedLIF(_Synaptic, LIF):
    """Norse's LIF by iirsnn's kernels."""

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        if input_tensor.is_sparse:
            return super().forward(input_tensor, state)
        return self.steps(input_tensor, state)


class FusedLift(Lift):
    """Lift of a cell by iirsnn's kernels: one call for all timesteps."""

    def forward(self, x: Any) -> Any:
        x, state = x if isinstance(x, tuple) else (x, None)
        if x.is_sparse:
            return super().forward((x, state))
        return self.lifted_module.steps(x, state)


FUSED = {LIFBoxCell: FusedLIFBoxCell, LIFCell: FusedLIFCell, LIF: FusedLIF, Lift: FusedLift}


def unroll(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """A fresh module on x [T, B, ...], in more calls than one: spikes [T, B, ...], last state."""
    spikes: list[Tensor] = []
    state: Any = None
    for part in x.split((x.shape[0] + 1) // 2):
        if isinstance(module, Lift):
            s, state = module(part if state is None else (part, state))
            spikes.extend(s)
        elif isinstance(module, SNN):
            s, state = module(part, state)
            spikes.extend(s)
        else:
            for x_t in part:
                s, state = module(x_t, state)
                spikes.append(s)
    return torch.stack(spikes), *state


def parameter_shapes(module: nn.Module) -> list[torch.Size]:
    return []
