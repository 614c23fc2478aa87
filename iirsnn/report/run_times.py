"""How long an image takes: the ANN by dense paths, each T by PyTorch and by the engine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conversion import fold_batch_norm
from ..errors import IirsnnError
from ..measure.evaluation import latencies
from ..train.deployment import event_network
from ..train.pipeline import Pipeline

#: Images of one call, and how often it is timed: the engine is made for one, training for many.
ROUNDS = {1: 25, 64: 9}
#: As the table calls them.
PYTORCH, ENGINE = "PyTorch", "engine"

#: {images of a call: {path: milliseconds an image}}
Times = dict[str, dict[str, float]]


def measure(pipeline: Pipeline, names: Sequence[str]) -> tuple[dict[str, Times], str]:
    """Time the stages of these names on test images, all of them round robin in this call.

    Returns:
        ({stage: {batch: {path: median milliseconds an image}}}, why there is no engine). Paths of
        the ANN are PyTorch's: as trained, BatchNorm folded, and that in channels_last. Those of a
        spiking stage are "PyTorch" and, where there is one, "engine" (fp32, on the CPU).
    """
    paths: dict[tuple[str, str], Callable[[Tensor], Any]] = {}
    missing = ""
    for name in names:
        network = pipeline.trained(name)
        paths[name, PYTORCH] = network
        if name == "ann":
            folded = copy.deepcopy(network).eval()
            fold_batch_norm(folded)
            paths[name, f"{PYTORCH}, BatchNorm folded"] = folded.to(
                memory_format=torch.contiguous_format
            )
            paths[name, f"{PYTORCH}, BatchNorm folded, channels_last"] = copy.deepcopy(folded).to(
                memory_format=torch.channels_last
            )
            continue
        try:
            paths[name, ENGINE] = event_network(pipeline, int(name[1:]), "fp32")
        except IirsnnError as error:  # no compiler, or a module that it does not have
            missing = str(error)
    times: dict[str, Times] = {name: {} for name in names}
    with warnings.catch_warnings():  # that a dense network is faster: the table shows it
        warnings.simplefilter("ignore", RuntimeWarning)
        for batch, rounds in ROUNDS.items():
            images = pipeline.test_images(batch)
            taken = latencies(list(paths.values()), images, repeats=rounds)
            for (name, path), milliseconds in zip(paths, taken, strict=True):
                times[name].setdefault(str(batch), {})[path] = milliseconds
    return times, missing


def fastest(times: Times, batch: str) -> tuple[str, float]:
    """The fastest path of a stage at that batch and its milliseconds an image."""
    return min(times[batch].items(), key=lambda item: item[1])
