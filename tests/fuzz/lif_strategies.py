"""Calls of the LIF ops, and what every backend must make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from iirsnn.ops import reference
from tests.lif_cases import Implementation, laid_out

#: Numbers that rounding, comparing and resetting find hard; h == threshold among them.
HARD = (0.0, -0.0, 1.0, 1.0 + 2.0**-23, -1e30, 3e38, 1e-42, math.inf, -math.inf, math.nan)

# Of a gradient, relative to the largest one of the call: the roundings of up to 24 timesteps in
# another order, and one rounding to the dtype.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 2.0**-11 + 1e-4,
    torch.bfloat16: 2.0**-8 + 1e-4,
}


@dataclass(frozen=True)
class Call:
    """Arguments of lif_forward and lif_backward; a seed instead of tensors, so that it prints."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    threshold_channels: bool
    leak_channels: bool
    v0: bool
    grad_v: bool
    hard: bool
    how: tuple[str, float, bool, str, float]  # reset, v_reset, detach, surrogate, scale
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, threshold, leak, v0."""
        rng = torch.Generator().manual_seed(self.seed)
        acc = reference.acc_dtype(self.dtype)
        x = 0.4 + 0.8 * torch.randn(self.shape, generator=rng, dtype=acc)
        if self.hard and x.numel():
            at = torch.randint(0, x.numel(), (5,), generator=rng)
            which = torch.randint(0, len(HARD), (5,), generator=rng)
            x.view(-1)[at] = torch.tensor(HARD, dtype=acc)[which]

        def parameter(centre: float, per_channel: bool) -> Tensor:
            count = self.shape[2] if per_channel else 1
            return centre + 0.1 * torch.rand(count, generator=rng, dtype=acc)

        channels = self.threshold_channels or self.leak_channels
        threshold, leak = parameter(0.9, self.threshold_channels), parameter(0.7, channels)
        if channels and not self.threshold_channels:
            threshold = threshold.expand(self.shape[2]).contiguous()
        v0 = None
        if self.v0:
            v0 = torch.randn(self.shape[1:], generator=rng, dtype=acc)
            v0 = laid_out(v0[None], self.layout)[0]
        return laid_out(x.to(self.dtype), self.layout), threshold, leak, v0

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """grad_s, grad_v."""
        rng = torch.Generator().manual_seed(self.seed + 1)
        acc = reference.acc_dtype(self.dtype)
        grad_s = torch.randn(self.shape, generator=rng, dtype=acc).to(self.dtype)
        grad_v = torch.randn(self.shape[1:], generator=rng, dtype=acc)
        return grad_s, grad_v if self.grad_v else None


@st.composite
def calls(draw, dtypes=tuple(TOLERANCE), hard=True, most=400) -> Call:
    timesteps = draw(st.integers(1, 24))
    neurons = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda n: math.prod(n) <= most))
    if len(neurons) < 2 and draw(st.booleans()):
        neurons.append(draw(st.integers(1, most)))
    channels = len(neurons) >= 2 and neurons[1] > 0
    layouts = ["contiguous", "same", "strided", "unaligned"]
    layouts += ["channels_last"] * (len(neurons) > 2)
    scale = draw(st.sampled_from((None, 0.25, 1.0, 3.0)))
    surrogate = draw(st.sampled_from(tuple(reference.SURROGATES)))
    return Call(
        (timesteps, *neurons),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(layouts)),
        channels and draw(st.booleans()),
        channels and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        hard and draw(st.booleans()),
        (
            draw(st.sampled_from(reference.RESETS)),
            draw(st.sampled_from((0.0, -0.25, 0.5))),
            draw(st.booleans()),
            surrogate,
            scale or reference.SURROGATES[surrogate][1],
        ),
        draw(st.integers(0, 2**16)),
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Equal by ==, with NaN where the other has it."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def check_forward(call: Call, ops: Implementation) -> None:
    """Spikes, membrane and bits are the reference's."""
    arguments = call.tensors()
    s_ref, v_ref = reference.lif_forward(*arguments, *call.how, True)
    s, v = ops.forward(*arguments, *call.how, True)
    assert s.stride() == reference.empty_spikes(arguments[0]).stride()
    assert same(s, s_ref)
    assert same(v, v_ref)
    if not s_ref.isnan().any():
        bits, v = ops.packed(*arguments, *call.how[:2], True)
        assert torch.equal(bits, reference.pack(s))
        assert same(v, v_ref)
        shape = list(s.shape), list(s.stride())
        assert torch.equal(ops.unpack(bits, *shape, call.dtype), s)


def backward(call: Call, ops: Implementation) -> tuple[Any, ...]:
    """The gradients of x, threshold, leak and v0."""
    return ops.backward(*call.gradients(), *call.tensors(), *call.how, True)


def check_backward(call: Call, ops: Implementation) -> None:
    """Gradients are near those of the reference's autograd, in the dtype that membranes have."""
    x, threshold, leak, v0 = call.tensors()
    acc = reference.acc_dtype(call.dtype)
    leaves = [None if t is None else t.to(acc).requires_grad_() for t in (x, threshold, leak, v0)]
    outputs = reference.lif_forward(*leaves, *call.how, True)
    grad_s, grad_v = call.gradients()
    grad_v = torch.zeros_like(outputs[1]) if grad_v is None else grad_v
    wanted = torch.autograd.grad(
        outputs,
        [t for t in leaves if t is not None],
        [grad_s.to(acc), grad_v],
        allow_unused=True,
    )
    largest = max([1.0, *(float(w.abs().max()) for w in wanted if w is not None and w.numel())])
    for got, want in zip(backward(call, ops), wanted, strict=False):
        want = torch.zeros_like(got) if want is None else want
        # terms of a parameter's sum, each with an error of its own
        terms = max(1, math.prod(call.shape)) if got.dim() == 1 else 1
        atol = TOLERANCE[call.dtype] * largest * math.sqrt(terms)
        torch.testing.assert_close(got.to(acc), want, rtol=TOLERANCE[call.dtype], atol=atol)
