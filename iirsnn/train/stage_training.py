"""Training of one stage, resumable at any step with the same result.

Nothing random has a state of its own: the order of an epoch, the augmentation of an image and the
dropout of a step are functions of (seed, stage, epoch or step). So weights, the optimiser's state
and the number of steps done are all that a checkpoint holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..errors import RunError
from ..measure.energy import EnergyPenalty
from ..measure.evaluation import loss_and_accuracy
from ..nn import neurons
from . import checkpoint, data
from .data import Splits
from .device import autocast, grad_scaler
from .fused_norms import fuse_norms
from .objective import Objective
from .processes import Processes
from .progress import Board, StageProgress
from .run_folder import RunFolder
from .running_sums import Reading, Sums
from .schedule import make_optimizer, set_dropout, set_learning_rate
from .seeds import derive_seed, seed_step
from .stage_order import Stage
from .stopping import Stopped, StopRequest
from .weight_average import WeightAverage

#: Optimiser steps between two looks at the running sums on a GPU: each look waits for it.
LOOK_STEPS = 50


@dataclass
class Progress:
    """How far a stage is: the header of its checkpoint.

    Attributes:
        step: optimiser steps done.
        epochs: validated; one less than were trained where a validation was stopped.
        best_accuracy: on the validation split, after epoch `best_epoch` (from 1), whose weights
            are kept.
        loss_sum, right, seen: of the images of the epoch so far.
        seconds: spent on the stage.
    """

    step: int = 0
    epochs: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    loss_sum: float = 0.0
    right: int = 0
    seen: int = 0
    seconds: float = 0.0


class StageTraining:
    """The training of one stage, from its initial network or from where it was stopped.

    Writes `last` every few minutes or steps, and before and after the validation of each epoch;
    `best` after each epoch with a new best validation accuracy, or after each where the stage keeps
    the last; both in the stage's folder. Of `last` the one before is kept. Where the stage has
    `ema`, what is validated and `best` is the average of the weights.

    With many processes each takes its share of every batch, so their number changes nothing but
    the rounding of sums, and dropout: each process draws its own masks. A stage may be resumed by
    any number of processes; by the same number, it ends in the same bits.

    Args:
        network: the initial network, on the device; trained in place.
        stage: which.
        folder: of the run; locked by process 0.
        splits: of the data.
        device: of this process.
        teacher: whose soft labels are learned too, on the device; None for none.
        processes: that train it together; None for this one alone.

    Raises:
        RunError: both resume checkpoints are damaged, or do not belong to this run.
    """

    def __init__(
        self,
        network: nn.Module,
        stage: Stage,
        folder: RunFolder,
        splits: Splits,
        device: torch.device,
        teacher: nn.Module | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.network, self.stage, self.folder, self.splits = network, stage, folder, splits
        self.device, self.data = device, folder.recipe.data
        self.processes = processes or Processes()
        self.runtime = folder.recipe.runtime
        self.config = folder.recipe.stage_config(stage.name)
        self.seed = derive_seed(folder.recipe.seed, stage.name)
        self.sizes = data.batch_sizes(len(splits.train), self.data.batch_size)
        self.epoch_steps = len(self.sizes)
        self.total = self.config.epochs * self.epoch_steps
        self.progress = Progress()
        self.objective = Objective(self.config, splits.classes, teacher)
        set_dropout(network, self.config.dropout)
        self.optimizer = make_optimizer(network, self.config)
        self.scaler = grad_scaler(device, self.runtime.precision)
        self.average = WeightAverage(network, self.config.ema) if self.config.ema else None
        name, self.warning = self.processes.first(lambda: folder.newest_checkpoint(stage.name))
        if name is not None:
            self._restore(name)
        self.processes.synchronise(network)
        if self.processes.main:
            folder.rewind_metrics(stage.name, self.progress.epochs)
        self.sums = Sums(device)
        if self.processes.main:
            progress = self.progress
            self.sums.start(progress.loss_sum, progress.right, progress.seen)
        self.model: Any = fuse_norms(network, stage.timesteps) if stage.timesteps else network
        self.penalty = EnergyPenalty(self.model)
        if self.runtime.compile:
            torch.compiler.reset()  # the stage before had its own network
            self.model = torch.compile(self.model)
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    def run(self, console: Console, stop: StopRequest | None = None) -> Progress:
        """Train to the end of the stage.

        Raises:
            RunError: the loss is not finite, or a checkpoint cannot be written.
            Stopped: `stop` was asked for; all that was trained is saved.
        """
        progress, config = self.progress, self.config
        stop = stop or StopRequest()
        if self.warning:
            console.print(f"warning: {self.warning}", markup=False, highlight=False, soft_wrap=True)
        started, before = time.monotonic(), progress.seconds
        watched = self.penalty.watching() if config.energy_weight else nullcontext()
        board = Board(self.folder.path, self.stage.name, progress.step) if self._logs() else None
        with (
            watched,
            StageProgress(
                console, self.stage.name, config.epochs, self.total, progress.step
            ) as bar,
            board or nullcontext(),
        ):
            for epoch in range(progress.epochs, config.epochs):
                self.network.train()
                for images, labels in self._batches(epoch, stop):
                    self._step(images, labels, progress.step / self.total)
                    progress.seconds = before + time.monotonic() - started
                    self._look(bar, epoch)
                record = self._finish_epoch(epoch, bar, stop)
                if board is not None:
                    board.log(record, self.network, self.optimizer)
        return progress

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.runtime.precision)

    def _logs(self) -> bool:
        return self.runtime.tensorboard and self.processes.main

    def _batches(self, epoch: int, stop: StopRequest) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that are left; saves between them, and stops."""
        start = self.progress.step - epoch * self.epoch_steps
        loader = iter(
            data.train_batches(
                self.splits,
                self.data,
                seed=self.seed,
                epoch=epoch,
                start_batch=start,
                share=self.processes.share,
            )
        )
        for _ in range(start, self.epoch_steps):
            try:
                batch = next(loader)
            except RuntimeError:
                if not stop.signal:  # a scheduler may have ended the loader's workers as well
                    raise
                batch = None
            asked, due = self.processes.any(stop.signal is not None, self._save_is_due())
            if (asked or due) and self.progress.step != self._saved_step:
                self._save_last()
            if asked:
                raise self._stopped(stop, "after")
            assert batch is not None
            yield batch

    def _stopped(self, stop: StopRequest, when: str) -> Stopped:
        where = f"{when} step {self.progress.step} of {self.total}"
        return stop.stopped(self.stage.name, where, self.folder.path)

    def _save_is_due(self) -> bool:
        """Whether `last` has become too old: process 0 alone knows."""
        steps = self.progress.step - self._saved_step
        if steps == 0 or not self.processes.main:
            return False
        if 0 < self.runtime.checkpoint_steps <= steps:
            return True
        return time.monotonic() - self._saved_at >= 60 * self.runtime.checkpoint_minutes

    def _step(self, images: Tensor, labels: Tensor, done: float) -> None:
        """One optimiser step, with the stage's fraction `done` behind it.

        images and labels are this process's share of the batch.
        """
        progress, config, processes = self.progress, self.config, self.processes
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        set_learning_rate(self.optimizer, config, done)
        seed_step(self.device, derive_seed(self.seed, progress.step, *self._own_seed()))
        self.optimizer.zero_grad(set_to_none=True)
        size = len(images) if processes.count == 1 else self.sizes[progress.step % self.epoch_steps]
        first, last = data.part(size, processes.share)
        images, labels = images[: last - first], labels[: last - first]
        # as many micro-batches in every process: synchronised BatchNorms wait for each other
        count = max(1, min(config.accumulate, size // processes.count))
        mixed, targets = self.objective.targets(images, labels, done)
        parts = zip(*(t.tensor_split(count) for t in (mixed, targets, labels)), strict=True)
        for part, part_targets, part_labels in parts:
            with self._autocast():
                logits = self.model(part).float()
            if not len(part):  # a batch of fewer images than processes
                self.scaler.scale(logits.sum()).backward()
                continue
            with self._autocast():  # for the teacher
                loss = self.objective.loss(logits, part, part_targets)
            if config.energy_weight and done >= config.energy_from:
                assert self.stage.timesteps is not None
                excess = self.penalty.value(self.stage.timesteps) - config.energy_budget
                loss = loss + config.energy_weight * excess.clamp(min=0)
            # the mean over the processes is that over the batch
            self.scaler.scale(loss * (len(part) * processes.count / size)).backward()
            self.sums.add(loss, logits, part_labels, progress.step + 1)
        processes.average_gradients(self.network.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for neuron in neurons(self.network):
            neuron.constrain_()
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        progress.seen += size

    def _own_seed(self) -> tuple[int, ...]:
        return () if self.processes.main else (self.processes.rank,)

    def _look(self, bar: StageProgress, epoch: int) -> None:
        """Show a step; see now and then whether the loss of this process is finite."""
        size = self.sizes[(self.progress.step - 1) % self.epoch_steps]
        accuracy = None
        if self.device.type == "cpu" or self.progress.step % LOOK_STEPS == 0:
            reading = self.sums.read()
            self._require_finite_loss([reading])
            accuracy = reading.right / max(reading.seen, 1)
        bar.step(epoch, size, accuracy)

    def _require_finite_loss(self, readings: Sequence[Reading]) -> None:
        bad = [(r.bad_step, r.bad_loss) for r in readings if r.bad_step]
        if bad:
            step, loss = min(bad)
            self._require_finite("loss", loss, step)

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        last = self.folder.checkpoint_path(self.stage.name, "last")
        if last.exists():
            kept = f"the last good checkpoint is kept: {last}"
        elif self.stage.parent is not None:
            kept = f"the last good checkpoint is kept, that of stage {self.stage.parent}"
        else:
            kept = "no checkpoint was written yet"
        raise RunError(f"stage {self.stage.name}, step {step}: the {what} is {value}; {kept}")

    def _add_up(self) -> None:
        """Bring the sums of all processes into `progress`."""
        readings = self.processes.gather(self.sums.read())
        self._require_finite_loss(readings)
        self.progress.loss_sum = math.fsum(reading.loss for reading in readings)
        self.progress.right = sum(reading.right for reading in readings)

    def _finish_epoch(self, epoch: int, bar: StageProgress, stop: StopRequest) -> dict[str, Any]:
        progress, processes = self.progress, self.processes
        if progress.step != self._saved_step:
            self._save_last()  # a validation may take longer than whoever stops the run will wait
        self._add_up()
        validation_set = self.splits.validation
        network = self.network if self.average is None else self.average.network
        batches = stop.between(
            data.eval_batches(validation_set, self.data, processes.share),
            data.eval_rounds(validation_set, self.data, processes.count),
            processes,
            lambda: self._stopped(stop, "in the validation after"),
        )
        with self._autocast():
            validation_loss, validation = loss_and_accuracy(
                network, batches, self.device, self.processes
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
        progress.epochs = epoch + 1
        self.sums.start()
        best = validation > progress.best_accuracy or self.config.keep == "last"
        if best:
            progress.best_accuracy, progress.best_epoch = validation, epoch + 1
        if self.processes.main:
            if best:
                header = {"validation_accuracy": validation, "epoch": epoch + 1}
                self.folder.save_checkpoint(self.stage.name, "best", network.state_dict(), header)
            self.folder.log(record)
        self._save_last()
        bar.epoch(epoch, training_loss, training, validation)
        return record

    def _save_last(self) -> None:
        progress = self.progress
        self._add_up()
        weights = [p.detach().abs().max() for p in self.network.parameters()]
        self._require_finite("largest weight", float(torch.stack(weights).max()), progress.step)
        if self.processes.main:
            tensors, scalars = checkpoint.pack_optimizer(self.optimizer)
            tensors |= _named("network", self.network)
            if self.average is not None:
                tensors |= _named("average", self.average.network)
            header = {
                "progress": vars(progress),
                "optimizer": scalars,
                "scaler": self.scaler.state_dict(),
            }
            self.folder.save_checkpoint(self.stage.name, "last", tensors, header)
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def _restore(self, name: str) -> None:
        tensors, header = self.folder.load_checkpoint(self.stage.name, name)
        checkpoint.load_weights(self.network, _of("network", tensors))
        if self.average is not None:
            checkpoint.load_weights(self.average.network, _of("average", tensors))
        checkpoint.unpack_optimizer(self.optimizer, tensors, header["optimizer"])
        if header["scaler"]:  # empty but for fp16
            self.scaler.load_state_dict(header["scaler"])
        done = header["progress"]
        # older runs wrote no checkpoint between an epoch and its validation
        done.setdefault("epochs", done["step"] // self.epoch_steps)
        self.progress = Progress(**done)


def _named(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """A network's state as a checkpoint names it."""
    return {f"{prefix}.{name}": tensor for name, tensor in network.state_dict().items()}


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that `_named` named so."""
    return {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }
