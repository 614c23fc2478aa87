"""Graphs of any layers: the event engine against PyTorch, by ==.

Sums, concats, slices, shuffles, pools, layers without neurons, branches that nothing reads. Every
value has a smallest step and a bound, and no layer is drawn whose sums need more bits than float32
has: every sum is exact, in whatever order it is made.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iirsnn import FusedLIF
from iirsnn.event import EventNetwork
from iirsnn.models.graph import Affine
from iirsnn.ops.reference import RESETS
from iirsnn.runtime.library import set_capability
from tests.event.graphs import Graph, fire, first
from tests.event.networks import levels, spikes_of
from tests.fuzz.settings import fuzzed
from tests.fuzz.test_event import LARGEST

BITS = 23  # of float32, less one for the sum of two such values
TAPS = 12  # weights of a filter that are not 0


@dataclass(frozen=True)
class Value:
    """What the bits of a value are: multiples of 2 ** step, |value| <= most; weighted: sums of
    products that no layer has computed yet, by the unit of what they read."""

    channels: int
    height: int
    width: int
    step: int
    most: float
    unit: float = 1.0
    weighted: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def fits(self) -> bool:
        return self.most * 2.0**-self.step <= 2**BITS


@dataclass(frozen=True)
class Case:
    """operations: (name, numbers of the values it reads, arguments); 0 is of the first neurons."""

    image: tuple[int, int, int]
    stem: tuple[Any, ...]
    operations: tuple[tuple[str, tuple[int, ...], Any], ...]
    end: tuple[str, tuple[int, ...]]
    timesteps: int
    precision: str
    batch: int
    threads: int
    seed: int

    def network(self) -> Drawn:
        network = Drawn(self).eval()
        network.timesteps = self.timesteps
        return network

    def images(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(-2, 3, (self.batch, *self.image), generator=rng) * 0.5


class Drawn(Graph):
    """The network of a case."""

    def __init__(self, case: Case):
        self.case = case
        self.rng = torch.Generator().manual_seed(case.seed)
        super().__init__()

    def numbers(self, like: Tensor, low: int, high: int, step: float) -> Tensor:
        return torch.randint(low, high + 1, like.shape, generator=self.rng) * step

    def weighted(self, module: nn.Module) -> nn.Module:
        """Each filter has TAPS weights at most; in int8 its largest makes the scale exact."""
        weight = module.weight.data.view(len(module.weight), -1)
        order = torch.rand(weight.shape, generator=self.rng).argsort(1)
        weight.copy_(self.numbers(weight, -3, 3, 0.25) * (order < TAPS))
        weight[:, 0] = LARGEST
        if module.bias is not None:
            module.bias.data = self.numbers(module.bias, -2, 2, 0.25)
        return module

    def neurons(self, channels: int | None, reset: str) -> nn.Module:
        neurons = FusedLIF(channels=channels, reset=reset, v_reset=0.25 * (reset == "hard"))
        neurons.threshold.data = self.numbers(neurons.threshold, 1, 12, 0.125)
        neurons.leak.data = self.numbers(neurons.leak, 1, 4, 0.25)
        return neurons

    def module(self, name: str, arguments: Any) -> nn.Module:
        kinds = {
            "max_pool": nn.MaxPool2d,
            "average_pool": nn.AvgPool2d,
            "adaptive_pool": nn.AdaptiveAvgPool2d,
            "pad": nn.ZeroPad2d,
            "shuffle": nn.ChannelShuffle,
        }
        if name == "conv":
            return self.weighted(nn.Conv2d(*arguments))
        if name == "fire":
            return self.neurons(*arguments)
        if name == "affine":
            count, same, bias = arguments
            one = torch.full((count,), same) if same else None
            drawn = self.numbers(torch.empty(count), 1, 4, 0.25)
            return Affine(drawn if one is None else one, drawn - 0.5 if bias else None)
        return kinds[name](*arguments) if name in kinds else nn.Identity()

    def build(self) -> None:
        convolution, pool, neurons = self.case.stem
        self.stem = nn.Sequential(self.module("conv", convolution))
        if pool is not None:
            self.stem.append(self.module(*pool))
        self.a = self.neurons(*neurons)
        self.inner = nn.ModuleList(
            self.module(name, args) for name, _, args in self.case.operations
        )
        kind, sizes = self.case.end
        self.flat = nn.Flatten()
        self.head = self.weighted(nn.Linear(*sizes)) if kind == "linear" else nn.Identity()

    def body(self, images: Tensor, timesteps: int) -> Tensor:
        values = [first(self.a, self.stem(images), timesteps)]
        for module, (name, sources, arguments) in zip(
            self.inner, self.case.operations, strict=True
        ):
            read = [values[source] for source in sources]
            if name == "image":
                made = first(module, images, timesteps)
            elif name == "add":
                made = read[0] + read[1]
            elif name == "cat":
                made = torch.cat(read, dim=1)
            elif name == "slice":
                made = read[0][:, slice(*arguments)]
            elif name == "fire":
                made = fire(module, read[0], timesteps)
            else:
                made = module(read[0])
            values.append(made)
        return self.head(self.flat(values[-1]))


def sides(value: Value, kernel, stride, padding, dilation, ceil=False) -> tuple[int, int] | None:
    """Rows and columns that a window of torch's pools and convolutions leaves; None: it cannot."""
    found = []
    for size, k, s, p, d in zip(value.shape[1:], kernel, stride, padding, dilation, strict=True):
        left = size + 2 * p - d * (k - 1) - 1
        if left < 0:
            return None
        count = (left + (s - 1 if ceil else 0)) // s + 1
        if ceil and (count - 1) * s >= size + p:  # torch drops a window that begins in the padding
            count -= 1
        found.append(count)
    return found[0], found[1]


def small(draw, low: int, high: int) -> tuple[int, int]:
    return draw(st.integers(low, high)), draw(st.integers(low, high))


def convolution(draw, value: Value):
    kernel, stride, padding = small(draw, 1, 3), small(draw, 1, 2), small(draw, 0, 2)
    dilation, outputs, groups = small(draw, 1, 2), draw(st.sampled_from((1, 3, 17, 64, 70))), 1
    if draw(st.integers(0, 2)) == 0:
        groups = draw(st.sampled_from([n for n in range(1, 71) if value.channels % n == 0]))
        outputs = groups * draw(st.sampled_from((1, 2)))
    size = sides(value, kernel, stride, padding, dilation)
    if size is None:
        return None
    most = value.most * (TAPS * 0.75 + LARGEST) + 0.5
    made = Value(outputs, *size, value.step - 5, most, 1.0, (value.unit,))
    options = (value.channels, outputs, kernel, stride, padding, dilation, groups)
    return (*options, draw(st.booleans())), made


def pool(draw, value: Value, kind: str):
    """A pool; of averages the areas are powers of two."""
    if kind == "max_pool":
        kernel, stride, dilation = small(draw, 1, 3), small(draw, 1, 3), small(draw, 1, 2)
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        ceil = draw(st.booleans())
        size = sides(value, kernel, stride, padding, dilation, ceil)
        if size is None or min(size) < 1:
            return None
        arguments = (kernel, stride, padding, dilation, False, ceil)
        return arguments, replace(value, height=size[0], width=size[1], weighted=())
    if kind == "average_pool":
        kernel = tuple(draw(st.sampled_from((1, 2, 4))) for _ in range(2))
        stride, padding = small(draw, 1, 3), tuple(draw(st.integers(0, k // 2)) for k in kernel)
        size, shrunk = sides(value, kernel, stride, padding, (1, 1)), math.prod(kernel)
        arguments = (kernel, stride, padding)
    else:
        size = small(draw, 1, 8)
        areas = [window_sizes(*each) for each in zip(value.shape[1:], size, strict=True)]
        if any(n & (n - 1) for each in areas for n in each):
            return None
        shrunk, arguments = math.prod(max(each) for each in areas), (size,)
    if size is None:
        return None
    unit = value.unit / shrunk
    step = value.step - int(math.log2(shrunk))
    return arguments, Value(value.channels, *size, step, value.most, unit)


def window_sizes(size: int, positions: int) -> set[int]:
    """Of an adaptive pool."""
    return {-(-(i + 1) * size // positions) - i * size // positions for i in range(positions)}


def fired(value: Value, timesteps: int) -> bool:
    """Whether the membranes of neurons that take it are exact."""
    step = min(value.step, -3) - 2 * (timesteps - 1)
    return replace(value, step=step, most=(value.most + 2) * timesteps).fits()


OPERATIONS = (
    *("conv", "conv", "fire", "fire", "add", "add", "cat", "cat", "slice", "shuffle"),
    *("max_pool", "average_pool", "adaptive_pool", "pad", "affine", "image"),
)


@st.composite
def cases(draw) -> Case:
    timesteps = draw(st.sampled_from((1, 1, 2, 4)))
    precision = draw(st.sampled_from(("fp32", "bf16", "int8")))
    image = (draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    source = Value(*image, -1, 1.0)

    def neurons(value: Value):
        count = draw(st.sampled_from((None, value.channels)))
        return (count, draw(st.sampled_from(RESETS))), Value(*value.shape, 0, 1.0)

    stem = None
    while stem is None:
        stem = convolution(draw, source)
    stem_pool = None
    if draw(st.integers(0, 3)) == 0:
        drawn = pool(draw, stem[1], "max_pool")
        stem_pool, stem = (("max_pool", drawn[0]), (stem[0], drawn[1])) if drawn else (None, stem)
    arguments, value = neurons(stem[1])
    values, operations = [value], []
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(OPERATIONS))
        at = draw(st.integers(0, len(values) - 1))
        if draw(st.booleans()):
            at = len(values) - 1
        value, sources, options, made = values[at], (at,), (), None
        if name == "conv":
            options, made = convolution(draw, value) or ((), None)
        elif name == "fire" and fired(value, timesteps):
            options, made = neurons(value)
        elif name in ("max_pool", "average_pool", "adaptive_pool"):
            options, made = pool(draw, value, name) or ((), None)
        elif name == "image":
            sources, made = (), source
        elif name == "pad":
            options = (tuple(draw(st.integers(0, 2)) for _ in range(4)),)
            left, right, top, bottom = options[0]
            height, width = value.height + top + bottom, value.width + left + right
            made = replace(value, height=height, width=width, weighted=())
        elif name == "slice" and value.channels > 1:
            low = draw(st.integers(0, value.channels - 1))
            options = (low, draw(st.integers(low + 1, value.channels)))
            made = replace(value, channels=options[1] - low, weighted=())
        elif name == "shuffle":
            groups = [n for n in range(1, value.channels + 1) if value.channels % n == 0]
            options, made = (draw(st.sampled_from(groups)),), replace(value, weighted=())
        elif name == "affine":
            same = draw(st.sampled_from((0.5, 2.0, -1.0)))
            bias = precision == "fp32" and draw(st.booleans())
            if precision == "fp32" and draw(st.booleans()):
                same = None
            options = (value.channels, same, bias)
            step = min(value.step - 2, -2)
            unit = value.unit * (same or 1)
            made = replace(value, step=step, most=2 * value.most + 0.5, unit=unit)
        elif name in ("add", "cat"):
            wanted = value.shape if name == "add" else value.shape[1:]
            like = [i for i, v in enumerate(values) if v.shape[-len(wanted) :] == wanted]
            others = draw(st.lists(st.sampled_from(like), min_size=1, max_size=3))
            sources = (at, *(others[:1] if name == "add" else others))
            read = [values[i] for i in sources]
            step = min(v.step for v in read)
            if name == "add":
                terms = tuple(unit for v in read for unit in v.weighted)
                made = replace(value, step=step, most=sum(v.most for v in read), weighted=terms)
                if precision == "int8" and len({abs(unit) for unit in terms}) > 1:
                    made = None  # weights of two scales, in one
            else:
                channels, most = sum(v.channels for v in read), max(v.most for v in read)
                made = replace(value, channels=channels, step=step, most=most, weighted=())
                made = made if channels <= 200 else None
        if made is not None and made.fits() and min(made.shape) > 0 and max(made.shape[1:]) <= 16:
            operations.append((name, sources, options))
            values.append(made)
    last, outputs = values[-1], draw(st.integers(1, 70))
    end = ("plain", ())
    features = math.prod(last.shape)
    if last.most * 2.0**-last.step * 16 <= 2**BITS / timesteps**2 and draw(st.booleans()):
        end = ("linear", (features, outputs))
    return Case(
        image,
        (stem[0], stem_pool, arguments),
        tuple(operations),
        end,
        timesteps,
        precision,
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


NEURONS = (None, "soft")
POINT = (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, True)  # a convolution of one weight


def found(*operations: tuple[str, tuple[int, ...], Any], end=("plain", ())) -> Case:
    """What the engine once got wrong, or what no other test saw, at its smallest."""
    return Case((1, 2, 2), (POINT, None, NEURONS), operations, end, 1, "fp32", 2, 1, 0)


FOUND = {
    "an average pool of real values beyond their edge": found(
        ("conv", (0,), POINT), ("average_pool", (1,), ((2, 2), (1, 1), (1, 1)))
    ),
    "a Flatten behind a sum of spikes": found(("add", (0, 0), ()), end=("linear", (4, 1))),
    "a layer that one concat reads twice": found(("conv", (0,), POINT), ("cat", (1, 1), ())),
    "the image as the output": found(("image", (), ())),
    "some channels of the image": replace(
        found(("image", (), ()), ("slice", (1,), (1, 2)), end=("linear", (4, 3))),
        image=(2, 2, 2),
        stem=((2, *POINT[1:]), None, NEURONS),
    ),
    "the image beside spikes over time": replace(
        found(
            ("image", (), ()), ("conv", (1,), POINT), ("add", (2, 0), ()), ("fire", (3,), NEURONS)
        ),
        timesteps=2,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(tmp_path, name):
    check(FOUND[name], tmp_path)


@fuzzed(few=60, share=0.15)
@given(cases())
def test_a_graph_gives_what_torch_gives(tmp_path_factory, case):
    check(case, tmp_path_factory.getbasetemp())


def check(case: Case, folder: Path) -> None:
    network, images = case.network(), case.images()
    torch.set_num_threads(case.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of networks that are dense
        net = EventNetwork.from_model(
            network, case.timesteps, precision=case.precision, image_shape=case.image
        )
        path = folder / "graph.iirsnn"
        net.save(path)
        assert EventNetwork.load(path) == net
        spikes, logits = spikes_of(network, images)
        for level in levels():
            set_capability(level)
            assert torch.equal(net(images), logits), level
            for ours, theirs in zip(net.spikes(), spikes, strict=True):
                assert torch.equal(ours.float().reshape(theirs.shape), theirs), level
