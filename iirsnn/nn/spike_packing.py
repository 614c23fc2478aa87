"""What the input of a spike layer is by its values, bits or counts, and its packed form."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_PROBE = 4096  # values that a guess of the input's kind looks at


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for calls that need gradients
def _table(unit: float, divisor: int, dtype: torch.dtype) -> Tensor:
    """float32 [256]: the value of a count: k / divisor where there is one, else k * unit."""
    counts = torch.arange(256, dtype=torch.float32)
    values = counts / divisor if divisor else counts * unit
    return values.to(dtype).float()


@dataclass(frozen=True)
class Kind:
    """What an input may be: bits or counts, and their unit."""

    counts: bool
    unit: float
    divisor: int = 0

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """(packed, table, values that are not 0), or None where x is something else."""
        table = _table(self.unit, self.divisor, x.dtype)
        packed, stats = torch.ops.iirsnn.spike_pack(x, table, self.counts)
        exact, nonzeros = stats.tolist()
        return (packed, table, nonzeros) if exact else None


def _guesses(x: Tensor) -> list[Kind]:
    """What x [N, C, H, W] may be, from a sample of its values."""
    values = (x.permute(0, 2, 3, 1) if not x.is_contiguous() else x).reshape(-1)
    sample = values[:: max(1, values.numel() // _PROBE)].float()
    found = sample[sample != 0].unique()[:256].tolist()
    if not found:
        return [Kind(False, 1.0)]
    if found[0] < 0 or not found[-1] < float("inf"):
        return []
    units = dict.fromkeys([found[0], *(b - a for a, b in itertools.pairwise(found))])
    guesses = [Kind(False, found[0])] if len(found) == 1 else []
    for unit in sorted(units)[:3]:
        if found[-1] / unit < 255.5:
            guesses.append(Kind(True, unit))
            if unit < 1:
                guesses.append(Kind(True, unit, round(1 / unit)))
    return guesses


_SPIKES = Kind(False, 1.0)


def pack(x: Tensor) -> tuple[Kind, tuple[Tensor, Tensor, int]] | None:
    """x packed as what it is, by its values alone; None: it is neither spikes nor counts.

    Spikes first: another value is found out at once, a guess would take longer than small layers.
    """
    result = _SPIKES.pack(x)
    if result is not None:
        return _SPIKES, result
    for kind in _guesses(x):
        result = kind.pack(x)
        if result is not None:
            return kind, result
    return None
