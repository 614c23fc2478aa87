"""The torch.library ops: schemas, fakes, autograd, and nothing else.

`iirsnn._C` registers their CPU and CUDA kernels, and defines schemas and autograd itself, in
csrc/lif/torch/lif_autograd.cpp: a call costs less there. Where it is not built, or built later at
first use, this is their twin, so that the ops exist whether or not anything was compiled. Strings
name the reset and the surrogate; what was not asked for (v, the parameters' gradients, grad_v0)
comes back with 0 elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiled import define_ops
from .reference import acc_dtype, empty_spikes

define_ops()

#: Whether iirsnn._C has defined the ops.
DEFINED_IN_CPP = hasattr(torch.ops.iirsnn, "lif_forward")

SCHEMAS = {
    "lif_forward": "(Tensor x, Tensor threshold, Tensor leak, Tensor? v0, str reset, "
    "float v_reset, bool detach_reset, str surrogate, float surrogate_scale, bool return_v) "
    "-> (Tensor s, Tensor v)",
    "lif_backward": "(Tensor grad_s, Tensor? grad_v, Tensor x, Tensor threshold, Tensor leak, "
    "Tensor? v0, str reset, float v_reset, bool detach_reset, str surrogate, "
    "float surrogate_scale, bool need_parameter_grads) "
    "-> (Tensor grad_x, Tensor grad_threshold, Tensor grad_leak, Tensor grad_v0)",
    "lif_packed": "(Tensor x, Tensor threshold, Tensor leak, Tensor? v0, str reset, "
    "float v_reset, bool return_v) -> (Tensor bits, Tensor v)",
    "unpack_spikes": "(Tensor bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor",
}

# The layout of x decides the layout of everything that comes out: Inductor must not change it.
for _name, _schema in ({} if DEFINED_IN_CPP else SCHEMAS).items():
    torch.library.define(f"iirsnn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides,))


def empty_membrane(x: Tensor, wanted: bool) -> Tensor:
    """A membrane [*neurons] for x: acc dtype, the layout of x[0]; no elements when not wanted."""
    dtype = acc_dtype(x.dtype)
    if not wanted:
        return x.new_empty(0, dtype=dtype)
    return x.new_empty_strided(x.shape[1:], x.stride()[1:], dtype=dtype)


def empty_bits(x: Tensor) -> Tensor:
    """Packed spikes for x: uint8 [T, 8 * ceil(N / 64)]."""
    neurons = x[0].numel()
    return x.new_empty((x.shape[0], (neurons + 63) // 64 * 8), dtype=torch.uint8)


@torch.library.register_fake("iirsnn::lif_forward")
def _lif_forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_v = args[-1]
    return empty_spikes(x), empty_membrane(x, return_v)


@torch.library.register_fake("iirsnn::lif_backward")
def _lif_backward_fake(
    grad_s: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    v0: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_parameter_grads = args[-1]
    return (
        empty_spikes(x),
        threshold.new_empty(threshold.shape if need_parameter_grads else 0),
        leak.new_empty(leak.shape if need_parameter_grads else 0),
        empty_membrane(x, v0 is not None),
    )


@torch.library.register_fake("iirsnn::lif_packed")
def _lif_packed_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_v = args[-1]
    return empty_bits(x), empty_membrane(x, return_v)


@torch.library.register_fake("iirsnn::unpack_spikes")
def _unpack_spikes_fake(bits: Tensor, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return bits.new_empty_strided(size, stride, dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, threshold, leak, v0, *options, return_v = inputs
    ctx.save_for_backward(x, threshold, leak, v0)
    ctx.options, ctx.return_v = options, return_v
    ctx.set_materialize_grads(False)


def no_double_backward(ctx: Any, *grads: Tensor) -> Any:
    """The gradient of a backward op: RuntimeError."""
    raise RuntimeError(
        "iirsnn: expected one backward pass through lif, got a second one through its gradient "
        "(create_graph=True); a surrogate gradient has no second derivative worth having"
    )


def register(forward_op: Any, backward_op: Any) -> None:
    """Give a forward op with the schema of lif_forward its gradient: backward_op, once.

    An op is a qualified name ("iirsnn::lif_forward") or what torch.library.triton_op returned.
    """
    call = backward_op
    if isinstance(backward_op, str):
        namespace, name = backward_op.split("::")
        call = getattr(getattr(torch.ops, namespace), name)

    def backward(ctx: Any, grad_s: Tensor | None, grad_v: Tensor | None) -> Any:
        x, threshold, leak, v0 = ctx.saved_tensors
        if grad_s is None:
            grad_s = x.new_zeros(()).expand(x.shape)
        need_parameter_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if not ctx.return_v:  # AOTAutograd makes a gradient of 0 elements for the empty v
            grad_v = None
        grad_x, grad_threshold, grad_leak, grad_v0 = call(
            grad_s, grad_v, x, threshold, leak, v0, *ctx.options, need_parameter_grads
        )
        return (
            grad_x,
            grad_threshold if need_parameter_grads else None,
            grad_leak if need_parameter_grads else None,
            grad_v0 if v0 is not None else None,
            *[None] * (len(ctx.options) + 1),
        )

    torch.library.register_autograd(forward_op, backward, setup_context=_setup)
    torch.library.register_autograd(backward_op, no_double_backward)


if not DEFINED_IN_CPP:
    register("iirsnn::lif_forward", "iirsnn::lif_backward")
