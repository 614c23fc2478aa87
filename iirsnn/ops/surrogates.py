"""Surrogates of a spike's gradient in plain torch; csrc/lif/surrogate.h and kernels/step.py follow.

A new one is a function here and its name in `SURROGATES`; the same in csrc/lif/surrogate.h (its
name in csrc/lif/torch/lif_checks.h) and kernels/step.py; and a line in the table of
`iirsnn.functional.lif`. The tests take the names from here and compare all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _triangle(z: Tensor, a: float) -> Tensor:
    return a * (1 - z.abs()).clamp(min=0)


def _atan(z: Tensor, a: float) -> Tensor:
    y = (math.pi / 2 * a) * z
    return (a / 2) / (1 + y * y)


def _sigmoid(z: Tensor, a: float) -> Tensor:
    e = torch.exp(-(a * z.abs()))  # sig (1 - sig) = e / (1 + e)^2, even in z
    d = 1 + e
    return (a * e) / (d * d)


def _fast_sigmoid(z: Tensor, a: float) -> Tensor:
    d = 1 + a * z.abs()
    return 1 / (d * d)


def _boxcar(z: Tensor, a: float) -> Tensor:
    return (z.abs() <= a).to(z.dtype) * (0.5 / a)


#: f(z) = ds/dz at z = h / threshold - 1, and the default of its scale a.
SURROGATES: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "triangle": (_triangle, 0.3),
    "atan": (_atan, 2.0),
    "sigmoid": (_sigmoid, 4.0),
    "fast_sigmoid": (_fast_sigmoid, 25.0),
    "boxcar": (_boxcar, 0.5),
}
