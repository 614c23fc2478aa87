"""What the launchers share: checks, memory order, the device."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction

from iirsnn.errors import check_choice
from iirsnn.ops.reference import empty_spikes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def traced(kernel: Any) -> Any:
    """A kernel as torch.compile can see its launch; what Triton interprets torch 2.11 cannot."""
    return kernel if isinstance(kernel, InterpretedFunction) else wrap_triton(kernel)


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


def _same_order(a: Tensor, like: Tensor) -> bool:
    strides = zip(a.stride(), like.stride(), like.shape, strict=True)
    return all(mine == wanted for mine, wanted, size in strides if size > 1)


def in_order(a: Tensor, like: Tensor) -> Tensor:
    """a, of the shape of `like`, in its memory order: itself, or one copy."""
    if _same_order(a, like):
        return a
    return a.new_empty_strided(like.shape, like.stride()).copy_(a)


def gradient_in_order(g: Tensor, x: Tensor) -> Tensor:
    """g [T, *neurons] with its neurons in the memory order of x[0]: itself, or one copy.

    A gradient that is the same at every timestep keeps its stride of 0: one timestep is copied.
    """
    if g.stride(0) == 0:
        return in_order(g[0], x[0]).expand(x.shape)
    return g if _same_order(g[0], x[0]) else empty_spikes(x, g.dtype).copy_(g)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: this makes it that of x."""
    if x.is_cuda and torch.cuda.device_count() > 1:
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
