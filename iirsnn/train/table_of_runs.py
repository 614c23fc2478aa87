"""A table of runs, from start to end: a row is a recipe with settings changed, a seed a run.

A table is YAML::

    name: fashion-mnist
    base: fashion-mnist                # a recipe; a row may have another
    seeds: [0, 1, 2]
    set: {snn.epochs: 2}               # for every row; may be left out
    rows:
      - {name: direct, set: {timesteps: [5, 1]}, reason: the paper's baseline}

Row `direct` with seed 0 is the ordinary run folder OUT/direct/seed0. What is finished is not done
again, so the same command goes on where it stopped.

Rows share work: a stage is copied, not trained, when a finished stage of the table has the same
inputs (`stage_inputs.stage_inputs`: for stage T5 the seed, data, model, precision, neurons and
conversion, and the settings of `ann` and T5; not those of later stages). A copy's result says so
under `copied_from`. Processes share work as well: a lock for each set of inputs, held while a stage
is trained, sends a second process on to other runs and lets it wait when there is no other work.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from rich.console import Console

from ..errors import IirsnnError, UsageError, one_line
from . import recipe
from .pipeline import Pipeline, open_data
from .recipe import Recipe
from .run_folder import InUse, RunFolder
from .stage_inputs import digest, run_inputs, stage_inputs
from .stage_order import Stage, stages
from .stopping import Stopped, StopRequest

#: Seconds between two looks at work that another process does.
POLL_SECONDS = 5.0


def wait() -> None:
    """For work that another process does."""
    time.sleep(POLL_SECONDS)


@dataclass
class Row:
    """One row of a table: its base recipe (else the table's) with `set` changed, and why."""

    name: str = ""
    base: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass
class TableConfig:
    """A table; see the module."""

    name: str = ""
    base: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    set: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One run of a table.

    Attributes:
        path: of its folder.
        recipe: complete.
    """

    path: Path
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


class Busy(Exception):
    """Another process is training a stage with these inputs, or has the run's folder."""


def names() -> list[str]:
    """The tables that ship with the package."""
    return recipe.names("tables")


def load(name_or_path: str) -> TableConfig:
    """A table by name or from a YAML file.

    Raises:
        UsageError: unknown, unreadable, or not a table.
    """
    text = recipe.read("table", name_or_path, "tables")
    try:
        config = OmegaConf.merge(OmegaConf.structured(TableConfig), OmegaConf.create(text))
        table = OmegaConf.to_object(config)
        assert isinstance(table, TableConfig)
    except Exception as error:  # OmegaConf raises from IndexError to its own over odd input
        raise UsageError(f"table {name_or_path}: {one_line(error)}") from error
    table.name = table.name or Path(name_or_path).stem
    recipe.check_folder_name(f"table {name_or_path}: name", table.name)
    rows = [row.name for row in table.rows]
    for row in rows:
        recipe.check_folder_name(f"table {name_or_path}: name of a row", row)
    if not rows or not table.seeds:
        raise UsageError(f"table {name_or_path}: expected at least one row and one seed")
    if len(set(rows)) < len(rows):
        raise UsageError(f"table {name_or_path}: expected names of rows to differ, got {rows}")
    return table


def plan(
    table: TableConfig,
    out: Path,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> list[Run]:
    """The runs of a table: all rows with the first seed, then all with the second, and so on.

    Args:
        table: the table.
        out: its folder.
        only: names of rows; empty for all.
        seeds: instead of the table's.
        overrides: `key=value` for every row, which a row's own settings come after.

    Raises:
        UsageError: an unknown row, a row that is no recipe, or several processes that would
            train one run together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "reproduce: expected one process, got one of several under torchrun; "
            "start the command several times instead, each takes what no other has"
        )
    rows = [row.name for row in table.rows]
    for name in only:
        if name not in rows:
            raise UsageError(f"only: expected rows among {', '.join(rows)}, got {name!r}")
    runs = []
    for seed in seeds or table.seeds:
        for row in table.rows:
            if only and row.name not in only:
                continue
            settings = [*_settings(table.set), *overrides, *_settings(row.set), f"seed={seed}"]
            try:
                wanted = recipe.load(row.base or table.base, settings)
            except UsageError as error:
                raise UsageError(f"row {row.name}: {error}") from error
            wanted.name = row.name
            runs.append(Run(out / row.name / f"seed{seed}", wanted))
    return runs


def train(runs: Sequence[Run], out: Path, console: Console) -> list[str]:
    """Train what is not finished; a run that fails is left and the others go on.

    Returns:
        One line about each run that failed.

    Raises:
        Stopped: a signal asked to stop, and what is needed to go on is saved.
    """
    failures: dict[str, str] = {}  # by the inputs of the stage that failed
    queue, in_vain = deque(runs), 0
    with StopRequest() as stop:
        while queue:
            run = queue.popleft()
            try:
                _advance(run, out, failures, console, stop)
            except Busy:
                queue.append(run)
                in_vain += 1
                if in_vain >= len(queue):
                    wait()
                    in_vain = 0
            else:
                in_vain = 0
            if queue and stop.signal:
                raise Stopped(f"{stop.signal}: stopped; the same command goes on")
    return list(dict.fromkeys(failures.values()))


def started(table: TableConfig, out: Path) -> list[Path]:
    """Folders of the table's runs, by row and seed, whoever trained them and however far."""
    return [
        file.parent
        for row in table.rows
        for file in sorted((out / row.name).glob("seed*/recipe.yaml"))
    ]


def parse_seeds(text: str) -> list[int]:
    """[0, 2] from "0,2".

    Raises:
        UsageError: not a list of whole numbers.
    """
    try:
        return [int(seed) for seed in text.split(",") if seed.strip()]
    except ValueError:
        raise UsageError(f"seeds: expected whole numbers like 0,1,2, got {text!r}") from None


def _advance(
    run: Run, out: Path, failures: dict[str, str], console: Console, stop: StopRequest
) -> None:
    """Train or copy the stages of one run that are not finished.

    Raises:
        Busy: the next one is being trained by another process.
        Stopped: see `train`.
    """
    splits = None
    try:
        _require_same(run)
    except IirsnnError as error:
        failures[run.label] = f"{run.label}: {error}"
        return
    for stage in stages(run.recipe.timesteps):
        if _result(run.path, stage.name) is not None:
            continue
        key = digest(stage_inputs(run.recipe, stage.name))
        if key in failures:
            console.print(f"{run.label}: left out, {failures[key]}", highlight=False)
            return
        (out / ".locks").mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".locks" / key, timeout=0), _open(run) as folder:
                if folder.result(stage.name) is None and not _copied(folder, stage, key, out):
                    console.rule(f"{run.label}: {stage.name}")
                    splits = splits or open_data(run.recipe)
                    Pipeline(folder, splits).train_stage(stage, console, stop)
        except (Timeout, InUse):  # of a stage that has just ended, the folder is released last
            raise Busy from None
        except Stopped:
            raise Stopped(
                f"{stop.signal}: stopped, {run.label} is saved; the same command goes on"
            ) from None
        except Exception as error:  # whatever it is, the other rows do not depend on it
            kind = "" if isinstance(error, IirsnnError) else f"{type(error).__name__}: "
            failures[key] = f"{run.label}, stage {stage.name}: {kind}{one_line(error)}"
            console.print(f"error: {failures[key]}", style="bold", highlight=False)
            if kind:
                console.print_exception()
            return


def _require_same(run: Run) -> None:
    """A folder that is there already holds a run of the recipe that the table asks for."""
    if not (run.path / "recipe.yaml").exists():
        return
    there, here = run_inputs(RunFolder.read(run.path).recipe), run_inputs(run.recipe)
    for key in {**there, **here}:
        if there.get(key) != here.get(key):
            raise UsageError(
                f"was started with another recipe: {key} is {there.get(key)} there and "
                f"{here.get(key)} here; remove the folder or choose another --out"
            )


def _open(run: Run) -> RunFolder:
    if (run.path / "recipe.yaml").exists():
        return RunFolder.resume(run.path, run.recipe)
    return RunFolder.create(run.path, run.recipe)


def _copied(folder: RunFolder, stage: Stage, key: str, out: Path) -> bool:
    """Whether a finished stage with the same inputs was found in the table, and copied."""
    for file in sorted(out.glob(f"*/*/stages/{stage.name}/result.json")):
        source = RunFolder.read(file.parents[2])
        if digest(stage_inputs(source.recipe, stage.name)) != key:
            continue
        tensors, header = source.load_checkpoint(stage.name, "best")
        header = {k: v for k, v in header.items() if k not in ("recipe", "stage", "format")}
        folder.save_checkpoint(stage.name, "best", tensors, header)
        folder.rewind_metrics(stage.name, 0)
        for record in source.metrics():
            if record["stage"] == stage.name:
                folder.log(record)
        result = source.result(stage.name) or {}
        origin = f"{source.path.parent.name}/{source.path.name}"
        folder.finish_stage(stage.name, {"copied_from": origin, **result})
        return True
    return False


def _result(path: Path, stage: str) -> dict[str, Any] | None:
    return RunFolder.read(path).result(stage) if (path / "recipe.yaml").exists() else None


def _settings(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
