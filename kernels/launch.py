"""What the launchers share: launches that are planned once, checks, memory order."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction

from iirsnn.errors import check_choice
from iirsnn.ops.reference import empty_spikes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLANS = 4096  # kept of each kind: one for every layer and size of batch
_FLOATS = ("v_reset", "scale", "eps", "momentum")


class Launch:
    """A kernel with those of its arguments that follow from layouts and options.

    In the signature of a kernel come tensors (x_ptr, ...), then sizes, then floats, then constants;
    tensors and floats are those of each call.
    """

    __slots__ = ("_compiled", "constants", "grid", "kernel", "sizes")

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
        sizes = list(itertools.takewhile(lambda name: name not in _FLOATS, names))
        constants = [name for name in names[len(sizes) :] if name not in _FLOATS]
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.sizes = tuple(arguments[name] for name in sizes)
        self.constants = tuple(arguments[name] for name in constants)
        self._compiled: dict[tuple[int | None, ...], Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *floats: float) -> None:
        """Launch on the device of the first tensor, in its current stream.

        Triton looks up what it has compiled by every argument of every call, which takes longer
        than all else. Beside this object, what specialises a kernel is which tensors are None,
        their alignment, and their dtypes, which it was planned for: what Triton found is kept.
        """
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current one
                return self(tensors, *floats)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        which = device, *[p if p is None else p & 15 for p in pointers]
        compiled = self._compiled.get(which)
        if compiled is not None:
            compiled(*pointers, *self.sizes, *floats, *self.constants)
            return None
        kernel = self.kernel[self.grid](*tensors, *self.sizes, *floats, *self.constants)
        if kernel is not None:  # None where it was interpreted
            self._compiled[which] = kernel[self.grid]
        return None


def traced(launch: Launch, tensors: Sequence[Tensor | None], *floats: float) -> None:
    """A launch that torch sees where it traces, by an op, which may be given any dtype."""
    kernel = launch.kernel
    if not isinstance(kernel, InterpretedFunction):  # which torch 2.11 cannot trace
        kernel = wrap_triton(kernel)
    with on_device_of(tensors[0]):  # type: ignore[arg-type]
        kernel[launch.grid](*tensors, *launch.sizes, *floats, *launch.constants)


#: `traced`, or `Launch.__call__` where nobody traces.
Launcher = Callable[..., None]
now: Launcher = Launch.__call__


_kept: list[Callable[[], None]] = []


def forget_plans() -> None:
    """For who changes a constant that launches are planned by."""
    for forget in _kept:
        forget()


def planned(plan: Callable[..., Any]) -> Callable[..., Any]:
    """A function of layouts and options, computed once for each; every time for symbolic sizes."""
    kept = functools.lru_cache(_PLANS)(plan)
    _kept.append(kept.cache_clear)

    @functools.wraps(plan)
    def look_up(*arguments: Any) -> Any:
        try:
            return kept(*arguments)
        except TypeError:  # a symbolic size has no hash
            return plan(*arguments)

    return look_up


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where there is none those of an H100, as if it were one."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_current(x: Tensor) -> None:
    """x [T, *neurons] with T >= 1 in a dtype of DTYPES: else TypeError or ValueError."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16 for Triton, got {x.dtype}")
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"x: expected [T, *neurons] with T >= 1, got {tuple(x.shape)}")


def code(table: dict[str, int], argument: str, name: str) -> int:
    """The number of a reset or a surrogate."""
    check_choice(argument, name, table)
    return table[name]


def _same_order(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether strides of a and b give the same order; that of a dimension of 1 says nothing."""
    return all(mine == wanted for mine, wanted, size in zip(a, b, shape, strict=True) if size > 1)


def empty_gradient(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Memory of this shape for a gradient, in the dtype of x or another.

    The layout is named because that is what every tensor has anyway: before 2.14 torch.compile
    takes two equal calls for one, so the output of forward for this, and copies it for each launch.
    """
    return x.new_empty_strided(shape, strides, dtype=dtype, layout=torch.strided)


def in_order(a: Tensor, x: Tensor) -> Tensor:
    """a [*neurons] in the memory order of x[0]: itself, or one copy."""
    if _same_order(a.stride(), x.stride()[1:], a.shape):
        return a
    return a.new_empty_strided(a.shape, x.stride()[1:]).copy_(a)


def is_in_order(g: Sequence[int], x: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether strides of g give its neurons the order of those of x, both [T, *neurons]."""
    return _same_order(g[1:], x[1:], shape[1:])


def gradient_in_order(g: Tensor, x: Tensor) -> Tensor:
    """g [T, *neurons] with its neurons in the memory order of x[0]: itself, or one copy.

    A gradient that is the same at every timestep keeps its stride of 0: one timestep is copied.
    """
    if g.stride(0) == 0:
        return in_order(g[0], x).expand(x.shape)
    return g if is_in_order(g.stride(), x.stride(), x.shape) else empty_spikes(x, g.dtype).copy_(g)


def planned_in_order(
    plan: Callable[..., Any], grad_s: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, Any]:
    """grad_s in the order of x, and the plan, which is None for strides of another order."""
    how = x.dtype, processors(x.device), *rest
    found = plan(x.shape, x.stride(), grad_s.stride(), *how)
    if found is None:
        grad_s = gradient_in_order(grad_s, x)
        found = plan(x.shape, x.stride(), grad_s.stride(), *how)
    return grad_s, found


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: this makes it that of x."""
    if x.is_cuda and torch.cuda.device_count() > 1:
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
