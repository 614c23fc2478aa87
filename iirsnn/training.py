"""Training of one stage, resumable at any step with the same result.

Nothing random has a state of its own: the order of an epoch, the augmentation of an image and the
dropout of a step are functions of (seed, stage, epoch or step). So weights, the optimiser's state
and the number of steps done are all that a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms import v2

from . import checkpoint, data
from .convert import neurons
from .data import Splits
from .energy import EnergyPenalty
from .errors import RunError
from .evaluation import loss_and_accuracy
from .models import Network, SharedDropout
from .progress import StageProgress
from .recipe import StageConfig
from .reduction import Stage
from .run_folder import RunFolder


@dataclass
class Progress:
    """How far a stage is: the header of its checkpoint.

    Attributes:
        step: optimiser steps done.
        best_accuracy: on the validation split, after epoch `best_epoch` (from 1).
        loss_sum, right, seen: of the images of the epoch so far.
        seconds: spent on the stage.
    """

    step: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    loss_sum: float = 0.0
    right: int = 0
    seen: int = 0
    seconds: float = 0.0


class StageTraining:
    """The training of one stage, from its initial network or from where it was stopped.

    Writes `last` every few minutes and after each epoch, and `best` after each epoch with a new
    best validation accuracy, both in the stage's folder.

    Args:
        network: the initial network, on the accelerator's device; trained in place.
        stage: which.
        folder: of the run, locked.
        splits: of the data.
        accelerator: device and mixed precision.
        teacher: whose soft labels are learned too, on the same device; None for none.

    Raises:
        RunError: `last` is damaged or does not belong to this run.
    """

    def __init__(
        self,
        network: Network,
        stage: Stage,
        folder: RunFolder,
        splits: Splits,
        accelerator: Accelerator,
        teacher: Network | None = None,
    ) -> None:
        self.network, self.stage, self.folder, self.splits = network, stage, folder, splits
        self.accelerator, self.data = accelerator, folder.recipe.data
        self.config = folder.recipe.stage_config(stage.name)
        self.seed = derive_seed(folder.recipe.seed, stage.name)
        self.epoch_steps = len(data.train_batches(splits, self.data, seed=self.seed, epoch=0))
        self.progress = Progress()
        self.objective = Objective(self.config, splits.classes, teacher)
        self.penalty = EnergyPenalty(network)
        set_dropout(network, self.config.dropout)
        self.optimizer = make_optimizer(network, self.config)
        if folder.has_checkpoint(stage.name, "last"):
            self._restore()
        folder.rewind_metrics(stage.name, self.progress.step)
        self.model, self.optimizer = accelerator.prepare(network, self.optimizer)

    def run(self, console: Console) -> Progress:
        """Train to the end of the stage.

        Raises:
            RunError: the loss is not finite, or a checkpoint cannot be written.
        """
        progress, config = self.progress, self.config
        between = 60 * self.folder.recipe.runtime.checkpoint_minutes
        started = saved = time.monotonic()
        before = progress.seconds
        total = config.epochs * self.epoch_steps
        watched = self.penalty.measured() if config.energy_weight else nullcontext()
        with (
            watched,
            StageProgress(console, self.stage.name, config.epochs, total, progress.step) as bar,
        ):
            for epoch in range(progress.step // self.epoch_steps, config.epochs):
                self.network.train()
                start = progress.step - epoch * self.epoch_steps
                for images, labels in data.train_batches(
                    self.splits, self.data, seed=self.seed, epoch=epoch, start_batch=start
                ):
                    self._step(images, labels, progress.step / total)
                    progress.seconds = before + time.monotonic() - started
                    bar.step(epoch, len(labels), progress.right / progress.seen)
                    # after an epoch's last step its end has to come first: _finish_epoch saves
                    if progress.step % self.epoch_steps and time.monotonic() - saved >= between:
                        self._save_last()
                        saved = time.monotonic()
                self._finish_epoch(epoch, bar)
                saved = time.monotonic()
        return progress

    def _step(self, images: Tensor, labels: Tensor, done: float) -> None:
        """One optimiser step, with the stage's fraction `done` behind it."""
        progress, config = self.progress, self.config
        images, labels = images.to(self.accelerator.device), labels.to(self.accelerator.device)
        set_learning_rate(self.optimizer, config, done)
        torch.manual_seed(derive_seed(self.seed, progress.step))
        self.optimizer.zero_grad(set_to_none=True)
        mixed, targets = self.objective.targets(images, labels)
        parts = zip(*(t.chunk(config.accumulate) for t in (mixed, targets, labels)), strict=True)
        for part, part_targets, part_labels in parts:
            logits = self.model(part).float()
            with self.accelerator.autocast():  # for the teacher
                loss = self.objective.loss(logits, part, part_targets)
            if config.energy_weight:
                excess = self.penalty.value(self.network.timesteps) - config.energy_budget
                loss = loss + config.energy_weight * excess.clamp(min=0)
            self._require_finite("loss", float(loss.detach()), progress.step + 1)
            self.accelerator.backward(loss * (len(part) / len(images)))
            progress.loss_sum += float(loss.detach()) * len(part)
            progress.right += int((logits.detach().argmax(1) == part_labels).sum())
        self.optimizer.step()
        for neuron in neurons(self.network):
            neuron.constrain_()
        progress.step += 1
        progress.seen += len(images)

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        last = self.folder.stage_path(self.stage.name) / "last.safetensors"
        if last.exists():
            kept = f"the last good checkpoint is kept: {last}"
        elif self.stage.parent is not None:
            kept = f"the last good checkpoint is kept, that of stage {self.stage.parent}"
        else:
            kept = "no checkpoint was written yet"
        raise RunError(f"stage {self.stage.name}, step {step}: the {what} is {value}; {kept}")

    def _finish_epoch(self, epoch: int, bar: StageProgress) -> None:
        progress = self.progress
        batches = data.eval_batches(self.splits.validation, self.data)
        validation_loss, validation = loss_and_accuracy(
            self.network, batches, self.accelerator.device
        )
        self._require_finite("validation loss", validation_loss, progress.step)
        training_loss, training = progress.loss_sum / progress.seen, progress.right / progress.seen
        record = {
            "stage": self.stage.name,
            "epoch": epoch + 1,
            "step": progress.step,
            "loss": training_loss,
            "accuracy": training,
            "validation_loss": validation_loss,
            "validation_accuracy": validation,
            "images_per_second": bar.images_per_second,
            "seconds": progress.seconds,
        }
        progress.loss_sum, progress.right, progress.seen = 0.0, 0, 0
        if validation > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = validation, epoch + 1
            header = {"validation_accuracy": validation, "epoch": epoch + 1}
            self.folder.save_checkpoint(self.stage.name, "best", self.network.state_dict(), header)
        self.folder.log(record)
        self._save_last()
        bar.epoch(epoch, training_loss, training, validation)

    def _save_last(self) -> None:
        progress = self.progress
        weights = [p.detach().abs().max() for p in self.network.parameters()]
        self._require_finite("largest weight", float(torch.stack(weights).max()), progress.step)
        tensors, scalars = checkpoint.pack_optimizer(self.optimizer)
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        scaler = self.accelerator.scaler
        header = {
            "progress": vars(progress),
            "optimizer": scalars,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.folder.save_checkpoint(self.stage.name, "last", {**network, **tensors}, header)

    def _restore(self) -> None:
        tensors, header = self.folder.load_checkpoint(self.stage.name, "last")
        weights = {
            name.removeprefix("network."): tensor
            for name, tensor in tensors.items()
            if name.startswith("network.")
        }
        load_weights(self.network, weights)
        checkpoint.unpack_optimizer(self.optimizer, tensors, header["optimizer"])
        if self.accelerator.scaler is not None and header["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.progress = Progress(**header["progress"])


class Objective:
    """What a stage minimises, but for the energy: labels, mixed or smoothed, and a teacher's.

    Args:
        config: of the stage.
        classes: number of classes.
        teacher: in eval mode hereafter; None for none.
    """

    def __init__(self, config: StageConfig, classes: int, teacher: Network | None = None) -> None:
        self.config = config
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.mixup = v2.MixUp(alpha=config.mixup, num_classes=classes) if config.mixup else None

    def targets(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is to see and say: images, and labels or class probabilities.

        Args:
            images: [B, C, H, W].
            labels: int64 [B].
        """
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

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


def load_weights(network: Network, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights.

    Raises:
        RunError: they are those of another network.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"checkpoint: of another network ({' '.join(str(error).split())})"
        ) from error


def make_optimizer(network: Network, config: StageConfig) -> torch.optim.Optimizer:
    """The optimiser of a stage; thresholds and leaks have no weight decay."""
    own = {id(p) for neuron in neurons(network) for p in neuron.parameters()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) not in own]},
        {
            "params": [p for p in parameters if id(p) in own],
            "weight_decay": 0.0,
            "factor": config.neuron_rate,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.Adam(
        groups, config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: StageConfig, done: float) -> None:
    """Set the learning rate for a stage of which the fraction `done` in [0, 1) is over."""
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = config.decay ** -sum(done >= milestone for milestone in config.milestones)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor * group.get("factor", 1.0)


def set_dropout(network: nn.Module, p: float) -> None:
    """Set the probability of every SharedDropout."""
    for module in network.modules():
        if isinstance(module, SharedDropout):
            module.p = p


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
