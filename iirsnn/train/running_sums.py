"""What an epoch adds up while it is trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a process has added up of an epoch.

    Attributes:
        loss, right, seen: sums over its images.
        bad_step, bad_loss: the first step whose loss was not finite, and that loss; or 0.
    """

    loss: float
    right: int
    seen: int
    bad_step: int
    bad_loss: float


class Sums:
    """Loss and right answers of an epoch, added up on the device: only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(4, dtype=dtype, device=device)
        self._seen = 0

    def start(self, loss: float = 0.0, right: int = 0, seen: int = 0) -> None:
        """Begin an epoch, or go on with one."""
        self._sums = self._sums.new_tensor([loss, right, 0, 0])
        self._seen = seen

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
        """Add the mean loss of some images, [] in fp32, and what was made of them in a step."""
        loss = loss.detach().to(self._sums.dtype)
        right = (logits.detach().argmax(1) == labels).sum()
        total, hits, bad_step, bad_loss = self._sums.unbind()
        first_bad = ~loss.isfinite() & (bad_step == 0)
        self._sums = torch.stack(
            [
                total + loss * len(labels),
                hits + right,
                torch.where(first_bad, step, bad_step),
                torch.where(first_bad, loss, bad_loss),
            ]
        )
        self._seen += len(labels)

    def read(self) -> Reading:
        """The sums so far."""
        loss, right, bad_step, bad_loss = self._sums.tolist()
        return Reading(loss, int(right), self._seen, int(bad_step), bad_loss)
