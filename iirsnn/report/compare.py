"""Runs side by side: accuracy by stage, energy, spikes, and what their recipes differ in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from .. import atomic_files
from ..errors import RunError
from ..measure.energy import microjoules
from ..train import recipe
from ..train.run_folder import RunFolder
from ..train.stage_inputs import digest, run_inputs
from ..train.stage_order import stages
from . import plot_files
from .tables import Column, MarkdownTable, markdown_tables, print_table

#: Settings in which runs that are compared may differ without a word.
_NOT_SHOWN = ("name", "seed", "runtime.", "data.root", "data.download", "data.workers")

_NOTE = (
    "Accuracies: test set, %. Mean ± standard deviation over n seeds (n - 1 in the denominator). "
    "Energy: microjoules an image, 4.6 pJ a multiply-accumulate and 0.9 pJ an addition (45 nm), "
    "each sub-spike of an average-pooled value an addition; 'pooled once' counts such a value as "
    "one. ANN / this: the energy of the same run's ANN over it."
)

Cell = dict[str, Any]  # {"mean": f, "std": f or None, "n": n}


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders among the paths and, for a path that is none, below it.

    Raises:
        RunError: no run in one of them.
    """
    found: dict[Path, Path] = {}  # by the folder, however it is written
    for path in paths:
        runs = [path] if (path / "recipe.yaml").is_file() else []
        runs = runs or sorted(file.parent for file in path.rglob("recipe.yaml"))
        if not runs:
            raise RunError(f"run {path}: no run there, nor below it (no recipe.yaml)")
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def build(paths: Sequence[Path], reasons: dict[str, str] | None = None) -> dict[str, Any]:
    """The comparison of runs; those that differ in their seed alone are one group.

    Args:
        paths: of run folders; a run counts as far as its stages are finished.
        reasons: a word on a group, by the name of its recipe.

    Returns:
        {"groups": [{"name": s, "runs": [s], "seeds": [n], "reason": s, "differs": {key: value},
        "stages": {"ann": {"test_accuracy": cell, "energy_uj": cell, ...}, "T5": ...}}]} with
        cell = {"mean": f, "std": f or null, "n": n}; accuracies are fractions, energies
        microjoules an image.

    Raises:
        UsageError: a path that holds no run.
        RunError: no run with a finished stage.
    """
    groups: dict[tuple[str, str], list[RunFolder]] = {}
    for path in paths:
        folder = RunFolder.read(path)
        settings = {k: v for k, v in run_inputs(folder.recipe).items() if k != "seed"}
        if folder.result("ann") is not None:
            groups.setdefault((folder.recipe.name, digest(settings)), []).append(folder)
    if not groups:
        raise RunError("compare: no run with a finished stage")
    differs = _differences([folders[0] for folders in groups.values()])
    names = [name for name, _ in groups]
    entries = []
    for ((name, _), folders), settings in zip(groups.items(), differs, strict=True):
        folders.sort(key=lambda folder: folder.recipe.seed)
        # two groups of one name are told apart by their folders
        shown = name if names.count(name) == 1 else f"{name} ({folders[0].path})"
        entries.append(
            {
                "name": shown,
                "reason": (reasons or {}).get(name, ""),
                "runs": ["/".join(folder.path.parts[-2:]) for folder in folders],
                "seeds": [folder.recipe.seed for folder in folders],
                "differs": settings,
                "stages": _stages(folders),
                "commits": _origins(folders, "commit"),
                "machines": _origins(folders, "machine"),
            }
        )
    return {"groups": entries}


def write(comparison: dict[str, Any], path: Path) -> None:
    """Write compare.json, compare.md, accuracy.png and frontier.png into a folder, made if needed.

    Raises:
        RunError: it cannot be written.
    """
    atomic_files.make_folder(path)
    atomic_files.write_text(path / "compare.json", json.dumps(comparison, indent=2) + "\n")
    atomic_files.write_text(path / "compare.md", markdown(comparison))
    plots = {"accuracy": ((9, 5), _plot_accuracy), "frontier": ((12, 5), _plot_frontier)}
    plot_files.write(path, plots, comparison)


def show(comparison: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for title, header, rows in _tables(comparison):
        if title != _RECIPES:
            print_table(console, title, [Column("", left=True), *map(Column, header[1:])], rows)
            continue
        table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))  # of words: they wrap
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{_NOTE} {_origin(comparison)}", style="dim", highlight=False)


def markdown(comparison: dict[str, Any]) -> str:
    """The tables as Markdown."""
    return f"{markdown_tables(_tables(comparison))}\n\n{_NOTE} {_origin(comparison)}\n"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (energy, accuracy) points that no other one beats in both, by rising energy."""
    kept: list[tuple[float, float]] = []
    for energy, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((energy, accuracy))
    return kept


def _stages(folders: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """{stage: {measure: cell}} of the runs of one group."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        ann = folder.result("ann") or {}
        for stage in stages(folder.recipe.timesteps):
            result = folder.result(stage.name)
            if result is not None:
                by_stage.setdefault(stage.name, []).append(_measures(result, ann))
    return {
        name: {
            "spike_rates": [
                mean(layer) for layer in zip(*(r["spike_rates"] for r in results), strict=True)
            ],
            **{
                key: _cell([result[key] for result in results])
                for key in results[0]
                if key != "spike_rates"
            },
        }
        for name, results in by_stage.items()
    }


def _measures(result: dict[str, Any], ann: dict[str, Any]) -> dict[str, Any]:
    multiplications, once = result["multiplications"], result["additions_pooled_once"]
    energy_once = microjoules(multiplications, once)
    measures = {
        "test_accuracy": result["test_accuracy"],
        "validation_accuracy": result["validation_accuracy"],
        "below_ann": ann["test_accuracy"] - result["test_accuracy"],
        "multiplications": multiplications,
        "additions": result["additions"],
        "additions_pooled_once": once,
        "energy_uj": result["energy_uj"],
        "energy_pooled_once_uj": energy_once,
        "ann_over_this": ann["energy_uj"] / result["energy_uj"],
        "ann_over_this_pooled_once": ann["energy_uj"] / energy_once,
        "seconds": result["seconds"],
        "spike_rates": result["spike_rates"],
    }
    if result["spike_rates"]:
        measures["spikes_per_neuron"] = mean(result["spike_rates"])
    return measures


def _cell(values: Sequence[float]) -> Cell:
    std = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "std": std, "n": len(values)}


def _origin(comparison: dict[str, Any]) -> str:
    """Where the figures come from, in words."""
    commits, machines = (
        ", ".join(dict.fromkeys(value for group in comparison["groups"] for value in group[key]))
        for key in ("commits", "machines")
    )
    return f"Trained at commit {commits}; {machines}."


def _origins(folders: Sequence[RunFolder], key: str) -> list[str]:
    results = [f.result(s.name) or {} for f in folders for s in stages(f.recipe.timesteps)]
    return sorted({str(result[key]) for result in results if key in result})


def _differences(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """For each run the settings, as its recipe writes them, that are not the same in all."""
    flat = [recipe.flatten(folder.recipe) for folder in folders]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if key != "stages"]
    differing = [
        key
        for key in keys
        if not key.startswith(_NOT_SHOWN) and any(f.get(key) != flat[0].get(key) for f in flat)
    ]
    return [{key: f.get(key, "unset") for key in differing} for f in flat]


_RECIPES = "What the recipes differ in"


def _tables(comparison: dict[str, Any]) -> list[MarkdownTable]:
    """(title, header, rows) of each table."""
    groups = comparison["groups"]
    names = _stage_names(groups)
    accuracy = [
        [group["name"], str(len(group["seeds"])), *(_accuracy(group, name) for name in names)]
        for group in groups
    ]
    tables = [("Test accuracy", ["", "n", *(_label(name) for name in names)], accuracy)]
    spiking = [group for group in groups if _last(group) != "ann"]
    if spiking:
        header = ["", "", "accuracy", "below ANN", "energy", "ANN / this"]
        header += ["energy, pooled once", "ANN / this", "spikes / neuron"]
        rows = [[g["name"], _label(_last(g)), *_energy(g["stages"][_last(g)])] for g in spiking]
        tables.append(("Last stage", header, rows))
    recipes = _recipe_rows(groups)
    if recipes:
        why = ["why"] if any(group["reason"] for group in groups) else []
        header = ["", "settings", *why]
        tables.append((_RECIPES, header, [row[: len(header)] for row in recipes]))
    return tables


def _recipe_rows(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """[name, settings, reason] of each group; what most groups share is said once, above them."""

    def lines(settings: dict[str, Any]) -> str:
        return "\n".join(f"{key}={_value(value)}" for key, value in settings.items())

    most: dict[str, Any] = {}
    for key in dict.fromkeys(key for group in groups for key in group["differs"]):
        found = [group["differs"][key] for group in groups if key in group["differs"]]
        value = max(found, key=found.count)
        if 2 * found.count(value) > len(groups):
            most[key] = value
    rows = []
    for group in groups:
        differs = {k: v for k, v in group["differs"].items() if k not in most or v != most[k]}
        rows.append([group["name"], lines(differs), group["reason"]])
    if not any(row[1] or row[2] for row in rows):
        return []
    return [["(most of them)", lines(most), ""], *rows] if most else rows


def _energy(stage: dict[str, Any]) -> list[str]:
    def times(key: str) -> str:
        return _spread(stage[key], "{:.1f}", 1) + "x"

    return [
        _spread(stage["test_accuracy"], "{:.2f}", 100),
        _spread(stage["below_ann"], "{:.2f}", 100),
        _spread(stage["energy_uj"], "{:.2f}", 1),
        times("ann_over_this"),
        _spread(stage["energy_pooled_once_uj"], "{:.2f}", 1),
        times("ann_over_this_pooled_once"),
        _spread(stage["spikes_per_neuron"], "{:.3f}", 1),
    ]


def _accuracy(group: dict[str, Any], name: str) -> str:
    if name not in group["stages"]:
        return ""
    cell = group["stages"][name]["test_accuracy"]
    fewer = f" (n={cell['n']})" if cell["n"] < len(group["seeds"]) else ""
    return _spread(cell, "{:.2f}", 100) + fewer


def _spread(cell: Cell, number: str, factor: float) -> str:
    text = number.format(factor * cell["mean"])
    return text if cell["std"] is None else f"{text} ± {number.format(factor * cell['std'])}"


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def _label(stage: str) -> str:
    return "ANN" if stage == "ann" else f"T={stage[1:]}"


def _last(group: dict[str, Any]) -> str:
    return list(group["stages"])[-1]


def _stage_names(groups: Sequence[dict[str, Any]]) -> list[str]:
    found = {name for group in groups for name in group["stages"]} - {"ann"}
    return ["ann", *sorted(found, key=lambda name: -int(name[1:]))]


def _plot_accuracy(comparison: dict[str, Any], figure: Figure) -> None:
    axes = figure.subplots()
    names = _stage_names(comparison["groups"])
    for group, style in zip(comparison["groups"], cycle(plot_files.STYLES)):
        present = [name for name in names if name in group["stages"]]
        cells = [group["stages"][name]["test_accuracy"] for name in present]
        axes.errorbar(
            [names.index(name) for name in present],
            [100 * cell["mean"] for cell in cells],
            [100 * (cell["std"] or 0) for cell in cells],
            capsize=2,
            linewidth=1,
            label=group["name"],
            **style,
        )
    axes.set_xticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Accuracy by stage: mean and standard deviation over seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")


def _plot_frontier(comparison: dict[str, Any], figure: Figure) -> None:
    """Accuracy against energy: at the least T that there is, and at every T."""
    last, every = figure.subplots(1, 2)
    least = _stage_names(comparison["groups"])[-1]
    last_points, points = [], []
    for group, style in zip(comparison["groups"], cycle(plot_files.STYLES)):
        spiking = [stage for name, stage in group["stages"].items() if name != "ann"]
        if not spiking:
            continue
        x, x_error, y, y_error = (
            [factor * (stage[key][value] or 0) for stage in spiking]
            for key, factor in (("energy_uj", 1), ("test_accuracy", 100))
            for value in ("mean", "std")
        )
        every.plot(x, y, linewidth=0.7, markersize=4, **style)
        points += list(zip(x, y, strict=True))
        if least in group["stages"]:
            last.errorbar(
                x[-1], y[-1], y_error[-1], x_error[-1], capsize=2, label=group["name"], **style
            )
            last_points.append((x[-1], y[-1]))
    for axes, shown, title in (
        (last, last_points, _label(least)),
        (every, points, "every T, a line for each group"),
    ):
        if shown:
            best = zip(*frontier(shown), strict=True)
            axes.step(*best, "k--", where="post", linewidth=1, label="frontier")
        axes.set_title(title)
        axes.set_xlabel("energy per image (µJ), sub-spikes counted")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
    figure.legend(*last.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
