"""The neuron of any library as one equation, and that equation by `iirsnn.functional.lif`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...functional import lif
from ...ops.reference import acc_dtype
from .library_surrogate import lif_with_derivative

Parameter = float | Tensor
Derivative = Callable[[Tensor, Parameter], Tensor]


class NoEqualError(Exception):
    """Why a neuron has no equal here."""


@dataclass(frozen=True)
class Surrogate:
    """The spike function of a library, and ds/dh, in the units of the library's membrane.

    derivative: the library's own ds/dh at (h, threshold), elementwise on tensors of any shape.
    at_threshold: it fires where h >= threshold, else where h > threshold.
    name, peak, slope: where ds/dh has the form of one of ours, written in u = h - threshold:

        sigmoid       slope sig(slope u) (1 - sig(slope u))
        atan          slope / 2 / (1 + (pi / 2 slope u)^2)
        fast_sigmoid  peak / (1 + slope abs(u))^2
        triangle      peak max(0, 1 - slope abs(u))
    """

    derivative: Derivative
    at_threshold: bool = False
    name: str | None = None
    slope: float = 1.0
    peak: float = 1.0

    def scale(self, threshold: float) -> float | None:
        """The scale with which ours is the same at this threshold; None where none is."""
        if self.name in ("sigmoid", "atan"):
            return self.slope * threshold
        if self.name == "fast_sigmoid" and math.isclose(self.peak * threshold, 1):
            return self.slope * threshold
        if self.name == "triangle" and math.isclose(self.slope * threshold, 1):
            return self.peak * threshold
        return None


def derivative_of(spike: Callable[[Tensor], Tensor]) -> Derivative:
    """ds/dh of a function of h - threshold, by autograd; 0 where it lets no gradient through."""

    def derivative(h: Tensor, threshold: Parameter) -> Tensor:
        with torch.enable_grad():
            u = (h - threshold).detach().requires_grad_()
            s = spike(u)
            if not s.requires_grad:
                return torch.zeros_like(u)
            return torch.autograd.grad(s, u, torch.ones_like(s))[0]

    return derivative


def fires_at_threshold(spike: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of h - threshold fires where both are equal."""
    with torch.no_grad():
        return bool(spike(torch.zeros(1)).item())


@dataclass(frozen=True)
class Equation:
    """What a library's neuron computes, in the units of its own membrane::

        h[t] = rest + leak (v[t-1] - rest) + gain x[t]
        s[t] by `surrogate`
        v[t] by `reset`, one of those of `iirsnn.functional.lif`

    Tensors have one element, or broadcast to the neurons of one image.
    """

    threshold: Parameter
    surrogate: Surrogate
    leak: Parameter = 1.0
    gain: Parameter = 1.0
    rest: float = 0.0
    reset: str = "soft"
    v_reset: float = 0.0
    detach_reset: bool = True

    @property
    def zero(self) -> float:
        """The membrane that is 0 in the kernels: the rest, but that they subtract a threshold."""
        return self.rest if self.reset in ("hard", "none") else 0.0

    def height(self) -> Parameter:
        """Of the threshold above `zero`. Raises NoEqualError unless it is positive and finite."""
        height = self.threshold - self.zero
        lowest = height.detach().min().item() if isinstance(height, Tensor) else height
        if not 0 < lowest < math.inf:
            raise NoEqualError(
                f"its threshold {lowest + self.zero:g} is not above its resting membrane "
                f"{self.zero:g}"
            )
        return height

    def kernel_scale(self) -> float | None:
        """The scale of our surrogate of that name; None: the library's own one is needed.

        It is for a learned threshold as well: ours is a function of h / threshold, so its gradient
        is another one.
        """
        height = self.height()
        if not isinstance(height, Tensor):
            return self.surrogate.scale(height)
        if height.requires_grad or height.numel() > 1:
            return None
        return self.surrogate.scale(height.item())

    def run(self, x: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Current x [T, *neurons], membrane v0 [*neurons] or None for the rest -> spikes, v[T-1].

        The gain is that of x, which costs a pass over it, or by its inverse that of threshold,
        reset and membrane, which are small beside x where T > 1.
        """
        height, scale, zero = self.height(), self.kernel_scale(), self.zero
        v_reset, gain = self.v_reset - zero, self.gain
        learned_unit = isinstance(gain, Tensor) and v_reset != 0
        if not is_one(gain) and (scale is None or x.shape[0] == 1 or learned_unit):
            x, gain = x * gain, 1.0
        if zero != self.rest:
            x = x + (1 - self.leak) * self.rest / gain
            v0 = torch.full_like(x[0], self.rest) if v0 is None else v0
        if v0 is not None:
            v0 = v0 - zero if zero else v0
            v0 = v0 if is_one(gain) else v0 / gain
        if not is_one(gain):
            height, v_reset = height / gain, v_reset / float(gain) if v_reset else 0.0

        shape = x.shape
        leak = self.leak
        if any(isinstance(p, Tensor) and p.numel() > 1 for p in (height, leak)):
            height, leak = _per_neuron(height, shape), _per_neuron(leak, shape)
            x = x.reshape(shape[0], shape[1] if len(shape) > 2 else 1, -1)
            v0 = None if v0 is None else v0.reshape(x.shape[1:])
        fires_above = _below(height, acc_dtype(x.dtype)) if self.surrogate.at_threshold else height
        if scale is None:
            s, v = lif_with_derivative(
                *(x, height, fires_above, leak, v0, v_reset),
                *(self.surrogate.derivative, self.reset, self.detach_reset),
            )
        else:
            assert self.surrogate.name is not None
            s, v = lif(
                *(x, fires_above, leak, v0),
                reset=self.reset,
                v_reset=v_reset,
                detach_reset=self.detach_reset,
                surrogate=self.surrogate.name,
                surrogate_scale=scale,
                return_v=True,
            )
        if s.shape != shape:  # a library may detach v in place, which it cannot of a view
            s, v = s.reshape(shape), v.reshape(shape[1:]).clone()
        v = v if is_one(gain) else v * gain
        return s, v + zero if zero else v


def is_one(value: Parameter) -> bool:
    """Whether it is the number 1, not a tensor."""
    return isinstance(value, float) and value == 1


def number_or_learned(value: Tensor) -> Parameter:
    """A number where it is one that gets no gradient: the cheaper call."""
    return value.item() if value.numel() == 1 and not value.requires_grad else value


def _per_neuron(value: Parameter, shape: torch.Size) -> Parameter:
    """[N] of a tensor that broadcasts to one image of x [T, B, *neurons], or to x [T, *neurons]."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    neurons = shape[2:] if len(shape) > 2 else shape[1:]
    while value.dim() > len(neurons) and value.shape[0] == 1:
        value = value[0]
    if value.dim() > len(neurons):
        raise ValueError(
            f"expected a parameter that is the same for every image, its shape broadcast to "
            f"{tuple(neurons)}, got {tuple(value.shape)}"
        )
    return value.expand(neurons).reshape(-1)


def _below(threshold: Parameter, dtype: torch.dtype) -> Parameter:
    """The next lower number of this dtype: h >= threshold where h > it."""
    if isinstance(threshold, Tensor):
        threshold = threshold.to(dtype)
        value = threshold.detach()
        return threshold + (torch.nextafter(value, torch.full_like(value, -math.inf)) - value)
    if dtype == torch.float64:
        return math.nextafter(threshold, -math.inf)
    return float(np.nextafter(np.float32(threshold), np.float32(-math.inf)))
