"""A recipe: everything a run depends on, as typed YAML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import models
from ..conversion import NeuronConfig
from ..errors import UsageError, check_choice, one_line
from ..models import ModelConfig
from . import any_network, freed_memory
from .data import DataConfig
from .stage_order import stages


@dataclass
class ConversionConfig:
    """How thresholds are balanced.

    Attributes:
        percentile: of the input current of each layer, in (0, 100].
        scale: factor on each threshold.
        images: of the training set that currents are taken on.
    """

    percentile: float = 90.0
    scale: float = 1.0
    images: int = 512


@dataclass
class StageConfig:
    """How one stage is trained.

    Attributes:
        epochs: passes over the training set.
        optimizer: sgd or adam (amsgrad).
        learning_rate: at the start.
        momentum: of sgd.
        weight_decay: of weights; thresholds and leaks have none.
        schedule: step (divide by `decay` at each of `milestones`) or cosine (to zero).
        milestones: fractions of the stage, in (0, 1).
        decay: what a milestone divides the learning rate by.
        dropout: probability, one mask for all timesteps.
        label_smoothing: share of a label that goes to all classes.
        accumulate: micro-batches a step is split into.
        neuron_rate: the learning rate of thresholds and leaks, as a factor on that of the weights.
        shift_rate: the same of what shifts a channel's current before its neurons: the bias of
            each norm or layer but the last; 0 learns none.
        keep: whose weights are kept and handed on: best (of all epochs on the validation split) or
            last (the last epoch's, whatever validation says).
        ema: decay of the moving average of the weights that is validated, kept and handed on in
            their place (see `weight_average`); 0 for none.
        teacher: whose soft labels are learned too: none, ann, or previous (the stage before).
        teacher_weight: of the distillation loss; the labels' has 1 minus it.
        teacher_temperature: divides both networks' logits (Hinton et al., arXiv 1503.02531).
        energy_weight: on additions per operation of the ANN; see `measure.energy.EnergyPenalty`.
        energy_budget: additions per operation that are free, in each micro-batch of each process.
        energy_from: fraction of the stage that goes by before additions have a price.
        mixup: alpha of the Beta distribution that images are mixed by (Zhang et al., arXiv
            1710.09412); 0 for none.
        mixup_until: fraction of the stage after which images are no longer mixed.
        weights: of the ANN alone, a file with its trained weights (.safetensors, or .pt with a
            state_dict), which are tested and not trained.
    """

    epochs: int = 1
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "step"
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.8, 0.9])
    decay: float = 5.0
    dropout: float = 0.2
    label_smoothing: float = 0.0
    accumulate: int = 1
    neuron_rate: float = 1.0
    shift_rate: float = 1.0
    keep: str = "best"
    ema: float = 0.0
    teacher: str = "none"
    teacher_weight: float = 0.5
    teacher_temperature: float = 2.0
    energy_weight: float = 0.0
    energy_budget: float = 0.0
    energy_from: float = 0.0
    mixup: float = 0.0
    mixup_until: float = 1.0
    weights: str = ""


@dataclass
class RuntimeConfig:
    """Where and how a run computes; no part of its result but for rounding.

    Attributes:
        device: auto (a GPU where there is one) or cpu.
        precision: fp32, or mixed with bf16 or (on a GPU) fp16.
        threads: of the CPU, for each process; 0 leaves torch's choice.
        allocator: on a CPU, retain (freed memory stays with the process: fewer page faults, some
            more resident memory) or system.
        channels_last: memory format of convolutions.
        spike_layers: on a CPU, auto (spiking stages keep spikes as bits and add weights for spikes
            where that is faster), always (so) or never (torch's own layers).
        compile: train through torch.compile.
        checkpoint_minutes: between two checkpoints inside an epoch; each epoch's end has one too.
        checkpoint_steps: the same in steps; whichever comes first counts, 0 is never.
        tensorboard: write RUN/tensorboard as well.
    """

    device: str = "auto"
    precision: str = "fp32"
    threads: int = 0
    allocator: str = "retain"
    channels_last: bool = True
    spike_layers: str = "auto"
    compile: bool = False
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    tensorboard: bool = False


def _ann_stage() -> StageConfig:
    return StageConfig(
        optimizer="sgd",
        learning_rate=1e-2,
        weight_decay=5e-4,
        milestones=[0.45, 0.7, 0.9],
    )


@dataclass
class Recipe:
    """A whole run, from the ANN to the last T.

    Attributes:
        name: of the run's folder; "" for the file's.
        seed: of weights, order, augmentation and the validation split.
        timesteps: T of the spiking stages, strictly decreasing.
        stages: settings of one stage that differ from `snn`, e.g. {T1: {epochs: 4}}.
    """

    name: str = ""
    seed: int = 0
    timesteps: list[int] = field(default_factory=lambda: [5, 4, 3, 2, 1])
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    ann: StageConfig = field(default_factory=_ann_stage)
    snn: StageConfig = field(default_factory=StageConfig)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def stage_config(self, name: str) -> StageConfig:
        """The settings of a stage: "ann", "T5", ..."""
        if name == "ann":
            return self.ann
        merged = OmegaConf.merge(OmegaConf.structured(self.snn), self.stages.get(name, {}))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]


def names(folder: str = "") -> list[str]:
    """The recipes that ship with the package, or the tables, in its folder `tables`."""
    found = files("iirsnn.recipes").joinpath(folder).iterdir()
    return sorted(Path(f.name).stem for f in found if f.name.endswith(".yaml"))


def read(kind: str, name_or_path: str, folder: str = "") -> str:
    """The text of a YAML file: one of `names(folder)`, or by its path.

    Raises:
        UsageError: neither, or unreadable; says that a `kind` was expected.
    """
    path = Path(name_or_path)
    if name_or_path in names(folder):
        shipped = files("iirsnn.recipes").joinpath(folder).joinpath(f"{name_or_path}.yaml")
        return shipped.read_text(encoding="utf-8")
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(
            f"{kind}: expected one of {', '.join(names(folder))}, or a .yaml file that exists, "
            f"got {name_or_path!r}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{kind} {path}: cannot be read ({error})") from error


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, with `key=value` overrides.

    Raises:
        UsageError: unknown recipe or key, a value of the wrong type or out of range.
    """
    text = read("recipe", name_or_path)
    loaded = parse(text, overrides, source=name_or_path)
    loaded.name = loaded.name or Path(name_or_path).stem
    check_folder_name("name", loaded.name)
    return loaded


def parse(text: str, overrides: Sequence[str] = (), *, source: str) -> Recipe:
    """A recipe from YAML text; see `load`. `source` names the text in errors."""
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"--set: expected key=value, got {override!r}")
    try:
        loaded = OmegaConf.create(text)
        if not isinstance(loaded, DictConfig):
            raise UsageError(f"recipe {source}: expected keys and values, got a list")
        config = OmegaConf.merge(OmegaConf.structured(Recipe), loaded)
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        recipe = OmegaConf.to_object(config)
        assert isinstance(recipe, Recipe)
        check(recipe)
    except UsageError:
        raise
    except Exception as error:  # OmegaConf raises from IndexError to its own over odd input
        reason = one_line(error) or "expected keys and values"
        raise UsageError(f"recipe {source}: {reason}") from error
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, complete: every default written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as {"section.key": value}, in the order of its YAML."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        items = [walk(f"{prefix}.{key}" if prefix else str(key), v) for key, v in value.items()]
        return {key: leaf for item in items for key, leaf in item.items()}

    return walk("", OmegaConf.to_container(OmegaConf.structured(recipe)))


def check(recipe: Recipe) -> None:
    """Every value that has a range is in it.

    Raises:
        UsageError: naming the key, what was expected and what came.
    """
    names = [stage.name for stage in stages(recipe.timesteps)]
    if recipe.name:
        check_folder_name("name", recipe.name)
    if not any_network.is_foreign(recipe.model.name):
        check_choice("model.name", recipe.model.name, models.NAMES)
    elif any(recipe.stage_config(name).energy_weight for name in names):
        raise UsageError(
            f"energy_weight: expected 0 for {recipe.model.name}, whose additions have no gradient"
        )
    try:
        recipe.neuron.build(channels=1)
    except ValueError as error:
        raise UsageError(f"neuron.{error}") from error
    check_choice("runtime.device", recipe.runtime.device, ("auto", "cpu"))
    check_choice("runtime.precision", recipe.runtime.precision, ("fp32", "bf16", "fp16"))
    check_choice("runtime.spike_layers", recipe.runtime.spike_layers, ("auto", "always", "never"))
    check_choice("runtime.allocator", recipe.runtime.allocator, freed_memory.POLICIES)
    _number("runtime.threads", recipe.runtime.threads, "at least 0", recipe.runtime.threads >= 0)
    minutes = recipe.runtime.checkpoint_minutes
    _number("runtime.checkpoint_minutes", minutes, "at least 0", minutes >= 0)
    steps = recipe.runtime.checkpoint_steps
    _number("runtime.checkpoint_steps", steps, "at least 0", steps >= 0)
    conversion = recipe.conversion
    _number(
        "conversion.percentile",
        conversion.percentile,
        "in (0, 100]",
        0 < conversion.percentile <= 100,
    )
    _number("conversion.scale", conversion.scale, "positive", 0 < conversion.scale < math.inf)
    _number("conversion.images", conversion.images, "positive", conversion.images > 0)
    _number("neuron.leak", recipe.neuron.leak, "in [0, 1]", 0 <= recipe.neuron.leak <= 1)
    for name in recipe.stages:
        # settings of a T that a shortened list leaves out do no harm
        if not re.fullmatch("T[1-9][0-9]*", name):
            raise UsageError(f"stages: expected T1, T2, ..., got {name!r}")
    for name in names:
        _check_stage(name, recipe.stage_config(name))


def check_stages_named(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Raises UsageError where an override is of a stage that is not trained: it changes nothing."""
    names = [stage.name for stage in stages(recipe.timesteps) if stage.timesteps]
    for override in overrides:
        section, _, rest = override.partition("=")[0].partition(".")
        name = rest.partition(".")[0]
        if section == "stages" and name and name not in names:
            timesteps = [int(t) for t in recipe.timesteps]
            raise UsageError(
                f"--set {override}: expected a stage of timesteps {timesteps} "
                f"({', '.join(names)}), got {name}"
            )


def check_folder_name(key: str, name: str) -> None:
    """Raises UsageError unless a folder of that name lies in the folder it is made in."""
    if Path(name).name != name or name.startswith(".") or "\\" in name or not name.isprintable():
        raise UsageError(f"{key}: expected the name of a folder, no path, got {name!r}")


def _check_stage(name: str, stage: StageConfig) -> None:
    check_choice(f"{name}: optimizer", stage.optimizer, ("sgd", "adam"))
    check_choice(f"{name}: schedule", stage.schedule, ("step", "cosine"))
    check_choice(f"{name}: keep", stage.keep, ("best", "last"))
    _number(f"{name}: epochs", stage.epochs, "at least 1", stage.epochs >= 1)
    _number(f"{name}: accumulate", stage.accumulate, "at least 1", stage.accumulate >= 1)
    rate = stage.learning_rate
    _number(f"{name}: learning_rate", rate, "positive", 0 < rate < math.inf)
    _number(f"{name}: decay", stage.decay, "positive", stage.decay > 0)
    _number(f"{name}: momentum", stage.momentum, "in [0, 1)", 0 <= stage.momentum < 1)
    _number(f"{name}: weight_decay", stage.weight_decay, "at least 0", stage.weight_decay >= 0)
    for key in ("label_smoothing", "energy_from", "mixup_until"):
        value = getattr(stage, key)
        _number(f"{name}: {key}", value, "in [0, 1]", 0 <= value <= 1)
    for key in ("dropout", "ema"):
        value = getattr(stage, key)
        _number(f"{name}: {key}", value, "in [0, 1)", 0 <= value < 1)
    for key in ("neuron_rate", "shift_rate", "energy_weight", "energy_budget", "mixup"):
        value = getattr(stage, key)
        _number(f"{name}: {key}", value, "at least 0", 0 <= value < math.inf)
    check_choice(f"{name}: teacher", stage.teacher, ("none", "ann", "previous"))
    _number(
        f"{name}: teacher_weight", stage.teacher_weight, "in [0, 1]", 0 <= stage.teacher_weight <= 1
    )
    temperature = stage.teacher_temperature
    _number(f"{name}: teacher_temperature", temperature, "positive", 0 < temperature < math.inf)
    if name != "ann" and stage.weights:
        raise UsageError(f"{name}: weights: expected none but for ann, got {stage.weights!r}")
    if name == "ann" and stage.teacher != "none":
        raise UsageError(f"ann: teacher: expected none, as the first, got {stage.teacher!r}")
    if name == "ann" and stage.energy_weight:
        raise UsageError(f"ann: energy_weight: expected 0, got {stage.energy_weight}: no spikes")
    for milestone in stage.milestones:
        _number(f"{name}: milestones", milestone, "in (0, 1)", 0 < milestone < 1)


def _number(key: str, value: float, expected: str, holds: bool) -> None:
    if not holds:
        raise UsageError(f"{key}: expected a value {expected}, got {value}")
