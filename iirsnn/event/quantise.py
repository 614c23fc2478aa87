"""Weights of a layer as they are kept: fp32, bf16, or int8 with one scale an output."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Layer, give_values

PRECISIONS = ("fp32", "bf16", "int8")


def quantise(layers: list[Layer], precision: str) -> None:
    """Weights of all layers as they are kept; those of one layer share the scales of its outputs.

    fp32 remain those of a layer that meets real values (the image's among them), or whose inputs
    without weights the sums of small integers could not take.
    """
    values = give_values(layers)
    for layer in layers:
        bare = sum(each.weight is None for each in layer.inputs)
        most = 0 if layer.kind == "currents" else 1
        if bare <= most and not any(values[each.source] for each in layer.inputs):
            _quantise(layer, precision)


def _quantise(layer: Layer, precision: str) -> None:
    if not layer.weights or precision == "fp32":
        return
    if precision == "bf16":
        for each in layer.inputs:
            if each.weight is not None:
                each.weight = each.weight.to(torch.bfloat16)
        return
    most = torch.stack([weight.flatten(1).abs().amax(1) for weight in layer.weights]).amax(0)
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))

    def rounded(weight: Tensor) -> Tensor:
        shape = (-1, *[1] * (weight.dim() - 1))
        return (weight / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)

    for each in layer.inputs:
        if each.weight is not None:
            each.weight = rounded(each.weight)
    layer.scale = scale
