"""Schemas and fakes of the ops on packed spikes: convolutions by events. CPU, float32 and bfloat16.

`iirsnn._C` defines both itself, in csrc/spike/torch/spike_schemas.cpp; where it is not built, or
built later at first use, this is their twin.

An input x [N, C, H, W] is `packed` as int64 bits [N, H, W, ceil(C / 64)] (channel c is bit c % 64
of word c / 64) or as uint8 counts [N, H, W, C]; `table`, float32 [256], says what value a count
stands for (of bits: 0 and table[1]). `size` is that of x. Whatever comes out is channels_last.
These ops carry no gradient: `iirsnn.nn.spike_layers` puts them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiled import define_ops

define_ops()

SCHEMAS = {
    # stats, int64 [2]: whether x is exactly what packed says (else packed is undefined), and the
    # number of values that are not 0
    "spike_pack": "(Tensor x, Tensor table, bool counts) -> (Tensor packed, Tensor stats)",
    "spike_unpack": "(Tensor packed, Tensor table, SymInt[] size, ScalarType dtype) -> Tensor",
    "spike_conv2d": "(Tensor packed, Tensor table, SymInt[] size, Tensor weight, Tensor? bias, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    # the gradient of x of a convolution of stride 1, by the events of a sparse grad; float32
    "spike_conv2d_input": "(Tensor grad, Tensor weight, SymInt[] size, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor",
    "spike_conv2d_weight": "(Tensor packed, Tensor table, SymInt[] size, Tensor grad, "
    "SymInt[] weight_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) "
    "-> Tensor",
}


def _channels_last(like: Tensor, size: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _spike_pack_fake(x: Tensor, table: Tensor, counts: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    packed = x.new_empty(
        (n, h, w, c if counts else (c + 63) // 64), dtype=torch.uint8 if counts else torch.int64
    )
    return packed, x.new_empty(2, dtype=torch.int64)


def _spike_unpack_fake(packed: Tensor, table: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    return _channels_last(packed, size, dtype)


def _spike_conv2d_fake(
    packed: Tensor,
    table: Tensor,
    size: Any,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    out = [
        (size[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]
    return _channels_last(weight, [size[0], weight.shape[0], *out])


def _spike_conv2d_input_fake(grad: Tensor, weight: Tensor, size: Any, *args: Any) -> Tensor:
    return _channels_last(grad, size)


def _spike_conv2d_weight_fake(
    packed: Tensor, table: Tensor, size: Any, grad: Tensor, weight_size: Any, *args: Any
) -> Tensor:
    return _channels_last(grad, weight_size)


if not hasattr(torch.ops.iirsnn, "spike_pack"):
    _FAKES = {
        "spike_pack": _spike_pack_fake,
        "spike_unpack": _spike_unpack_fake,
        "spike_conv2d": _spike_conv2d_fake,
        "spike_conv2d_input": _spike_conv2d_input_fake,
        "spike_conv2d_weight": _spike_conv2d_weight_fake,
    }
    for _name, _schema in SCHEMAS.items():
        torch.library.define(f"iirsnn::{_name}", _schema, tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"iirsnn::{_name}")(_FAKES[_name])
