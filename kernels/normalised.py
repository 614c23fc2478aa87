"""What the kernels of BatchNorm and LIF share: tiles of channels, and the normalised current."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import COLUMN


@triton.jit
def channel_value(ptr, plane, cols, mask, INDEX: tl.constexpr, MANY: tl.constexpr = True):
    """Of a parameter [C], or [1] where not MANY: a scalar, or [1, COLS]."""
    if not MANY:
        value = tl.load(ptr)
    elif INDEX == COLUMN:
        value = tl.load(ptr + cols, mask=mask, other=1.0)
    else:
        value = tl.load(ptr + plane)
    return value


@triton.jit
def normalised(x, gain, shift):
    """What a BatchNorm of the dtype of x would write, in float32."""
    # see `charge`: the product is rounded on its own
    current = tl.fma(x.to(tl.float32), gain, 0.0) + shift
    return current.to(x.dtype).to(tl.float32)


@triton.jit
def normalised_steps(xs, gain, shift, STEPS: tl.constexpr):
    currents = ()
    for t in tl.static_range(STEPS):
        currents += (normalised(xs[t], gain, shift),)
    return currents


@triton.jit
def gain_and_shift(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, plane, cols, mask, INDEX: tl.constexpr
):
    mean = channel_value(mean_ptr, plane, cols, mask, INDEX)
    gain = channel_value(rstd_ptr, plane, cols, mask, INDEX)
    if weight_ptr is not None:
        gain = gain * channel_value(weight_ptr, plane, cols, mask, INDEX)
    bias = 0.0
    if bias_ptr is not None:
        bias = channel_value(bias_ptr, plane, cols, mask, INDEX)
    return mean, gain, bias - tl.fma(mean, gain, 0.0)
