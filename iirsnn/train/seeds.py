"""Random numbers that depend on the recipe's seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(device: torch.device, seed: int) -> None:
    """Start the streams that a step on the device draws from, as `torch.manual_seed` does.

    That one seeds every other device too, and where CUDA is built in but not in use it takes down
    the whole call stack each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
