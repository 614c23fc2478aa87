"""What events cost beside dense products: when a spike layer should use which."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Time of events as a fraction of dense time: fixed + density * slope.

    Of a 3x3 convolution of many channels; `decide` scales it to other layers.
    """

    fixed: float
    slope: float


Key = tuple[str, str, torch.dtype]

#: By (pass, kind of events, dtype of the weight): one core of an AMD EPYC (Zen 4) with AVX-512.
BUILT_IN: dict[Key, Cost] = {
    ("forward", "bits", torch.float32): Cost(0.09, 1.2),
    ("forward", "counts", torch.float32): Cost(0.09, 1.5),
    ("weight_grad", "bits", torch.float32): Cost(0.09, 1.15),
    ("weight_grad", "counts", torch.float32): Cost(0.09, 1.3),
    ("input_grad", "reals", torch.float32): Cost(0.1, 1.5),
    ("forward", "bits", torch.bfloat16): Cost(0.15, 2.3),
    ("forward", "counts", torch.bfloat16): Cost(0.15, 2.9),
    ("weight_grad", "bits", torch.bfloat16): Cost(0.13, 2.1),
    ("weight_grad", "counts", torch.bfloat16): Cost(0.13, 2.4),
}

#: A calibration may meet a busy machine: how far it may be from the built-in numbers, as a factor.
LIMIT = 4.0

FORMAT = 1  # of the cache
_ROUNDS, _SPARSE, _DENSER = 6, 0.1, 0.4  # of the calibration; densities
_TILE = 32  # outputs that events are added to at a time
_SEGMENT = 192  # channels times kernel columns whose events are added one after the other


def cache_path() -> Path:
    """Where this machine's calibration is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    info = importlib.import_module("iirsnn._C").build_info()
    facts: list[Any] = [platform.processor(), platform.machine(), _processor(), torch.__version__]
    facts += [info["cpu_capability"], torch.get_num_threads(), FORMAT]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(root) / "iirsnn" / f"spike-cost-{digest}.json"


@functools.cache  # asked by every layer in every step, and slow where there are many cores
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def costs() -> dict[Key, Cost]:
    """This machine's costs: measured once (a fraction of a second), then read from the cache.

    The built-in ones where IIRSNN_CALIBRATE=0, or where the cache cannot be written: what a process
    measured for itself alone would make runs differ by rounding.
    """
    if os.environ.get("IIRSNN_CALIBRATE", "1") == "0":
        return BUILT_IN
    return _costs(str(cache_path()))


@functools.lru_cache(maxsize=8)
def _costs(path: str) -> dict[Key, Cost]:
    file, damaged = Path(path), (OSError, ValueError, TypeError, KeyError)
    try:
        return _decode(json.loads(file.read_text()))
    except FileNotFoundError:
        pass
    except damaged:
        with contextlib.suppress(OSError):
            file.unlink()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / "new"
            new.write_text(json.dumps(_encode(calibrate())))
            with contextlib.suppress(FileExistsError):
                os.link(new, file)  # the first process to finish decides for all
        return _decode(json.loads(file.read_text()))
    except damaged:
        return BUILT_IN


def _encode(measured: dict[Key, Cost]) -> dict[str, list[float]]:
    return {
        f"{which} {kind} {str(dtype).removeprefix('torch.')}": [cost.fixed, cost.slope]
        for (which, kind, dtype), cost in measured.items()
    }


def _decode(text: dict[str, list[float]]) -> dict[Key, Cost]:
    names = _encode(BUILT_IN)
    return {key: Cost(*map(float, text[name])) for key, name in zip(BUILT_IN, names, strict=True)}


def calibrate() -> dict[Key, Cost]:
    """Time events and dense products of a 3x3 convolution, 128 to 128 channels, now."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return {key: _bounded(key, _measure(*key)) for key in BUILT_IN}


def _measure(which: str, kind: str, dtype: torch.dtype) -> Cost:
    ops, geometry = torch.ops.iirsnn, ([1, 1], [1, 1], [1, 1], 1)
    generator = torch.Generator().manual_seed(0)

    def values(*size: int) -> Tensor:
        made = torch.rand(size, generator=generator).to(dtype)
        return made.contiguous(memory_format=torch.channels_last)

    x, weight, size = values(8, 128, 8, 8), values(128, 128, 3, 3), [8, 128, 8, 8]
    table = torch.arange(256, dtype=torch.float32)
    mask = [which == "input_grad", which == "weight_grad", False]

    def dense() -> Any:
        if which == "forward":
            return torch.conv2d(x, weight, None, *geometry)
        rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
        return torch.ops.aten.convolution_backward(x, x, weight, None, *rest)

    def events(density: float) -> Callable[[], Any]:
        sparse = (x < density).to(dtype)
        if kind == "reals":
            return lambda: ops.spike_conv2d_input(sparse, weight, size, [1, 1], [1, 1], 1)
        bits, _ = ops.spike_pack(sparse, table, kind == "counts")
        if which == "forward":
            return lambda: ops.spike_conv2d(bits, table, size, weight, None, *geometry)
        return lambda: ops.spike_conv2d_weight(bits, table, size, x, weight.shape, *geometry)

    runs = [dense, events(_SPARSE), events(_DENSER)]
    best = [float("inf")] * len(runs)
    for _ in range(_ROUNDS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    slope = (best[2] - best[1]) / (_DENSER - _SPARSE)
    return Cost((best[1] - slope * _SPARSE) / best[0], slope / best[0])


def _bounded(key: Key, cost: Cost) -> Cost:
    def bound(value: float, known: float) -> float:
        return round(min(max(value, known / LIMIT), known * LIMIT), 4)

    known = BUILT_IN[key]
    return Cost(bound(cost.fixed, known.fixed), bound(cost.slope, known.slope))


def ratio(which: str, kind: str, density: float, outputs: int, reach: int, dtype: Any) -> float:
    """Expected time of events as a fraction of dense time.

    Args:
        which: forward, weight_grad or input_grad.
        kind: bits, counts or reals: what the events are.
        density: fraction of the values that are not 0.
        outputs: of a group; rows of them are added.
        reach: channels of a group times kernel columns, whose events adjoin.
        dtype: of the weight.
    """
    cost = costs()[which, kind, dtype]
    waste = -(-outputs // _TILE) * _TILE / outputs
    return waste * (cost.fixed * _SEGMENT / min(_SEGMENT, reach) + cost.slope * density)


def decide(
    mode: str, kind: str, density: float, weight: Tensor, groups: int
) -> tuple[tuple[str, str], str]:
    """((forward, weight gradient), reason), the first two "events" or "dense".

    Args:
        mode: auto, events or dense.
        kind: bits or counts.
        density: fraction of the input that is not 0.
        weight: [K, C / groups, kernel rows, columns].
        groups: of the convolution.
    """
    if mode != "auto":
        return (mode, mode), f"mode is {mode}"
    outputs, reach = weight.shape[0] // groups, weight.shape[1] * weight.shape[3]
    ratios = [
        ratio(which, kind, density, outputs, reach, weight.dtype)
        for which in ("forward", "weight_grad")
    ]
    forward, weight_grad = ("events" if r < 1 else "dense" for r in ratios)
    reason = (
        f"density {density:.3f} of {kind}: events are expected to take {ratios[0]:.2f} (forward) "
        f"and {ratios[1]:.2f} (weight gradient) of the dense time"
    )
    return (forward, weight_grad), reason


def input_by_events(mode: str, density: float, weight: Tensor, groups: int) -> bool:
    """Whether the input's gradient, of an output's gradient of this density, is for events."""
    if mode != "auto":
        return mode == "events"
    outputs, reach = weight.shape[1], weight.shape[0] // groups * weight.shape[3]
    return ratio("input_grad", "reals", density, outputs, reach, weight.dtype) < 1
