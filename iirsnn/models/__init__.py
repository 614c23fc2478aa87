"""Networks by name. The ANN and the SNN are one module with its activation exchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import check_choice
from .graph import GraphNetwork
from .network import Network
from .resnet import PLANS, MembraneBlock, ResidualBlock, membrane_resnet, resnet
from .vgg import HIDDEN, LAYERS, POOLS, vgg

__all__ = [
    "GraphNetwork",
    "MembraneBlock",
    "ModelConfig",
    "Network",
    "ResidualBlock",
    "build",
    "membrane_resnet",
    "resnet",
    "vgg",
]

#: Whose `layers` a recipe writes down.
_WRITTEN = ("vgg", "membrane-resnet")
NAMES = ("vgg", *LAYERS, *PLANS, "membrane-resnet")


@dataclass
class ModelConfig:
    """The `model` section of a recipe.

    Attributes:
        name: vgg6, vgg9, vgg11, vgg16, vgg16-imagenet, resnet18, resnet19, resnet20; vgg or
            membrane-resnet with `layers` of its own; in a recipe also torchvision/NAME, timm/NAME
            or PATH/FILE.py:FUNCTION, called with classes and image_shape.
        layers: for vgg: channels of each 3x3 convolution, "A" for a 2x2 pool. For membrane-resnet:
            channels of the stem and of each block, "A" before a block that halves the image.
        hidden: widths of the hidden fully connected layers of a VGG.
        pool: average or max; a membrane-resnet has none but the global average.
        batch_norm: in the ANN; folded into the weights before conversion.
        small_images: of a network made for 224x224: its first convolution becomes one of 3x3 and
            stride 1, and a max pool right after it goes.
    """

    name: str = "vgg"
    layers: list[int | str] = field(default_factory=list)
    hidden: list[int] = field(default_factory=lambda: list(HIDDEN))
    pool: str = "average"
    batch_norm: bool = True
    small_images: bool = False


def build(config: ModelConfig, classes: int, image_shape: tuple[int, int, int]) -> Network:
    """The ANN that a recipe describes, freshly initialised, with dropout 0.

    Args:
        config: the `model` section.
        classes: number of classes.
        image_shape: (channels, height, width).

    Raises:
        ValueError: an unknown name, or a description that gives no network.
    """
    check_choice("model.name", config.name, NAMES)
    if config.layers and config.name not in _WRITTEN:
        raise ValueError(f"model.layers: {config.name} has its own; use name=vgg to write them")
    check_choice("model.pool", config.pool, POOLS)
    if config.name == "membrane-resnet":
        return membrane_resnet(config.layers, classes, image_shape, batch_norm=config.batch_norm)
    if config.name in PLANS:
        plan = PLANS[config.name]
        pool, norm = POOLS[config.pool], config.batch_norm
        return resnet(plan, classes, image_shape, pool=pool, batch_norm=norm)
    return vgg(
        config.layers or LAYERS.get(config.name, []),
        classes,
        image_shape,
        hidden=config.hidden,
        pool=config.pool,
        batch_norm=config.batch_norm,
    )
