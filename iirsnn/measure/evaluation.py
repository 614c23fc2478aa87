"""What a trained network does: accuracy, operations and spikes, and how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .energy import OperationCounter

Batches = Iterable[tuple[Tensor, Tensor]]
T = TypeVar("T")


class Gatherer(Protocol):
    """Processes that share the batches, e.g. `iirsnn.train.processes.Processes`."""

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them."""


@contextmanager
def evaluating(*networks: nn.Module):
    """Networks in eval mode and no gradients; the modes they had come back afterwards."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def accuracies(
    networks: Sequence[nn.Module],
    batches: Batches,
    device: torch.device,
    processes: Gatherer | None = None,
) -> list[float]:
    """The fraction of images that each network classifies rightly, in one pass over the data.

    Args:
        networks: on `device`, each taking [B, C, H, W] to logits [B, classes].
        batches: (images float [B, C, H, W], labels int64 [B]); this process's share of them.
        device: where the networks are.
        processes: that the batches are shared among.
    """
    right = torch.zeros(len(networks), dtype=torch.int64, device=device)
    total = 0
    with evaluating(*networks):
        for images, labels in batches:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            total += len(labels)
            for index, network in enumerate(networks):
                right[index] += (network(images).argmax(1) == labels).sum()
    total, *counts = _sums([total, *right.tolist()], processes)
    return [count / max(total, 1) for count in counts]


def loss_and_accuracy(
    network: nn.Module,
    batches: Batches,
    device: torch.device,
    processes: Gatherer | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and the fraction classified rightly; see `accuracies`."""
    losses: list[Tensor] = []  # on the device until the end: reading one waits for it
    right: list[Tensor] = []
    total = 0
    with evaluating(network):
        for images, labels in batches:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            logits = network(images).float()
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            right.append((logits.argmax(1) == labels).sum())
            total += len(labels)
    loss, count = math.fsum(map(float, losses)), sum(map(int, right))
    total, loss, count = _sums([total, loss, count], processes)
    return loss / max(total, 1), count / max(total, 1)


def _sums(values: list[Any], processes: Gatherer | None) -> list[Any]:
    shares = [values] if processes is None else processes.gather(values)
    return [sum(each) for each in zip(*shares, strict=True)]


def count_operations(
    network: nn.Module, images: Tensor, *, batch_size: int = 64
) -> OperationCounter:
    """Operations and spikes on [B, C, H, W] images, `batch_size` of them at a time."""
    counter = OperationCounter(network)
    with evaluating(network), counter.watching():
        for part in images.split(batch_size):
            network(part)
    return counter


def latencies(
    networks: Sequence[Callable[[Tensor], Any]], images: Tensor, *, repeats: int = 9
) -> list[float]:
    """Median milliseconds per image of each network, measured round robin on the same images.

    Args:
        networks: modules on the device of the images, or anything else that takes them.
        images: [B, C, H, W].
        repeats: rounds counted; one more comes first to warm up.
    """
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
    times: list[list[float]] = [[] for _ in networks]
    with evaluating(*(network for network in networks if isinstance(network, nn.Module))):
        for round_ in range(repeats + 1):
            for network, measured in zip(networks, times, strict=True):
                synchronise()
                start = time.perf_counter()
                network(images)
                synchronise()
                if round_ > 0:
                    measured.append(time.perf_counter() - start)
    return [1e3 * median(measured) / len(images) for measured in times]
