"""Spikes as bits: 1/32 of the bytes of fp32 spikes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import choose


@dataclass(frozen=True, eq=False)
class PackedSpikes:
    """Spikes [T, *neurons] as bits.

    bits: uint8 [T, 8 * ceil(N / 64)]. Bit j (least significant first) of byte k of a timestep is
    neuron 8k + j in the memory order of that timestep (W runs fastest when contiguous, C when
    channels_last); the bits past N are zero.
    shape, stride: those of the spikes, so that they come back in the layout they had.
    """

    bits: Tensor
    shape: torch.Size
    stride: tuple[int, ...]

    def unpack(self, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> Tensor:
        """The spikes, 0 or 1, as float32, float64, float16 or bfloat16 [T, *neurons]."""
        unpack = choose(backend, self.bits.device).unpack
        spikes: Tensor = unpack(self.bits, list(self.shape), list(self.stride), dtype)
        return spikes

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bits, in the same layout, on the same device."""
        if not isinstance(other, PackedSpikes):
            return NotImplemented
        return (
            (self.shape, self.stride, self.bits.device)
            == (other.shape, other.stride, other.bits.device)
        ) and torch.equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.shape, self.stride))

    def to(self, device: torch.device | str) -> PackedSpikes:
        """The same spikes on a device."""
        return PackedSpikes(self.bits.to(device), self.shape, self.stride)
