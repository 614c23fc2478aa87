"""What the neurons of a network do: spikes, membranes and rates, layer by layer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes
from ..ops.reference import acc_dtype
from .neuron import FusedLIF


class Recorder:
    """What `record` finds, by the name of each FusedLIF in the network, in the order they fired.

    spikes: [T, B, ...] of the last call, like what the neuron returned (unpacked).
    membranes: [T, B, ...] of the last call, before reset, in the unit of the current: a neuron
        spikes where its membrane is above its threshold. float32, or float64 for a float64 current.
        Computed when it is asked for, and kept no longer.
    rates: spikes a neuron and timestep, over all calls.
    All are detached and on the device of the network.
    """

    def __init__(self) -> None:
        self.spikes: dict[str, Tensor] = {}
        self._calls: dict[str, tuple[FusedLIF, Tensor, Tensor | None]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def membranes(self) -> dict[str, Tensor]:
        """[T, B, ...] of the last call, before reset; computed now."""
        return {
            name: torch.stack(list(membranes(neuron, current, self.spikes[name], v0)))
            for name, (neuron, current, v0) in self._calls.items()
        }

    @property
    def rates(self) -> dict[str, float]:
        """Spikes a neuron and timestep, over all calls."""
        return {name: self._sums[name].item() / self._counts[name] for name in self._sums}

    def clear(self) -> None:
        """Forget all that was recorded."""
        for found in (self.spikes, self._calls, self._sums, self._counts):
            found.clear()

    @torch.no_grad()
    def _add(self, name: str, neuron: FusedLIF, x: Tensor, v0: Tensor | None, result: Any) -> None:
        s = result[0] if neuron.return_v else result
        s = s.unpack(x.dtype) if isinstance(s, PackedSpikes) else s.detach()
        self.spikes[name] = s
        self._calls[name] = (neuron, x.detach(), v0)
        total = s.sum(dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + s.numel()


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recorder]:
    """`with record(model) as r:` watches every FusedLIF of the model, those in a BatchNormLIF too.

    It keeps each neuron's last current and spikes. A BatchNormLIF runs as its two modules
    meanwhile. What torch.compile compiled runs eagerly inside the context, in the whole process: a
    compiled graph would not call the neurons.
    """
    recorder = Recorder()
    before: dict[str, Tensor | None] = {}

    def start(name: str) -> Any:
        def hook(neuron: FusedLIF, args: tuple[Tensor, ...]) -> None:
            state = neuron.state if neuron.stateful else None
            before[name] = None if state is None else state.clone()

        return hook

    def end(name: str) -> Any:
        def hook(neuron: FusedLIF, args: tuple[Tensor, ...], named: Any, result: Any) -> None:
            x = args[0] if args else named["x"]
            recorder._add(name, neuron, x, before.pop(name), result)

        return hook

    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in getattr(model, "_orig_mod", model).named_modules():
            if isinstance(module, FusedLIF):
                for handle in (
                    module.register_forward_pre_hook(start(name)),
                    module.register_forward_hook(end(name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
        yield recorder


@torch.no_grad()
def membranes(
    neuron: FusedLIF, current: Tensor, spikes: Tensor, v0: Tensor | None = None
) -> Iterator[Tensor]:
    """The membrane h [B, ...] before reset of one timestep after the other, from v0 or 0.

    The kernels keep none, so it is computed again, in float32, or float64 for a float64 current.
    current and spikes are [T, B, ...]. The values are the kernels', bit for bit.
    """
    acc = acc_dtype(current.dtype)
    channels = (-1, *[1] * (current.dim() - 3))
    threshold, leak = (
        p.detach().to(acc).reshape(channels if p.numel() > 1 else ())
        for p in (neuron.threshold, neuron.leak)
    )
    v = torch.zeros_like(current[0], dtype=acc) if v0 is None else v0.to(acc)
    last = (v > threshold).to(acc)  # of soft_delayed
    for x, s in zip(current.to(acc), spikes.to(acc), strict=True):
        h = leak * v + x
        if neuron.reset == "soft_delayed":
            h = h - threshold * last
        v = h - threshold * s if neuron.reset == "soft" else h
        if neuron.reset == "hard":
            v = torch.where(s > 0, neuron.v_reset, h)
        last = s
        yield h
