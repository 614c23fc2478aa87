"""Which code runs: the table of backends, chosen once per call, in the open.

`auto` takes `cuda` then `triton` for a CUDA tensor, `cpu` for a CPU tensor, and where nothing else
can run the plain torch `reference`, with one warning. A backend asked for by name runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import check_choice
from . import batch_norm, build, lif, reference  # noqa: F401  (they define the schemas)


@dataclass(frozen=True)
class Backend:
    """The three entry points, each with the arguments of its op (see ops/lif.py)."""

    name: str  # compiled, triton or reference
    forward: Callable[..., Any]
    packed: Callable[..., Any]
    unpack: Callable[..., Any]


_ops = torch.ops.iirsnn
_COMPILED = Backend("compiled", _ops.lif_forward, _ops.lif_packed, _ops.unpack_spikes)
_REFERENCE = Backend(
    "reference", reference.lif_forward, reference.lif_packed, reference.unpack_spikes
)
NAMES = ("auto", "cpu", "cuda", "triton", "reference")

#: Timesteps up to which torch.compile sees plain operators in place of a kernel, by device.
#:
#: cuda, 1: one comparison, which Inductor fuses with the BatchNorm or the pool beside it, where a
#: kernel would read and write once more. Its bits are those of the kernels, for there is nothing to
#: contract. From two timesteps on there is: Triton makes one instruction of leak * v + x.
#: cpu, 0: measured (docs/performance.md): fusing gains a little in cache and loses more beyond it.
PLAIN_IN_COMPILED_CODE = {"cuda": 1, "cpu": 0}

_compiled_reason: dict[str, str | None] = {}
_direct: dict[str, Callable[..., Any] | None] = {}
_warned: set[str] = set()


def _compiled(device: str) -> str | None:
    """Why the compiled kernels for `device` cannot run; None when they can."""
    if "import" not in _compiled_reason:
        _compiled_reason["import"] = build.load()
    reason = _compiled_reason["import"]
    if reason is None and device == "cuda":
        if device not in _compiled_reason:
            built = importlib.import_module("iirsnn._C").build_info()["cuda"]
            why = "iirsnn._C was built without CUDA (build with IIRSNN_BUILD_CUDA=1)"
            _compiled_reason[device] = None if built else why
        reason = _compiled_reason[device]
    return reason


def _triton() -> str | None:
    try:
        importlib.import_module("iirsnn.kernels")
    except ImportError as error:
        return f"iirsnn.kernels cannot be imported: {error}"
    _hand_over()
    return None


@functools.cache
def _hand_over() -> None:
    """Let the calls of iirsnn._C have the Triton kernels, where both are there."""
    if _compiled("cpu") is None:
        eager = importlib.import_module("iirsnn.kernels.eager")
        normed = importlib.import_module("iirsnn.kernels.eager_batch_norm")
        sys.modules["iirsnn._C"].take_triton(
            eager.forward, eager.backward, normed.forward_counted, normed.backward
        )


def why_not(name: str, device: str) -> str | None:
    """Why backend `name` cannot take a tensor of `device` ("cpu", "cuda", ...); None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"it takes CUDA tensors (CPU tensors under TRITON_INTERPRET=1), got {device}"
        return _triton()
    if device != name and device != "meta":
        return f"it takes {name.upper()} tensors, got {device}"
    return _compiled(name)


def _candidates(device: str) -> tuple[str, ...]:
    """What `auto` looks for, best first."""
    return ("cuda", "triton") if device == "cuda" else ("cpu",)


def has_kernels(device: str) -> bool:
    """Whether `auto` has kernels for tensors of `device`, and is not left with the reference."""
    return any(why_not(name, device) is None for name in _candidates(device))


def _resolve(name: str, device: str) -> str:
    check_choice("backend", name, NAMES)
    if name != "auto":
        reason = why_not(name, device)
        if reason is not None:
            raise RuntimeError(f"backend: expected one that can run, got {name!r}: {reason}")
        return name
    reasons = []
    for candidate in _candidates(device):
        reason = why_not(candidate, device)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    text = "; ".join(reasons)
    if text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"iirsnn runs its slow plain-torch reference on {device} tensors ({text}). "
            "Cure: `pip install --no-build-isolation .` where a C++ compiler is installed; "
            'backend="reference" asks for it without this warning.',
            RuntimeWarning,
            stacklevel=4,
        )
    return "reference"


# torch.compiler.assume_constant_result, without its import of torch._dynamo: that takes a second
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class BatchNormBackend:
    """The entry points of BatchNorm and LIF in one, of one backend (see ops/batch_norm.py)."""

    name: str
    forward: Callable[..., Any]
    moments: Callable[..., Any]
    fire: Callable[..., Any]
    gradient_sums: Callable[..., Any]
    grad_x: Callable[..., Any]
    # what counts a call of a norm in the same launches, or returns None: see nn/batch_norm.py
    counted: Callable[..., Any] | None = None
    totals: Callable[..., Any] | None = None

    @staticmethod
    @functools.cache
    def of(name: str) -> BatchNormBackend:
        """Of `cpu`, `cuda` or `triton`."""
        prefix = "triton_bn_lif_" if name == "triton" else "bn_lif_"
        ops = ("forward", "moments", "fire", "gradient_sums", "grad_x")
        return BatchNormBackend(name, *(getattr(torch.ops.iirsnn, prefix + op) for op in ops))


_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def choose_batch_norm(name: str, x: torch.Tensor) -> BatchNormBackend | str:
    """BatchNorm and LIF in one by the backend `name` for x, or why that has no such kernels.

    Raises what `choose` raises.
    """
    resolved = _resolve(name, x.device.type)
    if resolved == "reference":
        return "backend reference has no kernels"
    if x.dtype not in _FUSED_DTYPES[resolved]:
        wanted = ", ".join(str(dtype) for dtype in _FUSED_DTYPES[resolved])
        return f"backend {resolved} takes {wanted}, got {x.dtype}"
    if resolved != "cpu" and not torch.compiler.is_compiling():
        return _batch_norm_by_triton() if resolved == "triton" else _batch_norm_by_cuda()
    return BatchNormBackend.of(resolved)


@functools.cache
def _batch_norm_by_cuda() -> BatchNormBackend:
    return replace(BatchNormBackend.of("cuda"), totals=direct("bn_lif_totals"))


@functools.cache
def _batch_norm_by_triton() -> BatchNormBackend:
    eager = importlib.import_module("iirsnn.kernels.eager_batch_norm")
    return replace(
        BatchNormBackend.of("triton"),
        forward=eager.call,
        fire=eager.fire,
        counted=eager.counted,
        totals=eager.totals,
    )


def direct(name: str = "lif_call") -> Callable[..., Any] | None:
    """iirsnn._C.lif_call, the shortest way to lif_forward; None where it is not compiled.

    It takes the name of a backend and the arguments of `iirsnn.functional.lif`, and returns None
    where that has to take them. neuron_call does the same for a `FusedLIF`, whose attributes it
    reads itself, bn_lif_call for `BatchNormLIF` in training, and spike_origin, spike_product and
    spike_average_pool for spike layers.
    """
    found = _direct.get(name)
    if found is None and _compiled("cpu") is None:
        found = _direct[name] = getattr(sys.modules["iirsnn._C"], name, None)
    return found


@functools.cache
def _by_triton() -> Backend:
    eager = importlib.import_module("iirsnn.kernels.eager")
    return Backend("triton", eager.call, eager.packed, eager.unpack)


def direct_to_triton() -> Callable[..., Any] | None:
    """The twin in Python of what `direct` returns, for Triton's kernels once they are imported."""
    eager = sys.modules.get("iirsnn.kernels.eager")
    return None if eager is None else eager.lif_call


def choose_compiled(name: str, x: torch.Tensor, v0: torch.Tensor | None) -> Backend:
    """As `choose`, for code that torch.compile traces: see PLAIN_IN_COMPILED_CODE."""
    plain = v0 is None and x.shape[0] <= PLAIN_IN_COMPILED_CODE.get(x.device.type, 0)
    return _REFERENCE if name == "auto" and plain else choose(name, x.device)


@functools.cache  # its ops are defined when it is imported
def _triton_backend() -> Backend:
    names = ("triton_lif_forward", "triton_lif_packed", "triton_unpack_spikes")
    return Backend("triton", *(getattr(_ops, name) for name in names))


def choose(name: str, device: torch.device) -> Backend:
    """The backend `name` for tensors on `device`.

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run there.
    """
    resolved = _resolve(name, device.type)
    if resolved == "triton":
        return _triton_backend() if torch.compiler.is_compiling() else _by_triton()
    return _REFERENCE if resolved == "reference" else _COMPILED
