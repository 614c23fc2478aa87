"""What events cost beside dense products on this machine: when a spike layer should use which."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import cache
from .products import Work, dense_backward, dense_forward

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]


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

FORMAT = 4  # of the cache
_PRODUCTS = 16 * 64 * 64 * 9 * 32 * 32  # multiplications of what is timed, at most
_VALUES = 2**22  # of its input or output, at most
_SECONDS, _ROUNDS = 0.02, (2, 9)  # of one measurement, which ends between these rounds
_AGREE, _PATIENCE = 1.25, 0.3  # until two least times differ by no more, rounds go on so long
_SETTLED = 1.5  # what differs by more is not kept
_WAIT = 5.0  # seconds for another process's measurement
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
    if not possible(work):
        return ("dense", "dense"), "events cannot address images of this size"
    if mode != "auto":
        return (mode, mode), f"mode is {mode}"
    known = costs(("forward", "weight_grad"), kind, work, dtype)
    ratios = [cost.at(density) for cost in known]
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
    if mode == "dense" or not possible(work):
        return False
    if mode == "events":
        return True
    (known,) = costs(("input_grad",), "reals", work, dtype)
    return known.at(0.0) < GAIN and (known.at(1.0) < GAIN or known.at(density()) < GAIN)


@functools.lru_cache(maxsize=1024)  # a layer asks in every step
def possible(work: Work) -> bool:
    """Whether the kernels of events take a layer: their offsets have 32 bits.

    Not one without inputs or outputs, nor images smaller than the kernel, which torch's own product
    refuses.
    """
    (height, width), (out_height, out_width) = work.size[2:], work.output[2:]
    if math.prod(work.weight) == 0 or min(out_height, out_width) <= 0:
        return False
    positions = max(height, out_height) * (width + out_width)
    return 192 * max(width, out_width) < 2**25 and positions < 2**25


# ---- What events cost ----


def costs(passes: tuple[str, ...], kind: str, work: Work, dtype: torch.dtype) -> list[Cost]:
    """What events cost beside dense products here: measured once, then read from the cache.

    Built in where IIRSNN_CALIBRATE=0, under torch.jit.trace, which would record what is measured,
    or where the cache cannot be written: what a process measured for itself alone would make runs
    differ by rounding.

    Args:
        passes: of forward, weight_grad and input_grad.
        kind: bits, counts or reals: what the events are.
        work: the layer's.
        dtype: of the weight.
    """
    never = os.environ.get("IIRSNN_CALIBRATE", "1") == "0" or torch.jit.is_tracing()
    path = None if never else cache_path()
    where = None if path is None else str(path)
    return [_cost(where, which, kind, work, dtype) for which in passes]


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


def representative(work: Work) -> Work:
    """What is timed in place of `work`: enough images to show what each of many costs.

    Their number is a power of two. Of one image that is too much by itself, some rows; of a linear
    layer 2048 inputs and outputs at most.
    """
    (images, channels, height, width), weight, geometry = work
    if work.linear:
        channels, weight = min(channels, 2048), (*(min(n, 2048) for n in weight[:2]), 1, 1)

    def of(images: int, height: int) -> Work:
        return Work((images, channels, height, width), weight, geometry)

    def fits(work: Work) -> bool:
        outputs = weight[0] // geometry.groups
        padded = -(-outputs // _TILE) * _TILE / outputs  # events compute whole tiles
        values = max(math.prod(work.size), math.prod(work.output))
        return work.size[0] * work.products * padded <= _PRODUCTS and values <= _VALUES

    images = 1 << images.bit_length() - 1
    while images > 1 and not fits(of(images, height)):
        images //= 2
    least = geometry.dilation[0] * (weight[2] - 1) + 1
    while height > least and not fits(of(images, height)):
        height = max(least, height // 2)
    return of(images, height)


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
    facts += [capability, threads, os.environ.get("OMP_WAIT_POLICY"), FORMAT]
    facts.append(hashlib.sha256(Path(kernels).read_bytes()).hexdigest())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(root) / f"spike-cost-{capability}-{digest}.jsonl"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _kept(file: Path, key: str, measure: Callable[[], tuple[Cost, bool]]) -> Cost:
    """The cost that the file has for a key; else it is measured, and appended if it is settled.

    One process measures at a time, as others would disturb it, and all end with the same: that of
    the first line. What is not settled is this process's alone.

    Raises:
        OSError: the file can neither be read nor written, or does not keep what is written.
    """
    known = _read(file, key)
    if known is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # fails before anything is measured
        with file.open("ab", buffering=0) as lines, _alone(lines.fileno()):
            known = _read(file, key)
            if known is None:
                new, settled = measure()
                if not settled:
                    return new
                line = json.dumps([key, [new.fixed, new.slope]])
                lines.write(f"\n{line}\n".encode())  # at once, and after a line that was cut off
                known = _read(file, key)
        if known is None:
            raise OSError(f"{file} does not keep what is written")  # a full disk, after a part
    return known


@contextlib.contextmanager
def _alone(file: int) -> Iterator[None]:
    """Holds a lock of an open file; without it where there is none, or where it takes too long."""
    if fcntl is None:
        yield
        return
    end = time.monotonic() + _WAIT
    while time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process has it
            time.sleep(0.005)
        except OSError:  # a file system without locks
            break
        else:
            break
    yield  # closing the file gives it back


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


def measure(which: str, kind: str, work: Work, dtype: torch.dtype) -> tuple[Cost, bool]:
    """Time the dense product and events at two densities, now: (cost, whether it is settled).

    Rounds over the three, of each the least time: a busy moment hits one round alone. Where it
    lasts, the least times of two rounds differ by more than the half: that settles nothing.
    """
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        calls = _calls(which, kind, work, dtype)
        times: list[list[float]] = [[] for _ in calls]
        begin = time.perf_counter()
        for turn in itertools.count(1):
            for call, taken in zip(calls, times, strict=True):
                taken.append(_seconds(call))
            spent = time.perf_counter() - begin
            if turn >= _ROUNDS[0] and (spent > _SECONDS or turn >= _ROUNDS[1]):
                doubt = max(map(_doubt, times))
                if spent > _PATIENCE or doubt <= _AGREE:
                    break
                time.sleep(0.005)  # another moment
    return _line(*map(min, times)), doubt <= _SETTLED


def _doubt(times: list[float]) -> float:
    least, second, *_ = sorted(times)
    return second / least


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
