"""Where a run computes, and in which precision."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UsageError

if TYPE_CHECKING:
    from .recipe import RuntimeConfig

#: What layers compute in under mixed precision.
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose(runtime: RuntimeConfig) -> torch.device:
    """The device of this process: a GPU of its own where there is one, else the CPU.

    Raises:
        UsageError: a precision that the device does not have.
    """
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if runtime.device != "cpu" and gpu is not None:
        index = int(os.environ.get("LOCAL_RANK", 0))  # of the processes on this machine
        torch.accelerator.set_device_index(index)
        return torch.device(gpu.type, index)
    if runtime.precision == "fp16":
        raise UsageError("runtime.precision: expected fp32 or bf16 on a CPU, got 'fp16'")
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as a context; fp32 changes nothing."""
    dtype = _HALF.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The scaling of a loss whose gradients fp16 would round to zero; else it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def memory_format(
    network: nn.Module, channels_last: bool, device: torch.device
) -> torch.memory_format:
    """The layout of a network's convolutions: channels_last where it is asked for and safe.

    On a CPU oneDNN's gradient of a strided 1x1 convolution of fewer than 8 channels in
    channels_last writes past the end of its memory (seen with torch 2.11 and 2.14).
    """
    unsafe = device.type == "cpu" and any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels // layer.groups < 8
        for layer in network.modules()
    )
    return torch.channels_last if channels_last and not unsafe else torch.contiguous_format
