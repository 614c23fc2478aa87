"""What a trained network does: accuracy, operations and spikes, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .energy import OperationCounter

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def evaluating(*networks: nn.Module):
    """Networks in eval mode and no gradients; the modes they had come back afterwards."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)


def accuracies(
    networks: Sequence[nn.Module], batches: Batches, device: torch.device
) -> list[float]:
    """The fraction of images that each network classifies rightly, in one pass over the data.

    Args:
        networks: on `device`, each taking [B, C, H, W] to logits [B, classes].
        batches: (images float [B, C, H, W], labels int64 [B]).
        device: where the networks are.
    """
    right = [0] * len(networks)
    total = 0
    with evaluating(*networks):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            total += len(labels)
            for index, network in enumerate(networks):
                right[index] += int((network(images).argmax(1) == labels).sum())
    return [count / max(total, 1) for count in right]


def loss_and_accuracy(
    network: nn.Module, batches: Batches, device: torch.device
) -> tuple[float, float]:
    """Mean cross-entropy and the fraction classified rightly; see `accuracies`."""
    loss, right, total = 0.0, 0, 0
    with evaluating(network):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = network(images).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    return loss / max(total, 1), right / max(total, 1)


def count_operations(
    network: nn.Module, images: Tensor, *, batch_size: int = 64
) -> OperationCounter:
    """Operations and spikes on [B, C, H, W] images, `batch_size` of them at a time."""
    counter = OperationCounter(network)
    with evaluating(network), counter.counting():
        for part in images.split(batch_size):
            network(part)
    return counter


def latencies(networks: Sequence[nn.Module], images: Tensor, *, repeats: int = 9) -> list[float]:
    """Median milliseconds per image of each network, measured round robin on the same images.

    Args:
        networks: on the device of the images.
        images: [B, C, H, W].
        repeats: rounds counted; one more comes first to warm up.
    """
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
    times: list[list[float]] = [[] for _ in networks]
    with evaluating(*networks):
        for round_ in range(repeats + 1):
            for network, measured in zip(networks, times, strict=True):
                synchronise()
                start = time.perf_counter()
                network(images)
                synchronise()
                if round_ > 0:
                    measured.append(time.perf_counter() - start)
    return [1e3 * median(measured) / len(images) for measured in times]
