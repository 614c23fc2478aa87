"""Balancing of thresholds: each one from the current that its layer sees."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..models import Network
from ..models.graph import GraphNetwork
from ..nn import FusedLIF, neurons
from .units import consumers

#: What a threshold becomes when the percentile of its layer's current is not positive.
SILENT_THRESHOLD = 0.1

#: Calibration images: one batch [B, C, H, W], or batches of it; a batch may be (images, labels).
Images = Tensor | Iterable[Tensor | Sequence[Tensor]]


@torch.no_grad()
def balance_thresholds(
    snn: Network | GraphNetwork,
    images: Images,
    percentile: float = 90.0,
    scale: float = 1.0,
    *,
    batch_size: int | None = None,
) -> list[float]:
    """Set each threshold to the percentile of its layer's current, layer by layer.

    A layer sees the spikes of the layers already balanced, with leak as it stands. In a Network the
    threshold is the paper's: the maximum over timesteps of the percentile over all elements of one
    timestep, times `scale`. In a GraphNetwork it is the percentile of the mean over time, times
    `scale`: that mean stands for the ANN's current. The weights that a layer's spikes meet are
    scaled with its threshold (see `iirsnn.models.graph`), and where a ReLU6 or clamp stood, its
    bound is the highest threshold. At T = 1 the two rules are one.

    One batch takes one forward pass: each neuron sets its threshold just before it fires. Several
    take a pass over all batches for each layer, no further than that layer, and the memory of one
    batch; the percentile is then that of a histogram, within 0.013 % of the value.

    Args:
        snn: changed in place.
        images: [B, C, H, W], or an iterable of such batches, or of (images, labels).
        percentile: in (0, 100].
        scale: > 0.
        batch_size: images of a batch where `images` is one tensor; None for all of them.

    Returns:
        The thresholds, in the order of the forward pass.

    Raises:
        ValueError: a percentile, scale or batch size out of range; no images, or NaN or inf in them
            or in a current.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected a value in (0, 100], got {percentile}")
    if not scale > 0:
        raise ValueError(f"scale: expected a positive factor, got {scale}")
    batches = batches_of(images, batch_size)
    balancing = _Balancing(snn, percentile, scale, tuple(batches[0].shape[1:]))
    training = snn.training
    snn.eval()
    try:
        if len(batches) == 1:
            balancing.at_once(batches[0])
        else:
            balancing.by_layer(batches)
    finally:
        snn.train(training)
    return balancing.thresholds


def batches_of(images: Images, batch_size: int | None = None) -> list[Tensor]:
    """The calibration images batch by batch, checked.

    Raises:
        TypeError: what is no tensor.
        ValueError: no images, NaN or inf, or a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if isinstance(images, Tensor):
        batches = list(images.split(batch_size or max(len(images), 1)))
    else:
        batches = [b if isinstance(b, Tensor) else b[0] for b in images]
    for batch in batches:
        if not isinstance(batch, Tensor):
            kind = type(batch).__name__
            raise TypeError(f"calibration_images: expected tensors [B, C, H, W], got {kind}")
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        raise ValueError("calibration_images: expected at least one image, got none")
    if not all(bool(torch.isfinite(batch).all()) for batch in batches):
        raise ValueError("calibration_images: expected finite values, got NaN or inf")
    return batches


class _Reached(Exception):
    """The layer that is being balanced has seen its current: the pass need not go on."""


class _Balancing:
    """Attributes: thresholds: so far, in the order of the forward pass."""

    def __init__(
        self,
        snn: Network | GraphNetwork,
        percentile: float,
        scale: float,
        image_shape: tuple[int, ...],
    ) -> None:
        self.snn, self.percentile, self.scale = snn, percentile, scale
        self.thresholds: list[float] = []
        self.names: dict[nn.Module, str] = {
            m: name for name, m in snn.named_modules() if isinstance(m, FusedLIF)
        }
        graph = snn.graph_module if isinstance(snn, GraphNetwork) else None
        self.consumers = [] if graph is None else consumers(graph, image_shape)
        self.number = {neuron: place for place, neuron in enumerate(_in_order(snn), start=1)}

    def at_once(self, images: Tensor) -> None:
        def balance(neuron: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            steps = self._steps(neuron, inputs[0])
            percentile = np.float64(self.percentile)  # of a float NumPy 2.2 rounds to float32
            values = (np.percentile(s.float().cpu().numpy(), percentile) for s in steps)
            self._set(neuron, max(values))

        self._watching(balance, [images])

    def by_layer(self, batches: list[Tensor]) -> None:
        balanced: set[nn.Module] = set()
        while True:
            histograms: list[Histogram] = []
            present: list[nn.Module] = []

            def count(
                neuron: nn.Module,
                inputs: tuple[Tensor, ...],
                histograms: list[Histogram] = histograms,
                present: list[nn.Module] = present,
            ) -> None:
                if neuron in balanced:
                    return
                present[:] = [neuron]
                for t, step in enumerate(self._steps(neuron, inputs[0])):
                    if t == len(histograms):
                        histograms.append(Histogram(step.device))
                    histograms[t].add(step)
                raise _Reached

            self._watching(count, batches)
            if not present:
                return
            values = [histogram.percentile(self.percentile) for histogram in histograms]
            self._set(present[0], max(values))
            balanced.add(present[0])

    def _watching(self, hook: Callable, batches: list[Tensor]) -> None:
        hooks = [n.register_forward_pre_hook(hook) for n in neurons(self.snn)]
        try:
            for images in batches:
                with contextlib.suppress(_Reached):
                    self.snn(images)
        finally:
            for handle in hooks:
                handle.remove()

    def _steps(self, neuron: nn.Module, current: Tensor) -> Tensor:
        """What percentiles are taken of: the current by timestep, or its mean over time."""
        if isinstance(self.snn, GraphNetwork):
            current = current.mean(0, keepdim=True) if current.stride(0) else current[:1]
        steps = current[:1] if current.stride(0) == 0 else current
        if not bool(torch.isfinite(steps).all()):
            raise ValueError(f"{self.names[neuron]}: expected a finite current, got NaN or inf")
        return steps

    def _set(self, neuron: nn.Module, percentile: float) -> None:
        assert isinstance(neuron, FusedLIF)
        value = self.scale * percentile
        threshold = float(value) if value > 0 else SILENT_THRESHOLD
        if isinstance(self.snn, GraphNetwork):
            name = self.names[neuron].removeprefix("graph_module.")
            threshold = min(threshold, self.snn.ceilings.get(name, math.inf))
            factor = threshold / neuron.threshold.detach()
            for consumer in self.consumers:
                consumer.scale(self.number[neuron], factor)
        self.thresholds.append(threshold)
        neuron.threshold.fill_(threshold)


def _in_order(snn: Network | GraphNetwork) -> list[FusedLIF]:
    """The neurons of a graph in the order of its nodes; of other networks as registered."""
    if not isinstance(snn, GraphNetwork):
        return neurons(snn)
    graph_module = snn.graph_module
    called = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    found = [neurons(graph_module.get_submodule(str(node.target))) for node in called]
    return [neuron for layer in found for neuron in layer]


class Histogram:
    """Counts of positive float32 values in bins a part in 8192 wide; the rest in bin 0."""

    _SHIFT = 10  # bits of the mantissa that a bin leaves out
    _BINS = 1 << (31 - _SHIFT)

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(self._BINS, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """values: finite, any shape and float dtype."""
        bits = values.detach().float().clamp(min=0).reshape(-1).contiguous().view(torch.int32)
        self.counts += torch.bincount(bits >> self._SHIFT, minlength=self._BINS)

    def percentile(self, percentile: float) -> float:
        """Between the two nearest ranks, each spread evenly in its bin; 0 in bin 0."""
        total = self.counts.cpu().cumsum(0)
        rank = (int(total[-1]) - 1) * percentile / 100
        below, above = (self._at(r, total) for r in (math.floor(rank), math.ceil(rank)))
        return below + (rank - math.floor(rank)) * (above - below)

    def _at(self, rank: int, total: Tensor) -> float:
        """The value of that rank, from 0; `total`: values up to and with each bin."""
        place = int(torch.searchsorted(total, rank, right=True))
        if place == 0:
            return 0.0
        edges = torch.tensor([place, place + 1], dtype=torch.int32) << self._SHIFT
        low, high = edges.view(torch.float32).tolist()
        before = int(total[place - 1])
        return low + (rank - before + 0.5) / (int(total[place]) - before) * (high - low)
