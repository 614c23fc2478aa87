"""A trained stage as an event-driven network that stands alone, and image files for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from ..errors import RunError, UsageError
from ..event import EventNetwork
from .images import ImageFiles, ImageSet, MemoryImages
from .pipeline import Pipeline


def finished_timesteps(pipeline: Pipeline) -> list[int]:
    """T of the spiking stages that are finished, in order.

    Raises:
        RunError: there is none.
    """
    folder = pipeline.folder
    found = [s.timesteps for s in pipeline.stages if s.timesteps and folder.result(s.name)]
    if not found:
        raise RunError(f"run {folder.path}: no spiking stage is finished yet")
    return found


def event_network(pipeline: Pipeline, timesteps: int, precision: str) -> EventNetwork:
    """The engine of the stage at that T.

    Raises:
        UsageError: that stage is not finished, an unknown precision, or a network the engine lacks.
    """
    finished = finished_timesteps(pipeline)
    if timesteps not in finished:
        raise UsageError(
            f"stage: expected one of {', '.join(map(str, finished))} timesteps, got {timesteps}"
        )
    return EventNetwork.from_model(
        pipeline.trained(f"T{timesteps}"), timesteps, precision=precision
    )


def preparation(images: ImageSet) -> dict[str, Any]:
    """How an image file becomes what the network was trained on, for `read_image`.

    Raises:
        UsageError: images that no file becomes.
    """
    if isinstance(images, MemoryImages):
        mean, std = images.normalise.mean, images.normalise.std
        return {"mean": list(mean), "std": list(std)}
    if isinstance(images, ImageFiles):
        return {"mean": list(images.mean), "std": list(images.std), "resize": 256}
    raise UsageError(f"data: expected images with a normalisation, got {type(images).__name__}")


def read_image(path: Path, network: EventNetwork) -> Tensor:
    """An image file as the network takes it, float32 [1, C, H, W].

    Raises:
        RunError: no such file, or one that cannot be read.
        UsageError: the wrong size, or a network that was not deployed.
    """
    assert network.image_shape is not None
    channels, height, width = network.image_shape
    wanted = network.notes.get("images")
    if wanted is None:
        raise UsageError("net: says nothing about its images; expected a file that deploy wrote")
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise RunError(f"image {path}: no such file") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
        raise RunError(f"image {path}: cannot be read ({error})") from error
    pixels = transforms.pil_to_tensor(image)
    if "resize" in wanted:
        pixels = transforms.center_crop(
            transforms.resize(pixels, [wanted["resize"]]), [height, width]
        )
    if tuple(pixels.shape[1:]) != (height, width):
        got = " x ".join(map(str, pixels.shape[1:]))
        raise UsageError(f"image {path}: expected {height} x {width} pixels, got {got}")
    return transforms.normalize(pixels.float() / 255, wanted["mean"], wanted["std"])[None]
