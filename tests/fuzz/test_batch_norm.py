"""BatchNorm and LIF in one: the CPU kernels of any shape, layout and option.

Spikes are the reference's on the normalised current, by ==; gradients are near those of float64,
and the same bits by every instruction set and number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from iirsnn.ops import batch_norm, reference  # noqa: F401  # defines the ops
from tests.fuzz.settings import fuzzed
from tests.fuzz.test_lif import levels
from tests.lif_cases import laid_out

forward = torch.ops.iirsnn.bn_lif_forward
backward = torch.ops.iirsnn.bn_lif_backward
EPS = 1e-5

# Of a gradient of float32, relative to the largest one of its tensor: roundings of T currents and
# of sums, more of the steepest surrogate.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Call:
    """shape: [T, B, C, ...] of x; what is None or scalar where it says so."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    affine: bool
    channels: bool
    how: tuple[str, float, bool, str, float]  # reset, v_reset, detach, surrogate, scale
    threads: int
    seed: int

    def has_variance(self) -> bool:
        """Whether there is more than one value of a channel."""
        return math.prod(self.shape) > self.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """x, weight, bias, threshold, leak, grad_s."""
        rng = torch.Generator().manual_seed(self.seed)
        count = self.shape[2]
        x = (2 * torch.randn(self.shape, generator=rng) + 0.5).to(self.dtype)
        grad_s = torch.randn(self.shape, generator=rng).to(self.dtype)
        weight = bias = None
        if self.affine:
            weight = 1 + 0.3 * torch.rand(count, generator=rng)
            bias = 0.3 * torch.rand(count, generator=rng)
        some = count if self.channels else 1
        threshold = 0.6 + 0.3 * torch.rand(some, generator=rng)
        leak = 0.7 + 0.3 * torch.rand(some, generator=rng)
        return laid_out(x, self.layout), weight, bias, threshold, leak, grad_s


@st.composite
def calls(draw, dtypes=(torch.float32, torch.bfloat16), small=False) -> Call:
    """small: of few neurons, for what interprets each operation."""
    timesteps, images = draw(st.integers(1, 12)), draw(st.integers(1, 3 if small else 9))
    channels = draw(st.sampled_from((1, 2, 3, 5, 8, 16, 21, 32, 64)[: 5 if small else None]))
    sides = draw(st.lists(st.integers(1, 3 if small else 9), max_size=3))
    if not small and draw(st.integers(0, 9)) == 0:  # enough for several threads
        timesteps, sides = draw(st.integers(1, 3)), [draw(st.integers(20, 40)) for _ in range(2)]
    layouts = ["contiguous", "contiguous", "same", "channels_last"]
    surrogate = draw(st.sampled_from(tuple(reference.SURROGATES)))
    return Call(
        (timesteps, images, channels, *sides),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(layouts if sides else layouts[:-1])),
        draw(st.booleans()),
        draw(st.booleans()),
        (
            draw(st.sampled_from(reference.RESETS)),
            draw(st.sampled_from((0.0, -0.25, 0.5))),
            draw(st.booleans()),
            surrogate,
            reference.SURROGATES[surrogate][1],
        ),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


def in_float64(call: Call) -> tuple[Tensor, list[Tensor | None]]:
    """Spikes and gradients by torch's batch norm, the reference and autograd."""
    *tensors, grad_s = call.tensors()
    # contiguous: of one image in channels_last torch's batch norm gives another gradient
    wide = [None if t is None else t.double().contiguous().requires_grad_() for t in tensors]
    current = F.batch_norm(wide[0].flatten(0, 1), None, None, *wide[1:3], training=True, eps=EPS)
    current = current.unflatten(0, call.shape[:2])
    s, _ = reference.lif_forward(current, *wide[3:], None, *call.how, False)
    s.backward(grad_s.double())
    return s.detach(), [None if t is None else t.grad for t in wide]


#: All values of a channel are the same: its currents are the small differences of large numbers.
NO_VARIANCE = Call(
    *((4, 1, 1), torch.float32, "same", True, False, ("soft", 0.0, False, "atan", 2.0), 1, 3)
)


def check(
    call: Call, forward: Any, backward: Any, first: list[Tensor] | None = None
) -> list[Tensor]:
    """s, mean, var and gradients of a call by these ops; as `first`, or as they should be."""
    *tensors, grad_s = call.tensors()
    x, weight, bias, threshold, leak = tensors
    s, mean, var, rstd = forward(*tensors, EPS, *call.how)
    found = [s, mean, var, *backward(grad_s, x, mean, rstd, *tensors[1:], *call.how)]
    if first is not None:
        assert all(torch.equal(got, other) for got, other in zip(found, first, strict=True))
        return first

    lined = (-1, *[1] * (x.dim() - 3))
    gain = rstd if weight is None else rstd * weight
    shift = (0.0 if bias is None else bias) - mean * gain
    scaled = x.float() * gain.view(lined)
    current = (scaled + shift.view(lined)).to(call.dtype)
    wanted, _ = reference.lif_forward(current, threshold, leak, None, *call.how, False)
    assert torch.equal(s, wanted)
    assert s.stride() == reference.empty_spikes(x).stride()

    # Rounding moves the edge of a boxcar, and a current of bfloat16 by more than any tolerance.
    if call.dtype != torch.float32 or call.how[3] == "boxcar":
        return found
    # Where a channel's values are nearly the same, float32 keeps few digits of their differences.
    if scaled.abs().max() > 100:
        return found
    wide_s, wide = in_float64(call)
    if not torch.equal(s.double(), wide_s):
        return found  # a spike that rounding moved has other gradients
    for got, want in zip(found[3:], wide, strict=True):
        if want is not None:
            largest = max(1.0, float(want.abs().max()))
            terms = 1 if got.dim() > 1 else math.sqrt(x.numel() / got.numel())
            atol = TOLERANCE * largest * terms
            torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=atol)
    return found


@fuzzed(few=40, share=0.09)
@given(calls())
@example(NO_VARIANCE)
def test_a_norm_and_its_neurons(call):
    if call.has_variance():
        found = None
        for _ in levels():
            for threads in {1, call.threads}:
                torch.set_num_threads(threads)
                found = check(call, forward, backward, found)
