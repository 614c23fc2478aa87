"""BatchNorm and LIF in one without an op, as eager.py has LIF alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batch_norm
from .batch_norm import NOTHING, Running
from .eager import needs_gradient, unwatched
from .launch import Launcher, now


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    eps: float,
    reset: str,
    v_reset: float,
    launch: Launcher = now,
    running: Running = NOTHING,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op bn_lif_forward: s, mean, var, rstd. Counts the call in `running`."""
    mean, var, rstd = batch_norm.statistics(x, eps, launch, running)
    s = batch_norm.fire(x, mean, rstd, weight, bias, threshold, leak, reset, v_reset, launch)
    return s, mean, var, rstd


def forward_counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `forward`, for iirsnn._C: the last four are those of `Running`."""
    return forward(*arguments[:-4], now, Running(*arguments[-4:]))


def backward(
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
    learned: bool = True,
    launch: Launcher = now,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the op bn_lif_backward; None for threshold and leak where they are not learned."""
    parameters = mean, rstd, weight, bias, threshold, leak
    how = reset, v_reset, detach_reset, surrogate, surrogate_scale
    found = batch_norm.gradient_sums(grad_s, x, parameters, how, learned, launch)
    second = found.workspace, found.grad_mean, found.slope
    batch_norm.finish_grad_x(found.grad_x, *second, grad_s, x, parameters, how, launch)
    grads = found.grad_x, found.grad_weight, found.grad_bias
    return *grads, found.grad_threshold, found.grad_leak


class BnLifGradient(torch.autograd.Function):
    """What the op triton_bn_lif_forward computes, with its gradient."""

    gives_spikes = True  # see iirsnn/nn/origin.py

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor,
        leak: Tensor,
        eps: float,
        options: tuple[str, float, bool, str, float],
        running: Running = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        how = eps, options[0], options[1], now, running
        found = forward(x, weight, bias, threshold, leak, *how)
        _, mean, var, rstd = found
        ctx.mark_non_differentiable(mean, var, rstd)
        ctx.save_for_backward(x, mean, rstd, weight, bias, threshold, leak)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor | None, *rest: Any) -> Any:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if grad_s is None:
            grad_s = saved[0].new_zeros(()).expand(saved[0].shape)
        if torch.is_grad_enabled() or not unwatched(grad_s, *saved):
            # a gradient of it raises
            grads = torch.ops.iirsnn.triton_bn_lif_backward(grad_s, *saved, *ctx.options)
        else:
            grads = backward(grad_s, *saved, *ctx.options, any(wanted[3:]))
        return (
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
            *[None] * (len(ctx.needs_input_grad) - len(wanted)),
        )


# ---- the ops of iirsnn.ops.batch_norm, or the same without them


def call(
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
    """The op triton_bn_lif_forward, or the same without it."""
    tensors = x, weight, bias, threshold, leak
    options = reset, float(v_reset), detach_reset, surrogate, surrogate_scale
    if not unwatched(*tensors):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.iirsnn.triton_bn_lif_forward(
            *tensors, eps, *options
        )
        return found
    return _without_op(tensors, eps, options)


def _without_op(
    tensors: tuple[Tensor | None, ...],
    eps: float,
    options: tuple[str, float, bool, str, float],
    running: Running = NOTHING,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    if needs_gradient(*tensors):
        run, how = BnLifGradient.apply, (options,)
    else:
        run, how = forward, (options[0], options[1], now)
    return run(*tensors, eps, *how, running)


def _running(x: Tensor, *kept: Any) -> Running | None:
    """Of a norm's running_mean, running_var, num_batches_tracked and momentum, for x on a device.

    None where they are no plain tensors beside x, in the dtypes of the kernels.
    """
    *tensors, momentum = kept
    for t, dtype in zip(tensors, (torch.float32, torch.float32, torch.int64), strict=True):
        if not isinstance(t, Tensor) or t.dtype != dtype or t.device != x.device:
            return None
        if not t.is_contiguous():
            return None
    return Running(*tensors, math.nan if momentum is None else float(momentum))


def _were_written(running: Running) -> None:
    """Tell autograd of memory that was written without it."""
    for t in running[:3]:
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


def counted(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    eps: float,
    options: tuple[str, float, bool, str, float],
    *kept: Any,
) -> Tensor | None:
    """Spikes of a call of a norm, which is counted: see `_running`. None where `call` has to."""
    tensors = x, weight, bias, threshold, leak
    running = _running(x, *kept)
    if running is None or not unwatched(*tensors, *running[:3]):
        return None
    s, *_ = _without_op(tensors, eps, options, running)
    _were_written(running)
    return s


def totals(total: Tensor, eps: float, *kept: Any) -> tuple[Tensor, Tensor] | None:
    """mean, rstd of a norm whose call is counted: see `batch_norm.totals`, `counted`."""
    running = _running(total, *kept)
    if running is None or not unwatched(total, *running[:3]):
        return None
    found = batch_norm.totals(total, eps, running)
    _were_written(running)
    return found


def fire(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    reset: str,
    v_reset: float,
    *how: Any,
) -> Tensor:
    """The op triton_bn_lif_fire, or the same without it. It has no gradient."""
    tensors = x, mean, rstd, weight, bias, threshold, leak
    if unwatched(*tensors) and not needs_gradient(*tensors):
        return batch_norm.fire(*tensors, reset, float(v_reset))
    s: Tensor = torch.ops.iirsnn.triton_bn_lif_fire(*tensors, reset, v_reset, *how)
    return s
