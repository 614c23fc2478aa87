"""Residual networks: two spiking convolutions a block, with a shortcut of spikes or of currents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ..nn import Readout, SharedDropout, TimeSequential
from .network import Network, initialise


class ResidualBlock(nn.Module):
    """neuron(main(x) + shortcut(x)): conv, neuron, conv; the shortcut joins the second current.

    Spikes are what a block takes and what it gives, so an identity shortcut adds one to the current
    of the neuron that a spike meets, and a 1x1 shortcut adds weights: nothing multiplies.

    Args:
        channels: of the input.
        out_channels: of both convolutions.
        stride: of the first one, and of the shortcut.
        batch_norm: after each convolution, to be folded.
        dropout: probability, on the spikes inside the block.

    Attributes:
        main: TimeSequential of convolution, [BatchNorm,] neuron, dropout, convolution[, BatchNorm].
        shortcut: TimeSequential, empty for the identity, else a 1x1 convolution[, BatchNorm].
        neuron: ReLU or FusedLIF.
    """

    over_time = True

    def __init__(
        self,
        channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.main, self.shortcut = _branches(channels, out_channels, stride, batch_norm, dropout)
        self.neuron: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, C, H, W] -> [T, B, out_channels, H / stride, W / stride]."""
        shortcut = self.shortcut(x)
        return self.neuron(self.main(x) + shortcut)


class MembraneBlock(nn.Module):
    """main(s) + x, s = neuron(x): neuron, conv, neuron, conv; the shortcut carries the current x.

    No threshold lies on the shortcut, so what one block computes reaches all later ones as a real
    value, and a gradient all earlier ones (Hu et al., arXiv 2112.08954; the order is that of He et
    al., arXiv 1603.05027). Every convolution still sees spikes. The identity costs an addition a
    value and timestep; where the shape changes a 1x1 convolution of s stands in its place.

    Args: those of `ResidualBlock`.

    Attributes:
        neuron: ReLU or FusedLIF, before everything else.
        main: TimeSequential of convolution, [BatchNorm,] neuron, dropout, convolution[, BatchNorm].
        shortcut: TimeSequential, empty for the identity, else a 1x1 convolution[, BatchNorm].
    """

    over_time = True

    def __init__(
        self,
        channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.neuron: nn.Module = nn.ReLU()
        self.main, self.shortcut = _branches(channels, out_channels, stride, batch_norm, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, B, C, H, W] -> [T, B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        spikes = self.neuron(x)
        return self.main(spikes) + (self.shortcut(spikes) if len(self.shortcut) else x)


def _branches(
    channels: int, out_channels: int, stride: int, batch_norm: bool, dropout: float
) -> tuple[TimeSequential, TimeSequential]:
    """What both kinds of blocks add: main, and the shortcut."""

    def conv(width: int, size: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(width, out_channels, size, stride, padding=size // 2, bias=not batch_norm)
        return [layer, nn.BatchNorm2d(out_channels)] if batch_norm else [layer]

    first, second = conv(channels, 3, stride), conv(out_channels, 3, 1)
    main = TimeSequential(*first, nn.ReLU(), SharedDropout(dropout), *second)
    changes = stride != 1 or channels != out_channels
    return main, TimeSequential(*(conv(channels, 1, stride) if changes else []))


@dataclass(frozen=True)
class Plan:
    """A residual network: stem, blocks, head.

    Attributes:
        stem: output channels of the 3x3 convolutions before the blocks.
        stem_pool: whether a 2x2 pool follows them.
        blocks: (channels, number) of each group; every group but the first halves the image.
        global_pool: average each channel before the head; else the last map is flattened.
        hidden: widths of fully connected layers between the blocks and the readout.
    """

    stem: tuple[int, ...]
    stem_pool: bool
    blocks: tuple[tuple[int, int], ...]
    global_pool: bool
    hidden: tuple[int, ...] = ()


#: resnet20 is that of the paper's line of work (11.3 M parameters, not the 0.27 M one for CIFAR);
#: resnet18 is He et al.'s with a 3x3 stem; resnet19 that of Zheng et al. (arXiv 2011.05280).
PLANS = {
    "resnet18": Plan((64,), False, ((64, 2), (128, 2), (256, 2), (512, 2)), True),
    "resnet19": Plan((128,), False, ((128, 3), (256, 3), (512, 2)), True, (256,)),
    "resnet20": Plan((64, 64, 64), True, ((64, 2), (128, 2), (256, 2), (512, 2)), False),
}


def resnet(
    plan: Plan,
    classes: int,
    image_shape: tuple[int, int, int],
    *,
    pool: type[nn.Module] = nn.AvgPool2d,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    """A residual network as an ANN.

    Args:
        plan: one of PLANS, or another.
        classes: number of classes.
        image_shape: (channels, height, width) of an image.
        pool: of the stem, 2x2.
        batch_norm: after each hidden layer.
        dropout: probability, one mask for all timesteps; in the stem, in each block and the head.

    Raises:
        ValueError: fewer than two classes, or images that the network halves too often.
    """
    channels, height, width = image_shape
    halvings = plan.stem_pool + len(plan.blocks) - 1
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if min(height, width) % 2**halvings:
        raise ValueError(
            f"image_shape: expected a height and width that {2**halvings} divides, "
            f"got {height} x {width}"
        )
    modules: list[nn.Module] = []

    def hidden(layer: nn.Module, norm: nn.Module, drop: bool) -> None:
        modules.extend([layer, norm, nn.ReLU()] if batch_norm else [layer, nn.ReLU()])
        if drop:
            modules.append(SharedDropout(dropout))

    for wide, following in pairwise([*plan.stem, None]):
        assert wide is not None
        conv = nn.Conv2d(channels, wide, 3, padding=1, bias=not batch_norm)
        hidden(conv, nn.BatchNorm2d(wide), drop=following is not None or not plan.stem_pool)
        channels = wide
    if plan.stem_pool:
        modules.append(pool(2))
    for group, (wide, number) in enumerate(plan.blocks):
        for index in range(number):
            stride = 2 if group and not index else 1
            modules.append(
                ResidualBlock(channels, wide, stride, batch_norm=batch_norm, dropout=dropout)
            )
            channels = wide
    height, width = height >> halvings, width >> halvings
    if plan.global_pool:
        modules.append(nn.AvgPool2d((height, width)))
        height = width = 1
    modules.append(nn.Flatten())
    features = channels * height * width
    for units in plan.hidden:
        hidden(nn.Linear(features, units, bias=not batch_norm), nn.BatchNorm1d(units), drop=True)
        features = units
    modules.append(Readout(features, classes))
    network = Network(modules, image_shape)
    network.apply(initialise)
    return network


def membrane_resnet(
    layers: Sequence[int | str],
    classes: int,
    image_shape: tuple[int, int, int],
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    """A residual network of `MembraneBlock`s as an ANN: stem, blocks, neurons, global average.

    Args:
        layers: output channels of the stem, a 3x3 convolution, then of each block; "A" before a
            block halves the image: its stride is 2.
        classes: number of classes.
        image_shape: (channels, height, width) of an image.
        batch_norm: after each convolution. Without it the shortcut adds currents of different
            units once thresholds are balanced.
        dropout: probability, one mask for all timesteps; in each block.

    Raises:
        ValueError: a description that gives no network.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    widths = [wide for wide in layers if wide != "A"]
    stray = any(a == "A" and not isinstance(b, int) for a, b in pairwise([*layers, None]))
    if len(widths) < 2 or layers[0] == "A" or stray:
        raise ValueError(
            f"layers: expected a stem's channels and blocks, 'A' before a block, got {list(layers)}"
        )
    if not all(isinstance(wide, int) and wide > 0 for wide in widths):
        raise ValueError(f"layers: expected positive widths and 'A', got {list(layers)}")
    channels, height, width = image_shape
    wide = int(layers[0])
    stem: list[nn.Module] = [nn.Conv2d(channels, wide, 3, padding=1, bias=not batch_norm)]
    modules = [*stem, nn.BatchNorm2d(wide)] if batch_norm else stem
    channels, stride = wide, 1
    for layer in layers[1:]:
        if layer == "A":
            stride, height, width = 2, -(-height // 2), -(-width // 2)
            continue
        wide = int(layer)
        modules.append(
            MembraneBlock(channels, wide, stride, batch_norm=batch_norm, dropout=dropout)
        )
        channels, stride = wide, 1
    modules += [nn.ReLU(), nn.AvgPool2d((height, width)), nn.Flatten(), Readout(channels, classes)]
    network = Network(modules, image_shape)
    network.apply(initialise)
    return network
