"""Spike layers of any geometry, by events: outputs and gradients equal torch's, by ==.

Spikes, counts, weights and gradients are multiples of powers of two, and few: every sum is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iirsnn import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from iirsnn.nn import events_or_dense  # noqa: F401  # its costs are read when a layer runs
from tests.fuzz.settings import fuzzed
from tests.fuzz.test_event import CHANNELS, windows
from tests.fuzz.test_lif import levels

UNITS = {"spikes": (1.0, 1), "after dropout": (1.25, 1), "counts": (0.25, 12)}


@dataclass(frozen=True)
class Case:
    """size: [N, C, H, W] of the input. arguments: of nn.Conv2d after the channels; None: linear.

    padding: zeros, same, or another padding_mode of nn.Conv2d. alone: one image without its axis.
    """

    size: tuple[int, int, int, int]
    outputs: int
    arguments: tuple | None
    kind: str
    dtype: torch.dtype
    bias: bool
    last: bool
    padding: str
    alone: bool
    threads: int
    seed: int

    def layers(self) -> tuple[nn.Module, nn.Module]:
        """The spike layer and torch's."""
        channels = self.size[1]
        if self.arguments is None:
            pair = [kind(channels, self.outputs, self.bias) for kind in (SpikeLinear, nn.Linear)]
        else:
            kernel, stride, dilation, padding, groups = self.arguments
            mode = "zeros" if self.padding == "same" else self.padding
            padding = "same" if self.padding == "same" else padding
            options = (channels, self.outputs, kernel, stride, padding, dilation, groups, self.bias)
            pair = [kind(*options, mode) for kind in (SpikeConv2d, nn.Conv2d)]
        rng = torch.Generator().manual_seed(self.seed)
        for mine, torchs in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            mine.data = torch.randint(-3, 4, mine.shape, generator=rng) * 0.5
            torchs.data = mine.data.clone()
        return pair[0].to(self.dtype), pair[1].to(self.dtype)

    def tensors(self, out: torch.Size) -> tuple[Tensor, Tensor]:
        """The input and the gradient of the output."""
        rng = torch.Generator().manual_seed(self.seed + 1)
        unit, most = UNITS[self.kind]
        counts = torch.randint(1, most + 1, self.size, generator=rng)
        x = (counts * (torch.rand(self.size, generator=rng) < 0.3)).to(self.dtype) * unit
        grad = torch.randint(-1, 2, out, generator=rng).to(self.dtype)
        if self.arguments is None:
            return x.flatten(1), grad
        if self.alone:
            return x[0], grad
        return x.contiguous(memory_format=torch.channels_last) if self.last else x, grad


@st.composite
def cases(draw) -> Case:
    images, channels = draw(st.integers(1, 6)), draw(st.sampled_from(CHANNELS))
    outputs, arguments, height, width = draw(st.sampled_from(CHANNELS)), None, 1, 1
    padding = "zeros"
    if draw(st.integers(0, 3)):
        height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        numbers, _, _ = draw(windows(height, width))
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        groups = draw(st.sampled_from((1, 1, *divisors)))
        outputs = outputs if groups == 1 else groups * draw(st.integers(1, max(1, 70 // groups)))
        arguments = (*numbers, groups)
        _, stride, _, most = numbers
        if stride == (1, 1) and draw(st.integers(0, 3)) == 0:
            padding = "same"
        elif most[0] < height and most[1] < width and draw(st.integers(0, 3)) == 0:
            padding = draw(st.sampled_from(("reflect", "replicate", "circular")))
    return Case(
        (images, channels, height, width),
        outputs,
        arguments,
        draw(st.sampled_from(tuple(UNITS))),
        draw(st.sampled_from((torch.float32, torch.bfloat16))),
        draw(st.booleans()),
        draw(st.booleans()),
        padding,
        arguments is not None and draw(st.integers(0, 5)) == 0,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), grad.to(out.dtype))]


@fuzzed(few=40, share=0.1)
@given(cases())
def test_a_layer_gives_what_torch_gives(case):
    layer, plain = case.layers()
    layer.set_mode("events")
    torch.set_num_threads(case.threads)
    size = case.size[:2] if case.arguments is None else case.size[case.alone :]
    x, grad = case.tensors(plain(torch.zeros(size, dtype=case.dtype)).shape)
    exact = gradients(plain.double(), x.double(), grad)
    for level in levels():
        for ours, theirs in zip(gradients(layer, x, grad), exact, strict=True):
            assert torch.equal(ours, theirs.to(case.dtype)), level


@st.composite
def pools(draw):
    """Size of the input, arguments of nn.AvgPool2d, dtype, whether channels_last, a seed."""
    size = [draw(st.integers(1, n)) for n in (3, 9, 12, 12)]
    kernel = tuple(draw(st.integers(1, min(4, n))) for n in size[2:])
    options = (
        kernel,
        draw(st.sampled_from((None, kernel, (1, 2), (3, 1)))),
        tuple(draw(st.integers(0, k // 2)) for k in kernel),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((None, None, 1, 3))),
    )
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
    return size, options, dtype, draw(st.booleans()), draw(st.integers(0, 2**16))


@fuzzed(few=30, share=0.02)
@given(pools())
def test_an_average_pool_is_torchs(case):
    size, options, dtype, last, seed = case
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=rng).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    grad = torch.randn(nn.AvgPool2d(*options)(x).shape, generator=rng)
    for ours, theirs in zip(
        gradients(SpikeAvgPool2d(*options), x, grad),
        gradients(nn.AvgPool2d(*options), x, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
