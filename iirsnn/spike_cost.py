"""What events cost beside dense products: when a spike layer should use which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Time of events as a fraction of dense time: fixed + density * slope.

    Of a 3x3 convolution of many channels; `decide` scales it to other layers.
    """

    fixed: float
    slope: float


#: By (pass, kind of events, dtype of the weight); of one core of an AMD EPYC with AVX-512.
BUILT_IN: dict[tuple[str, str, torch.dtype], Cost] = {
    ("forward", "bits", torch.float32): Cost(0.11, 1.2),
    ("forward", "counts", torch.float32): Cost(0.11, 1.6),
    ("weight_grad", "bits", torch.float32): Cost(0.11, 1.2),
    ("weight_grad", "counts", torch.float32): Cost(0.11, 1.6),
    ("input_grad", "reals", torch.float32): Cost(0.11, 1.5),
    ("forward", "bits", torch.bfloat16): Cost(0.22, 2.4),
    ("forward", "counts", torch.bfloat16): Cost(0.22, 3.2),
    ("weight_grad", "bits", torch.bfloat16): Cost(0.22, 2.4),
    ("weight_grad", "counts", torch.bfloat16): Cost(0.22, 3.2),
}

_TILE = 32  # outputs that events are added to at a time
_SEGMENT = 192  # channels times kernel columns whose events are added one after the other


def ratio(which: str, kind: str, density: float, outputs: int, reach: int, dtype: Any) -> float:
    """Expected time of events as a fraction of dense time.

    Args:
        which: forward, weight_grad or input_grad.
        kind: bits, counts or reals: what the events are.
        density: fraction of the values that are not 0.
        outputs: of a group; rows of them are added.
        reach: channels of a group times kernel columns, whose events adjoin.
        dtype: of the weight.
    """
    cost = BUILT_IN[which, kind, dtype]
    waste = -(-outputs // _TILE) * _TILE / outputs
    return waste * (cost.fixed * _SEGMENT / min(_SEGMENT, reach) + cost.slope * density)


def decide(
    mode: str, kind: str, density: float, weight: Tensor, groups: int
) -> tuple[tuple[str, str], str]:
    """((forward, weight gradient), reason), the first two "events" or "dense".

    Args:
        mode: auto, events or dense.
        kind: bits or counts.
        density: fraction of the input that is not 0.
        weight: [K, C / groups, kernel rows, columns].
        groups: of the convolution.
    """
    if mode != "auto":
        return (mode, mode), f"mode is {mode}"
    outputs, reach = weight.shape[0] // groups, weight.shape[1] * weight.shape[3]
    ratios = [
        ratio(which, kind, density, outputs, reach, weight.dtype)
        for which in ("forward", "weight_grad")
    ]
    forward, weight_grad = ("events" if r < 1 else "dense" for r in ratios)
    reason = (
        f"density {density:.3f} of {kind}: events are expected to take {ratios[0]:.2f} (forward) "
        f"and {ratios[1]:.2f} (weight gradient) of the dense time"
    )
    return (forward, weight_grad), reason


def input_by_events(mode: str, density: float, weight: Tensor, groups: int) -> bool:
    """Whether the input's gradient, of an output's gradient of this density, is for events."""
    if mode != "auto":
        return mode == "events"
    outputs, reach = weight.shape[1], weight.shape[0] // groups * weight.shape[3]
    return ratio("input_grad", "reals", density, outputs, reach, weight.dtype) < 1
