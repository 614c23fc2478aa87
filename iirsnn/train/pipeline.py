"""A whole run: the ANN, its conversion, and the stages that shrink T."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from ..conversion import balance_thresholds, to_spiking
from ..errors import RunError, UsageError
from ..event import EventNetwork
from ..measure.energy import microjoules
from ..measure.evaluation import accuracies, count_operations, evaluating
from ..measure.provenance import commit, machine
from ..models import Network
from ..models.graph import GraphNetwork
from ..nn import use_spike_layers
from . import any_network, checkpoint, data, device, freed_memory
from .data import Splits
from .processes import Processes
from .recipe import Recipe
from .run_folder import RunFolder
from .seeds import derive_seed
from .stage_order import Stage, stages
from .stage_training import StageTraining
from .stopping import Stopped, StopRequest

Module = TypeVar("Module", bound=nn.Module)

#: Any converted network.
SpikingNetwork = Network | GraphNetwork

#: Values of calibration images that go through a network in one batch; more go in several. A layer
#: of VGG16 has 21 times as many for each timestep: 0.8 GB at T = 5.
LARGE = 2**21

#: Test images that operations and spikes are counted on at most.
COUNTED_IMAGES = 2048


class Pipeline:
    """A run in its folder: initial networks, trained networks, and the loop over the stages.

    Args:
        folder: of the run; locked when it is to be trained.
        splits: what `open_data` returned for its recipe.
        processes: that train it together; None for this one alone.
    """

    def __init__(
        self, folder: RunFolder, splits: Splits, processes: Processes | None = None
    ) -> None:
        self.folder, self.splits, self.recipe = folder, splits, folder.recipe
        self.processes = processes or Processes()
        folder.require_data(splits.description())
        runtime = self.recipe.runtime
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        self.device = device.choose(runtime)
        if self.device.type == "cpu":
            freed_memory.apply(runtime.allocator)
        self.stages = stages(self.recipe.timesteps)

    def train(self, console: Console) -> None:
        """Train what is not finished yet, stage after stage.

        Raises:
            RunError, Stopped: see `StageTraining.run`.
        """
        with StopRequest() as stop:
            for stage in self.stages:
                if self.processes.first(partial(self._finished, stage)):
                    continue
                self.train_stage(stage, console, stop)

    def train_stage(self, stage: Stage, console: Console, stop: StopRequest | None = None) -> None:
        """Train one stage, whose parent is trained, to its end and record its result.

        Raises:
            RunError, Stopped: see `StageTraining.run`.
        """
        if self.processes.main:
            self.folder.keep_data(self.splits.description())
        weights = self.recipe.stage_config(stage.name).weights
        if weights:
            self._take_weights(stage, Path(weights), console, stop)
            return
        training = StageTraining(
            self._by_events(self.initial(stage)),
            stage,
            self.folder,
            self.splits,
            self.device,
            self.teacher(stage),
            self.processes,
        )
        progress = training.run(console, stop)
        result = {
            "validation_accuracy": progress.best_accuracy,
            "epoch": progress.best_epoch,
            "seconds": progress.seconds,
            "processes": self.processes.count,
            "commit": commit(),
            "machine": machine(),
            **self.test(stage, stop),
        }
        if self.processes.main:
            self.folder.finish_stage(stage.name, result)
        console.print(f"{stage.name:>4}  test {result['test_accuracy']:.2%}", style="bold")

    def _take_weights(
        self, stage: Stage, file: Path, console: Console, stop: StopRequest | None
    ) -> None:
        """The weights of a file in place of the training of a stage; they are tested all the same.

        Raises:
            RunError: no file, or one of another network.
            Stopped: see `test`.
        """
        network = self._untrained(stage.name)
        weights = any_network.read_weights(file)
        try:
            checkpoint.load_weights(network, weights)
        except RunError as error:
            raise RunError(f"{stage.name}.weights: {file}: {error}") from error
        self._place(network)
        batches = data.eval_batches(self.splits.validation, self.recipe.data, self.processes.share)
        (validation,) = accuracies([network], batches, self.device, self.processes)
        if self.processes.main:
            header = {"validation_accuracy": validation, "epoch": 0}
            self.folder.save_checkpoint(stage.name, "best", network.state_dict(), header)
        self.processes.gather(None)  # the others read it now
        tested = self.test(stage, stop)
        result = {
            "validation_accuracy": validation,
            "epoch": 0,
            "seconds": 0.0,
            "processes": self.processes.count,
            "commit": commit(),
            "machine": machine(),
            **tested,
        }
        if self.processes.main:
            self.folder.finish_stage(stage.name, result)
        accuracy = tested["test_accuracy"]
        console.print(f"{stage.name:>4}  test {accuracy:.2%}, of {file}", style="bold")

    def _finished(self, stage: Stage) -> bool:
        if self.folder.result(stage.name) is None:
            return False
        self.folder.tidy(stage.name)  # a kill may have come between the result and this
        return True

    def initial(self, stage: Stage) -> nn.Module:
        """The network a stage starts from, on its device."""
        if stage.timesteps is None:
            return self._place(self._untrained("ann"))
        if stage.parent == "ann":
            return self.converted(stage.timesteps)
        assert stage.parent is not None
        network = self.spiking(stage.parent)
        network.timesteps = stage.timesteps
        return network

    def teacher(self, stage: Stage) -> nn.Module | None:
        """The network whose soft labels the stage learns too, if any, on its device."""
        choice = self.recipe.stage_config(stage.name).teacher
        if choice == "none":
            return None
        assert stage.parent is not None  # recipe.check refuses a teacher of the ANN
        return self.trained("ann" if choice == "ann" else stage.parent)

    def trained(self, name: str) -> nn.Module:
        """The network of a stage as its best epoch left it, on its device.

        Raises:
            RunError: the stage has no checkpoint yet, or a damaged one.
        """
        tensors, _ = self.folder.load_checkpoint(name, "best")
        network = self._untrained(name)
        checkpoint.load_weights(network, tensors)
        return self._place(network)

    def spiking(self, name: str) -> SpikingNetwork:
        """The same, of a spiking stage."""
        network = self.trained(name)
        assert isinstance(network, (Network, GraphNetwork))
        return network

    def converted(self, timesteps: int) -> SpikingNetwork:
        """The trained ANN as an SNN at T, thresholds balanced at that T, not retrained."""
        network = self._place(self._spiking(self.trained("ann"), timesteps))
        conversion = self.recipe.conversion
        images = self.calibration_images(conversion.images)
        batch_size = None
        if images.numel() > LARGE:
            most = max(1, LARGE // images[0].numel())
            batch_size = min(self.recipe.data.test_batch_size, most)
        balance_thresholds(
            network, images, conversion.percentile, conversion.scale, batch_size=batch_size
        )
        return network

    def _spiking(self, ann: nn.Module, timesteps: int) -> SpikingNetwork:
        shape = self.splits.image_shape
        return to_spiking(ann, timesteps, self.recipe.neuron, image_shape=shape)

    def calibration_images(self, count: int) -> Tensor:
        """Random training images, not augmented, the same in every call: [count, C, H, W]."""
        seed = derive_seed(self.recipe.seed, "calibration")
        return self._images(self.splits.train, count, seed)[0]

    def test_images(self, count: int) -> Tensor:
        """Random test images, the same in every call: [count, C, H, W]."""
        return self._images(self.splits.test, count, derive_seed(self.recipe.seed, "test"))[0]

    def validation_images(self, count: int) -> tuple[Tensor, Tensor]:
        """Random validation images, the same in every call: [count, C, H, W], labels int64."""
        seed = derive_seed(self.recipe.seed, "validation")
        return self._images(self.splits.validation, count, seed)

    def test(self, stage: Stage, stop: StopRequest | None = None) -> dict[str, Any]:
        """The stage's entry in the report; reads the test set once.

        Processes share the test set; operations and spikes are counted by the first one alone.

        Raises:
            Stopped: `stop` was asked for.
        """
        stop, processes = stop or StopRequest(), self.processes

        def stopped() -> Stopped:
            return stop.stopped(stage.name, "in its test", self.folder.path)

        network = self.trained(stage.name)
        networks = [self._by_events(network)]
        if stage.timesteps is not None:
            networks.append(self._by_events(self.converted(stage.timesteps)))
        batches = stop.between(
            data.eval_batches(self.splits.test, self.recipe.data, processes.share),
            data.eval_rounds(self.splits.test, self.recipe.data, processes.count),
            processes,
            stopped,
        )
        accuracy, *without_retraining = accuracies(networks, batches, self.device, processes)
        result: dict[str, Any] = {"test_accuracy": accuracy}
        if not processes.main:
            return result
        if stage.timesteps is not None:
            result["timesteps"] = stage.timesteps
            result["converted_without_retraining_accuracy"] = without_retraining[0]
        if processes.count == 1:  # others would wait in vain for one that stops alone
            network.register_forward_pre_hook(lambda *_: stop.meet(stopped))
        images = self.test_images(COUNTED_IMAGES)
        if isinstance(network, GraphNetwork):
            return {**result, **_counted_by_engine(network, images)}
        counter = count_operations(network, images)
        return {
            **result,
            "multiplications": counter.multiplications,
            "additions": counter.additions,
            "additions_pooled_once": counter.additions_pooled_once,
            "energy_uj": counter.energy_uj,
            "layers": list(counter.spikes),
            "spike_rates": counter.spike_rates,
        }

    def _images(self, dataset: data.ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:count].tolist()
        images, labels = zip(*dataset.__getitems__(chosen), strict=True)
        return torch.stack(images).to(self.device), torch.tensor(labels, device=self.device)

    def _untrained(self, name: str) -> nn.Module:
        """A network with the modules of a stage's; the ANN's weights are its initial ones."""
        ann = _build(self.recipe, self.splits)
        timesteps = {stage.name: stage.timesteps for stage in self.stages}[name]
        return ann if timesteps is None else self._spiking(ann, timesteps)

    def _by_events(self, network: nn.Module) -> nn.Module:
        """The network with spike layers, where the recipe wants them; of an ANN nothing changes."""
        choice = self.recipe.runtime.spike_layers
        if not isinstance(network, Network):  # whose layers may see other values than spikes
            return network
        if choice != "never" and self.device.type == "cpu":
            use_spike_layers(network, "events" if choice == "always" else "auto")
        return network

    def _place(self, network: Module) -> Module:
        network.to(self.device)
        layout = device.memory_format(network, self.recipe.runtime.channels_last, self.device)
        network.to(memory_format=layout)
        return network


def _counted_by_engine(network: GraphNetwork, images: Tensor) -> dict[str, Any]:
    """What the engine really does for the images, in the form of a result: per image.

    Only it knows what spikes meet in any graph.
    """
    net = EventNetwork.from_model(network, network.timesteps)
    sums: dict[str, float] = dict.fromkeys(("multiplications", "additions"), 0.0)
    spikes: dict[str, float] = {}
    for part in images.cpu().split(64):
        net(part)
        for layer in net.statistics():
            for key in sums:
                sums[key] += getattr(layer, key) / len(images)
            if layer.spikes:
                rate = layer.spikes / layer.neurons / len(images)
                spikes[layer.name] = spikes.get(layer.name, 0.0) + rate
    return {
        **sums,
        "additions_pooled_once": sums["additions"],
        "energy_uj": microjoules(sums["multiplications"], sums["additions"]),
        "layers": list(spikes),
        "spike_rates": list(spikes.values()),
    }


def open_data(recipe: Recipe) -> Splits:
    """The recipe's data, after a check that its networks can be built and run.

    Raises:
        UsageError: the recipe describes no network, unknown neurons or data, or a backend that
            cannot run here.
        RunError: the data is missing or damaged.
    """
    splits = data.load(recipe.data, recipe.seed)
    ann = _build(recipe, splits)
    place = device.choose(recipe.runtime)
    try:
        snn = to_spiking(ann, recipe.timesteps[0], recipe.neuron, image_shape=splits.image_shape)
        with evaluating(snn.to(place)):
            snn(torch.zeros(1, *splits.image_shape, device=place))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"neuron: {error}") from error
    return splits


def _build(recipe: Recipe, splits: Splits) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "initial"))
        try:
            return any_network.build(recipe.model, splits.classes, splits.image_shape)
        except ValueError as error:
            raise UsageError(str(error)) from error
