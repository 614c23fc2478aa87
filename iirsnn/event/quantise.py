"""Weights of a layer as they are kept: fp32, bf16, or int8 with one scale an output."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Layer

PRECISIONS = ("fp32", "bf16", "int8")


def quantise(layer: Layer, precision: str) -> None:
    """Its weights as they are kept; those of a shortcut share the scale of their output."""
    if layer.weight is None or precision == "fp32":
        return
    if precision == "bf16":
        layer.weight = layer.weight.to(torch.bfloat16)
        if layer.shortcut_weight is not None:
            layer.shortcut_weight = layer.shortcut_weight.to(torch.bfloat16)
        return
    most = layer.weight.flatten(1).abs().amax(1)
    if layer.shortcut_weight is not None:
        most = torch.maximum(most, layer.shortcut_weight.flatten(1).abs().amax(1))
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))

    def rounded(weight: Tensor) -> Tensor:
        shape = (-1, *[1] * (weight.dim() - 1))
        return (weight / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)

    layer.weight, layer.scale = rounded(layer.weight), scale
    if layer.shortcut_weight is not None:
        layer.shortcut_weight = rounded(layer.shortcut_weight)
