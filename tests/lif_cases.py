"""The cases every implementation of the LIF ops is tested on, and what each must satisfy.

An implementation is four callables with the arguments of the ops of iirsnn/ops/lif.py. Forward is
compared with the reference by ==. Backward is compared with the reference's autograd in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iirsnn.ops import reference

V_RESET = 0.125

# Largest error of a gradient, relative and absolute. grad_x: T <= 17 roundings of float32 numbers
# near 1, then one rounding to the dtype (half a unit in the last place).
TOLERANCE = {
    torch.float32: (1e-5, 2e-6),
    torch.float16: (2.0**-11 + 1e-5, 2e-6),
    torch.bfloat16: (2.0**-8 + 1e-5, 2e-6),
}
# Gradients of parameters: a sum of that many float32 terms near 1, whose errors are random.
SUM_TOLERANCE = (1e-5, 2e-6)  # the absolute one times the root of the number of terms


@dataclass(frozen=True)
class Case:
    """One way to call the ops. shape: [T, *neurons] of x."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # channels_last, transposed, strided, same, unaligned
    dtype: torch.dtype = torch.float32
    reset: str = "soft"
    detach: bool = True
    surrogate: str = "triangle"
    threshold_channels: bool = False
    leak_channels: bool = False
    v0: bool = False
    grad_v: bool = False
    grad_s: str = "dense"  # same: one gradient for every timestep; contiguous: in another order
    need_parameter_grads: bool = True


def _cases() -> list[Case]:
    plain = [
        Case("T=1", (1, 2, 8, 9, 8)),
        Case("T=1 odd N", (1, 3, 5, 7, 11)),
        Case("T=1 bfloat16", (1, 2, 8, 9, 16), dtype=torch.bfloat16),
        Case("T=1 float16 odd N", (1, 13, 11), dtype=torch.float16),
        Case("T=1 v0", (1, 2, 70), v0=True),
        Case("T=1 grad_v", (1, 2, 70), grad_v=True),
        Case("T=1 channels", (1, 2, 6, 4, 4), threshold_channels=True),
        Case(
            "T=1 channels, channels_last",
            (1, 2, 6, 5, 5),
            "channels_last",
            threshold_channels=True,
        ),
        Case("T=2", (2, 4, 160)),
        Case("T=4 no parameter gradients", (4, 4, 160), need_parameter_grads=False),
        Case("T=5", (5, 4, 256)),
        Case("T=8", (8, 4, 40)),
        Case("T=9", (9, 3, 36)),
        Case("T=17", (17, 2, 36), v0=True, grad_v=True),
        Case("one neuron", (3, 1, 1)),
        Case("no neuron dimension", (3,)),
        Case("below one vector", (5, 3)),
        Case("odd N", (5, 3, 5, 37)),
        Case("empty", (5, 0, 4)),
        Case("channels_last", (5, 2, 6, 5, 4), "channels_last"),
        Case("transposed, grad_s contiguous", (3, 6, 20), "transposed", grad_s="contiguous"),
        Case("strided time", (5, 4, 33), "strided"),
        Case("unaligned pointer", (5, 4, 32), "unaligned"),
        Case("same current", (5, 4, 32), "same"),
        Case("same current, T=11", (11, 4, 32), "same"),
        Case("same gradient", (5, 4, 32), grad_s="same"),
        Case("same gradient, T=10", (10, 4, 32), grad_s="same"),
        Case("float16", (4, 3, 77), dtype=torch.float16, v0=True, grad_v=True),
        Case("bfloat16", (5, 4, 256), dtype=torch.bfloat16),
        Case("bfloat16 T=8 v0", (8, 2, 64), dtype=torch.bfloat16, v0=True, grad_v=True),
    ]
    both = {"threshold_channels": True, "leak_channels": True}
    channels = [
        Case("channels, wide rows", (3, 2, 3, 4, 9), **both),
        Case("channels, odd rows", (3, 2, 5, 7, 7), **both),
        Case("channels, channels_last", (3, 2, 6, 5, 4), "channels_last", **both, v0=True),
        Case("channels, fully connected", (4, 9, 70), **both),
        Case("channels, whole bytes", (3, 9, 24), **both),
        Case("channels, T=9", (9, 2, 8, 2, 4), **both),
        Case("channels, threshold only", (3, 2, 5, 12), threshold_channels=True),
        Case("channels, leak only", (3, 2, 5, 12), leak_channels=True, dtype=torch.bfloat16),
    ]
    resets = [
        Case(
            f"{reset}{'' if detach else ' attached'}{' v0' if v0 else ''}",
            (4, 2, 67),
            reset=reset,
            detach=detach,
            v0=v0,
            grad_v=v0,
        )
        for reset in reference.RESETS
        for detach in (True, False)
        for v0 in (False, True)
        if (reset, detach) != ("none", False) and (reset, detach, v0) != ("soft", True, False)
    ]
    surrogates = [
        Case(f"{name} T={timesteps}", (timesteps, 3, 43), surrogate=name)
        for name in reference.SURROGATES
        for timesteps in (1, 3)
        if name != "triangle"
    ]
    long_delayed = Case("soft_delayed attached T=10", (10, 2, 40), reset="soft_delayed")
    return [*plain, *channels, *resets, *surrogates, replace(long_delayed, detach=False, v0=True)]


CASES = _cases()
FEW = [c for c in CASES if c.name in ("T=1", "T=5", "T=17", "bfloat16", "channels, odd rows")]


@dataclass
class Implementation:
    """Ops under test, and where their tensors live."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    packed: Callable[..., Any]
    unpack: Callable[..., Any]
    device: str = "cpu"
    truncates: bool = False  # cuts float32 to bfloat16 off instead of rounding it

    @staticmethod
    def of(prefix: str, device: str = "cpu", truncates: bool = False) -> Implementation:
        """The ops iirsnn::<prefix>lif_forward, ..."""
        names = ("lif_forward", "lif_backward", "lif_packed", "unpack_spikes")
        ops = (getattr(torch.ops.iirsnn, prefix + name) for name in names)
        return Implementation(*ops, device, truncates)


def laid_out(a: Tensor, layout: str) -> Tensor:
    """a [T, *neurons] with the same values in another layout."""
    if layout == "channels_last":
        order = (0, 1, *range(3, a.dim()), 2)
        return a.permute(order).contiguous().permute(0, 1, a.dim() - 1, *range(2, a.dim() - 1))
    if layout == "transposed":
        return a.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        wider = a.new_full((a.shape[0], 2, *a.shape[1:]), math.nan)
        wider[:, 0] = a
        return wider[:, 0]
    if layout == "unaligned":
        return torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape)
    if layout == "same":
        return a[:1].expand(a.shape)
    return a


@dataclass
class Inputs:
    x: Tensor
    threshold: Tensor
    leak: Tensor
    v0: Tensor | None
    grad_s: Tensor
    grad_v: Tensor | None

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if a is None else a.to(device) for a in vars(self).values()))


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Tensors on the CPU. Values are such that about a third of the neurons fire."""
    rng = torch.Generator().manual_seed(seed)
    shape = case.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    def parameter(centre: float, per_channel: bool) -> Tensor:
        return centre + 0.05 * normal(shape[2] if per_channel else 1)

    x = laid_out((0.4 + 0.8 * normal(*shape)).to(case.dtype), case.layout)
    grad_s = normal(*shape).to(case.dtype)
    if case.grad_s != "contiguous":
        grad_s = laid_out(grad_s, "same" if case.grad_s == "same" else case.layout)
        if case.layout == "same":
            grad_s = normal(*shape).to(case.dtype)
    return Inputs(
        x,
        parameter(0.9, case.threshold_channels),
        parameter(0.8, case.leak_channels),
        laid_out(normal(1, *shape[1:]), case.layout)[0] if case.v0 else None,
        grad_s,
        normal(*shape[1:]) if case.grad_v else None,
    )


def options(case: Case) -> tuple[Any, ...]:
    scale = reference.SURROGATES[case.surrogate][1]
    return case.reset, V_RESET, case.detach, case.surrogate, scale


def check_forward(case: Case, ops: Implementation) -> None:
    """Spikes and last membrane equal the reference's; layout and dtype are those of x."""
    a = inputs(case)
    on = a.to(ops.device)
    arguments = (a.x, a.threshold, a.leak, a.v0, *options(case))
    s_ref, v_ref = reference.lif_forward(*arguments, True)
    arguments = (on.x, on.threshold, on.leak, on.v0, *options(case))
    # Up to two timesteps both ways: a kernel without v differs by one store, but at T = 1.
    for return_v in (True, False) if case.shape[0] <= 2 else (True,):
        s, v = ops.forward(*arguments, return_v)
        assert s.dtype == case.dtype
        assert s.stride() == reference.empty_spikes(a.x).stride()
        assert torch.equal(s.cpu(), s_ref)
        if return_v:
            assert v.dtype == torch.float32
            assert v.stride() == a.x.stride()[1:]
            assert torch.equal(v.cpu(), v_ref)
        else:
            assert v.numel() == 0
    if s_ref.numel() > 100:
        assert 0.1 < s_ref.float().mean() < 0.9


def reference_gradients(case: Case, a: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients of x, threshold, leak and v0 by autograd through the reference in float64."""
    x, threshold, leak, v0 = (
        None if t is None else t.double().requires_grad_() for t in (a.x, a.threshold, a.leak, a.v0)
    )
    s, v = reference.lif_forward(x, threshold, leak, v0, *options(case), True)
    outputs, grads = [s], [a.grad_s.double()]
    if a.grad_v is not None:
        outputs, grads = [s, v], [*grads, a.grad_v.double()]
    wanted = [t for t in (x, threshold, leak, v0) if t is not None]
    got = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    return (*got, None) if v0 is None else got


def assert_near(got: Tensor, wanted: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=rtol, atol=atol)


def check_backward(case: Case, ops: Implementation) -> None:
    """Every gradient is near the float64 one; what was not asked for is empty."""
    a = inputs(case)
    on = a.to(ops.device)
    grad_x, grad_threshold, grad_leak, grad_v0 = ops.backward(
        *(on.grad_s, on.grad_v, on.x, on.threshold, on.leak, on.v0),
        *options(case),
        case.need_parameter_grads,
    )
    x_ref, threshold_ref, leak_ref, v0_ref = reference_gradients(case, a)
    assert grad_x.dtype == case.dtype
    assert grad_x.stride() == reference.empty_spikes(a.x).stride()
    rtol, atol = TOLERANCE[case.dtype]
    cut = ops.truncates and case.dtype == torch.bfloat16
    assert_near(grad_x, x_ref, 2 * rtol if cut else rtol, atol)
    if case.need_parameter_grads:
        for got, wanted, p in (
            (grad_threshold, threshold_ref, a.threshold),
            (grad_leak, leak_ref, a.leak),
        ):
            if wanted is None:
                wanted = torch.zeros_like(p)
            assert got.shape == p.shape
            rtol, atol = SUM_TOLERANCE
            terms = max(1, a.x.numel() // p.numel())
            assert_near(got, wanted, rtol, atol * math.sqrt(terms))
    else:
        assert grad_threshold.numel() == grad_leak.numel() == 0
    if v0_ref is None:
        assert grad_v0.numel() == 0
    else:
        assert_near(grad_v0, v0_ref, *TOLERANCE[torch.float32])


def check_packed(case: Case, ops: Implementation) -> None:
    """Bits equal the reference's, padding included, and unpack to the spikes in their layout."""
    a = inputs(case)
    on = a.to(ops.device)
    how = (case.reset, V_RESET)
    return_v = case.v0
    bits_ref, v_ref = reference.lif_packed(a.x, a.threshold, a.leak, a.v0, *how, return_v)
    bits, v = ops.packed(on.x, on.threshold, on.leak, on.v0, *how, return_v)
    assert torch.equal(bits.cpu(), bits_ref)
    assert torch.equal(v.cpu(), v_ref)
    s_ref, _ = reference.lif_forward(a.x, a.threshold, a.leak, a.v0, *options(case), False)
    stride = reference.empty_spikes(a.x).stride()
    s = ops.unpack(bits, list(a.x.shape), list(stride), case.dtype)
    assert s.dtype == case.dtype
    assert s.stride() == stride
    assert torch.equal(s.cpu(), s_ref)


def check_special_values(ops: Implementation, timesteps: int) -> None:
    """NaN gives a NaN spike, +inf fires, -inf and the threshold itself do not; packed, NaN is 0."""
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 1.0, 1.0 + 2.0**-23, -0.0]).expand(timesteps, 6).contiguous()
    one = torch.ones(1)
    arguments = (x, one, one, None, "hard", 0.0, True, "triangle", 0.3, True)
    s_ref, v_ref = reference.lif_forward(*arguments)
    on = [a.to(ops.device) if isinstance(a, Tensor) else a for a in arguments]
    s, v = ops.forward(*on)
    assert torch.equal(s.cpu().nan_to_num(7.0), s_ref.nan_to_num(7.0))
    assert s_ref[0].nan_to_num(7.0).tolist() == [7.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert torch.equal(v.cpu().nan_to_num(7.0), v_ref.nan_to_num(7.0))
    bits, _ = ops.packed(*on[:6], False)
    assert torch.equal(bits.cpu(), reference.pack(s_ref.nan_to_num(0.0)))


def check_split(ops: Implementation, reset: str) -> None:
    """Two runs, the first one's membrane passed on, equal the whole run."""
    a = inputs(Case("split", (11, 2, 40), reset=reset)).to(ops.device)
    how = (reset, V_RESET, True, "triangle", 0.3, True)
    whole, v_whole = ops.forward(a.x, a.threshold, a.leak, None, *how)
    first, v = ops.forward(a.x[:4], a.threshold, a.leak, None, *how)
    second, v = ops.forward(a.x[4:], a.threshold, a.leak, v, *how)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v, v_whole)


def check_repeats(ops: Implementation) -> None:
    """The gradients of parameters repeat bit for bit."""
    case = Case("repeats", (3, 4, 6, 11, 11), threshold_channels=True, leak_channels=True)
    a = inputs(case).to(ops.device)
    arguments = (a.grad_s, None, a.x, a.threshold, a.leak, None, *options(case), True)
    first, second = ops.backward(*arguments), ops.backward(*arguments)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def check_refused(ops: Implementation) -> None:
    """Wrong dtype, T = 0 and unknown names raise."""
    one = torch.ones(1, device=ops.device)
    x = torch.ones(2, 3, device=ops.device)

    def call(x: Tensor, reset: str = "soft", surrogate: str = "triangle") -> None:
        s, _ = ops.forward(x, one, one, None, reset, 0.0, True, surrogate, 0.3, False)
        ops.backward(s, None, x, one, one, None, reset, 0.0, True, surrogate, 0.3, False)

    call(x)
    for error, arguments in (
        (TypeError, (x.int(),)),
        (ValueError, (x[:0],)),
        (ValueError, (x, "sharp")),
        (ValueError, (x, "soft", "spline")),
    ):
        try:
            call(*arguments)
        except error:
            continue
        raise AssertionError(f"no {error.__name__} for {arguments[1:] or arguments[0].dtype}")


def named(cases: list[Any]) -> Any:
    """A test for each case, named after it."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def exact_terms(
    size: tuple[int, ...], last: bool = False, largest: int = 2**12
) -> tuple[Tensor, Tensor]:
    """x [T, B, C, H, W] and grad_s: with threshold, leak and scale 1, quarters and whole numbers.

    Of a detached soft reset and the triangle, float32 holds every term of a parameter's gradient.
    """
    rng = torch.Generator().manual_seed(size[0])

    def laid(t: Tensor) -> Tensor:
        if last:
            t = t.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, size[:2])
        return t

    x = torch.randint(0, 6, size, generator=rng) / 4
    return laid(x), laid(torch.randint(1, largest, size, generator=rng).float())
