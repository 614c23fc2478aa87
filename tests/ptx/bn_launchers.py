"""The launchers of BatchNorm and LIF in one on the CPU; see cuda_launchers.py."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from iirsnn.ops.reference import RESETS, empty_spikes
from iirsnn.ops.surrogates import SURROGATES
from tests.bn_lif_cases import BnImplementation
from tests.ptx.cuda_launchers import (
    BOOL,
    DOUBLE,
    DTYPES,
    INT,
    INT64,
    POINTER,
    Launchers,
    Shape,
    pointer,
)


class Running(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("mean", "var", "calls")),
        ("momentum", DOUBLE),
    ]


class Moments(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("eps", DOUBLE),
        *((name, POINTER) for name in ("x", "sums", "mean", "var", "rstd")),
        *((name, POINTER) for name in ("workspace", "counters")),
        ("running", Running),
    ]


class Totals(ctypes.Structure):
    _fields_ = [
        ("channels", INT64),
        ("eps", DOUBLE),
        *((name, POINTER) for name in ("totals", "mean", "rstd")),
        ("running", Running),
    ]


class BnLif(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("reset", INT),
        ("v_reset", DOUBLE),
        ("detach_reset", BOOL),
        ("surrogate", INT),
        ("surrogate_scale", DOUBLE),
        *((name, POINTER) for name in ("x", "mean", "rstd", "weight", "bias", "threshold", "leak")),
        ("one_threshold", BOOL),
        ("one_leak", BOOL),
        ("s", POINTER),
        ("grad_s", POINTER),
        ("grad_s_stride_t", INT64),
        *((name, POINTER) for name in ("sums", "grad_weight", "grad_bias", "grad_threshold")),
        *((name, POINTER) for name in ("grad_leak", "grad_mean", "slope", "grad_x")),
        *((name, POINTER) for name in ("workspace", "counters")),
    ]


def nans(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(size, math.nan, dtype=dtype)


class BnLaunchers:
    """ops: a BnImplementation for CPU tensors. The counters are checked to be left at 0."""

    def __init__(self, launchers: Launchers) -> None:
        self.launchers, self.lib = launchers, launchers.lib
        for name in ("bn_moments", "bn_totals", "bn_fire", "bn_sums", "bn_grad_x"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        for name in ("bn_counters", "bn_moments_workspace", "bn_workspace"):
            getattr(self.lib, name).restype = INT64
        self.ops = BnImplementation(
            *(self.forward, self.backward, self.moments, self.fire, self.gradient_sums, self.grad_x)
        )

    @staticmethod
    def shape(x: Tensor) -> Shape:
        neurons, channels = math.prod(x.shape[1:]), x.shape[2]
        inner = x.stride(2) if channels > 1 else neurons
        return Shape(DTYPES.index(x.dtype), x.shape[0], neurons, x.stride(0), channels, inner)

    def scratch(self, shape: Shape, size: Any) -> tuple[Tensor, Tensor]:
        counters = torch.zeros(self.lib.bn_counters(ctypes.byref(shape)), dtype=torch.int32)
        return nans(-(-size(ctypes.byref(shape)) // 4)), counters

    @staticmethod
    def running(kept: Any, momentum: float | None) -> tuple[Running, dict[str, Tensor]]:
        """kept: mean, var, calls, or None."""
        named = dict(zip(("running_mean", "running_var", "calls"), kept or (), strict=bool(kept)))
        many = [pointer(tensor) for tensor in named.values()] or [None] * 3
        return Running(*many, math.nan if momentum is None else momentum), named

    def moments(
        self, x: Tensor, eps: float, kept: Any = None, momentum: float | None = None
    ) -> tuple[Tensor, ...]:
        shape, channels = self.shape(x), x.shape[2]
        sums = nans(2, channels, dtype=torch.float64)
        mean, var, rstd = (nans(channels) for _ in range(3))
        workspace, counters = self.scratch(shape, self.lib.bn_moments_workspace)
        known = {"x": x, "sums": sums, "mean": mean, "var": var, "rstd": rstd}
        known |= {"workspace": workspace, "counters": counters}
        running, named = self.running(kept, momentum)
        args = Moments(shape, eps, *map(pointer, known.values()), running)
        self.launchers.call(self.lib.bn_moments, ctypes.byref(args), **known, **named)
        assert not counters.any()
        return sums, mean, var, rstd

    def totals(
        self, totals: Tensor, eps: float, kept: Any, momentum: float | None
    ) -> tuple[Tensor, Tensor]:
        channels = totals.shape[1]
        mean, rstd = nans(channels), nans(channels)
        running, named = self.running(kept, momentum)
        known = {"totals": totals, "mean": mean, "rstd": rstd}
        args = Totals(channels, eps, *map(pointer, known.values()), running)
        self.launchers.call(self.lib.bn_totals, ctypes.byref(args), **known, **named)
        return mean, rstd

    def call(self, launch: Any, x: Tensor, given: tuple[Any, ...], **others: Any) -> None:
        *tensors, reset, v_reset, detach, surrogate, scale = given
        names = ("mean", "rstd", "weight", "bias", "threshold", "leak")
        known = {"x": x, **dict(zip(names, tensors, strict=True)), **others}
        args = BnLif(
            shape=self.shape(x),
            reset=RESETS.index(reset),
            v_reset=v_reset,
            detach_reset=detach,
            surrogate=list(SURROGATES).index(surrogate),
            surrogate_scale=scale,
            one_threshold=known["threshold"].numel() == 1,
            one_leak=known["leak"].numel() == 1,
            **{name: pointer(tensor) for name, tensor in known.items()},
        )
        if "grad_s" in known:
            args.grad_s_stride_t = known["grad_s"].stride(0) and x[0].numel()
        self.launchers.call(launch, ctypes.byref(args), **known)

    def fire(self, x: Tensor, *given: Any) -> Tensor:
        s = empty_spikes(x).fill_(math.nan)
        self.call(self.lib.bn_fire, x, given, s=s)
        return s

    def forward(self, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *parameters, eps = given[:5]
        _, mean, var, rstd = self.moments(x, eps)
        return self.fire(x, mean, rstd, *parameters, *given[5:]), mean, var, rstd

    def sums(self, grad_s: Tensor, x: Tensor, given: tuple[Any, ...]) -> dict[str, Tensor]:
        channels = x.shape[2]
        workspace, counters = self.scratch(self.shape(x), self.lib.bn_workspace)
        found = {"sums": nans(4, channels, dtype=torch.float64)}
        for name in ("grad_weight", "grad_bias", "grad_mean", "slope"):
            found[name] = nans(channels)
        found["grad_threshold"], found["grad_leak"] = nans(given[4].numel()), nans(given[5].numel())
        found |= {"grad_x": empty_spikes(x).fill_(math.nan), "workspace": workspace}
        self.call(self.lib.bn_sums, x, given, grad_s=grad_s, counters=counters, **found)
        assert not counters.any()
        return found

    def gradient_sums(self, grad_s: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        found = self.sums(grad_s, x, given)
        return found["grad_x"], found["sums"], found["workspace"]

    def grad_x(self, grad_x, workspace, grad_mean, slope, grad_s, x, *given: Any) -> None:
        others = {"workspace": workspace, "grad_mean": grad_mean, "slope": slope, "grad_s": grad_s}
        self.call(self.lib.bn_grad_x, x, given, grad_x=grad_x, **others)

    def backward(self, grad_s: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        found = self.sums(grad_s, x, given)
        kept = (found[name] for name in ("grad_x", "workspace", "grad_mean", "slope"))
        self.grad_x(*kept, grad_s, x, *given)
        names = ("grad_x", "grad_weight", "grad_bias", "grad_threshold", "grad_leak")
        return tuple(found[name] for name in names)
