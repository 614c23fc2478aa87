"""A trained stage as an event-driven network that stands alone, and image files for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import atomic_files
from ..errors import RunError, UsageError
from ..event import EventNetwork
from ..runtime.image_files import Preparation
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


def may_be_written(out: Path, force: bool) -> None:
    """Raises UsageError where a file that `deploy` has not written would be lost."""
    if out.is_dir():
        raise UsageError(f"out: expected a file, got the folder {out}")
    header = atomic_files.read_header(out) if out.exists() else {"event_format": 0}
    if not force and (header is None or "event_format" not in header):
        raise UsageError(f"out: {out} is there and is no network of deploy; --force writes over it")


def class_names(network: EventNetwork, classes: int) -> list[str]:
    """The names of a network's classes; their numbers where its file has none.

    Raises:
        UsageError: notes that are no names of its classes.
    """
    names = network.notes.get("class_names")
    if names is None:
        return [str(index) for index in range(classes)]
    if (
        not isinstance(names, list)
        or len(names) != classes
        or not all(isinstance(name, str) for name in names)
    ):
        raise UsageError(f"net: notes: class_names: expected {classes} names, got {names!r:.60}")
    return names


def preparation(network: EventNetwork) -> Preparation:
    """How image files become what the network takes.

    Raises:
        UsageError: the network's file does not say.
    """
    size = network.image_shape
    if size is None:
        raise UsageError("net: does not say the size of its images; expected a file of deploy")
    try:
        return Preparation.from_json(network.notes.get("images"), size)
    except UsageError as error:
        raise UsageError(f"net: {error}") from None


def read_image(path: Path, network: EventNetwork) -> Tensor:
    """An image file as the network takes it, float32 [1, C, H, W].

    Raises:
        RunError: no such file, or one that cannot be read.
        UsageError: the wrong size, or a network whose file does not say how images are made.
    """
    return torch.from_numpy(preparation(network).input(path))[None]
