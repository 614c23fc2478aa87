"""From an ANN to an SNN: a neuron in the place of each ReLU."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import check_timesteps
from ..models import Network
from ..models.graph import GraphNetwork
from ..nn import FusedLIF, SharedDropout
from ..nn.hooks import changed_by_hooks
from .batch_norm_folding import fold_batch_norm
from .graph_conversion import graph_to_spiking
from .node_kinds import DROPOUTS, EXPECTED, LAYERS, MOVING, NORMS, SPATIAL
from .thresholds import Images, balance_thresholds, batches_of

#: What a Network takes as it is, beside ReLU and SharedDropout.
_PLAIN = (
    *(nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten),
    *(nn.Identity, SharedDropout, *DROPOUTS, *NORMS),
)


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
    calibration_images: Images,
    percentile: float = 90.0,
    scale: float = 1.0,
    timesteps: int = 5,
    *,
    neuron: NeuronConfig | None = None,
    batch_size: int | None = None,
) -> Network | GraphNetwork:
    """An SNN with the ANN's weights, BatchNorm folded in, and balanced thresholds.

    Every ReLU, ReLU6, Hardtanh(0, a) and clamp(0, a), whether module, function or method, becomes
    neurons of its own; every other function that is not linear is refused by name and place.

    Args:
        ann: any network that torch.fx traces once shapes are known; left unchanged.
        calibration_images: float [B, C, H, W], training images that thresholds are chosen on; or an
            iterable of such batches, or of (images, labels).
        percentile: of the input current of each layer, in (0, 100]; DIET-SNN uses 99.7.
        scale: factor on each threshold.
        timesteps: T of the SNN.
        neuron: the neurons' settings; None for the paper's.
        batch_size: images of a calibration pass where they come as one tensor; None for all.

    Returns:
        A Network where `to_spiking` says so, else a GraphNetwork. Either takes images [B, C, H, W]
        and gives logits [B, classes]: summed over time, or their mean in the ANN's units.

    Raises:
        ValueError: a percentile, scale, T or batch size out of range, images that are not finite or
            none at all, or a model that `to_spiking` refuses.
    """
    batches = batches_of(calibration_images, batch_size)
    snn = to_spiking(ann, timesteps, neuron, image_shape=tuple(batches[0].shape[1:]))
    balance_thresholds(snn, batches, percentile, scale)
    return snn


@overload
def to_spiking(
    ann: Network,
    timesteps: int,
    neuron: NeuronConfig | None = ...,
    *,
    image_shape: tuple[int, ...] | None = ...,
) -> Network: ...


@overload
def to_spiking(
    ann: nn.Module,
    timesteps: int,
    neuron: NeuronConfig | None = ...,
    *,
    image_shape: tuple[int, ...] | None = ...,
) -> Network | GraphNetwork: ...


def to_spiking(
    ann: nn.Module,
    timesteps: int,
    neuron: NeuronConfig | None = None,
    *,
    image_shape: tuple[int, ...] | None = None,
) -> Network | GraphNetwork:
    """A copy of the ANN with a FusedLIF (threshold 1) for each ReLU, BatchNorm folded or kept.

    A Network stays one, and so does an nn.Sequential of plain layers that ends in a Linear: spikes
    are 1 whatever their threshold, the paper's rule. Any other module becomes a GraphNetwork, whose
    weights carry the thresholds.

    Args:
        ann: left unchanged.
        timesteps: T of the SNN.
        neuron: the neurons' settings; None for the paper's.
        image_shape: of an image, [C, H, W]; what a GraphNetwork is traced with. None for the
            attribute `image_shape` of the ANN.

    Raises:
        ValueError: T < 1; a model without ReLU, with other functions that are not linear, or that
            cannot be traced; a BatchNorm to be folded without running statistics; no image shape
            where there must be one.
    """
    check_timesteps(timesteps)
    neuron = neuron or NeuronConfig()
    if not isinstance(ann, Network) and not _is_plain(ann, neuron.keep_batch_norm):
        shape = image_shape or getattr(ann, "image_shape", None)
        if shape is None:
            raise ValueError("image_shape: expected [C, H, W] of an image, got None")
        return graph_to_spiking(
            ann, timesteps, neuron.build, shape, keep_batch_norm=neuron.keep_batch_norm
        )
    if not isinstance(ann, Network):
        _check_hooks(ann)
    snn = copy.deepcopy(ann)
    if not isinstance(snn, Network):
        assert isinstance(snn, nn.Sequential)
        snn = Network.from_sequential(snn)
    _check_linear(snn)
    if not neuron.keep_batch_norm:
        fold_batch_norm(snn)
        if any(isinstance(module, _BatchNorm) for module in snn.modules()):
            raise ValueError("ann: expected each BatchNorm right after a Conv2d or Linear")
    count, _ = _exchange(snn, neuron, None, _device_of(snn))
    if count == 0:
        raise ValueError("ann: no ReLU to exchange for a neuron")
    snn.timesteps = timesteps
    return snn


def _is_plain(ann: nn.Module, keep_batch_norm: bool) -> bool:
    """Whether it is a Sequential, however nested, that a Network can be: the last a Linear."""
    modules = _unrolled(ann)
    if type(ann) is not nn.Sequential or not modules or type(modules[-1]) is not nn.Linear:
        return False
    for before, module in zip([None, *modules], modules, strict=False):
        foldable = type(before) in (nn.Conv2d, nn.Linear)
        if isinstance(module, _BatchNorm) and not (keep_batch_norm or foldable):
            return False
    return all(type(module) in _PLAIN for module in modules)


def _unrolled(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [inner for child in module for inner in _unrolled(child)]


def _check_hooks(ann: nn.Module) -> None:
    """Refuse what a Network of the same layers would leave out without a word."""
    for name, module in ann.named_modules():
        if changed_by_hooks(module):
            kind = type(module).__name__
            raise ValueError(
                f"ann: expected no hooks (a weight norm, a pruning), got {name} ({kind})"
            )


def _check_linear(network: Network) -> None:
    """Refuse what would stay analog in a Network without a word."""
    for name, module in network.named_modules():
        ours = type(module).__module__.startswith("iirsnn.")
        known = (*_PLAIN, *LAYERS, *SPATIAL, *MOVING, nn.Sequential)
        alone = next(module.children(), None) is None
        if ours or type(module) in known or getattr(module, "over_time", False):
            continue
        if type(module).__module__.startswith("torch.nn") or alone:
            raise ValueError(f"ann: expected {EXPECTED}, got {name} ({type(module).__name__})")


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
