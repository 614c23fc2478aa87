"""SpikingJelly: IFNode, LIFNode, ParametricLIFNode, in both step modes."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as surrogates
from torch import Tensor, nn

from .equation import (
    Equation,
    NoEqualError,
    Parameter,
    Surrogate,
    derivative_of,
    fires_at_threshold,
)


def is_neuron(module: nn.Module) -> bool:
    """Whether it is one of the library's."""
    return isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode))


def equation(node: Any) -> Equation:
    """Raises NoEqualError for options that have no equal here."""
    if not getattr(node.surrogate_function, "spiking", True):
        raise NoEqualError("its surrogate_function is not in spiking mode: it emits no spikes")
    if getattr(node, "_neuron_precision", None) is not None:
        raise NoEqualError("it computes at a precision of its own")
    integrates = isinstance(node, neuron.IFNode)
    leaks: Parameter = 0.0
    if isinstance(node, neuron.ParametricLIFNode):
        leaks = node.w.sigmoid()
    elif not integrates:
        leaks = 1 / node.tau
    hard = node.v_reset is not None
    return Equation(
        threshold=node.v_threshold,
        surrogate=_surrogate(node.surrogate_function),
        leak=1 - leaks,
        gain=1.0 if integrates or not node.decay_input else leaks,
        rest=node.v_reset if hard and not integrates else 0.0,
        reset="hard" if hard else "soft",
        v_reset=node.v_reset if hard else 0.0,
        detach_reset=node.detach_reset,
    )


def _surrogate(function: Any) -> Surrogate:
    derivative = derivative_of(function)
    alpha = getattr(function, "alpha", None)
    if type(function).__module__ != surrogates.__name__ or not isinstance(alpha, (int, float)):
        return Surrogate(derivative, fires_at_threshold(function))
    name, slope, peak = {
        "Sigmoid": ("sigmoid", alpha, alpha / 4),
        "ATan": ("atan", alpha, alpha / 2),
        "PiecewiseQuadratic": ("triangle", alpha, alpha),
        "SoftSign": ("fast_sigmoid", alpha, alpha / 2),
        "SuperSpike": ("fast_sigmoid", 1.0, alpha),
    }.get(type(function).__name__, (None, 1.0, 1.0))
    return Surrogate(derivative, True, name, slope, peak)


class _Fused(neuron.BaseNode):
    """The two transitions that every call of a BaseNode ends in."""

    def reset_state(self) -> None:
        self.reset()

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        if isinstance(states[0], float):  # no membrane in memory before the first call
            return states
        return super().materialize_states(inputs, states, step_mode)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        s, v = self._over_time(inputs[0].unsqueeze(0), states[0])
        return (s[0],), (v,)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        s, v = self._over_time(inputs[0], states[0])
        return (s,), (v,)

    def _over_time(self, x: Tensor, v: Any) -> tuple[Tensor, Tensor]:
        wanted = equation(self)
        if isinstance(v, float):
            v = None if v == wanted.rest else torch.full_like(x[0], v)
        s, v = wanted.run(x, v)
        return s, v.to(x.dtype)


class FusedIFNode(_Fused, neuron.IFNode):
    """IFNode by iirsnn's kernels."""


class FusedLIFNode(_Fused, neuron.LIFNode):
    """LIFNode by iirsnn's kernels."""


class FusedParametricLIFNode(_Fused, neuron.ParametricLIFNode):
    """ParametricLIFNode by iirsnn's kernels."""


FUSED = {
    neuron.IFNode: FusedIFNode,
    neuron.LIFNode: FusedLIFNode,
    neuron.ParametricLIFNode: FusedParametricLIFNode,
}


def unroll(node: Any, x: Tensor) -> tuple[Tensor, ...]:
    """A fresh node on x [T, B, ...], in more calls than one: spikes [T, B, ...], last membrane."""
    node.reset()
    if node.step_mode == "m":
        s = torch.cat([node(part) for part in x.split((x.shape[0] + 1) // 2)])
    else:
        s = torch.stack([node(x_t) for x_t in x])
    return s, node.v


def parameter_shapes(node: nn.Module) -> list[torch.Size]:
    return []
