"""The ops of BatchNorm and LIF in one: schemas, fakes, autograd.

`iirsnn._C` has their kernels for CPU and CUDA tensors, and schemas and autograd of its own in
csrc/lif/torch/bn_lif_autograd.cpp; where it is not built, or built later at first use, this is
their twin. iirsnn.kernels has their Triton twins.

bn_lif_forward takes the statistics of x [T, B, C, ...] (float32 or bfloat16, on a GPU float16 too)
over all but C and gives spikes s like x, and mean, var (biased) and rstd = 1 / sqrt(var + eps) [C],
which carry no gradient: that of x is the whole one, through the statistics too. weight, bias, mean
and rstd are float32 [C], threshold and leak float32 of 1 or C elements.

The other ops are its passes, for who has something to do between them, such as processes that share
a batch; none has a gradient:

    bn_lif_moments        sums float64 [2, C] of x and of its square; mean, var, rstd
    bn_lif_fire           s
    bn_lif_gradient_sums  grad_x, not finished; sums float64 [4, C] of the gradients of threshold
                          and leak, of that of the current, and of that times x - mean; a workspace
    bn_lif_grad_x         finishes grad_x, from the workspace and two [C]: grad_mean, the mean of
                          the gradient of the current, and slope, the mean of its product with
                          x - mean, times rstd^2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lif import DEFINED_IN_CPP, no_double_backward
from .reference import empty_spikes

_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor threshold, Tensor leak"
_OPTIONS = "str reset, float v_reset, bool detach_reset, str surrogate, float surrogate_scale"
_CALL = f"Tensor x, Tensor mean, Tensor rstd, {_PARAMETERS}, {_OPTIONS}"
SCHEMAS = {
    "bn_lif_forward": f"(Tensor x, {_PARAMETERS}, float eps, {_OPTIONS}) "
    "-> (Tensor s, Tensor mean, Tensor var, Tensor rstd)",
    "bn_lif_backward": f"(Tensor grad_s, {_CALL}) -> (Tensor grad_x, Tensor grad_weight, "
    "Tensor grad_bias, Tensor grad_threshold, Tensor grad_leak)",
    "bn_lif_moments": "(Tensor x, float eps) "
    "-> (Tensor sums, Tensor mean, Tensor var, Tensor rstd)",
    "bn_lif_fire": f"({_CALL}) -> Tensor",
    "bn_lif_gradient_sums": f"(Tensor grad_s, {_CALL}) "
    "-> (Tensor grad_x, Tensor sums, Tensor workspace)",
    "bn_lif_grad_x": "(Tensor(a!) grad_x, Tensor workspace, Tensor grad_mean, Tensor slope, "
    f"Tensor grad_s, {_CALL}) -> ()",
}
for _name, _schema in ({} if DEFINED_IN_CPP else SCHEMAS).items():
    torch.library.define(f"iirsnn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides,))


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[2], dtype=torch.float32)


@torch.library.register_fake("iirsnn::bn_lif_forward")
def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return empty_spikes(x), *(_per_channel(x) for _ in range(3))


@torch.library.register_fake("iirsnn::bn_lif_moments")
def _moments_fake(x: Tensor, eps: float) -> tuple[Tensor, ...]:
    sums = x.new_empty(2, x.shape[2], dtype=torch.float64)
    return sums, *(_per_channel(x) for _ in range(3))


@torch.library.register_fake("iirsnn::bn_lif_fire")
def _fire_fake(x: Tensor, *args: Any) -> Tensor:
    return empty_spikes(x)


@torch.library.register_fake("iirsnn::bn_lif_backward")
def _backward_fake(
    grad_s: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    like = (mean, mean, threshold, leak)
    return empty_spikes(x), *(t.new_empty(t.shape) for t in like)


def register(forward_op: Any, backward_op: Any) -> None:
    """Give an op with the schema of bn_lif_forward its gradient: backward_op, once.

    An op is a qualified name ("iirsnn::bn_lif_forward") or what torch.library.triton_op returned.
    """
    call = backward_op
    if isinstance(backward_op, str):
        call = getattr(torch.ops.iirsnn, backward_op.removeprefix("iirsnn::"))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, threshold, leak, _, *options = inputs
        _, mean, var, rstd = output
        ctx.mark_non_differentiable(mean, var, rstd)
        ctx.save_for_backward(x, mean, rstd, weight, bias, threshold, leak)
        ctx.options = options
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_s: Tensor | None, *rest: Any) -> Any:
        saved = ctx.saved_tensors
        if grad_s is None:
            grad_s = saved[0].new_zeros(()).expand(saved[0].shape)
        grads = call(grad_s, *saved, *ctx.options)
        wanted = ctx.needs_input_grad
        grads = [grad if want else None for grad, want in zip(grads, wanted[:5], strict=True)]
        return *grads, *[None] * (len(ctx.options) + 1)

    torch.library.register_autograd(forward_op, backward, setup_context=setup)
    torch.library.register_autograd(backward_op, no_double_backward)


if not DEFINED_IN_CPP:
    register("iirsnn::bn_lif_forward", "iirsnn::bn_lif_backward")
