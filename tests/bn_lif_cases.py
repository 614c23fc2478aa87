"""The cases every GPU implementation of the bn_lif ops is tested on, and what each must satisfy.

An implementation is callables with the arguments of the ops of iirsnn/ops/batch_norm.py. Spikes are
compared by == with those of the reference on the normalised current, gradients with float64's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iirsnn.ops import reference

V_RESET, EPS = 0.125, 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BnCase:
    """One way to call the ops. shape: [T, B, C, ...] of x."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # channels_last, same
    dtype: torch.dtype = torch.float32
    reset: str = "soft"
    detach: bool = True
    surrogate: str = "triangle"
    channels: bool = False  # threshold and leak a channel
    affine: bool = True
    grad_s: str = "dense"  # same: one gradient for every timestep


def _cases() -> list[BnCase]:
    last = "channels_last"
    shapes = [
        BnCase("T=1", (1, 3, 6, 8, 8)),
        BnCase("T=1 channels_last", (1, 3, 16, 5, 5), last, channels=True),
        BnCase("T=1 bfloat16", (1, 3, 6, 4, 8), dtype=torch.bfloat16),
        BnCase("T=1 float16 channels_last", (1, 3, 24, 5, 5), last, torch.float16),
        BnCase("T=1 odd", (1, 3, 5, 7, 5), affine=False),
        BnCase("T=2 not affine", (2, 3, 6, 8, 8), affine=False),
        BnCase("T=5", (5, 3, 6, 8, 8), channels=True),
        BnCase("T=5 channels_last", (5, 3, 32, 3, 3), last, channels=True),
        BnCase("T=5 bfloat16", (5, 2, 5, 8, 8), dtype=torch.bfloat16, channels=True),
        BnCase("T=3 bfloat16 channels_last", (3, 2, 16, 4, 3), last, torch.bfloat16),
        BnCase("T=8", (8, 2, 3, 4, 5)),
        BnCase("T=9", (9, 2, 4, 4, 4)),
        BnCase("T=18 bfloat16", (18, 2, 3, 4, 4), dtype=torch.bfloat16),
        BnCase("T=18 channels_last", (18, 2, 8, 3, 3), last),
        BnCase("odd rows", (3, 3, 5, 7, 7), channels=True),
        BnCase("odd channels, channels_last", (3, 2, 21, 3, 3), last, channels=True),
        BnCase("short rows", (3, 9, 40, 2, 2)),
        BnCase("one channel", (2, 7, 1, 9, 5)),
        BnCase("one channel, many blocks", (1, 5, 1, 32, 64)),
        BnCase("no image", (3, 70, 48)),
        BnCase("three dimensions", (2, 2, 3, 4, 3, 5)),
        BnCase("same input", (5, 3, 6, 4, 4), "same"),
        BnCase("same gradient", (5, 3, 6, 4, 4), grad_s="same"),
    ]
    resets = [
        BnCase(
            f"{reset}{'' if detach else ' attached'}", (4, 2, 3, 4, 6), reset=reset, detach=detach
        )
        for reset in reference.RESETS
        for detach in (True, False)
        if (reset, detach) not in (("soft", True), ("none", False))
    ]
    surrogates = [
        BnCase(f"{name} T={t}", (t, 2, 4, 3, 4), surrogate=name, channels=True)
        for name in reference.SURROGATES
        for t in (1, 3)
        if name != "triangle"
    ]
    return [*shapes, *resets, *surrogates]


BN_CASES = _cases()
BN_FEW = [c for c in BN_CASES if c.name in ("T=1", "T=5 bfloat16", "T=5 channels_last", "T=9")]


def most_are_slow(cases: list[Any], few: list[Any]) -> list[Any]:
    """For pytest.mark.parametrize: those that are not among the few run in `make test-slow`."""
    return [case if case in few else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@dataclass
class BnImplementation:
    """Ops under test, and where their tensors live."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    moments: Callable[..., Any]
    fire: Callable[..., Any]
    gradient_sums: Callable[..., Any]
    grad_x: Callable[..., Any]
    device: str = "cpu"
    truncates: bool = False  # cuts float32 to bfloat16 off instead of rounding it

    @staticmethod
    def of(prefix: str, device: str = "cpu", truncates: bool = False) -> BnImplementation:
        """The ops iirsnn::<prefix>bn_lif_forward, ..."""
        names = ("forward", "backward", "moments", "fire", "gradient_sums", "grad_x")
        ops = (getattr(torch.ops.iirsnn, f"{prefix}bn_lif_{name}") for name in names)
        return BnImplementation(*ops, device, truncates)


@dataclass
class BnInputs:
    x: Tensor
    parameters: tuple[Tensor | None, ...]  # weight, bias, threshold, leak
    grad_s: Tensor

    def to(self, device: str) -> BnInputs:
        moved = tuple(p if p is None else p.to(device) for p in self.parameters)
        return BnInputs(self.x.to(device), moved, self.grad_s.to(device))


def bn_inputs(case: BnCase, seed: int = 0) -> BnInputs:
    """A current of mean 1/2 and deviation 2, on the CPU."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    def laid(t: Tensor, layout: str) -> Tensor:
        t = t.to(case.dtype)
        if layout == "channels_last":
            order = (0, 1, *range(3, t.dim()), 2)
            return t.permute(order).contiguous().permute(0, 1, t.dim() - 1, *range(2, t.dim() - 1))
        return t[:1].expand(t.shape) if layout == "same" else t

    count = case.shape[2]
    x = laid(2 * normal(*case.shape) + 0.5, case.layout)
    grad_s = laid(normal(*case.shape), case.layout if case.grad_s == "dense" else "same")
    if case.layout == "same":
        grad_s = normal(*case.shape).to(case.dtype)
    weight, bias = (1 + 0.3 * normal(count), 0.3 * normal(count)) if case.affine else (None, None)
    threshold, leak = torch.tensor([0.7]), torch.tensor([0.8])
    if case.channels:
        threshold, leak = torch.linspace(0.6, 0.9, count), torch.linspace(1.0, 0.7, count)
    return BnInputs(x, (weight, bias, threshold, leak), grad_s)


def bn_options(case: BnCase) -> tuple[Any, ...]:
    scale = reference.SURROGATES[case.surrogate][1]
    return case.reset, V_RESET, case.detach, case.surrogate, scale


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel in float64."""
    wide = x.double().transpose(0, 2).flatten(1)
    return wide.mean(1), wide.var(1, correction=0)


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, bias: Any) -> Tensor:
    """The current as a BatchNorm in float32 would write it, every operation rounded on its own."""
    lined = (-1, *[1] * (x.dim() - 3))
    gain = rstd if weight is None else rstd * weight
    shift = (0.0 if bias is None else bias) - mean * gain
    return (x.float() * gain.view(lined) + shift.view(lined)).to(x.dtype)


def check_bn_forward(case: BnCase, ops: BnImplementation) -> None:
    """Statistics are near float64's; spikes those of the reference on the current they give."""
    a = bn_inputs(case)
    on = a.to(ops.device)
    s, mean, var, rstd = (
        t.cpu() for t in ops.forward(on.x, *on.parameters, EPS, *bn_options(case))
    )
    for got, wanted in zip((mean, var), statistics(a.x), strict=True):
        # sums are float32 in a thread: what they lose is a share of the deviation, 2
        torch.testing.assert_close(got.double(), wanted, rtol=2.0**-22, atol=2.0**-24)
    torch.testing.assert_close(rstd.double(), (var.double() + EPS).rsqrt(), rtol=2.0**-22, atol=0)
    sums, *again = (t.cpu() for t in ops.moments(on.x, EPS))
    assert all(torch.equal(p, q) for p, q in zip(again, (mean, var, rstd), strict=True))
    wide = a.x.double().transpose(0, 2).flatten(1)
    torch.testing.assert_close(
        sums, torch.stack([wide.sum(1), wide.square().sum(1)]), rtol=1e-6, atol=1e-5
    )
    weight, bias, threshold, leak = a.parameters
    current = normalised(a.x, mean, rstd, weight, bias)
    wanted, _ = reference.lif_forward(current, threshold, leak, None, *bn_options(case), False)
    assert s.dtype == case.dtype
    assert s.stride() == reference.empty_spikes(a.x).stride()
    if ops.truncates and case.dtype == torch.bfloat16:
        assert (s != wanted).float().mean() < 0.05
    else:
        assert torch.equal(s, wanted)
    assert 0.05 < s.float().mean() < 0.95


def wide_gradients(case: BnCase, a: BnInputs) -> list[Tensor | None]:
    """Gradients in float64 by torch's batch norm, the reference and autograd."""
    x, *parameters = (
        None if t is None else t.double().requires_grad_() for t in (a.x, *a.parameters)
    )
    current = F.batch_norm(x.flatten(0, 1), None, None, *parameters[:2], training=True, eps=EPS)
    current = current.unflatten(0, a.x.shape[:2])
    s, _ = reference.lif_forward(current, *parameters[2:], None, *bn_options(case), False)
    s.backward(a.grad_s.double())
    return [None if t is None else t.grad for t in (x, *parameters)]


# Relative, of an element or of the largest one: float32 roundings of T currents and of sums.
# fast_sigmoid is so steep that it makes five times as much of those of a current; a current of 16
# bits is rounded to them, which moves spikes.
TOLERANCE = 3e-5


def check_bn_backward(case: BnCase, ops: BnImplementation) -> None:
    """Near float64's in float32; in 16 bits, near what the same op computes in float32."""
    a = bn_inputs(case)
    on = a.to(ops.device)
    how = bn_options(case)
    _, mean, _, rstd = ops.forward(on.x, *on.parameters, EPS, *how)
    got = ops.backward(on.grad_s, on.x, mean, rstd, *on.parameters, *how)
    assert got[0].dtype == case.dtype
    assert got[0].stride() == reference.empty_spikes(a.x).stride()
    if case.dtype == torch.float32:
        for g, w in zip(got, wide_gradients(case, a), strict=True):
            if w is None:
                continue
            tolerance = TOLERANCE * (5 if case.surrogate == "fast_sigmoid" else 1)
            largest = max(1.0, w.abs().max().item())
            torch.testing.assert_close(
                g.cpu().double(), w, rtol=tolerance, atol=tolerance * largest
            )
    again = ops.backward(on.grad_s, on.x, mean, rstd, *on.parameters, *how)
    assert all(torch.equal(p, q) for p, q in zip(got, again, strict=True))
    check_passes(case, ops, on, (mean, rstd), got)


def check_passes(
    case: BnCase, ops: BnImplementation, on: BnInputs, statistics: Any, got: Any
) -> None:
    """The two passes by themselves, as processes call them, give the bits of the whole."""
    how, (mean, rstd) = bn_options(case), statistics
    call = (on.grad_s, on.x, mean, rstd, *on.parameters, *how)
    grad_x, sums, workspace = ops.gradient_sums(*call)
    wide, count = rstd.double(), on.x.numel() // on.x.shape[2]
    grad_mean, slope = (sums[2] / count).float(), (sums[3] / count * wide * wide).float()
    ops.grad_x(grad_x, workspace, grad_mean, slope, *call)
    assert torch.equal(grad_x, got[0])
    assert torch.equal((sums[3] * wide).float(), got[1])
    assert torch.equal(sums[2].float(), got[2])
    for total, gradient in zip(sums[:2], got[3:], strict=True):
        total = total if gradient.numel() > 1 else total.sum(0, True)
        torch.testing.assert_close(gradient, total.float(), rtol=2.0**-22, atol=1e-7)


def check_bn_same_bits(case: BnCase, ops: BnImplementation, other: BnImplementation) -> None:
    """From the same statistics the same spikes; in float32 from the same sums the same grad_x."""
    a = bn_inputs(case)
    how = bn_options(case)
    _, mean, _, rstd = other.forward(a.x, *a.parameters, EPS, *how)
    call = (a.grad_s, a.x, mean, rstd, *a.parameters, *how)
    assert torch.equal(ops.fire(*call[1:]), other.fire(*call[1:]))
    results = []
    for implementation in (ops, other):
        grad_x, sums, workspace = implementation.gradient_sums(*call)
        if not results:
            count, wide = a.x.numel() // a.x.shape[2], rstd.double()
            given = (sums[2] / count).float(), (sums[3] / count * wide * wide).float()
        implementation.grad_x(grad_x, workspace, *given, *call)
        results.append(grad_x)
    if case.dtype == torch.float32:
        assert torch.equal(*results)


def check_bn_far_mean(ops: BnImplementation) -> None:
    """A variance far below the mean is exact."""
    x = bn_inputs(BnCase("far", (3, 3, 6, 8, 8))).x + 3000
    threshold, leak = (torch.ones(1, device=ops.device) for _ in range(2))
    how = ("soft", 0.0, True, "triangle", 0.3)
    _, mean, var, _ = ops.forward(x.to(ops.device), None, None, threshold, leak, EPS, *how)
    for got, wanted in zip((mean, var), statistics(x), strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=2.0**-22, atol=0)


def check_bn_nan(ops: BnImplementation) -> None:
    """A NaN or an infinite value reaches every spike of its channel, and no other's."""
    for value in (math.nan, math.inf):
        for place in ((1, 2, 1, 3, 1), (0, 0, 1, 0, 0)):
            a = bn_inputs(BnCase("nan", (2, 3, 3, 4, 4))).to(ops.device)
            a.x[place] = value
            how = ("soft", 0.0, True, "triangle", 0.3)
            s, *_ = ops.forward(a.x, *a.parameters, EPS, *how)
            assert s[:, :, 1].isnan().all()
            assert not s[:, :, ::2].isnan().any()
