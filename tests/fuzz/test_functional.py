"""`iirsnn.functional.lif` as users call it: the CPU kernels against the definition.

Tensors of any strides and dtypes, parameters in any form, any of them with a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iirsnn.functional import lif
from iirsnn.ops import reference
from tests.fuzz.lif_strategies import TOLERANCE, same
from tests.fuzz.settings import fuzzed
from tests.fuzz.test_lif import levels

DTYPES = tuple(TOLERANCE)


@dataclass(frozen=True)
class Layout:
    """Where elements lie: order of the dims in memory, steps between elements, dims of stride 0."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    same: tuple[bool, ...]
    offset: int

    def lay(self, a: Tensor) -> Tensor:
        """The values of a (those at index 0 of dims of stride 0), so laid out; NaN lies between."""
        for dim, one in enumerate(self.same):
            a = a[(slice(None),) * dim + (slice(0, 1),)] if one else a
        steps = [self.steps[dim] for dim in self.order]
        size = [a.shape[dim] * step for dim, step in zip(self.order, steps, strict=True)]
        memory = a.new_full((self.offset + math.prod(size),), math.nan)
        view = memory[self.offset :].view(size)[tuple(slice(None, None, step) for step in steps)]
        view = view.permute([self.order.index(dim) for dim in range(a.dim())])
        return view.copy_(a)

    def full(self, a: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.lay(a).expand(shape)


@dataclass(frozen=True)
class Parameter:
    """form: number, scalar, one, channels, spread (every other element) or image ([C, 1, 1])."""

    form: str
    dtype: torch.dtype
    gradient: bool

    def made(self, centre: float, channels: int, rng: torch.Generator) -> float | Tensor:
        count = channels if self.form in ("channels", "spread", "image") else 1
        values = (centre + 0.1 * torch.rand(count, generator=rng)).to(self.dtype)
        if self.form == "number":
            return float(values)
        values = {
            "scalar": values[0],
            "spread": values.repeat_interleave(2)[::2],
            "image": values.view(-1, 1, 1),
        }.get(self.form, values)
        return values.requires_grad_(self.gradient)


@dataclass(frozen=True)
class Call:
    shape: tuple[int, ...]
    dtype: torch.dtype
    x: Layout
    grad: Layout
    threshold: Parameter
    leak: Parameter
    v0: tuple[Layout, torch.dtype, bool] | None  # layout, dtype, gradient
    x_gradient: bool
    used: tuple[bool, bool]  # spikes and membrane have a gradient
    reset: str
    v_reset: float
    detach: bool
    surrogate: str
    scale: float | None
    threads: int
    seed: int

    @property
    def options(self) -> dict:
        return {
            "reset": self.reset,
            "v_reset": self.v_reset,
            "detach_reset": self.detach,
            "surrogate": self.surrogate,
            "surrogate_scale": self.scale,
            "return_v": True,
        }

    def tensors(self) -> tuple[Tensor, float | Tensor, float | Tensor, Tensor | None]:
        rng = torch.Generator().manual_seed(self.seed)
        channels = self.shape[2] if len(self.shape) > 2 else 1
        x = self.x.full(
            (0.4 + 0.8 * torch.randn(self.shape, generator=rng)).to(self.dtype), self.shape
        )
        threshold = self.threshold.made(0.9, channels, rng)
        leak = self.leak.made(0.7, channels, rng)
        v0 = None
        if self.v0 is not None:
            layout, dtype, gradient = self.v0
            v0 = torch.randn((1, *self.shape[1:]), generator=rng).to(dtype)
            v0 = layout.full(v0, v0.shape)[0].detach().requires_grad_(gradient)
        return x.detach().requires_grad_(self.x_gradient), threshold, leak, v0

    def gradients(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(self.seed + 1)
        grad_s = self.grad.full(torch.randn(self.shape, generator=rng).to(s.dtype), self.shape)
        return grad_s, torch.randn(self.shape[1:], generator=rng).to(v.dtype)


@st.composite
def layouts(draw, dims: int, sizes: tuple[int, ...]) -> Layout:
    order = tuple(draw(st.permutations(range(dims)))) if draw(st.booleans()) else tuple(range(dims))
    odd = draw(st.integers(0, 2)) == 0
    steps = tuple(draw(st.sampled_from((1, 1, 2, 3))) if odd else 1 for _ in range(dims))
    one = tuple(draw(st.integers(0, 4)) == 0 and n > 1 for n in sizes)
    return Layout(order, steps, one, draw(st.sampled_from((0, 0, 1, 3))))


@st.composite
def calls(draw) -> Call:
    timesteps = draw(st.integers(1, 20))
    sizes = draw(st.lists(st.integers(0, 7), max_size=4))
    if draw(st.integers(0, 9)) == 0:  # enough for several threads
        timesteps = draw(st.integers(1, 5))
        sizes = [2, draw(st.integers(1, 9)), draw(st.integers(60, 120)), draw(st.integers(60, 120))]
        sizes = draw(st.permutations(sizes))
    shape = (timesteps, *sizes)
    forms = ["number", "scalar", "one"]
    if len(shape) > 2 and shape[2] > 0:
        forms += ["channels", "spread", "image"]

    def parameter() -> Parameter:
        return Parameter(
            draw(st.sampled_from(forms)), draw(st.sampled_from(DTYPES)), draw(st.booleans())
        )

    v0 = None
    if draw(st.booleans()):
        v0 = (
            draw(layouts(len(shape), (1, *sizes))),
            draw(st.sampled_from(DTYPES)),
            draw(st.booleans()),
        )
    return Call(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(layouts(len(shape), shape)),
        draw(layouts(len(shape), shape)),
        parameter(),
        parameter(),
        v0,
        draw(st.booleans()),
        draw(st.sampled_from(((True, True), (True, False), (False, True)))),
        draw(st.sampled_from(reference.RESETS)),
        draw(st.sampled_from((0.0, -0.25, 0.5))),
        draw(st.booleans()),
        draw(st.sampled_from(tuple(reference.SURROGATES))),
        draw(st.sampled_from((None, 0.25, 1.0, 3.0))),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


def differentiated(call: Call, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes and membrane; the gradients of what has one."""
    inputs = call.tensors()
    outputs = lif(*inputs, **call.options, backend=backend)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        return list(outputs), []
    used = [o for o, use in zip(outputs, call.used, strict=True) if use and o.requires_grad]
    grads = [g for g, use in zip(call.gradients(*outputs), call.used, strict=True) if use]
    found = torch.autograd.grad(used, leaves, grads[: len(used)], allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return [o.detach() for o in outputs], found


@fuzzed(few=60, share=0.12)
@given(calls())
def test_a_call_is_the_definition(call):
    wanted, near = differentiated(call, "reference")
    first = None
    for level in levels():
        for threads in {1, call.threads}:
            torch.set_num_threads(threads)
            outputs, found = differentiated(call, "cpu")
            for got, right in zip(outputs, wanted, strict=True):
                assert (got.dtype, got.shape) == (right.dtype, right.shape)
                assert same(got, right), level
            first = first or found
            for got, other in zip(found, first, strict=True):
                assert torch.equal(got, other), level
    largest = max([1.0, *(float(g.abs().max()) for g in near if g.numel())])
    for got, right in zip(first, near, strict=True):
        assert (got.dtype, got.shape) == (right.dtype, right.shape)
        tolerance = TOLERANCE[got.dtype] + TOLERANCE[call.dtype] + 2e-4
        terms = (
            math.sqrt(max(1, math.prod(call.shape)))
            if got.numel() < math.prod(call.shape[1:])
            else 1
        )
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance * largest * terms)


@fuzzed(few=30, share=0.05)
@given(calls())
def test_packed_spikes_are_the_spikes(call):
    options = call.options
    for name in ("detach_reset", "surrogate", "surrogate_scale"):
        options.pop(name)
    with torch.no_grad():
        inputs = call.tensors()
        torch.set_num_threads(call.threads)
        right, v_right = lif(*inputs, **options, backend="reference")
        for level in levels():
            bits, v = lif(*inputs, **options, packed=True)
            spikes = bits.unpack(call.dtype)
            assert torch.equal(spikes, right), level
            assert torch.equal(v, v_right), level
