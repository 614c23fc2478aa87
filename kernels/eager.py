"""The shortest way to the kernels: a gradient of our own, and no op, where nobody watches ops.

On small tensors what torch.library does for a call takes several times as long as the rest: it is
there for who traces, transforms or watches, and is left to them. Where iirsnn._C is compiled, its
lif_call has the gradient, in C++, and calls `forward` and `backward` here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .launch import DTYPES, Launcher, now
from .lif import lif_forward
from .lif_backward import lif_backward
from .packed import lif_packed, unpack_spikes
from .single_step import single_step_backward, single_step_forward
from .step import RESETS, SURROGATES


def forward(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor | None]:
    """As the op lif_forward, for its v None where it is not wanted."""
    if threshold.numel() > 1 or leak.numel() > 1:
        threshold, leak = threshold.contiguous(), leak.contiguous()
    if v0 is None and not return_v and x.shape[0] == 1:
        return single_step_forward(x, threshold, launch), None
    return lif_forward(x, threshold, leak, v0, reset, v_reset, return_v, launch)


def backward(
    grad_s: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    need_parameter_grads: bool,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the op lif_backward, with None for what is not wanted."""
    if threshold.numel() > 1 or leak.numel() > 1:
        threshold, leak = threshold.contiguous(), leak.contiguous()
    how = surrogate, surrogate_scale, need_parameter_grads, launch
    if v0 is None and grad_v is None and x.shape[0] == 1:
        grad_x, grad_threshold = single_step_backward(grad_s, x, threshold, *how)
        return (
            grad_x,
            grad_threshold,
            torch.zeros_like(leak) if need_parameter_grads else None,
            None,
        )
    return lif_backward(grad_s, grad_v, x, threshold, leak, v0, reset, v_reset, detach_reset, *how)


# ---- who watches

_PLAIN = (Tensor, torch.nn.Parameter)
#: What torch does for every thread; whatever else is included into a dispatch is who watches.
_UNWATCHING = reduce(
    int.__or__,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
        for name in dir(torch._C.DispatchKey)
        if name.startswith("Autocast") or name in ("BackendSelect", "ADInplaceOrView")
    ),
)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors and no mode, transform or tracer is to see what is done.

    As torch.compile, FakeTensorMode and any other mode, torch.func and torch.jit.trace do.
    """
    if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_UNWATCHING:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return tensors[0].is_cuda or tensors[0].is_cpu  # type: ignore[union-attr]


def needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


# ---- the ops of iirsnn.ops.lif, or the same without them


class LifGradient(torch.autograd.Function):
    """What the op triton_lif_forward computes, with its gradient."""

    gives_spikes = True  # see iirsnn/nn/origin.py

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        leak: Tensor,
        v0: Tensor | None,
        options: tuple[str, float, bool, str, float],
        return_v: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, threshold, leak, v0)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return forward(x, threshold, leak, v0, options[0], options[1], return_v)

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> Any:
        x, threshold, leak, v0 = ctx.saved_tensors
        _, *learned = ctx.needs_input_grad[:3]
        if grad_s is None:
            grad_s = x.new_zeros(()).expand(x.shape)
        run: Callable[..., Any] = backward
        if torch.is_grad_enabled() or not unwatched(grad_s, grad_v, x, threshold, leak, v0):
            run = torch.ops.iirsnn.triton_lif_backward  # a gradient of it raises
        grads = run(grad_s, grad_v, x, threshold, leak, v0, *ctx.options, any(learned))
        wanted = (True, *learned, v0 is not None)
        return (
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
            None,
            None,
        )


def call(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    return_v: bool,
) -> tuple[Tensor, Tensor | None]:
    """The op triton_lif_forward, or the same without it; v is None where it is not wanted."""
    options = reset, float(v_reset), detach_reset, surrogate, surrogate_scale
    if not unwatched(x, threshold, leak, v0):
        found: tuple[Tensor, Tensor] = torch.ops.iirsnn.triton_lif_forward(
            x, threshold, leak, v0, *options, return_v
        )
        return found
    return _without_op(x, threshold, leak, v0, options, return_v)


def _without_op(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    options: tuple[str, float, bool, str, float],
    return_v: bool,
) -> tuple[Tensor, Tensor | None]:
    if not needs_gradient(x, threshold, leak, v0):
        return forward(x, threshold, leak, v0, options[0], options[1], return_v)
    found: tuple[Tensor, Tensor | None] = LifGradient.apply(
        x, threshold, leak, v0, options, return_v
    )
    return found


def lif_call(
    backend: str,
    x: Tensor,
    threshold: Any,
    leak: Any,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: Any,
    return_v: bool,
) -> Any:
    """iirsnn._C.lif_call, where that is not compiled: see `iirsnn.functional.short_way`."""
    if type(x) not in _PLAIN or not takes(backend, x) or not unwatched(x, v0):
        return None
    if x.dtype not in DTYPES or x.dim() < 1 or x.shape[0] == 0 or not x.is_contiguous():
        return None
    if not (is_parameter(threshold, x) and is_parameter(leak, x)):
        return None
    if threshold.numel() != leak.numel():
        return None
    if v0 is not None and (
        v0.dtype != torch.float32 or v0.shape != x.shape[1:] or v0.device != x.device
    ):
        return None
    if not are_options(reset, v_reset, surrogate, surrogate_scale):
        return None
    options = reset, v_reset, detach_reset, surrogate, surrogate_scale
    s, v = _without_op(x, threshold, leak, v0, options, return_v)
    return (s, v) if return_v else s


def takes(backend: str, x: Tensor) -> bool:
    """Whether these kernels are the backend, where nothing is compiled."""
    if x.is_cuda:
        return backend in ("auto", "triton")
    return backend == "triton" and x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"


def is_parameter(value: Any, x: Tensor) -> bool:
    """Whether value is threshold or leak as the kernels take it."""
    return (
        type(value) in _PLAIN
        and value.dtype == torch.float32
        and value.dim() == 1
        and (value.numel() == 1 or (x.dim() >= 3 and value.numel() == x.shape[2]))
        and value.device == x.device
    )


def are_options(reset: str, v_reset: Any, surrogate: str, scale: Any) -> bool:
    """Whether they need no conversion, and no error."""
    return (
        reset in RESETS
        and surrogate in SURROGATES
        and type(v_reset) is type(scale) is float
        and math.isfinite(v_reset)
        and 0 < scale < math.inf
    )


def packed(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    """The op triton_lif_packed, or the same without it."""
    if not unwatched(x, threshold, leak, v0):
        found: tuple[Tensor, Tensor] = torch.ops.iirsnn.triton_lif_packed(
            x, threshold, leak, v0, reset, v_reset, return_v
        )
        return found
    threshold, leak = threshold.contiguous(), leak.contiguous()
    with torch.no_grad():
        return lif_packed(x, threshold, leak, v0, reset, float(v_reset), return_v)


def unpack(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The op triton_unpack_spikes, or the same without it."""
    if not unwatched(bits):
        found: Tensor = torch.ops.iirsnn.triton_unpack_spikes(bits, size, stride, dtype)
        return found
    return unpack_spikes(bits.contiguous(), size, stride, dtype)
