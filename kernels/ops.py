"""The Triton twins of the ops of iirsnn/ops/lif.py: same arguments, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iirsnn.ops import batch_norm as batch_norm_contract
from iirsnn.ops import lif as contract

from . import batch_norm
from .launch import on_device_of
from .lif import lif_backward, lif_forward
from .packed import lif_packed, unpack_spikes
from .single_step import single_step_backward, single_step_forward


def twin(fn: Callable[..., Any]) -> Any:
    """Register fn as the op iirsnn::<its name>, with the schema and the fake of the op it is of."""
    op = _twin(fn)
    op.register_fake(getattr(torch.ops.iirsnn, fn.__name__.removeprefix("triton_")))
    return op


def _twin(fn: Callable[..., Any]) -> Any:
    original = getattr(torch.ops.iirsnn, fn.__name__.removeprefix("triton_"))
    schema = original.default._schema
    arguments = str(schema).partition("(")
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    return torch.library.triton_op(
        f"iirsnn::{fn.__name__}", fn, mutates_args=written, schema="(" + arguments[2]
    )


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


# ---- BatchNorm and LIF in one


@twin
def triton_bn_lif_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(x):
        return batch_norm.moments(x, eps)


@twin
def triton_bn_lif_fire(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
) -> Tensor:
    with on_device_of(x):
        return batch_norm.fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset)


@twin
def triton_bn_lif_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    eps: float,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(x):
        _, mean, var, rstd = batch_norm.moments(x, eps)
        s = batch_norm.fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset)
        return s, mean, var, rstd


@_twin
def triton_bn_lif_gradient_sums(
    grad_s: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = mean, rstd, weight, bias, threshold, leak
    how = reset, v_reset, detach_reset, surrogate, surrogate_scale
    with on_device_of(x):
        return batch_norm.gradient_sums(grad_s, x, parameters, how)[:3]


@_twin
def triton_bn_lif_grad_x(
    grad_x: Tensor,
    workspace: Tensor,
    grad_mean: Tensor,
    slope: Tensor,
    grad_s: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
) -> None:
    parameters = mean, rstd, weight, bias, threshold, leak
    how = reset, v_reset, detach_reset, surrogate, surrogate_scale
    with on_device_of(x):
        batch_norm.finish_grad_x(grad_x, workspace, grad_mean, slope, grad_s, x, parameters, how)


@twin
def triton_bn_lif_backward(
    grad_s: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = mean, rstd, weight, bias, threshold, leak
    how = reset, v_reset, detach_reset, surrogate, surrogate_scale
    with on_device_of(x):
        found = batch_norm.gradient_sums(grad_s, x, parameters, how)
        batch_norm.finish_grad_x(
            *(found.grad_x, found.workspace, found.grad_mean, found.slope, grad_s, x),
            *(parameters, how),
        )
        return (
            *(found.grad_x, found.grad_weight, found.grad_bias),
            batch_norm.gradient_of(found.sums[0], threshold),
            batch_norm.gradient_of(found.sums[1], leak),
        )


batch_norm_contract.register(triton_bn_lif_forward, triton_bn_lif_backward)
