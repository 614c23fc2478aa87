"""sinabs: IAF and LIF with single spikes, and their Squeeze variants; batch first."""

from __future__ import annotations

from typing import Any

import torch
from sinabs.activation import MembraneReset, MembraneSubtract, SingleSpike
from sinabs.layers import IAF, LIF, IAFSqueeze, LIFSqueeze, StatefulLayer
from torch import Tensor, nn

from .equation import Equation, NoEqualError, Surrogate, number_or_learned
from .synapse import filtered


def is_neuron(module: nn.Module) -> bool:
    """Whether it is one of the library's."""
    return isinstance(module, StatefulLayer)


def equation(layer: Any) -> Equation:
    """Raises NoEqualError for options that have no equal here."""
    if layer.spike_fn is not SingleSpike:
        name = getattr(layer.spike_fn, "__name__", type(layer.spike_fn).__name__)
        raise NoEqualError(f"spike_fn {name}: only SingleSpike emits at most one spike a step")
    if layer.min_v_mem is not None:
        raise NoEqualError("min_v_mem: its membrane has a lower bound")
    if layer.record_states:
        raise NoEqualError("record_states: it keeps the membranes of all timesteps")
    if layer.spike_threshold.requires_grad:
        raise NoEqualError("its threshold is learned, without a gradient through the spikes")
    threshold = number_or_learned(layer.spike_threshold)
    leak = number_or_learned(layer.alpha_mem_calculated)
    gain = (1 - leak) if layer.norm_input else 1.0
    return Equation(
        threshold=threshold,
        surrogate=Surrogate(lambda h, at: layer.surrogate_grad_fn(h, at).expand(h.shape), True),
        leak=leak,
        gain=gain,
        reset=_reset(layer.reset_fn, layer.spike_threshold),
        detach_reset=isinstance(layer.reset_fn, MembraneReset),
    )


def _reset(how: Any, threshold: Tensor) -> str:
    if type(how) is MembraneReset:
        if how.reset_value == 0:
            return "hard"
        raise NoEqualError("MembraneReset adds its reset_value at every step, spike or not")
    if type(how) is MembraneSubtract:
        if how.subtract_value is None or bool((threshold == how.subtract_value).all()):
            return "soft"
        raise NoEqualError("MembraneSubtract subtracts something else than the threshold")
    raise NoEqualError(f"reset_fn {type(how).__name__} is not one of sinabs'")


class _Fused(LIF):
    """The forward pass that all of them have."""

    v_mem: Tensor
    i_syn: Tensor

    def reset_state(self) -> None:
        self.reset_states()

    def forward(self, input_data: Tensor) -> Tensor:
        shape = (input_data.shape[0], *input_data.shape[2:])
        if not self.is_state_initialised() or not self.has_trailing_dimension(shape[1:]):
            self.init_state_with_shape(shape)
        elif not self.state_has_shape(shape):
            self.handle_state_batch_size_mismatch(shape[0])
        x = input_data.transpose(0, 1)
        decay = self.alpha_syn_calculated
        if decay is not None:  # i[t] = decay (i[t-1] + x[t]) is decay times what `filtered` gives
            x = decay * filtered(x, self.i_syn, decay)
        wanted = equation(self)
        s, v = wanted.run(x, self.v_mem)
        self.v_mem = v
        if decay is not None:
            self.i_syn = x[-1]
        self.recordings: dict[str, Tensor] = {}
        s = s.transpose(0, 1)
        self.firing_rate = s.mean()
        return s


class FusedLIF(_Fused):
    """sinabs' LIF by iirsnn's kernels."""


class FusedIAF(IAF, _Fused):
    """sinabs' IAF by iirsnn's kernels."""


class FusedLIFSqueeze(LIFSqueeze, _Fused):
    """sinabs' LIFSqueeze by iirsnn's kernels."""


class FusedIAFSqueeze(IAFSqueeze, _Fused):
    """sinabs' IAFSqueeze by iirsnn's kernels."""


FUSED = {
    LIF: FusedLIF,
    IAF: FusedIAF,
    LIFSqueeze: FusedLIFSqueeze,
    IAFSqueeze: FusedIAFSqueeze,
}


def unroll(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """A fresh layer on x [T, B, ...], in two calls: spikes [T, B, ...] and the last state."""
    layer.reset_states()
    spikes = []
    for part in x.split((x.shape[0] + 1) // 2):
        batch_first = part.transpose(0, 1)
        if isinstance(layer, (LIFSqueeze, IAFSqueeze)):
            layer.batch_size, layer.num_timesteps = batch_first.shape[:2]
            s = layer(batch_first.flatten(0, 1)).unflatten(0, batch_first.shape[:2])
        else:
            s = layer(batch_first)
        spikes.append(s.transpose(0, 1))
    states = [layer.v_mem] if layer.alpha_syn_calculated is None else [layer.v_mem, layer.i_syn]
    return torch.cat(spikes), *states


def parameter_shapes(layer: Any) -> list[torch.Size]:
    return [p.shape for p in layer.parameters()]
