"""VGG networks of the paper, and any other VGG written as a list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..errors import check_choice
from ..nn import Readout, SharedDropout
from .network import Network, initialise

#: Output channels of the 3x3 convolutions and 2x2 pools ("A") of the networks in the authors' code.
LAYERS: dict[str, list[int | str]] = {
    "vgg6": [64, "A", 128, 128, "A"],
    "vgg9": [64, "A", 128, 256, "A", 256, 512, "A", 512, "A", 512],
    "vgg11": [64, "A", 128, 256, "A", 512, 512, "A", 512, "A", 512, 512],
    "vgg16": [64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512],
}
LAYERS["vgg16-imagenet"] = [*LAYERS["vgg16"], "A"]
HIDDEN = (4096, 4096)
POOLS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


def vgg(
    layers: Sequence[int | str],
    classes: int,
    image_shape: tuple[int, int, int],
    *,
    hidden: Sequence[int] = HIDDEN,
    pool: str = "average",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    """3x3 convolutions, 2x2 pools and fully connected layers, a ReLU after each, as an ANN.

    Args:
        layers: output channels of each convolution; "A" is a 2x2 pool after the one before it.
        classes: number of classes.
        image_shape: (channels, height, width) of an image.
        hidden: widths of the hidden fully connected layers.
        pool: "average" or "max" (of spikes: OR, which stays binary).
        batch_norm: a BatchNorm after each hidden layer, to be folded before conversion.
        dropout: probability, one mask for all timesteps; none on a layer followed by a pool.

    Raises:
        ValueError: a description that gives no network.
    """
    channels, height, width = image_shape
    _check(layers, classes, hidden, pool, height, width)
    modules: list[nn.Module] = []

    def add(layer: nn.Module, norm: nn.Module, drop: bool) -> None:
        modules.extend([layer, norm, nn.ReLU()] if batch_norm else [layer, nn.ReLU()])
        if drop:
            modules.append(SharedDropout(dropout))

    for layer, following in pairwise([*layers, None]):
        if isinstance(layer, int):
            conv = nn.Conv2d(channels, layer, 3, padding=1, bias=not batch_norm)
            add(conv, nn.BatchNorm2d(layer), drop=following != "A")
            channels = layer
        else:
            modules.append(POOLS[pool](2))
            height, width = height // 2, width // 2
    modules.append(nn.Flatten())
    features = channels * height * width
    for units in hidden:
        linear = nn.Linear(features, units, bias=not batch_norm)
        add(linear, nn.BatchNorm1d(units), drop=True)
        features = units
    modules.append(Readout(features, classes))

    network = Network(modules, image_shape)
    network.apply(initialise)
    return network


def _check(
    layers: Sequence[int | str],
    classes: int,
    hidden: Sequence[int],
    pool: str,
    height: int,
    width: int,
) -> None:
    check_choice("pool", pool, POOLS)
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    for layer in [*layers, *hidden]:
        if layer != "A" and not (isinstance(layer, int) and layer > 0):
            raise ValueError(f"layers: expected positive widths and 'A' for a pool, got {layer!r}")
    if not layers or layers[0] == "A":
        raise ValueError(f"layers: expected a convolution's channels first, got {list(layers)}")
    pools = sum(layer == "A" for layer in layers)
    if min(height, width) < 2**pools:
        raise ValueError(f"layers: {pools} pools are too many for images of {height} x {width}")
