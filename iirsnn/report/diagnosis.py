"""Why a stage learns or does not: rates, silent neurons and gradients, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from .. import atomic_files
from ..errors import RunError, check_choice
from ..measure.evaluation import evaluating
from ..nn import FusedLIF, neurons
from ..ops.surrogates import SURROGATES
from ..train.pipeline import Pipeline
from . import activity, plot_files
from .tables import Column, MarkdownTable, markdown_tables, print_table

#: Validation images that a network is looked at with.
IMAGES = 2048


@dataclass
class LayerDiagnosis:
    """One spiking layer over a number of images, each figure but the last a share in [0, 1].

    Attributes:
        layer: the name of the neuron.
        rate: spikes a neuron and timestep.
        never: neurons that no image makes fire.
        always: neurons that fire at every timestep of every image.
        learning: membranes at which the surrogate passes a gradient on.
        gradient: norm of the loss's gradient with respect to the current of one image, the mean
            over the images; the loss is cross-entropy.
    """

    layer: str
    rate: float
    never: float
    always: float
    learning: float
    gradient: float


#: What the table and the plot say of each figure, and how they write it.
FIGURES = {
    "rate": ("spikes a neuron and timestep", "{:.3f}"),
    "never": ("neurons that never fire", "{:.1%}"),
    "always": ("neurons that always fire", "{:.1%}"),
    "learning": ("membranes with a gradient", "{:.1%}"),
    "gradient": ("gradient of the current", "{:.2e}"),
}


class _Sums:
    """What one neuron did, added up over batches."""

    def __init__(self) -> None:
        self.fired: Tensor | None = None
        self.steps = self.membranes = self.learning = 0
        self.gradient = 0.0

    def add(self, neuron: FusedLIF, current: Tensor, spikes: Tensor) -> None:
        """current (with its .grad) and spikes are [T, B, ...]."""
        fired = spikes.sum((0, 1), dtype=torch.float64)
        self.fired = fired if self.fired is None else self.fired + fired
        self.steps += spikes.shape[0] * spikes.shape[1]
        slope, default = SURROGATES[neuron.surrogate]
        scale = default if neuron.surrogate_scale is None else neuron.surrogate_scale
        for h in activity.membranes(neuron, current.detach(), spikes):
            self.learning += int((slope(h - 1, scale) != 0).sum())
            self.membranes += h.numel()
        assert current.grad is not None
        # of a mean over the batch: times its size is one image's
        norms = current.grad.float().square().sum(dim=[0, *range(2, current.dim())]).sqrt()
        self.gradient += float(norms.sum()) * current.shape[1]

    def result(self, layer: str, images: int) -> LayerDiagnosis:
        assert self.fired is not None
        return LayerDiagnosis(
            layer=layer,
            rate=float(self.fired.mean()) / self.steps,
            never=float((self.fired == 0).float().mean()),
            always=float((self.fired == self.steps).float().mean()),
            learning=self.learning / self.membranes,
            gradient=self.gradient / images,
        )


def diagnose(network: nn.Module, images: Tensor, labels: Tensor) -> list[LayerDiagnosis]:
    """Each spiking layer of a network, in the order in which they fire.

    The network computes as in a test: running statistics, no dropout. It and its gradients are left
    as they were.

    Args:
        network: converted or trained.
        images: [B, C, H, W].
        labels: int64 [B].
    """
    sums: dict[str, _Sums] = {}
    names = {id(module): name for name, module in network.named_modules()}
    seen: list[tuple[FusedLIF, Tensor, Tensor]] = []

    def before(neuron: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        current.retain_grad()
        return (current, *inputs[1:])

    def after(neuron: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
        assert isinstance(neuron, FusedLIF)
        seen.append((neuron, inputs[0], spikes.detach()))

    hooks = [n.register_forward_pre_hook(before) for n in neurons(network)]
    hooks += [n.register_forward_hook(after) for n in neurons(network)]
    learned = [p for p in network.parameters() if p.requires_grad]
    try:
        with evaluating(network), torch.enable_grad():
            for parameter in learned:
                parameter.requires_grad_(False)  # the gradients of currents are all that is wanted
            for part, part_labels in zip(images.split(256), labels.split(256), strict=True):
                F.cross_entropy(network(part).float(), part_labels).backward()
                for neuron, current, spikes in seen:
                    sums.setdefault(names[id(neuron)], _Sums()).add(neuron, current, spikes)
                seen.clear()
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return [found.result(name, len(images)) for name, found in sums.items()]


def build(pipeline: Pipeline, stage: str | None = None) -> dict[str, Any]:
    """A spiking stage before and after its training, on validation images: JSON values.

    Args:
        pipeline: of the run.
        stage: "T5", ...; None for the last that is finished.

    Raises:
        RunError: no spiking stage is finished.
        UsageError: an unknown stage, or one that is not finished.
    """
    done = [s for s in pipeline.stages if s.timesteps and pipeline.folder.result(s.name)]
    if not done:
        raise RunError(f"run {pipeline.folder.path}: no spiking stage is finished yet")
    if stage is not None:
        check_choice("stage", stage, [s.name for s in done])
    chosen = next((s for s in done if s.name == stage), done[-1])
    images, labels = pipeline.validation_images(IMAGES)
    start = pipeline.initial(chosen)
    return {
        "run": str(pipeline.folder.path),
        "name": pipeline.recipe.name,
        "stage": chosen.name,
        "images": len(images),
        "before": [asdict(layer) for layer in diagnose(start, images, labels)],
        "after": [asdict(d) for d in diagnose(pipeline.spiking(chosen.name), images, labels)],
    }


def compare(diagnoses: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The diagnoses of runs of one name and stage as one: the mean of each figure.

    Raises:
        RunError: runs of one name whose layers differ.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in diagnoses:
        groups.setdefault((one["name"], one["stage"]), []).append(one)
    means = []
    for (name, stage), members in groups.items():
        layers = [layer["layer"] for layer in members[0]["after"]]
        if any([layer["layer"] for layer in m["after"]] != layers for m in members):
            raise RunError(f"diagnose: expected the same layers in all runs named {name}")
        means.append(
            {
                "name": name,
                "stage": stage,
                "runs": [member["run"] for member in members],
                "images": members[0]["images"],
                **{when: _means([m[when] for m in members]) for when in ("before", "after")},
            }
        )
    return means


def _means(members: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"layer": same[0]["layer"], **{key: mean(layer[key] for layer in same) for key in FIGURES}}
        for same in zip(*members, strict=True)
    ]


def show(groups: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each group."""
    for title, header, rows in _tables(groups):
        print_table(console, title, [Column("layer", left=True), *map(Column, header[1:])], rows)


def write(groups: Sequence[dict[str, Any]], path: Path) -> None:
    """Write diagnosis.json, diagnosis.md and diagnosis.png into a folder, made if needed.

    Raises:
        RunError: it cannot be written.
    """
    atomic_files.make_folder(path)
    atomic_files.write_text(path / "diagnosis.json", json.dumps(list(groups), indent=2) + "\n")
    atomic_files.write_text(path / "diagnosis.md", markdown_tables(_tables(groups)) + "\n")
    plot_files.write(path, {"diagnosis": ((16, 4.5), _plot)}, groups)


def _tables(groups: Sequence[dict[str, Any]]) -> list[MarkdownTable]:
    """(title, header, rows) of each group; each cell is before -> after training."""
    header = ["layer", *(FIGURES[key][0] for key in FIGURES)]
    return [
        (
            f"{group['name']}, {group['stage']}: before -> after training, "
            f"{group['images']} validation images, {len(group['runs'])} run(s)",
            header,
            [
                [
                    after["layer"],
                    *(
                        f"{text.format(before[key])} -> {text.format(after[key])}"
                        for key, (_, text) in FIGURES.items()
                    ),
                ]
                for before, after in zip(group["before"], group["after"], strict=True)
            ],
        )
        for group in groups
    ]


def _plot(groups: Sequence[dict[str, Any]], figure: Figure) -> None:
    figure.suptitle("by spiking layer: after training (before: dotted)")
    panels = figure.subplots(1, len(FIGURES))
    for panel, (key, (label, _)) in zip(panels, FIGURES.items(), strict=True):
        for group, style in zip(groups, cycle(plot_files.STYLES)):
            layers = range(1, len(group["after"]) + 1)
            panel.plot(
                layers, [layer[key] for layer in group["after"]], label=group["name"], **style
            )
            before = [layer[key] for layer in group["before"]]
            panel.plot(layers, before, ":", color=style["color"], linewidth=0.8)
        panel.set_title(label, fontsize="medium")
        panel.set_xlabel("layer")
        panel.grid(alpha=0.3)
    panels[-1].set_yscale("log")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
    )
