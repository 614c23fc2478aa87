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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cache
from .products import Work, dense_backward, dense_forward


@dataclass(frozen=True)
class Cost:
    """Time of events as a fraction of dense time: fixed + density * slope."""

    fixed: float
    slope: float

    def at(self, density: float) -> float:
        return self.fixed + density * self.slope


#: By dtype of the weight, pass and kind of events, where nothing can be measured: one core of an
#: AMD EPYC (Zen 4) with AVX-512, at layers whose channels and outputs fill the kernels' tiles.
BUILT_IN = {
    torch.float32: {
        ("forward", "bits"): Cost(0.09, 1.2),
        ("forward", "counts"): Cost(0.09, 1.5),
        ("weight_grad", "bits"): Cost(0.09, 1.15),
        ("weight_grad", "counts"): Cost(0.09, 1.3),
        ("input_grad", "reals"): Cost(0.1, 1.5),
    },
    torch.bfloat16: {
        ("forward", "bits"): Cost(0.15, 2.3),
        ("forward", "counts"): Cost(0.15, 2.9),
        ("weight_grad", "bits"): Cost(0.13, 2.1),
        ("weight_grad", "counts"): Cost(0.13, 2.4),
    },
}

#: Events have to take less than this fraction of the dense time: a tie is for dense.
GAIN = 0.95

FORMAT = 3  # of the cache
_PRODUCTS = 16 * 64 * 64 * 9 * 32 * 32  # multiplications of what is timed
_SECONDS, _ROUNDS = 0.02, (3, 9)  # of one measurement, which ends between these rounds
_SPARSE, _DENSER = 0.1, 0.4  # densities that are timed
_TILE = 32  # outputs that events are added to at a time
_SEGMENT = 192  # channels times kernel columns whose events are added one after the other


# ---- The decision ----


def decide(
    mode: str, kind: str, density: float, work: Work, dtype: torch.dtype
) -> tuple[tuple[str, str], str]:
    """((forward, weight gradient), reason), the first two "events" or "dense".

    Args:
        mode: auto, events or dense.
        kind: bits or counts.
        density: fraction of the input that is not 0.
        work: the layer's.
        dtype: of the weight.
    """
    if not addressable(work):
        return ("dense", "dense"), "events cannot address images of this size"
    if mode != "auto":
        return (mode, mode), f"mode is {mode}"
    ratios = [cost(p, kind, work, dtype).at(density) for p in ("forward", "weight_grad")]
    forward, weight_grad = ("events" if r < GAIN else "dense" for r in ratios)
    reason = (
        f"density {density:.3f} of {kind}: events are expected to take {ratios[0]:.2f} (forward) "
        f"and {ratios[1]:.2f} (weight gradient) of the dense time"
    )
    return (forward, weight_grad), reason


def input_by_events(
    mode: str, density: Callable[[], float], work: Work, dtype: torch.dtype
) -> bool:
    """Whether the input's gradient is for events, at the density of the output's gradient.

    density: asked for where it matters.
    """
    if mode == "dense" or not addressable(work):
        return False
    if mode == "events":
        return True
    known = cost("input_grad", "reals", work, dtype)
    return known.at(0.0) < GAIN and (known.at(1.0) < GAIN or known.at(density()) < GAIN)


@functools.lru_cache(maxsize=1024)  # a layer asks in every step
def addressable(work: Work) -> bool:
    """Whether the kernels of events take images of this size: their offsets have 32 bits.

    Not those smaller than the kernel, which torch's own product refuses.
    """
    (height, width), (out_height, out_width) = work.size[2:], work.output[2:]
    positions = max(height, out_height) * (width + out_width)
    small = 192 * max(width, out_width) < 2**25 and positions < 2**25
    return small and min(out_height, out_width) > 0


# ---- What events cost ----


def cost(which: str, kind: str, work: Work, dtype: torch.dtype) -> Cost:
    """What events cost beside dense products here: measured once, then read from the cache.

    Built in where IIRSNN_CALIBRATE=0, under torch.jit.trace, which would record what is measured,
    or where the cache cannot be written: what a process measured for itself alone would make runs
    differ by rounding.

    Args:
        which: forward, weight_grad or input_grad.
        kind: bits, counts or reals: what the events are.
        work: the layer's.
        dtype: of the weight.
    """
    never = os.environ.get("IIRSNN_CALIBRATE", "1") == "0" or torch.jit.is_tracing()
    path = None if never else cache_path()
    return _cost(None if path is None else str(path), which, kind, work, dtype)


@functools.lru_cache(maxsize=4096)  # asked by every layer in every step
def _cost(path: str | None, which: str, kind: str, work: Work, dtype: torch.dtype) -> Cost:
    if path is not None:
        with contextlib.suppress(OSError):
            work = representative(work)
            key = json.dumps([which, kind, str(dtype).removeprefix("torch."), *work])
            return _kept(Path(path), key, lambda: measure(which, kind, work, dtype))
    built_in = BUILT_IN[dtype][which, kind]
    outputs, channels, _, columns = work.weight
    outputs //= work.geometry.groups
    if which == "input_grad":
        outputs, channels = channels, outputs
    waste = -(-outputs // _TILE) * _TILE / outputs  # sums computed, for each that is wanted
    starts = _SEGMENT / min(channels * columns, _SEGMENT)
    return Cost(waste * starts * built_in.fixed, waste * built_in.slope)


@functools.lru_cache(maxsize=1024)
def representative(work: Work) -> Work:
    """What is timed in place of `work`: enough images to show what each of many costs.

    Their number is a power of two. A linear layer is timed at 2048 inputs and outputs at most.
    """
    (images, channels, *area), weight = work.size, work.weight
    if work.linear:
        channels, weight = min(channels, 2048), (*(min(n, 2048) for n in weight[:2]), 1, 1)
    work = Work((images, channels, *area), weight, work.geometry)
    images = min(images, max(2, _PRODUCTS // max(1, work.products)))
    return work._replace(size=(1 << images.bit_length() - 1, channels, *area))


# ---- The cache ----


def cache_path() -> Path | None:
    """Where the costs of these kernels on this machine are kept; None for a user without a home.

    A line of JSON each, [key, [fixed, slope]]; of several for one key the first counts.
    """
    root = cache.folder()
    if root is None:
        return None
    extension = _extension()
    capability = extension.build_info()["cpu_capability"]
    return _cache_path(str(root), extension.__file__, capability, torch.get_num_threads())


@functools.cache
def _extension() -> Any:
    return importlib.import_module("iirsnn._C")


@functools.lru_cache(maxsize=16)
def _cache_path(root: str, kernels: str, capability: str, threads: int) -> Path:
    facts: list[Any] = [platform.processor(), platform.machine(), _processor(), torch.__version__]
    facts += [capability, threads, FORMAT]
    facts.append(hashlib.sha256(Path(kernels).read_bytes()).hexdigest())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(root) / f"spike-cost-{capability}-{digest}.jsonl"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _kept(file: Path, key: str, measure: Callable[[], Cost]) -> Cost:
    """The cost that the file has for a key; else it is measured and appended.

    Processes that measure at the same time end with the same: that of the first line.

    Raises:
        OSError: the file can neither be read nor written, or does not keep what is written.
    """
    known = _read(file, key)
    if known is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as lines:  # fails before anything is measured
            new = measure()
            line = json.dumps([key, [new.fixed, new.slope]])
            lines.write(f"\n{line}\n".encode())  # at once, and after a line that was cut off
        known = _read(file, key)
        if known is None:
            raise OSError(f"{file} does not keep what is written")  # a full disk, after a part
    return known


def _read(file: Path, key: str) -> Cost | None:
    start = f"[{json.dumps(key)}, ".encode()
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_bytes().splitlines():
            if not line.startswith(start):  # of many, few are parsed
                continue
            with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
                _, (fixed, slope) = json.loads(line)
                if math.isfinite(fixed) and math.isfinite(slope):
                    return Cost(fixed, slope)
    return None


# ---- The measurement ----


def measure(which: str, kind: str, work: Work, dtype: torch.dtype) -> Cost:
    """Time the dense product and events at two densities, now.

    Rounds over the three, of each the least time: a busy moment hits one round alone.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        calls = _calls(which, kind, work, dtype)
        least, begin = [math.inf] * 3, time.perf_counter()
        for turn in range(1, _ROUNDS[1] + 1):
            least = [min(before, _seconds(call)) for before, call in zip(least, calls, strict=True)]
            if turn >= _ROUNDS[0] and time.perf_counter() - begin > _SECONDS:
                break
    return _line(*least)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _line(dense: float, sparse: float, denser: float) -> Cost:
    """From seconds of the dense product and of events at the two densities."""
    slope = max(0.0, (denser - sparse) / (_DENSER - _SPARSE))
    return Cost(round((sparse - slope * _SPARSE) / dense, 4), round(slope / dense, 4))


def _calls(which: str, kind: str, work: Work, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """The dense product, events at the lower density, and at the higher one."""
    ops, size, geometry = torch.ops.iirsnn, list(work.size), work.geometry
    x, grad, weight = (_values(n, dtype) for n in (work.size, work.output, work.weight))
    table = torch.arange(256, dtype=torch.float32)

    def dense() -> Any:
        if which == "forward":
            return dense_forward(x, weight, None, geometry)
        mask = [which == "input_grad", which == "weight_grad", False]
        return dense_backward(grad, x, weight, geometry, mask)

    def events(density: float) -> Callable[[], Any]:
        if kind == "reals":
            sparse = grad * (grad < density)
            return lambda: ops.spike_conv2d_input(sparse, weight, size, *geometry[1:])
        bits, _ = ops.spike_pack((x < density).to(dtype), table, kind == "counts")
        if which == "forward":
            return lambda: ops.spike_conv2d(bits, table, size, weight, None, *geometry)
        return lambda: ops.spike_conv2d_weight(bits, table, size, grad, weight.shape, *geometry)

    return [dense, events(_SPARSE), events(_DENSER)]


def _values(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random, of [0, 1), in channels_last: a few, over and over, as making many takes longest."""
    few = torch.rand(65521, generator=torch.Generator().manual_seed(0)).to(dtype)
    n, channels, rows, columns = size
    count = math.prod(size)
    many = few.repeat(-(-count // len(few)))[:count]
    return many.view(n, rows, columns, channels).permute(0, 3, 1, 2)
