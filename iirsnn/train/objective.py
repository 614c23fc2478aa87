"""What a stage minimises: labels, mixed or smoothed, and a teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from .recipe import StageConfig


class Objective:
    """What a stage minimises, but for the energy: labels, mixed or smoothed, and a teacher's.

    Args:
        config: of the stage.
        classes: number of classes.
        teacher: in eval mode hereafter; None for none.
    """

    def __init__(self, config: StageConfig, classes: int, teacher: nn.Module | None = None) -> None:
        self.config = config
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.mixup = v2.MixUp(alpha=config.mixup, num_classes=classes) if config.mixup else None

    def targets(self, images: Tensor, labels: Tensor, done: float = 0.0) -> tuple[Tensor, Tensor]:
        """What the network is to see and say: images, and labels or class probabilities.

        Args:
            images: [B, C, H, W].
            labels: int64 [B].
            done: the fraction of the stage that is over, in [0, 1).
        """
        if self.mixup is None or done >= self.config.mixup_until:
            return images, labels
        return self.mixup(images, labels)

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            logits: float [B, classes], what the network said to the images.
            images: [B, C, H, W].
            targets: int64 [B], or float [B, classes].
        """
        config = self.config
        loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        if self.teacher is None:
            return loss
        temperature = config.teacher_temperature
        with torch.no_grad():
            soft = F.softmax(self.teacher(images).float() / temperature, 1)
        # the square keeps the gradient's size whatever the temperature
        distance = F.cross_entropy(logits / temperature, soft) * temperature**2
        return (1 - config.teacher_weight) * loss + config.teacher_weight * distance
