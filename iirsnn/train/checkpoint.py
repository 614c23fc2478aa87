"""What a checkpoint holds: the weights of a network, the state of an optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError, one_line


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights.

    Raises:
        RunError: they are those of another network.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"checkpoint: of another network ({one_line(error)})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors, and what is not a tensor as JSON values.

    The settings (learning rate, ...) are not part of it: they follow from the recipe and the step.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
            target[f"optimizer.{index}.{name}"] = value
    return tensors, scalars


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Give an optimiser the state that `pack_optimizer` took from one over the same parameters."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        prefix, index, name = key.split(".", 2)
        if prefix != "optimizer":
            continue
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # files know no memory format: give back the parameter's
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
