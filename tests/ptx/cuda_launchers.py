"""csrc/lif/cuda on the CPU: its own launchers, their launches executed from PTX and counted."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iirsnn.ops.reference import RESETS, acc_dtype, empty_spikes
from iirsnn.ops.surrogates import SURROGATES
from tests.cuda_compiler import compile_kernels
from tests.lif_cases import Implementation

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
POINTER, INT, INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
DOUBLE, BOOL = ctypes.c_double, ctypes.c_bool


class Shape(ctypes.Structure):
    _fields_ = [
        ("dtype", INT),
        *((name, INT64) for name in ("timesteps", "neurons", "x_stride_t", "channels", "inner")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("reset", INT),
        ("v_reset", DOUBLE),
        *((name, POINTER) for name in ("x", "threshold", "leak", "v0", "s", "bits", "v")),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("reset", INT),
        ("v_reset", DOUBLE),
        ("detach_reset", BOOL),
        ("surrogate", INT),
        ("surrogate_scale", DOUBLE),
        ("grad_s", POINTER),
        ("grad_s_stride_t", INT64),
        *((name, POINTER) for name in ("grad_v", "x", "threshold", "leak", "v0", "grad_x")),
        *((name, POINTER) for name in ("grad_threshold", "grad_leak", "grad_v0", "workspace")),
        ("counters", POINTER),
    ]


def build(arch: int, unrolled: int, few: bool, library_dir: str) -> Path:
    """The launchers with PTX inside and the emulator for a runtime. See compile_kernels."""
    runtime = ["-cudart", "none", f"-L{library_dir}", "-lptxcudart"]
    runtime += ["-Xlinker", f"-rpath={library_dir}"]
    launchers = Path(__file__).with_name("launchers.cpp")
    return compile_kernels(arch, unrolled, few, runtime, launchers)[1]


class Launchers:
    """ops: an Implementation for CPU tensors. take(): (kernel name, Stats) of its launches."""

    def __init__(self, rt: Any, library: Path) -> None:
        self.rt, self.lib = rt, rt.load(str(library))
        for name in ("forward", "backward", "unpack"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.workspace.restype = self.lib.counters.restype = INT64
        self.ops = Implementation(self.forward, self.backward, self.packed, self.unpack)

    def take(self) -> list[tuple[str, Any]]:
        launches = [(name, stats) for name, _, _, stats in self.rt.stats]
        self.rt.stats.clear()
        return launches

    def call(self, launch: Callable[..., Any], *arguments: Any, **tensors: Tensor | None) -> None:
        """Launch with the memory of these tensors known to the emulator under their names."""
        known = {k: t for k, t in tensors.items() if t is not None and t.numel() > 0}
        for name, tensor in known.items():
            self.rt.register(tensor, name)
        try:
            error = launch(*arguments)
            self.rt.check()
            assert error is None, error
        finally:
            for tensor in known.values():
                self.rt.unregister(tensor)
        for name, _, _, stats in self.rt.stats:
            assert not stats.undefined, (name, stats.undefined)
            assert not stats.local, (name, stats.local)

    @staticmethod
    def shape(x: Tensor, *parameters: Tensor) -> tuple[Shape, list[Tensor]]:
        channels = max(p.numel() for p in parameters)
        neurons = math.prod(x.shape[1:])
        inner = x.stride(2) if channels > 1 else neurons
        shape = Shape(DTYPES.index(x.dtype), x.shape[0], neurons, x.stride(0), channels, inner)
        return shape, [p.expand(channels).clone() for p in parameters]

    def run_forward(self, x, threshold, leak, v0, reset, v_reset, return_v, packed) -> Any:
        shape, (threshold, leak) = self.shape(x, threshold, leak)
        v = membrane(x).fill_(math.nan) if return_v else membrane(x).new_empty(0)
        bits = torch.full((x.shape[0], -(-shape.neurons // 64) * 8), 255, dtype=torch.uint8)
        s = empty_spikes(x).fill_(math.nan)
        if x.numel() > 0:
            v0 = None if v0 is None else membrane(x, v0)
            known = {"x": x, "threshold": threshold, "leak": leak, "v0": v0}
            known |= {"s": None if packed else s, "bits": bits if packed else None}
            known["v"] = v if return_v else None
            args = Forward(shape, RESETS.index(reset), v_reset, *map(pointer, known.values()))
            self.call(self.lib.forward, ctypes.byref(args), **known)
        return (bits if packed else s), v

    def forward(self, x, threshold, leak, v0, reset, v_reset, detach, surrogate, scale, return_v):
        return self.run_forward(x, threshold, leak, v0, reset, v_reset, return_v, packed=False)

    def packed(self, x, threshold, leak, v0, reset, v_reset, return_v):
        return self.run_forward(x, threshold, leak, v0, reset, v_reset, return_v, packed=True)

    def unpack(self, bits, size, stride, dtype):
        s = torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan)
        if s.numel() > 0:
            where = (POINTER(pointer(bits)), POINTER(pointer(s)), DTYPES.index(dtype))
            many = (INT64(size[0]), INT64(math.prod(size[1:])))
            self.call(self.lib.unpack, *where, *many, bits=bits, s=s)
        return s

    def backward(
        self,
        grad_s,
        grad_v,
        x,
        threshold,
        leak,
        v0,
        reset,
        v_reset,
        detach,
        surrogate,
        scale,
        need_parameter_grads,
    ):
        elements = (threshold.numel(), leak.numel())
        shape, (threshold, leak) = self.shape(x, threshold, leak)
        v0 = None if v0 is None else membrane(x, v0)
        grad_v = None if grad_v is None else membrane(x, grad_v)
        none = membrane(x).new_empty(0)
        same = grad_s.shape[0] > 1 and grad_s.stride(0) == 0
        if not same and grad_s.stride() != empty_spikes(x).stride():
            grad_s = empty_spikes(x).copy_(grad_s)
        grad_x = empty_spikes(x).fill_(math.nan)
        grad_v0 = None if v0 is None else torch.full_like(v0, math.nan)
        sums = [torch.full_like(threshold, math.nan) for _ in range(2)]
        if not need_parameter_grads:
            sums = [None, None]
        if x.numel() > 0:
            known = {"grad_v": grad_v, "x": x, "threshold": threshold, "leak": leak, "v0": v0}
            known |= {"grad_x": grad_x, "grad_threshold": sums[0], "grad_leak": sums[1]}
            known["grad_v0"] = grad_v0
            args = Backward(
                *(shape, RESETS.index(reset), v_reset, detach, list(SURROGATES).index(surrogate)),
                *(scale, pointer(grad_s), 0 if same else shape.neurons),
                *map(pointer, known.values()),
            )
            size = self.lib.workspace(ctypes.byref(args))
            workspace = torch.full((size // 4,), math.nan)  # NaN: read before written would show
            args.workspace = pointer(workspace)
            counters = torch.zeros(self.lib.counters(ctypes.byref(args)), dtype=torch.int32)
            args.counters = pointer(counters)
            known |= {"grad_s": grad_s, "workspace": workspace, "counters": counters}
            self.call(self.lib.backward, ctypes.byref(args), **known)
            assert not counters.any()
        elif need_parameter_grads:
            sums = [torch.zeros_like(threshold) for _ in range(2)]
        sums = [
            none if g is None else g.sum(0, True) if n < shape.channels else g
            for g, n in zip(sums, elements, strict=True)
        ]
        return grad_x, *sums, none if grad_v0 is None else grad_v0


def membrane(x: Tensor, value: Tensor | None = None) -> Tensor:
    """A copy of value, or fresh memory, with the layout of x[0]."""
    like = torch.empty_strided(x.shape[1:], x.stride()[1:], dtype=acc_dtype(x.dtype))
    return like if value is None else like.copy_(value)


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()
