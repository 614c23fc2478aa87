"""A convolution's products, forward and backward: what they are of, and torch's own way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output(self, size: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns, of images [N, C, rows, columns] and a weight [K, C, rows, columns]."""
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                size[2:], weight[2:], *self[:3], strict=True
            )
        )
        return rows, columns


#: A linear layer, as a convolution of 1x1 images.
LINEAR = Geometry((1, 1), (0, 0), (1, 1), 1)


class Work(NamedTuple):
    """What a convolution computes.

    Attributes:
        size: of its input, [N, C, rows, columns].
        weight: the weight's, [K, C / groups, rows, columns].
        geometry: the rest.
    """

    size: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry

    @property
    def output(self) -> tuple[int, ...]:
        """The size of its output, [N, K, rows, columns]."""
        return self.size[0], self.weight[0], *self.geometry.output(self.size, self.weight)

    @property
    def products(self) -> int:
        """Multiplications of one image."""
        return math.prod(self.weight) * math.prod(self.output[2:])

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer's."""
        return self.geometry == LINEAR and self.weight[2:] == self.size[2:] == (1, 1)


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    x = x.to(weight.dtype)
    if Work(x.shape, weight.shape, geometry).linear:
        return F.linear(x.flatten(1), weight.flatten(1), bias)[..., None, None]
    return F.conv2d(x, weight, bias, *geometry)


def dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that the mask asks for.

    Where it does not ask for that of the weight, of x the layout alone is read.
    """
    if Work(x.shape, weight.shape, geometry).linear:
        flat = grad.flatten(1)
        return (
            (flat @ weight.flatten(1))[..., None, None] if mask[0] else None,
            (flat.t() @ x.flatten(1))[..., None, None] if mask[1] else None,
            flat.sum(0) if mask[2] else None,
        )
    stride, padding, dilation, groups = geometry
    size = [weight.shape[0]] if mask[2] else None
    rest = stride, padding, dilation, False, [0, 0], groups, mask
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads = torch.ops.aten.convolution_backward(grad, x, weight, size, *rest)
    return grads
