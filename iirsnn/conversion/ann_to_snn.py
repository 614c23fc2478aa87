"""From an ANN to an SNN: a neuron in the place of each ReLU."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models import Network
from ..nn import FusedLIF
from .batch_norm_folding import fold_batch_norm
from .thresholds import balance_thresholds


@dataclass
class NeuronConfig:
    """The `neuron` section of a recipe: the FusedLIF that takes the place of each ReLU.

    Attributes:
        leak: initial value; learned and kept <= 1 when `learn_leak`.
        reset: soft, hard, none or soft_delayed.
        per_channel: a threshold and a leak for each channel, else one for the layer (the paper's).
        keep_batch_norm: leave BatchNorm in the SNN, its statistics over all timesteps, to be folded
            at deployment; else it is folded into the weights before conversion (the paper's).
        detach_reset: no gradient through the spike inside the reset (the paper's choice).
        surrogate: triangle, atan, sigmoid, fast_sigmoid or boxcar.
        surrogate_scale: None for the surrogate's own default.
        backend: auto, cpu, cuda, triton or reference.
    """

    leak: float = 1.0
    learn_threshold: bool = True
    learn_leak: bool = True
    per_channel: bool = False
    keep_batch_norm: bool = False
    reset: str = "soft"
    detach_reset: bool = True
    surrogate: str = "triangle"
    surrogate_scale: float | None = None
    backend: str = "auto"

    def build(self, channels: int | None) -> FusedLIF:
        """The neurons of a layer of so many channels; None where it is not known.

        Raises:
            ValueError: a setting that FusedLIF refuses, or per_channel with unknown channels.
        """
        settings = asdict(self)
        del settings["keep_batch_norm"]
        if not settings.pop("per_channel"):
            channels = None
        elif channels is None:
            raise ValueError("per_channel: expected a Conv2d or Linear before each ReLU, got none")
        return FusedLIF(channels=channels, **settings)


def convert(
    ann: nn.Module,
    calibration_images: Tensor,
    percentile: float = 90.0,
    scale: float = 1.0,
    *,
    timesteps: int = 5,
    neuron: NeuronConfig | None = None,
) -> Network:
    """An SNN with the ANN's weights, BatchNorm folded in, and balanced thresholds.

    Args:
        ann: a Network with ReLU, or a plain nn.Sequential that ends in a Linear; left unchanged.
        calibration_images: [B, C, H, W], training images that thresholds are chosen on.
        percentile: of the input current of each layer, in (0, 100]; DIET-SNN uses 99.7.
        scale: factor on each threshold.
        timesteps: T of the SNN.
        neuron: the neurons' settings; None for the paper's.

    Raises:
        ValueError: a percentile, scale or T out of range, or a model that `to_spiking` refuses.
    """
    snn = to_spiking(ann, timesteps, neuron)
    balance_thresholds(snn, calibration_images, percentile, scale)
    return snn


def to_spiking(ann: nn.Module, timesteps: int, neuron: NeuronConfig | None = None) -> Network:
    """A copy of the ANN with a FusedLIF (threshold 1) for each ReLU, BatchNorm folded or kept.

    Raises:
        ValueError: T < 1, a model without ReLU, a ReLU inside a module that knows no time, or a
            BatchNorm to be folded that does not follow a Conv2d or Linear.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    snn = copy.deepcopy(ann)
    if not isinstance(snn, Network):
        if not isinstance(snn, nn.Sequential):
            raise ValueError(
                f"ann: expected a Network or an nn.Sequential, got {type(ann).__name__}"
            )
        snn = Network.from_sequential(snn)
    neuron = neuron or NeuronConfig()
    if not neuron.keep_batch_norm:
        fold_batch_norm(snn)
        snn.requires_grad_(True)  # torch's fusion freezes a bias that it had to add
        if any(isinstance(module, _BatchNorm) for module in snn.modules()):
            raise ValueError("ann: expected each BatchNorm right after a Conv2d or Linear")
    count, _ = _exchange(snn, neuron, None, _device_of(snn))
    if count == 0:
        raise ValueError("ann: no ReLU to exchange for a neuron")
    snn.timesteps = timesteps
    return snn


def _exchange(
    parent: nn.Module, neuron: NeuronConfig, channels: int | None, device: torch.device
) -> tuple[int, int | None]:
    """Exchange each ReLU below `parent`; how many, and the channels that its last layer gives."""
    count = 0
    for name, child in list(parent._modules.items()):  # one ReLU may stand in many places
        if isinstance(child, nn.ReLU):
            if not getattr(parent, "over_time", False):
                kind = type(parent).__name__
                raise ValueError(f"ann: expected each ReLU in a Sequential, got one in {kind}")
            setattr(parent, name, neuron.build(channels).to(device))
            count += 1
        elif isinstance(child, nn.Conv2d):
            channels = child.out_channels
        elif isinstance(child, nn.Linear):
            channels = child.out_features
        elif child is not None:
            below, channels = _exchange(child, neuron, channels, device)
            count += below
    return count, channels


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
