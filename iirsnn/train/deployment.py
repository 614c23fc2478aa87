"""A trained stage as an event-driven network that stands alone, and image files for it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import RunError, UsageError
from ..event import EventNetwork
from .image_files import Preparation
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


def read_image(path: Path, network: EventNetwork) -> Tensor:
    """An image file as the network takes it, float32 [1, C, H, W].

    Raises:
        RunError: no such file, or one that cannot be read.
        UsageError: the wrong size, or a network whose file does not say how images are made.
    """
    size = network.image_shape
    if size is None:
        raise UsageError("net: does not say the size of its images; expected a file of deploy")
    try:
        preparation = Preparation.from_json(network.notes.get("images"), size)
    except UsageError as error:
        raise UsageError(f"net: {error}") from None
    return preparation.input(path)[None]
