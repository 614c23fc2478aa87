"""What the result of a stage depends on, in a form in which equal things are equal."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from .data_sets import FOLDER
from .recipe import Recipe, flatten
from .stage_order import stages

#: Sections written out stage by stage, and what changes no result: names, places and speed.
_LEFT_OUT = ("name", "timesteps", "ann", "snn", "stages", "runtime")
_LEFT_OUT_OF_DATA = ("data.root", "data.download", "data.workers", "data.test_batch_size")
#: The ANN is trained before it has neurons or thresholds.
_OF_SPIKING_STAGES = ("neuron", "conversion")


def stage_inputs(recipe: Recipe, name: str) -> dict[str, Any]:
    """Every setting that the result of a stage depends on.

    That is the seed, the data and the model, the numeric precision, and for the stage and each of
    its ancestors all that its training is told (`Recipe.stage_config`: so it does not matter
    whether a value stands under `snn` or under `stages`); for a spiking stage also the neurons and
    their conversion. Stages that come later do not count, nor do the recipe's name and where it
    runs. A section this function does not know counts for every stage, so that in doubt two stages
    differ. The version of the code is not part of it: a stage's result names its commit.

    Raises:
        ValueError: the run has no such stage.
    """
    left_out_of_data: tuple[str, ...] = _LEFT_OUT_OF_DATA
    if recipe.data.name == FOLDER:  # which images these are
        left_out_of_data = left_out_of_data[1:]
    chain = [stage.name for stage in stages(recipe.timesteps)]
    chain = chain[: chain.index(name) + 1]
    left_out = _LEFT_OUT if name != "ann" else (*_LEFT_OUT, *_OF_SPIKING_STAGES)
    inputs = {
        key: value
        for key, value in flatten(recipe).items()
        if key.split(".")[0] not in left_out and key not in left_out_of_data
    }
    inputs["stages"] = chain
    inputs["runtime.precision"] = recipe.runtime.precision
    for stage in chain:
        config = asdict(recipe.stage_config(stage))
        inputs |= {f"{stage}.{key}": value for key, value in config.items()}
    return inputs


def run_inputs(recipe: Recipe) -> dict[str, Any]:
    """Every setting that the result of a run depends on: those of its last stage."""
    return stage_inputs(recipe, f"T{recipe.timesteps[-1]}")


def digest(inputs: dict[str, Any]) -> str:
    """16 hexadecimal digits, equal for equal inputs in any order."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
