"""The leaky integrate-and-fire neuron as a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import check_choice
from .ops.backend import choose, choose_compiled, direct, direct_to_triton
from .ops.packed import PackedSpikes
from .ops.reference import RESETS, acc_dtype, product
from .ops.surrogates import SURROGATES

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Of the surrogates, where none is given.
SCALES = {name: scale for name, (_, scale) in SURROGATES.items()}


def lif(
    x: Tensor,
    threshold: float | Tensor = 1.0,
    leak: float | Tensor = 1.0,
    v0: Tensor | None = None,
    *,
    reset: str = "soft",
    v_reset: float = 0.0,
    detach_reset: bool = True,
    surrogate: str = "triangle",
    surrogate_scale: float | None = None,
    packed: bool = False,
    return_v: bool = False,
    backend: str = "auto",
) -> Any:
    """Leaky integrate-and-fire neurons over time, in one pass over memory.

    For t = 0 .. T-1, starting from v[-1] = v0 or 0, all of it per neuron:

        h[t] = leak v[t-1] + x[t]                  (membrane)
        s[t] = 1 if h[t] > threshold else 0        (spike; NaN if h is NaN)
        v[t] = h[t] - threshold s[t]               reset="soft"
             = v_reset if s[t] else h[t]           reset="hard"
             = h[t]                                reset="none"
        h[t] = leak v[t-1] + x[t] - threshold s[t-1],  v[t] = h[t]     reset="soft_delayed"

    (soft_delayed starts from s[-1] = spike(v0).) At T = 1 without v0 this is s = (x > threshold).

    Backward, with z = h / threshold - 1, takes ds/dz = f(z) of the surrogate with its scale a:

        triangle      a max(0, 1 - abs(z))                   a = 0.3
        atan          a / 2 / (1 + (pi / 2 a z)^2)           a = 2
        sigmoid       a sig(a z) (1 - sig(a z))              a = 4
        fast_sigmoid  1 / (1 + a abs(z))^2                   a = 25
        boxcar        1 / (2 a) where abs(z) <= a, else 0    a = 0.5

    Args:
        x: input current [T, *neurons], T >= 1; float32, float64, float16 or bfloat16. "acc" below
            is float32, or float64 when x is. Read in place in any dense layout with time outermost
            (contiguous, channels_last, x0.expand(T, ...)); any other is copied once.
        threshold: a number, or a tensor of 1 or C elements that acts along dim 2 of [T, B, C, ...];
            computed in acc.
        leak: as threshold.
        v0: membrane [*neurons] to start from; computed in acc. None for 0.
        reset: soft, hard, none or soft_delayed.
        v_reset: membrane after a spike, of a hard reset.
        detach_reset: no gradient through the spike in the reset; the threshold in the reset always
            gets one.
        surrogate: triangle, atan, sigmoid, fast_sigmoid or boxcar.
        surrogate_scale: a; None for the surrogate's own.
        packed: spikes as bits, without a gradient.
        return_v: return the last membrane as well; time goes on where it is passed as the next v0.
        backend: auto, cpu, cuda, triton or reference.

    Returns:
        Spikes [T, *neurons] in the dtype of x, or `PackedSpikes` when packed (NaN in x raises on a
        CPU and is 0 on a GPU); with return_v, (spikes, v[T-1] [*neurons] acc).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or value; the values of threshold and leak tensors are checked on
            a CPU only: on a GPU that would wait for it.
        RuntimeError: a backend that cannot run.
    """
    call = None if packed else short_way()
    if call is not None:
        scale = SCALES.get(surrogate) if surrogate_scale is None else surrogate_scale
        how = reset, v_reset, detach_reset, surrogate, scale, return_v
        result = call(backend, x, threshold, leak, v0, *how)
        if result is not None:
            return result

    acc = _check_x(x)
    scale = check_options(reset, v_reset, surrogate, surrogate_scale)
    threshold = parameter_like("threshold", threshold, x, acc)
    leak = parameter_like("leak", leak, x, acc)
    if threshold.numel() != leak.numel():
        channels = max(threshold.numel(), leak.numel())
        threshold = threshold.expand(channels).contiguous()
        leak = leak.expand(channels).contiguous()
    if v0 is not None:
        if not isinstance(v0, Tensor):
            raise TypeError(f"v0: expected a tensor [*neurons], got {type(v0).__name__}")
        if v0.shape != x.shape[1:] or v0.device != x.device:
            raise ValueError(
                f"v0: expected shape {tuple(x.shape[1:])} on {x.device}, "
                f"got {tuple(v0.shape)} on {v0.device}"
            )
        if v0.is_complex():
            raise TypeError(f"v0: expected a real tensor, got {v0.dtype}")
        v0 = v0.to(acc)
    if not is_dense(x):
        x = x.contiguous()

    if torch.compiler.is_compiling() and not packed:
        run = choose_compiled(backend, x, v0)
    else:
        run = choose(backend, x.device)
    s: Tensor | PackedSpikes
    if packed:
        if torch.is_grad_enabled() and _any_requires_grad(x, threshold, leak, v0):
            raise ValueError(
                "packed: expected no gradient to be asked for (torch.no_grad()), "
                "got a tensor that requires one; bits carry none"
            )
        bits, v = run.packed(x, threshold, leak, v0, reset, v_reset, return_v)
        s = PackedSpikes(bits, x.shape, (product(x.shape[1:]), *x.stride()[1:]))
    else:
        s, v = run.forward(
            x, threshold, leak, v0, reset, v_reset, detach_reset, surrogate, scale, return_v
        )
    return (s, v) if return_v else s


def short_way() -> Callable[..., Any] | None:
    """What takes the arguments of the ops as they are and returns what `lif` does, or None.

    On small tensors a call is all that there is to pay for, so this is one call into C++, or where
    nothing is compiled to Triton's kernels. It leaves to `lif` what needs a conversion, and what is
    wrong, by returning None.
    """
    if torch.compiler.is_compiling():
        return None
    return direct() or direct_to_triton()


def _check_x(x: Tensor) -> torch.dtype:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [T, *neurons], got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1 or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [T, *neurons] with T >= 1, got {tuple(x.shape)}")
    return acc_dtype(x.dtype)


def check_options(
    reset: str, v_reset: float, surrogate: str, surrogate_scale: float | None
) -> float:
    """The scale of the surrogate. Raises ValueError for what `lif` says it raises it for."""
    check_choice("reset", reset, RESETS)
    check_choice("surrogate", surrogate, tuple(SURROGATES))
    scale = SURROGATES[surrogate][1] if surrogate_scale is None else float(surrogate_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"surrogate_scale: expected a finite number > 0, got {surrogate_scale}")
    if not -math.inf < v_reset < math.inf:
        raise ValueError(f"v_reset: expected a finite number, got {v_reset}")
    return scale


def parameter_like(name: str, value: float | Tensor, x: Tensor, acc: torch.dtype) -> Tensor:
    """threshold or leak as the ops want it: 1-D, 1 or C elements, acc."""
    if not isinstance(value, Tensor):
        number = float(value)
        lowest, wanted = -math.inf, "a finite number"
        if name == "threshold":
            lowest, wanted = 0.0, "a finite number > 0"
        if not lowest < number < math.inf:
            raise ValueError(f"{name}: expected {wanted}, got {value}")
        return torch.full((1,), number, dtype=acc, device=x.device)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {value.device}")
    elements = value.numel()
    if elements != 1 and (elements == 0 or x.dim() < 3 or elements != x.shape[2]):
        raise ValueError(
            f"{name}: expected 1 element, or C for x [T, B, C, ...], "
            f"got {tuple(value.shape)} for x {tuple(x.shape)}"
        )
    return value.reshape(-1).to(acc)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def is_dense(x: Tensor) -> bool:
    """Whether every timestep fills its memory without holes, and timesteps do not overlap."""
    if x.is_contiguous():
        return True
    neurons = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1 and stride != neurons:
            return False
        neurons *= size
    return x.shape[0] == 1 or x.stride(0) == 0 or x.stride(0) >= neurons
