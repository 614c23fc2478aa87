"""What a tensor is by where it comes from: spikes or their averages, read off autograd's graph.

Values prove more, but on a GPU looking at them waits for the device, which a CUDA graph forbids;
the graph is on the host. A tensor that was written to since it was made is not known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import is_dense
from ..ops.backend import choose, direct, has_kernels
from ..ops.reference import acc_dtype

_MOST = 255  # of a count in 8 bits


@dataclass(frozen=True)
class Origin:
    """The values of a tensor are k / divisor for k = 0..most <= 255; divisor is a power of two.

    So each is exact in every float dtype, and so are sums and averages of them.
    """

    most: int = 1
    divisor: int = 1

    @property
    def name(self) -> str:
        return "bits" if self.most == self.divisor == 1 else "counts"

    def pack(self, x: Tensor) -> Tensor:
        """x, which is dense, as bits in memory order, uint8 [1, 8 * ceil(N / 64)], or as counts."""
        if self.name == "counts":
            return (x * self.divisor).to(torch.uint8)
        half, kernels = half_for(x), choose("auto", x.device)
        bits: Tensor = kernels.packed(x.unsqueeze(0), half, half, None, "none", 0.0, False)[0]
        return bits

    def unpack(self, packed: Tensor, like: Layout) -> Tensor:
        """What was packed, in its layout and dtype."""
        if self.name == "counts":
            return packed.to(like.dtype).mul_(1 / self.divisor)
        size, stride = [1, *like.size], [like.size.numel(), *like.stride]
        x: Tensor = choose("auto", packed.device).unpack(packed, size, stride, like.dtype)
        return x[0]


@dataclass(frozen=True)
class Layout:
    """Of a tensor that was packed."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Layout:
        return Layout(x.shape, x.stride(), x.dtype)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)


_halves: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def half_for(x: Tensor) -> Tensor:
    """The threshold [1] that tells 0 from 1 in x: one for a device, for each call would fill it."""
    key = x.device, acc_dtype(x.dtype)
    half = _halves.get(key)
    if half is None:
        with torch.inference_mode(False):  # kept for calls that need gradients
            half = torch.full((1,), 0.5, dtype=key[1], device=key[0])
        graph = x.is_cuda and torch.cuda.is_current_stream_capturing()  # the memory is the graph's
        if type(half) is Tensor and not graph:
            _halves[key] = half
    return half


_known = functools.lru_cache(maxsize=256)(Origin)


def origin(x: Tensor) -> Origin | None:
    """What x is and can be packed as, or None where that is not known."""
    follow = direct("spike_origin")
    found = None if follow is None else follow(x, _SPIKES, _SAME)
    if found is not None:
        return _known(*found)
    if x.grad_fn is None or x._version != 0 or not is_dense(x.unsqueeze(0)):
        return None
    if not has_kernels(x.device.type):
        return None
    return _of(x.grad_fn, x.output_nr)


def _of(node: Any, output: int) -> Origin | None:
    name, written_here = node.name(), getattr(node, "_forward_cls", None)
    if name in _SPIKES or getattr(written_here, "gives_spikes", False):
        return Origin() if output == 0 else None
    if name.startswith(_AVERAGE):
        rule: Any = _package_average
    else:
        rule = getattr(written_here, "origin", None) or _RULES.get(name)
    found = None if rule is None else rule(node)
    return found if found is not None and found.most <= _MOST else None


def _inputs(node: Any) -> list[Origin | None]:
    return [None if of is None else _of(of, output) for of, output in node.next_functions]


def _same(node: Any) -> Origin | None:
    """Of an op that moves or selects the values of its first input."""
    return _inputs(node)[0]


def _sum(node: Any) -> Origin | None:
    a, b = _inputs(node)
    if a is None or b is None or a.divisor != b.divisor or node._saved_alpha != 1:
        return None
    return Origin(a.most + b.most, a.divisor)


def _together(node: Any) -> Origin | None:
    found = _inputs(node)
    if any(of is None or of.divisor != found[0].divisor for of in found):  # type: ignore[union-attr]
        return None
    return max(found, key=lambda of: of.most)  # type: ignore[union-attr]


def _average_of(node: Any, pooled: int) -> Origin | None:
    of = _same(node)
    return None if of is None else Origin(of.most * pooled, of.divisor * pooled)


def _package_average(node: Any) -> Origin | None:
    return _average_of(node, int(node.name().removeprefix(_AVERAGE)))


def average(
    node: Any, kernel: Any, padding: Any, ceil: bool, counted: bool, divisor: int | None
) -> Origin | None:
    """Of an average pool with the options of nn.AvgPool2d."""
    pooled = int(kernel[0] * kernel[-1])
    ragged = ceil or divisor is not None or (any(padding) and not counted)
    return None if ragged or pooled & (pooled - 1) else _average_of(node, pooled)


def _torch_average(node: Any) -> Origin | None:
    kernel, padding = node._saved_kernel_size, node._saved_padding
    counted, divisor = node._saved_count_include_pad, node._saved_divisor_override
    return average(node, kernel, padding, node._saved_ceil_mode, counted, divisor)


#: Nodes whose first output is spikes: of C++, and of gradients that are registered in Python. A
#: torch.autograd.Function of this package says so itself, by `gives_spikes` or a rule, `origin`.
_SPIKES = frozenset({"LifGradient", "BnLifGradient"}) | {
    f"GeneratedBackwardFor_iirsnn_{prefix}{op}_forward_defaultBackward"
    for prefix in ("", "triton_")
    for op in ("lif", "bn_lif")
}

#: Nodes of SpikeAvgPool2d, by csrc/spike/torch/average_pool.h, are called this and how many.
_AVERAGE = "SpikeAverageOf"

#: Nodes that move or select the values of their first input.
_SAME = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Alias", "Clone", "Expand", "MaxPool2DWithIndices", "Permute", "ReshapeAlias", "Select"),
        *("Slice", "Split", "Squeeze", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze"),
        "View",
    )
    for number in (0, 1)
)

_RULES: dict[str, Callable[[Any], Origin | None]] = {
    "AddBackward0": _sum,
    "AvgPool2DBackward0": _torch_average,
    "CatBackward0": _together,
    "StackBackward0": _together,
    **dict.fromkeys(_SAME, _same),
}
