"""The engine's layers, one operation of a network after another.

A `Source` is what a layer gives. A `Current` is a sum that no layer computes yet: neurons may take
it, a norm be folded into it, another current join it; whatever else reads it makes it a layer of
its own, which gives real values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..errors import UsageError
from ..nn import FusedLIF
from .layer import Input, Layer, Window, check_finite

MOST = (1 << 16) - 1  # spikes that one count may hold

Shape = tuple[int, int, int]  # channels, rows, columns


@dataclass(frozen=True)
class Source:
    """What a layer gives.

    Attributes:
        number: 0 the image, else the layer's number plus one.
        most: 1 for spikes, the largest count there may be, or 0 for real values.
        unit: what a count of one stands for; 1 of real values.
        shape: of one image; None where that is not known.
        flat: the network sees it as one row of features.
    """

    number: int
    most: int
    shape: Shape | None
    unit: Fraction = Fraction(1)
    flat: bool = False


@dataclass(frozen=True)
class Term:
    """A source of a current: `weight` float32, before the source's unit; None: its value itself."""

    source: Source
    weight: Tensor | None = None
    window: Window | None = None
    groups: int = 1


@dataclass(frozen=True)
class Current:
    """A sum of terms and a bias [outputs], float32; `name` of the first module in it."""

    name: str
    terms: tuple[Term, ...]
    bias: Tensor
    shape: Shape | None
    flat: bool = False


Value = Source | Current


def unsupported(name: str, module: object, why: str) -> UsageError:
    kind = module if isinstance(module, str) else type(module).__name__
    return UsageError(f"{name} ({kind}): {why}")


@dataclass
class Builder:
    """Attributes: image_shape: None where it is not known. timesteps: T. layers: so far."""

    image_shape: Shape | None
    timesteps: int = 1
    layers: list[Layer] = field(default_factory=list)

    @property
    def image(self) -> Source:
        return Source(0, 0, self.image_shape)

    def settle(self, value: Value, name: str) -> Source:
        """A source with this value: a current becomes a layer."""
        if isinstance(value, Source):
            return value
        terms = value.terms
        if not bool(value.bias.any()) and all(t.weight is None for t in terms):
            units = [term.source.unit for term in terms]
            source = self._sum([t.source for t in terms], value.name)
            if source is None and len(terms) == 1 and units[0] == 1:
                source = terms[0].source
            if source is not None:
                return replace(source, flat=value.flat)
        layer = self._layer("currents", value)
        return self._add(layer, Source(0, 0, value.shape, flat=value.flat))

    def neurons(self, value: Value, name: str, module: FusedLIF) -> Source:
        """Spikes of these neurons."""
        for option in ("stateful", "packed", "return_v"):
            if getattr(module, option):
                raise unsupported(name, module, f"expected {option}=False")
        layer = self._layer("neurons", self.current(value, name))
        assert layer.bias is not None
        outputs = len(layer.bias)
        for key in ("threshold", "leak"):
            given = getattr(module, key).detach().float().cpu().reshape(-1)
            if given.numel() not in (1, outputs):
                raise unsupported(
                    name, module, f"{key}: expected 1 element or {outputs}, got {given.numel()}"
                )
            setattr(layer, key, given.expand(outputs).clone())
        layer.reset, layer.v_reset = module.reset, float(module.v_reset)
        check_finite(layer)
        return self._add(layer, Source(0, 1, value.shape, flat=value.flat))

    def weighted(self, value: Value, name: str, module: nn.Module) -> Current:
        """A Conv2d or Linear."""
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        source = self.settle(value, name)
        if source.flat == isinstance(module, nn.Conv2d):
            wanted = "no" if source.flat else "a"
            raise unsupported(name, module, f"expected {wanted} Flatten before")
        weight = module.weight.detach().float().cpu()
        if module.bias is None:
            bias = torch.zeros(len(weight))
        else:
            bias = module.bias.detach().float().cpu().clone()
        if isinstance(module, nn.Linear):
            term = Term(source, weight)
            shape = (len(weight), 1, 1)
            if source.shape and math.prod(source.shape) != weight.shape[1]:
                raise unsupported(
                    name,
                    module,
                    f"expected {math.prod(source.shape)} features, got {weight.shape[1]}",
                )
            return Current(name, (term,), bias, shape, flat=True)
        window = _conv_window(name, module)
        term = Term(source, weight, window, module.groups)
        return Current(name, (term,), bias, _after(source.shape, window, name, len(weight)))

    def affine(self, value: Value, name: str, weight: Tensor, bias: Tensor | None) -> Value:
        """weight [C] times the value, plus bias [C]."""
        weight = weight.detach().float().cpu()
        channels = len(value.bias) if isinstance(value, Current) else (value.shape or [0])[0]
        if channels not in (0, len(weight)) or (
            value.flat and value.shape and math.prod(value.shape) != len(weight)
        ):
            raise unsupported(name, "norm", f"expected {channels} channels, got {len(weight)}")
        one = len(weight) and bool((weight == weight[0]).all()) and bool(weight[0].isfinite())
        if isinstance(value, Source) and value.most and bias is None and one:
            return replace(value, unit=value.unit * Fraction(float(weight[0])))
        zeros = torch.zeros_like(weight)
        shift = zeros if bias is None else bias.detach().float().cpu()
        if isinstance(value, Source):
            return Current(
                name, (self._scaled(value, weight),), shift.clone(), value.shape, value.flat
            )
        terms = [
            self._scaled(t.source, weight)
            if t.weight is None
            else replace(t, weight=t.weight * weight.view(-1, *[1] * (t.weight.dim() - 1)))
            for t in value.terms
        ]
        return replace(value, terms=tuple(terms), bias=value.bias * weight + shift)

    def batch_norm(self, value: Value, name: str, norm: Any) -> Value:
        """A BatchNorm of torch in eval mode, folded into what comes before it."""
        if norm.running_mean is None:
            raise unsupported(name, norm, "expected running statistics to fold, got none")
        mean, var = (
            norm.running_mean.detach().float().cpu(),
            norm.running_var.detach().float().cpu(),
        )
        weight = (
            torch.ones_like(mean) if norm.weight is None else norm.weight.detach().float().cpu()
        )
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().float().cpu()
        if isinstance(value, Current) and len(value.terms) == 1:
            (term,) = value.terms
            if term.weight is not None:
                if len(mean) != len(value.bias):
                    raise unsupported(
                        name, norm, f"expected {len(value.bias)} channels, got {len(mean)}"
                    )
                fuse = fuse_linear_bn_weights if term.window is None else fuse_conv_bn_weights
                folded, bias = fuse(term.weight, value.bias, mean, var, norm.eps, weight, shift)
                term = replace(term, weight=folded.detach())
                return replace(value, terms=(term,), bias=bias.detach())
        scale = weight * torch.rsqrt(var + norm.eps)
        return self.affine(value, name, scale, shift - mean * scale)

    def add(self, a: Value, b: Value, name: str) -> Current:
        """The sum of two values of the same shape."""
        if a.shape and b.shape and (a.shape, a.flat) != (b.shape, b.flat):
            raise unsupported(name, "add", f"expected one shape, got {a.shape} and {b.shape}")
        channels = next((len(v.bias) for v in (a, b) if isinstance(v, Current)), None)
        a, b = self.current(a, name, channels), self.current(b, name, channels)
        if len(a.bias) != len(b.bias):
            raise unsupported(name, "add", f"expected {len(a.bias)} channels, got {len(b.bias)}")
        first = a if any(t.weight is not None for t in a.terms) else b
        return replace(
            first, terms=a.terms + b.terms, bias=a.bias + b.bias, shape=a.shape or b.shape
        )

    def concat(self, values: Sequence[Value], name: str) -> Source:
        """Their channels, side by side."""
        sources = [self.settle(value, name) for value in values]
        shapes = [self._shape(source, name, "cat") for source in sources]
        if len({(shape[1:], s.flat) for shape, s in zip(shapes, sources, strict=True)}) > 1:
            raise unsupported(name, "cat", f"expected the same rows and columns, got {shapes}")
        if sources[0].flat and math.prod(shapes[0][1:]) > 1:
            raise unsupported(name, "cat", "expected no Flatten before it")
        sources = self._of_one_unit(sources, name)
        parts = [(s, 0, shape[0]) for s, shape in zip(sources, shapes, strict=True)]
        return self._channels(parts, name)

    def channels(self, value: Value, name: str, order: Sequence[int]) -> Source:
        """Some of its channels, in this order."""
        source = self.settle(value, name)
        if order == list(range(self._shape(source, name, "channels")[0])):
            return source
        source = self._values(source)
        parts: list[tuple[Source, int, int]] = []
        for channel in order:
            if parts and parts[-1][1] + parts[-1][2] == channel:
                parts[-1] = (source, parts[-1][1], parts[-1][2] + 1)
            else:
                parts.append((source, channel, 1))
        return self._channels(parts, name)

    def flatten(self, value: Value) -> Value:
        return replace(value, flat=True)

    def max_pool(self, value: Value, name: str, window: Window) -> Source:
        source = self._values(self._map(value, name))
        if source.most > 1 or source.unit <= 0:
            source = self._real(source, name)
        shape = _after(source.shape, window, name)
        layer = Layer("max_pool", name, [Input(source.number)], window)
        return self._add(layer, replace(source, shape=shape))

    def average_pool(self, value: Value, name: str, window: Window) -> Source:
        source, area = self._values(self._map(value, name)), math.prod(window.kernel)
        if source.most * area > MOST:
            source = self._real(source, name)
        shape = _after(source.shape, window, name)
        unit = source.unit / area if source.most else source.unit
        layer = Layer("average_pool", name, [Input(source.number)], window)
        return self._add(layer, Source(0, source.most * area, shape, unit))

    def adaptive_pool(self, value: Value, name: str, size: tuple[int, int]) -> Source:
        """Averages over as many windows; one window where they are all the same."""
        source = self._values(self._map(value, name))
        shape = self._shape(source, name, "AdaptiveAvgPool2d")
        if size == shape[1:]:
            return source
        if not any(have % want for have, want in zip(shape[1:], size, strict=True)):
            kernel = (shape[1] // size[0], shape[2] // size[1])
            return self.average_pool(source, name, Window(kernel, kernel))
        multiple = math.prod(common_multiple(*each) for each in zip(shape[1:], size, strict=True))
        if source.most * multiple > MOST:
            source = self._real(source, name)
        unit = source.unit / multiple if source.most else source.unit
        layer = Layer("adaptive_pool", name, [Input(source.number)], size=size)
        return self._add(layer, Source(0, source.most * multiple, (shape[0], *size), unit))

    def output(self, value: Value, divisor: int) -> None:
        """The last layer: the sum over the timesteps, divided by `divisor`."""
        if not value.flat:
            raise UsageError("model: expected a Linear as its last layer, without neurons")
        if (
            isinstance(value, Current)
            and len(value.terms) == 1
            and value.terms[0].weight is not None
        ):
            shape = value.shape
            if shape is None or shape[1:] == (1, 1):
                layer = self._layer("readout", value)
                if divisor > 1:
                    for each in layer.inputs:
                        assert each.weight is not None
                        each.weight = each.weight / divisor
                    assert layer.bias is not None
                    layer.bias = layer.bias / divisor
                self.layers.append(layer)
                return
        source = self._values(self.settle(value, "output"))
        unit = float(source.unit / divisor)
        self.layers.append(Layer("output", "output", [Input(source.number, unit=unit)]))

    def current(self, value: Value, name: str, channels: int | None = None) -> Current:
        """The value as a sum of itself alone; `channels` where no shape tells them."""
        if isinstance(value, Current):
            return value
        source = self._values(value)
        if source.shape is not None or channels is None:
            channels = self._shape(source, name, "neurons")[0]
        return Current(name, (Term(source),), torch.zeros(channels), source.shape, source.flat)

    def _add(self, layer: Layer, source: Source) -> Source:
        self.layers.append(layer)
        return replace(source, number=len(self.layers))

    def _layer(self, kind: str, value: Current) -> Layer:
        value = self._apart_from_image(value)
        inputs = [
            Input(t.source.number, unit=float(t.source.unit))
            if t.weight is None
            else Input(t.source.number, _in_units(t.weight, t.source.unit), t.window, t.groups)
            for t in value.terms
        ]
        layer = Layer(kind, value.name, inputs, bias=value.bias)
        check_finite(layer)
        return layer

    def _apart_from_image(self, value: Current) -> Current:
        """What the image adds is the same at every T: beside others, a layer that is run once."""
        images = tuple(t for t in value.terms if t.source.number == 0)
        if self.timesteps == 1 or len(images) in (0, len(value.terms)):
            return value
        layer = self._layer(
            "currents", replace(value, terms=images, bias=torch.zeros_like(value.bias))
        )
        once = Term(self._add(layer, Source(0, 0, value.shape, flat=value.flat)))
        others = tuple(t for t in value.terms if t.source.number)
        return replace(value, terms=(*others, once))

    def _shape(self, value: Value, name: str, what: str) -> Shape:
        if value.shape is None:
            raise unsupported(name, what, "needs image_shape=(channels, height, width)")
        return value.shape

    def _map(self, value: Value, name: str) -> Source:
        if value.flat:
            raise unsupported(name, "pool", "expected no Flatten before it")
        return self.settle(value, name)

    def _values(self, source: Source) -> Source:
        """The source, or real values of the image, which only convolutions read as it is."""
        if source.number:
            return source
        channels = self._shape(source, "model", "image")[0]
        term = self._scaled(source, torch.ones(channels))
        return self.settle(Current("image", (term,), torch.zeros(channels), source.shape), "image")

    def _scaled(self, source: Source, weight: Tensor) -> Term:
        """weight [C] times the source: a convolution of each channel alone."""
        return Term(source, weight.view(-1, 1, 1, 1), Window((1, 1)), len(weight))

    def _real(self, source: Source, name: str) -> Source:
        """Real values of counts."""
        if not source.most:
            return source
        layer = self._layer("currents", self.current(source, name))
        return self._add(layer, Source(0, 0, source.shape, flat=source.flat))

    def _sum(self, sources: list[Source], name: str) -> Source | None:
        """The counts of all of them together; None where they are not counts of one unit."""
        times = _common(sources)
        if times is None or sources[0].shape is None:
            return None
        most = sum(s.most * n for s, n in zip(sources, times, strict=True))
        if most > MOST:
            return None
        if len(sources) == 1 and times == [1]:
            return sources[0]
        inputs = [Input(s.number, times=n) for s, n in zip(sources, times, strict=True)]
        unit = sources[0].unit / times[0]
        first = sources[0]
        return self._add(Layer("sum", name, inputs), Source(0, most, first.shape, unit, first.flat))

    def _of_one_unit(self, sources: list[Source], name: str) -> list[Source]:
        """The same values, as counts of one unit where that can be."""
        times = _common(sources)
        if times is None:
            return [self._values(source) for source in sources]
        if any(s.most * n > MOST for s, n in zip(sources, times, strict=True)):
            return sources
        scaled = []
        for source, n in zip(sources, times, strict=True):
            if n > 1:
                layer = Layer("sum", name, [Input(source.number, times=n)])
                source = self._add(
                    layer, replace(source, most=source.most * n, unit=source.unit / n)
                )
            scaled.append(source)
        return scaled

    def _channels(self, parts: list[tuple[Source, int, int]], name: str) -> Source:
        first = parts[0][0]
        assert first.shape is not None
        shape = (sum(channels for _, _, channels in parts), *first.shape[1:])
        most, unit = max(s.most for s, _, _ in parts), first.unit
        if not all(s.most and s.unit == unit for s, _, _ in parts):
            if all(s.most for s, _, _ in parts):  # counts, but not of one unit
                parts = [(self._real(first, name), *parts[0][1:]), *parts[1:]]
            most, unit = 0, Fraction(1)
        inputs = [
            Input(s.number, unit=1.0 if most else float(s.unit), first=at, channels=channels)
            for s, at, channels in parts
        ]
        return self._add(Layer("channels", name, inputs), Source(0, most, shape, unit, first.flat))


def _common(sources: Sequence[Source]) -> list[int] | None:
    """How often each has to be counted for one common unit; None where there is no such number."""
    units = [source.unit for source in sources]
    if not all(source.most for source in sources) or not all(unit > 0 for unit in units):
        return None
    ratios = [unit / units[0] for unit in units]
    base = Fraction(1, math.lcm(*(ratio.denominator for ratio in ratios)))
    times = [int(ratio / base) for ratio in ratios]
    common = math.gcd(*times)
    times = [n // common for n in times]
    return times if max(times) <= MOST else None


def _in_units(weight: Tensor, unit: Fraction) -> Tensor:
    exact = weight.double() * float(unit.numerator) / float(unit.denominator)
    return exact.float().contiguous()


def _after(
    shape: Shape | None, window: Window, name: str, channels: int | None = None
) -> Shape | None:
    """The shape that a window makes of another."""
    if shape is None:
        return None
    sizes = []
    for axis, size in enumerate(shape[1:]):
        reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1
        left = size + window.before[axis] + window.after[axis] - reach
        if left < 0 or window.stride[axis] < 1:
            raise UsageError(
                f"{name}: cannot follow {' x '.join(map(str, shape))} (a kernel too large)"
            )
        sizes.append(left // window.stride[axis] + 1)
    return (channels or shape[0], sizes[0], sizes[1])


def common_multiple(size: int, positions: int) -> int:
    """The least common multiple of the windows of an adaptive pool along an axis."""
    return math.lcm(
        *(-(-(i + 1) * size // positions) - i * size // positions for i in range(positions))
    )


def _conv_window(name: str, module: nn.Conv2d) -> Window:
    if module.padding_mode != "zeros":
        raise unsupported(name, module, f"expected padding with zeros, got {module.padding_mode}")
    kernel, dilation = pair(module.kernel_size), pair(module.dilation)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        after = (total[0] - before[0], total[1] - before[1])
    else:
        before = after = (0, 0) if module.padding == "valid" else pair(module.padding)
    return Window(kernel, pair(module.stride), dilation, before, after)


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
