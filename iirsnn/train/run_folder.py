"""The folder of a run: its recipe, metrics, stages and report, owned by one process at a time.

RUN/recipe.yaml        the complete recipe
RUN/data.json          class names, numbers of images and how they are normalised
RUN/metrics.jsonl      one JSON object a line, in the order of training
RUN/stages/NAME/       best.safetensors, result.json; while it is trained, last.safetensors and
                       previous.safetensors, the resume checkpoint before it
RUN/report.json, *.png see `iirsnn.report`
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from .. import atomic_files
from ..errors import RunError, UsageError
from . import recipe
from .recipe import Recipe, dump

#: Checkpoints that a stage is resumed from, the newest first; a finished stage has none.
_RESUME = ("last", "previous")

#: Settings a resumed run may change: where it computes and where its data lies.
_FREE = ("runtime.", "data.root", "data.download", "data.workers", "data.test_batch_size")


class InUse(RunError):
    """Another process has the run folder."""


class RunFolder:
    """An open run folder; see `create`, `resume` and `read`.

    Attributes:
        path: of the folder.
        recipe: of the run.
    """

    def __init__(self, path: Path, recipe: Recipe, lock: FileLock | None) -> None:
        self.path, self.recipe, self._lock = path, recipe, lock
        self._recipe_text = dump(recipe)  # in the header of every checkpoint

    @classmethod
    def create(cls, path: Path, new: Recipe) -> RunFolder:
        """A new run in a folder that does not exist or is empty.

        Raises:
            UsageError: the folder holds a run, or something else.
            InUse: another process has it.
            RunError: it is not writable.
        """
        try:
            if path.exists() and not path.is_dir():
                raise UsageError(f"output folder {path}: is a file")
            path.mkdir(parents=True, exist_ok=True)
            there = {entry.name for entry in path.iterdir()}
        except OSError as error:
            raise RunError(f"output folder {path}: cannot be made ({error.strerror})") from error
        # a run killed before it had a recipe leaves no more than these; a lock is left nowhere else
        if "recipe.yaml" not in there and there - {".lock", ".recipe.yaml.tmp"}:
            raise UsageError(f"output folder {path}: is not empty and holds no run")
        lock = _acquire(path)
        try:
            if (path / "recipe.yaml").exists():
                raise UsageError(
                    f"output folder {path}: holds a run; continue it with --resume {path}, "
                    "or choose another --out"
                )
            folder = cls(path, new, lock)
            atomic_files.write_text(path / "recipe.yaml", folder._recipe_text)
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def resume(cls, path: Path, expected: Recipe | None = None) -> RunFolder:
        """The run in a folder, to go on with.

        Args:
            path: of the folder.
            expected: a recipe it must have been started with, but for `runtime` and the place of
                the data, which are taken from this one; or None.

        Raises:
            UsageError: no run there, or one of another recipe.
            InUse: another process has it.
            RunError: it is not writable.
        """
        stored = cls.read(path).recipe
        if expected is not None:
            difference = _difference(stored, expected)
            if difference:
                raise UsageError(f"run {path}: was started with another recipe: {difference}")
        return cls(path, expected or stored, _acquire(path))

    @classmethod
    def follow(cls, path: Path, recipe: Recipe) -> RunFolder:
        """The run in a folder that another process of the same run has opened, to read alone."""
        return cls(path, recipe, None)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """The run in a folder, for reading alone.

        Raises:
            UsageError: no run there.
        """
        file = path / "recipe.yaml"
        if not file.is_file():
            raise UsageError(f"run {path}: no run there (no {file.name} in it)")
        return cls(path, recipe.parse(file.read_text(encoding="utf-8"), source=str(file)), None)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def keep_data(self, description: dict[str, Any]) -> None:
        """Record in data.json what the run is trained on.

        Raises:
            RunError: it was begun on other data.
        """
        if not (self.path / "data.json").exists():
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            atomic_files.write_text(self.path / "data.json", text)
        self.require_data(description)

    def require_data(self, description: dict[str, Any]) -> None:
        """Raises RunError where the run was trained on other data than this."""
        file = self.path / "data.json"
        if not file.exists():
            return
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"run {self.path}: {file.name} cannot be read ({error})") from error
        given = json.loads(json.dumps(description))
        for key in given:
            if kept.get(key) != given[key]:
                raise RunError(
                    f"run {self.path}: its data has changed since it was trained ({key} differ, "
                    f"see {file.name}); bring the old images back or begin another run"
                )

    def checkpoint_path(self, stage: str, name: str) -> Path:
        """stages/STAGE/NAME.safetensors, whether or not it exists."""
        return self.path / "stages" / stage / f"{name}.safetensors"

    def save_checkpoint(
        self, stage: str, name: str, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> None:
        """Write stages/STAGE/NAME.safetensors; its header holds the recipe as well.

        Of the resume checkpoint, `last`, the one before is kept as `previous`.
        """
        header = {"recipe": self._recipe_text, "stage": stage, **header}
        path = self.checkpoint_path(stage, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = path.with_stem("previous") if name == "last" else None
        atomic_files.save(path, tensors, header, previous=previous)

    def load_checkpoint(self, stage: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read stages/STAGE/NAME.safetensors.

        Raises:
            RunError: missing or damaged, of another stage, or of another recipe than the run's.
        """
        path = self.checkpoint_path(stage, name)
        tensors, header = atomic_files.load(path)
        if header.get("stage") != stage:
            raise RunError(
                f"checkpoint {path}: expected stage {stage}, got {header.get('stage')!r}"
            )
        text = header.get("recipe", "")
        if text != self._recipe_text:
            difference = _difference(recipe.parse(text, source=str(path)), self.recipe)
            if difference:
                raise RunError(f"checkpoint {path}: is not of this run's recipe: {difference}")
        return tensors, header

    def newest_checkpoint(self, stage: str) -> tuple[str | None, str]:
        """The name of the newest whole resume checkpoint, and a warning if a newer one is damaged.

        Returns:
            (name, warning); None for a stage that was not begun, "" when there is nothing to say.

        Raises:
            Damaged: all that there are.
            RunError: one is of another stage, or of another recipe than the run's.
        """
        damage: list[atomic_files.Damaged] = []
        for name in _RESUME:
            if not self.has_checkpoint(stage, name):
                continue
            try:
                self.load_checkpoint(stage, name)
            except atomic_files.Damaged as error:
                damage.append(error)
                continue
            return name, f"{damage[0]}; going on from the one before it" if damage else ""
        if damage:
            raise damage[0]
        return None, ""

    def has_checkpoint(self, stage: str, name: str) -> bool:
        """Whether stages/STAGE/NAME.safetensors exists."""
        return self.checkpoint_path(stage, name).exists()

    def finish_stage(self, stage: str, result: dict[str, Any]) -> None:
        """Record a stage's result; its resume checkpoints are no longer needed."""
        text = json.dumps(result, indent=2) + "\n"
        atomic_files.write_text(self.path / "stages" / stage / "result.json", text)
        self.tidy(stage)

    def tidy(self, stage: str) -> None:
        """Remove the resume checkpoints of a finished stage."""
        for name in _RESUME:
            self.checkpoint_path(stage, name).unlink(missing_ok=True)

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, else None."""
        path = self.path / "stages" / stage / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        atomic_files.append_line(self.path / "metrics.jsonl", json.dumps(record))

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind_metrics(self, stage: str, epochs: int) -> None:
        """Drop what was logged of a stage after so many epochs: it is about to be done again."""
        kept = [r for r in self.metrics() if r["stage"] != stage or r["epoch"] <= epochs]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        atomic_files.write_text(self.path / "metrics.jsonl", text)


def _acquire(path: Path) -> FileLock:
    if not os.access(path, os.W_OK):
        raise RunError(f"output folder {path}: is not writable")
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUse(f"output folder {path}: in use by another run") from error
    except OSError as error:
        raise RunError(f"output folder {path}: cannot be locked ({error.strerror})") from error
    return lock


def _difference(theirs: Recipe, ours: Recipe) -> str | None:
    """The first setting that differs, in words; those that change no result do not count."""
    a, b = recipe.flatten(theirs), recipe.flatten(ours)
    for key in [*a, *(key for key in b if key not in a)]:
        if not key.startswith(_FREE) and a.get(key) != b.get(key):
            return f"{key} is {a.get(key)} there and {b.get(key)} here"
    return None
