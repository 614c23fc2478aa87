"""The kinds of nodes that a network in normal form has, and what is refused."""

from __future__ import annotations

from torch import Tensor, fx, nn

#: The only functions that are not linear and can become something that spikes.
EXPECTED = "ReLU, ReLU6, Hardtanh(0, a) and clamp(0, a) as the only functions that are not linear"

LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: What works on each channel's map alone, and leaves a channel its unit.
SPATIAL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
#: What only moves values.
MOVING = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

LINEAR_UPSAMPLING = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")


class Refused(Exception):
    """A node that has no place in a spiking network; says what it is."""


class Constant:
    """A parameter or buffer of the network."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def value_of(node: fx.Node) -> Tensor:
    return node.meta["value"]
