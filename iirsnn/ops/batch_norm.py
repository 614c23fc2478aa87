"""The ops of BatchNorm and LIF in one: schemas, fakes, autograd; `iirsnn._C` has their CPU kernels.

bn_lif_forward takes the statistics of x [T, B, C, ...] (float32 or bfloat16) over all but C and
gives spikes s like x, and mean, var (biased) and rstd = 1 / sqrt(var + eps) [C], which carry no
gradient: that of x is the whole one, through the statistics too. weight, bias, mean and rstd are
float32 [C], threshold and leak float32 of 1 or C elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lif import no_double_backward
from .reference import empty_spikes

_OPTIONS = "str reset, float v_reset, bool detach_reset, str surrogate, float surrogate_scale"
_SCHEMAS = {
    "bn_lif_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor threshold, Tensor leak, "
    f"float eps, {_OPTIONS}) -> (Tensor s, Tensor mean, Tensor var, Tensor rstd)",
    "bn_lif_backward": "(Tensor grad_s, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    f"Tensor? bias, Tensor threshold, Tensor leak, {_OPTIONS}) -> (Tensor grad_x, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_threshold, Tensor grad_leak)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"iirsnn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides,))


@torch.library.register_fake("iirsnn::bn_lif_forward")
def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return empty_spikes(x), *(x.new_empty(x.shape[2], dtype=torch.float32) for _ in range(3))


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


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, threshold, leak, _, *options = inputs
    _, mean, var, rstd = output
    ctx.mark_non_differentiable(mean, var, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, threshold, leak)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_s: Tensor | None, *rest: Any) -> Any:
    saved = ctx.saved_tensors
    if grad_s is None:
        grad_s = saved[0].new_zeros(()).expand(saved[0].shape)
    grads = torch.ops.iirsnn.bn_lif_backward(grad_s, *saved, *ctx.options)
    wanted = ctx.needs_input_grad
    grads = [grad if want else None for grad, want in zip(grads, wanted[:5], strict=True)]
    return *grads, *[None] * (len(ctx.options) + 1)


torch.library.register_autograd("iirsnn::bn_lif_forward", _backward, setup_context=_setup)
torch.library.register_autograd("iirsnn::bn_lif_backward", no_double_backward)
