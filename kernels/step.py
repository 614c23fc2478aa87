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
def discharge(h, threshold, RESET: tl.constexpr, V_RESET: tl.constexpr):
    """v: the membrane h after its own spike."""
    v = h
    if RESET == SOFT:
        v = tl.where(h > threshold, h - threshold, h)
    elif RESET == HARD:
        v = tl.where(h > threshold, tl.full(h.shape, V_RESET, tl.float32), h)
    return v


@triton.jit
def discharge_again(h, threshold, RESET: tl.constexpr, V_RESET: tl.constexpr):
    """`discharge`, its subtraction in other words, so that the compiler computes it once more.

    It would else keep every v in a register until the backward pass comes to it (T = 8, bfloat16,
    sm_90: 186 registers instead of 167).
    """
    if RESET == SOFT:
        v = h - threshold * spike(h, threshold)
    else:
        v = discharge(h, threshold, RESET, V_RESET)
    return v


@triton.jit
def surrogate(z, KIND: tl.constexpr, SCALE: tl.constexpr):
    """f(z) = ds/dz at z = h / threshold - 1."""
    if KIND == TRIANGLE:
        f = SCALE * tl.maximum(1.0 - tl.abs(z), 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == ATAN:
        y = (HALF_PI * SCALE) * z
        f = (0.5 * SCALE) / (1.0 + y * y)
    elif KIND == SIGMOID:
        e = tl.exp(-(SCALE * tl.abs(z)))
        d = 1.0 + e
        f = (SCALE * e) / (d * d)
    elif KIND == FAST_SIGMOID:
        d = 1.0 + SCALE * tl.abs(z)
        f = 1.0 / (d * d)
    else:
        f = tl.where(tl.abs(z) <= SCALE, 0.5 / SCALE, 0.0)
    return f
