"""What the neurons of a run do: spikes of one image, membranes and thresholds, as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..errors import RunError
from ..measure.evaluation import evaluating
from ..nn import FusedLIF, neurons, recorder
from ..train.pipeline import Pipeline, SpikingNetwork
from . import plot_files

#: Test images that membranes are counted on.
IMAGES = 16
#: Neurons of a layer in a raster at most.
SHOWN = 40
#: Edges of the bins of h / threshold; what is beyond is in the outermost ones.
EDGES = np.linspace(-3, 3, 61)


@dataclass
class Layer:
    """One spiking layer.

    Attributes:
        raster: bool [T, n], spikes of evenly spaced neurons for the first image.
        membranes: float [bins of EDGES], fraction of the membranes h before reset, in thresholds.
        thresholds, leaks: float [1 or C].
    """

    raster: np.ndarray
    membranes: np.ndarray
    thresholds: np.ndarray
    leaks: np.ndarray


@dataclass
class Activity:
    """What the layers of a network did, in the order in which they fire."""

    timesteps: int
    layers: list[Layer] = field(default_factory=list)


def record(network: SpikingNetwork, images: Tensor) -> Activity:
    """Watch a spiking network in one forward pass over images [B, C, H, W]."""
    activity = Activity(network.timesteps)

    def watch(neuron: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
        assert isinstance(neuron, FusedLIF)
        first = spikes[:, 0].flatten(1)  # [T, neurons]
        shown = np.linspace(0, first.shape[1] - 1, min(SHOWN, first.shape[1])).round()
        activity.layers.append(
            Layer(
                raster=first.cpu().numpy()[:, shown.astype(int)] > 0,
                membranes=_histogram(membranes(neuron, inputs[0], spikes)),
                thresholds=neuron.threshold.detach().float().cpu().numpy(),
                leaks=neuron.leak.detach().float().cpu().numpy(),
            )
        )

    hooks = [neuron.register_forward_hook(watch) for neuron in neurons(network)]
    try:
        with evaluating(network):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return activity


def membranes(neuron: FusedLIF, current: Tensor, spikes: Tensor) -> Iterator[Tensor]:
    """The membrane h before reset, in thresholds, of one timestep after the other: [B, ...].

    current and spikes are [T, B, ...].
    """
    threshold = neuron.threshold.detach()
    if threshold.numel() > 1:
        threshold = threshold.view(-1, *[1] * (current.dim() - 3))
    for h in recorder.membranes(neuron, current, spikes):
        yield h / threshold


def write(pipeline: Pipeline, path: Path) -> None:
    """Write raster.png, membranes.png and thresholds.png of the spiking stages that are finished.

    Raises:
        RunError: no spiking stage is finished, or the folder cannot be written.
    """
    names = [s.name for s in pipeline.stages if s.timesteps and pipeline.folder.result(s.name)]
    if not names:
        raise RunError(f"run {pipeline.folder.path}: no spiking stage is finished yet")
    images = pipeline.test_images(IMAGES)
    activities = [record(pipeline.spiking(name), images) for name in names]
    count = len(activities[0].layers)
    columns = min(count, 4)
    rows = -(-count // columns)
    plots: dict[str, plot_files.Plot] = {
        "raster": ((9, 1.5 + 0.5 * count), _plot_rasters),
        "membranes": ((2.6 * columns, 0.8 + 1.9 * rows), partial(_plot_membranes, rows, columns)),
        "thresholds": ((8, 3.6), _plot_thresholds),
    }
    plot_files.write(path, plots, activities, run=pipeline.recipe.name)


def _histogram(values: Iterable[Tensor]) -> np.ndarray:
    counts = np.zeros(len(EDGES) - 1)
    for value in values:  # one timestep at a time: large networks have 10^8 membranes in one
        clipped = value.clamp(float(EDGES[0]), float(EDGES[-1])).cpu().numpy()
        counts += np.histogram(clipped, EDGES)[0]
    return counts / counts.sum()


def _plot_rasters(activities: Sequence[Activity], figure: Figure) -> None:
    """A panel for each T, as wide as it has timesteps; the layers one above the other."""
    figure.suptitle(f"spikes of one test image, up to {SHOWN} neurons of each layer")
    panels = figure.subplots(
        1,
        len(activities),
        sharey=True,
        squeeze=False,
        width_ratios=[activity.timesteps + 0.5 for activity in activities],
    )[0]
    for panel, activity in zip(panels, activities, strict=True):
        offsets = np.cumsum([0, *(layer.raster.shape[1] for layer in activity.layers)])
        for index, (layer, offset) in enumerate(zip(activity.layers, offsets, strict=False)):
            steps, neuron = np.nonzero(layer.raster)
            panel.plot(steps + 1, offset + neuron, "s", markersize=2, color=f"C{index % 10}")
        for offset in offsets[1:-1]:
            panel.axhline(offset - 0.5, color="0.8", linewidth=0.5)
        panel.set_xlim(0.5, activity.timesteps + 0.5)
        panel.set_xticks(range(1, activity.timesteps + 1))
        panel.set_ylim(offsets[-1] - 0.5, -0.5)
        panel.set_title(f"T = {activity.timesteps}", fontsize="medium")
        panel.set_yticks(
            (offsets[:-1] + offsets[1:]) / 2 - 0.5, [str(n) for n in range(1, len(offsets))]
        )
    panels[0].set_ylabel("layer")
    figure.supxlabel("timestep", fontsize="medium")


def _plot_membranes(
    rows: int, columns: int, activities: Sequence[Activity], figure: Figure
) -> None:
    figure.suptitle(
        "membrane before reset, in thresholds (right of 1: a spike; outermost: all beyond)"
    )
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    ends = [activities[0], activities[-1]] if len(activities) > 1 else activities
    for index, panel in enumerate(panels):
        if index >= len(activities[0].layers):
            panel.set_axis_off()
            continue
        for activity in ends:
            share = activity.layers[index].membranes
            panel.stairs(share, EDGES, label=f"T = {activity.timesteps}")
        panel.axvline(1, color="0.4", linestyle="--", linewidth=0.8)
        panel.set_title(f"layer {index + 1}", fontsize="small")
        panel.set_yscale("log")
        panel.tick_params(labelsize="x-small", labelbottom=True)
    figure.axes[0].legend(fontsize="x-small")
    figure.supxlabel("h / threshold", fontsize="medium")
    figure.supylabel("fraction of membranes", fontsize="medium")


def _plot_thresholds(activities: Sequence[Activity], figure: Figure) -> None:
    figure.suptitle("thresholds and leaks (bars: least and greatest of a layer's channels)")
    left, right = figure.subplots(1, 2)
    for position, activity in enumerate(activities):
        shift = 0.08 * (position - (len(activities) - 1) / 2)
        for panel, values in (
            (left, [layer.thresholds for layer in activity.layers]),
            (right, [layer.leaks for layer in activity.layers]),
        ):
            _spread(panel, values, shift, f"T = {activity.timesteps}")
    left.set_ylabel("threshold")
    left.set_ylim(bottom=0)
    right.set_ylabel("leak")
    left.legend(fontsize="small")


def _spread(axes: Axes, values: Sequence[np.ndarray], shift: float, label: str) -> None:
    layers = np.arange(1, 1 + len(values))
    middle = np.array([np.median(value) for value in values])
    bars = [
        middle - [value.min() for value in values],
        [value.max() for value in values] - middle,
    ]
    axes.errorbar(layers + shift, middle, bars, fmt="o", markersize=4, label=label)
    axes.set_xticks(layers)
    axes.set_xlabel("layer")
