"""Iterative Initialization and Retraining: which T, from which stage, in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import UsageError


@dataclass(frozen=True)
class Stage:
    """One training of the run.

    Attributes:
        name: of its folder: "ann", "T5", ...
        timesteps: T; None for the ANN.
        parent: name of the stage whose network it starts from; None for the ANN. The first
            spiking stage starts from the converted ANN, each later one from the weights,
            thresholds and leaks of the one before, unscaled.
    """

    name: str
    timesteps: int | None = None
    parent: str | None = None


def stages(timesteps: Sequence[int]) -> list[Stage]:
    """The stages of a run: the ANN, then one for each T.

    Args:
        timesteps: strictly decreasing, each at least 1, e.g. (5, 4, 3, 2, 1) or (5, 3, 1).

    Raises:
        UsageError: an empty list, T < 1, or a list that does not decrease.
    """
    values = list(timesteps)
    if not values or min(values) < 1:
        raise UsageError(f"timesteps: expected each T to be at least 1, got {values}")
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise UsageError(f"timesteps: expected a strictly decreasing list, got {values}")
    names = ["ann", *(f"T{t}" for t in values)]
    spiking = [
        Stage(name, t, parent)
        for name, t, parent in zip(names[1:], values, names[:-1], strict=True)
    ]
    return [Stage("ann"), *spiking]
