"""What events cost beside dense products on this machine: when a spike layer should use which."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cache


@dataclass(frozen=True)
class Cost:
    """Time of events as a fraction of dense time: fixed + density * slope."""

    fixed: float
    slope: float


class Product(NamedTuple):
    """The product of a convolution, or of a linear layer as a 1x1 convolution.

    Attributes:
        channels, outputs: of a group; each event adds a row of outputs.
        rows, columns: of the kernel.
        images, positions: of the output; positions of an image.
    """

    channels: int
    outputs: int
    rows: int
    columns: int
    images: int
    positions: int

    @property
    def reach(self) -> int:
        """Channels times kernel columns: their events are added one after the other."""
        return min(self.channels * self.columns, _SEGMENT)

    @property
    def waste(self) -> float:
        """Sums computed, for each that is wanted."""
        return -(-self.outputs // _TILE) * _TILE / self.outputs

    def distance(self, other: Product) -> float:
        """How unlike another product it is: the logarithms of its sizes' ratios, added up."""
        pairs = zip(self, other, strict=True)
        return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs)


class Shape(NamedTuple):
    """What is timed: images [channels, size, size] and a square kernel."""

    images: int
    channels: int
    outputs: int
    size: int
    kernel: int

    @property
    def product(self) -> Product:
        kernel, positions = self.kernel, self.size**2
        return Product(self.channels, self.outputs, kernel, kernel, self.images, positions)

    def __str__(self) -> str:
        return "{} x {} to {}, {}, kernel {}".format(*self)


#: What `calibrate` times: early, middle and late layers, few images and many, a linear layer.
SHAPES = (
    Shape(2, 64, 64, 32, 3),
    Shape(2, 128, 128, 16, 3),
    Shape(4, 256, 256, 8, 3),
    Shape(8, 512, 512, 2, 3),
    Shape(64, 256, 256, 2, 3),
    Shape(64, 1024, 1024, 1, 1),
)

#: By pass and kind of events, and by shape.
Costs = dict[tuple[str, str], dict[Shape, Cost]]


def _everywhere(**costs: Cost) -> Costs:
    return {
        (which, kind): dict.fromkeys(SHAPES, cost)
        for (which, _, kind), cost in ((name.rpartition("_"), cost) for name, cost in costs.items())
    }


#: By dtype of the weight, where nothing can be measured: one core of an AMD EPYC (Zen 4), AVX-512.
BUILT_IN: dict[torch.dtype, Costs] = {
    torch.float32: _everywhere(
        forward_bits=Cost(0.09, 1.2),
        forward_counts=Cost(0.09, 1.5),
        weight_grad_bits=Cost(0.09, 1.15),
        weight_grad_counts=Cost(0.09, 1.3),
        input_grad_reals=Cost(0.1, 1.5),
    ),
    torch.bfloat16: _everywhere(
        forward_bits=Cost(0.15, 2.3),
        forward_counts=Cost(0.15, 2.9),
        weight_grad_bits=Cost(0.13, 2.1),
        weight_grad_counts=Cost(0.13, 2.4),
    ),
}

#: Events have to take less than this fraction of the dense time: a tie is for dense.
GAIN = 0.95

FORMAT = 2  # of the cache
_SECONDS, _ROUNDS = 1.2, 9  # of the calibration at most, the first round aside
_SPARSE, _DENSER = 0.1, 0.4  # densities that are timed
_TILE = 32  # outputs that events are added to at a time
_SEGMENT = 192  # channels times kernel columns whose events are added one after the other


# ---- The cache ----


def cache_path(dtype: torch.dtype) -> Path | None:
    """Where the calibration of these kernels on this machine, for weights of dtype, is kept.

    None for a user without a home.
    """
    root = cache.folder()
    if root is None:
        return None
    extension = _extension()
    capability = extension.build_info()["cpu_capability"]
    return _cache_path(str(root), extension.__file__, capability, torch.get_num_threads(), dtype)


@functools.cache
def _extension() -> Any:
    return importlib.import_module("iirsnn._C")


@functools.lru_cache(maxsize=16)  # asked by every layer in every step
def _cache_path(root: str, kernels: str, capability: str, threads: int, dtype: torch.dtype) -> Path:
    facts: list[Any] = [platform.processor(), platform.machine(), _processor(), torch.__version__]
    facts += [capability, threads, str(dtype), FORMAT, SHAPES]
    facts.append(hashlib.sha256(Path(kernels).read_bytes()).hexdigest())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(root) / f"spike-cost-{capability}-{digest}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def costs(dtype: torch.dtype) -> Costs:
    """This machine's costs: measured once (under two seconds), then read from the cache.

    The built-in ones where IIRSNN_CALIBRATE=0, or where the cache cannot be written: what a process
    measured for itself alone would make runs differ by rounding.
    """
    if os.environ.get("IIRSNN_CALIBRATE", "1") == "0":
        return BUILT_IN[dtype]
    path = cache_path(dtype)
    return BUILT_IN[dtype] if path is None else _costs(str(path), dtype)


@functools.lru_cache(maxsize=16)
def _costs(path: str, dtype: torch.dtype) -> Costs:
    file, damaged = Path(path), (OSError, ValueError, TypeError, KeyError)
    try:
        return _decode(json.loads(file.read_text()), dtype)
    except FileNotFoundError:
        pass
    except damaged:
        with contextlib.suppress(OSError):
            file.unlink()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / "new"
            new.write_text(json.dumps(_encode(calibrate(dtype))))
            with contextlib.suppress(FileExistsError):
                os.link(new, file)  # the first process to finish decides for all
        return _decode(json.loads(file.read_text()), dtype)
    except damaged:
        return BUILT_IN[dtype]


def _encode(measured: Costs) -> dict[str, dict[str, list[float]]]:
    return {
        f"{which} {kind}": {
            str(shape): [cost.fixed, cost.slope] for shape, cost in by_shape.items()
        }
        for (which, kind), by_shape in measured.items()
    }


def _decode(text: dict[str, dict[str, list[float]]], dtype: torch.dtype) -> Costs:
    return {
        key: {shape: Cost(*map(float, text[" ".join(key)][str(shape)])) for shape in SHAPES}
        for key in BUILT_IN[dtype]
    }


# ---- The calibration ----


def calibrate(dtype: torch.dtype) -> Costs:
    """Time events and dense products of every shape, now.

    Rounds over all of them, of each product the least time: a busy moment hits one round alone.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        calls = {
            (key, shape): _calls(*key, dtype, shape) for key in BUILT_IN[dtype] for shape in SHAPES
        }
        least = {case: [math.inf] * 3 for case in calls}
        _time(calls, least)  # warms up
        least = {case: [math.inf] * 3 for case in calls}
        begin = time.perf_counter()
        for turn in range(1, _ROUNDS + 1):
            _time(calls, least)
            if (time.perf_counter() - begin) * (turn + 1) / turn > _SECONDS:
                break
    return {key: {shape: _cost(*least[key, shape]) for shape in SHAPES} for key in BUILT_IN[dtype]}


def _time(calls: dict[Any, list[Callable[[], Any]]], least: dict[Any, list[float]]) -> None:
    """Calls each function once and lowers least[case] to its seconds."""
    for case, functions in calls.items():
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            least[case][i] = min(least[case][i], time.perf_counter() - start)


def _cost(dense: float, sparse: float, denser: float) -> Cost:
    """From seconds of the dense product and of events at the two densities."""
    slope = max(0.0, (denser - sparse) / (_DENSER - _SPARSE))
    return Cost(round((sparse - slope * _SPARSE) / dense, 4), round(slope / dense, 4))


def _calls(which: str, kind: str, dtype: torch.dtype, shape: Shape) -> list[Callable[[], Any]]:
    """The dense product, events at the lower density, and at the higher one."""
    ops, generator = torch.ops.iirsnn, torch.Generator().manual_seed(0)
    one, padding = [1, 1], [shape.kernel // 2] * 2
    geometry = (one, padding, one, 1)

    def values(*size: int) -> Tensor:
        made = torch.rand(size, generator=generator).to(dtype)
        return made.contiguous(memory_format=torch.channels_last)

    size = [shape.images, shape.channels, shape.size, shape.size]
    x, grad = values(*size), values(shape.images, shape.outputs, shape.size, shape.size)
    weight = values(shape.outputs, shape.channels, shape.kernel, shape.kernel)
    table = torch.arange(256, dtype=torch.float32)

    def dense() -> Any:
        if shape.kernel == shape.size == 1:
            flat = x.flatten(1), weight.flatten(1), grad.flatten(1)
            if which == "forward":
                return torch.nn.functional.linear(flat[0], flat[1])
            return flat[2] @ flat[1] if which == "input_grad" else flat[2].t() @ flat[0]
        if which == "forward":
            return torch.conv2d(x, weight, None, *geometry)
        mask = [which == "input_grad", which == "weight_grad", False]
        rest = (one, padding, one, False, [0, 0], 1, mask)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *rest)

    def events(density: float) -> Callable[[], Any]:
        if kind == "reals":
            sparse = grad * (grad < density)
            return lambda: ops.spike_conv2d_input(sparse, weight, size, padding, one, 1)
        bits, _ = ops.spike_pack((x < density).to(dtype), table, kind == "counts")
        if which == "forward":
            return lambda: ops.spike_conv2d(bits, table, size, weight, None, *geometry)
        return lambda: ops.spike_conv2d_weight(bits, table, size, grad, weight.shape, *geometry)

    return [dense, events(_SPARSE), events(_DENSER)]


# ---- The decision ----


def ratio(which: str, kind: str, density: float, work: Product, dtype: torch.dtype) -> float:
    """Expected time of events as a fraction of dense time: that of the most similar shape measured.

    Args:
        which: forward, weight_grad or input_grad.
        kind: bits, counts or reals: what the events are.
        density: fraction of the values that are not 0.
        work: the product.
        dtype: of the weight.
    """
    return _ratio(costs(dtype)[which, kind], density, work)


def _ratio(by_shape: dict[Shape, Cost], density: float, work: Product) -> float:
    shape, reach, own_reach, waste = _most_similar(work)
    cost = by_shape[shape]
    fixed = cost.fixed * reach / own_reach
    return waste * (fixed + cost.slope * density)


@functools.lru_cache(maxsize=1024)  # a layer asks in every step
def _most_similar(work: Product) -> tuple[Shape, int, int, float]:
    """(shape, its reach, that of `work` where it is less, the waste of `work`)."""
    shape = min(SHAPES, key=lambda shape: work.distance(shape.product))
    reach = shape.product.reach
    return shape, reach, min(reach, work.reach), work.waste


def decide(
    mode: str, kind: str, density: float, work: Product, dtype: torch.dtype
) -> tuple[tuple[str, str], str]:
    """((forward, weight gradient), reason), the first two "events" or "dense".

    Args:
        mode: auto, events or dense.
        kind: bits or counts.
        density: fraction of the input that is not 0.
        work: the layer's product.
        dtype: of the weight.
    """
    if mode != "auto":
        return (mode, mode), f"mode is {mode}"
    known = costs(dtype)
    ratios = [_ratio(known[which, kind], density, work) for which in ("forward", "weight_grad")]
    forward, weight_grad = ("events" if r < GAIN else "dense" for r in ratios)
    reason = (
        f"density {density:.3f} of {kind}: events are expected to take {ratios[0]:.2f} (forward) "
        f"and {ratios[1]:.2f} (weight gradient) of the dense time"
    )
    return (forward, weight_grad), reason


def input_by_events(mode: str, density: float, work: Product, dtype: torch.dtype) -> bool:
    """Whether the input's gradient, of an output's gradient of this density, is for events.

    work: the product of that gradient, whose channels are the layer's outputs.
    """
    if mode != "auto":
        return mode == "events"
    return ratio("input_grad", "reals", density, work, dtype) < GAIN
