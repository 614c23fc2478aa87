"""Balancing of thresholds: each one from the current that its layer sees."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..models import Network
from ..nn import FusedLIF, neurons

#: What a threshold becomes when the percentile of its layer's current is not positive.
SILENT_THRESHOLD = 0.1


@torch.no_grad()
def balance_thresholds(
    snn: Network, images: Tensor, percentile: float = 90.0, scale: float = 1.0
) -> list[float]:
    """Set each threshold to the percentile of its layer's current, layer by layer.

    A layer sees the spikes of the layers already balanced, with leak as it stands; the threshold is
    the maximum over timesteps of the percentile over all elements of one timestep, times `scale`.
    One forward pass balances every layer: each neuron sets its threshold just before it fires.

    Args:
        snn: changed in place.
        images: [B, C, H, W].
        percentile: in (0, 100].
        scale: > 0.

    Returns:
        The thresholds, in the order of the forward pass.

    Raises:
        ValueError: a percentile or scale out of range.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a value in (0, 100], got {percentile}")
    if not scale > 0:
        raise ValueError(f"scale: expected a positive factor, got {scale}")
    thresholds: list[float] = []

    def balance(neuron: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (current,) = inputs
        steps = current[:1] if current.stride(0) == 0 else current
        value = scale * max(np.percentile(step.float().cpu().numpy(), percentile) for step in steps)
        thresholds.append(float(value) if value > 0 else SILENT_THRESHOLD)
        assert isinstance(neuron, FusedLIF)
        neuron.threshold.fill_(thresholds[-1])

    hooks = [n.register_forward_pre_hook(balance) for n in neurons(snn)]
    training = snn.training
    snn.eval()
    try:
        snn(images)
    finally:
        snn.train(training)
        for hook in hooks:
            hook.remove()
    return thresholds
