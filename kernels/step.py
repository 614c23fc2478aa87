"""One neuron, one timestep, on the device: what csrc/lif/lif_step.h is to the C++ kernels.

The equation stands in iirsnn.functional.lif; names and rounding are those of iirsnn.ops.reference.
Membranes are float32 and equal the reference's bit for bit (a zero may differ in its sign).
"""

import triton
import triton.language as tl

RESETS = {"soft": 0, "hard": 1, "none": 2, "soft_delayed": 3}
SURROGATES = {"triangle": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3, "boxcar": 4}

SOFT = tl.constexpr(RESETS["soft"])
HARD = tl.constexpr(RESETS["hard"])
SOFT_DELAYED = tl.constexpr(RESETS["soft_delayed"])
TRIANGLE = tl.constexpr(SURROGATES["triangle"])
ATAN = tl.constexpr(SURROGATES["atan"])
SIGMOID = tl.constexpr(SURROGATES["sigmoid"])
FAST_SIGMOID = tl.constexpr(SURROGATES["fast_sigmoid"])
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def spike(h, threshold):
    """1 above the threshold, 0 at or below it, NaN for a NaN."""
    return tl.where(h > threshold, 1.0, tl.where(h == h, 0.0, h))


@triton.jit
def charge(v, x, threshold, leak, RESET: tl.constexpr):
    """h from the membrane before the step (None: there is none yet) and the current."""
    h = x.to(tl.float32)
    if v is not None:
        # A fused product with a zero is a product rounded on its own: no compiler may contract it
        # with the sum, whatever options Triton or torch.compile pass. The other products of a step
        # are exact (a spike is 0 or 1), so that contracting them changes nothing.
        h = tl.fma(leak, v, 0.0) + h
        if RESET == SOFT_DELAYED:
            h -= threshold * spike(v, threshold)
    return h


@triton.jit
def discharge(h, threshold, v_reset, RESET: tl.constexpr):
    """v: the membrane h after its own spike."""
    v = h
    if RESET == SOFT:
        v = tl.where(h > threshold, h - threshold, h)
    elif RESET == HARD:
        v = tl.where(h > threshold, v_reset, h)
    return v


@triton.jit
def discharge_again(h, threshold, v_reset, RESET: tl.constexpr):
    """`discharge`, its subtraction in other words, so that the compiler computes it once more.

    It would else keep every v in a register until the backward pass comes to it (T = 8, bfloat16,
    sm_90: 186 registers instead of 167).
    """
    if RESET == SOFT:
        v = h - threshold * spike(h, threshold)
    else:
        v = discharge(h, threshold, v_reset, RESET)
    return v


@triton.jit
def number(value):
    """v_reset or a surrogate's scale: torch.compile passes numbers as float64."""
    return tl.cast(value, tl.float32)


@triton.jit
def surrogate(z, scale, KIND: tl.constexpr):
    """f(z) = ds/dz at z = h / threshold - 1."""
    if KIND == TRIANGLE:
        f = scale * tl.maximum(1.0 - tl.abs(z), 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == ATAN:
        y = (HALF_PI * scale) * z
        f = (0.5 * scale) / (1.0 + y * y)
    elif KIND == SIGMOID:
        e = tl.exp(-(scale * tl.abs(z)))
        d = 1.0 + e
        f = (scale * e) / (d * d)
    elif KIND == FAST_SIGMOID:
        d = 1.0 + scale * tl.abs(z)
        f = 1.0 / (d * d)
    else:
        f = tl.where(tl.abs(z) <= scale, 0.5 / scale, 0.0)
    return f


@triton.jit
def backward_step(
    g,  # gradient of this timestep's spike
    h,
    before,  # the membrane this timestep started from, or None: 0
    g_v,  # gradient of the membrane after this timestep
    g_h,  # gradient of h one timestep later
    threshold,
    leak,
    inverse,  # 1 / threshold
    v_reset,
    scale,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """-> gradients of h (that is, of the current), of the membrane before and of the threshold

    That of leak is the first one times `before`.
    """
    if not DETACH:
        if RESET == SOFT:
            g -= threshold * g_v
        elif RESET == HARD:
            g += (v_reset - h) * g_v
        elif RESET == SOFT_DELAYED:
            g -= threshold * g_h
    u = h * inverse
    g_u = g * (surrogate(u - 1.0, scale, SURROGATE) * inverse)
    g_threshold = -(g_u * u)
    if RESET == SOFT:
        g_threshold -= spike(h, threshold) * g_v
    elif RESET == HARD:
        g_v = tl.where(h > threshold, 0.0, g_v)
    g_now = g_u + g_v
    if before is not None and RESET == SOFT_DELAYED:
        g_threshold -= spike(before, threshold) * g_now
    return g_now, leak * g_now, g_threshold
