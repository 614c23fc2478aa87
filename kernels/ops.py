"""The Triton twins of the ops of iirsnn/ops/lif.py: same arguments, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iirsnn.ops import batch_norm as batch_norm_contract
from iirsnn.ops import lif as contract

from . import batch_norm, eager, eager_batch_norm
from .launch import traced
from .packed import lif_packed, unpack_spikes


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
    s, v = eager.forward(x, threshold, leak, v0, reset, v_reset, return_v, traced)
    return s, contract.empty_membrane(x, False) if v is None else v


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
    how = reset, v_reset, detach_reset, surrogate, surrogate_scale, need_parameter_grads
    grad_x, grad_threshold, grad_leak, grad_v0 = eager.backward(
        grad_s, grad_v, x, threshold, leak, v0, *how, traced
    )
    return (
        grad_x,
        threshold.new_empty(0) if grad_threshold is None else grad_threshold,
        leak.new_empty(0) if grad_leak is None else grad_leak,
        contract.empty_membrane(x, False) if grad_v0 is None else grad_v0,
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
    return lif_packed(x, threshold, leak, v0, reset, v_reset, return_v, traced)


@twin
def triton_unpack_spikes(
    bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return unpack_spikes(bits.contiguous(), size, stride, dtype, traced)


contract.register(triton_lif_forward, triton_lif_backward)


# ---- BatchNorm and LIF in one


@twin
def triton_bn_lif_moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch_norm.moments(x, eps, traced)


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
    return batch_norm.fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, traced)


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
    how = reset, v_reset, traced
    return eager_batch_norm.forward(x, weight, bias, threshold, leak, eps, *how)


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
    return batch_norm.gradient_sums(grad_s, x, parameters, how, False, traced)[:3]


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
    second = workspace, grad_mean, slope
    batch_norm.finish_grad_x(grad_x, *second, grad_s, x, parameters, how, traced)


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
    return eager_batch_norm.backward(grad_s, x, *parameters, *how, True, traced)  # type: ignore[return-value]


batch_norm_contract.register(triton_bn_lif_forward, triton_bn_lif_backward)
