"""The Triton twins of the ops of iirsnn/ops/lif.py: same arguments, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iirsnn.ops import lif as contract

from .launch import on_device_of
from .lif import lif_backward, lif_forward
from .packed import lif_packed, unpack_spikes
from .single_step import single_step_backward, single_step_forward


def twin(fn: Callable[..., Any]) -> Any:
    """Register fn as the op iirsnn::<its name>, with the schema and the fake of the op it is of."""
    original = getattr(torch.ops.iirsnn, fn.__name__.removeprefix("triton_"))
    arguments = str(original.default._schema).partition("(")
    op = torch.library.triton_op(
        f"iirsnn::{fn.__name__}", fn, mutates_args=(), schema="(" + arguments[2]
    )
    op.register_fake(original)
    return op


@twin
def triton_lif_forward(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    threshold, leak = threshold.contiguous(), leak.contiguous()
    with on_device_of(x):
        if x.shape[0] == 1 and v0 is None and not return_v:
            return single_step_forward(x, threshold), contract.empty_membrane(x, False)
        return lif_forward(x, threshold, leak, v0, reset, v_reset, return_v)


@twin
def triton_lif_backward(
    grad_s: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
    need_parameter_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    threshold, leak = threshold.contiguous(), leak.contiguous()
    how = surrogate, surrogate_scale, need_parameter_grads
    with on_device_of(x):
        if x.shape[0] == 1 and v0 is None and grad_v is None:
            grad_x, grad_threshold = single_step_backward(grad_s, x, threshold, *how)
            grad_leak = torch.zeros_like(leak) if need_parameter_grads else leak.new_empty(0)
            return grad_x, grad_threshold, grad_leak, contract.empty_membrane(x, False)
        return lif_backward(
            grad_s, grad_v, x, threshold, leak, v0, reset, v_reset, detach_reset, *how
        )


@twin
def triton_lif_packed(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    threshold, leak = threshold.contiguous(), leak.contiguous()
    with on_device_of(x):
        return lif_packed(x, threshold, leak, v0, reset, v_reset, return_v)


@twin
def triton_unpack_spikes(
    bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    with on_device_of(bits):
        return unpack_spikes(bits.contiguous(), size, stride, dtype)


contract.register(triton_lif_forward, triton_lif_backward)
