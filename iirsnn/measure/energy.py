"""Operations and energy of a network, counted on the images it is shown.

Energy model (45 nm, 32-bit float): 4.6 pJ a multiply-accumulate, 0.9 pJ an addition. A layer that
sees real values (every layer of an ANN, and an SNN's layers before the first neuron, once for all
timesteps since the image does not change) multiplies: k^2 C_in C_out H_out W_out. A layer that sees
spikes adds one weight per spike and output it reaches: the real fan-out, smaller at the border.
An average-pooled value stands for up to k^2 spikes; each of them is counted. The identity shortcut
of a residual block adds what it carries to a current: each value of an ANN, each spike of an SNN,
or each value and timestep where it carries currents. Biases, resets and thresholds are not counted.

Memory is no part of that. `with_memory` adds it, for bytes that were counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.resnet import MembraneBlock, ResidualBlock
from ..nn.batch_norm import spiking_layers

MULTIPLY_ACCUMULATE_PJ = 4.6
ADDITION_PJ = 0.9

#: Of a byte read or written, by where it lies: an SRAM of 8 KB takes 10 pJ for 64 bits (Horowitz,
#: ISSCC 2014, 45 nm), DRAM 640 pJ for 32 bits (Han et al., arXiv 1506.02626, after the same).
BYTE_PJ = {"sram": 10 / 8, "dram": 640 / 4}

_BLOCKS = (ResidualBlock, MembraneBlock)


def microjoules(multiplications: float, additions: float) -> float:
    """Energy of so many multiply-accumulates and additions."""
    return 1e-6 * (multiplications * MULTIPLY_ACCUMULATE_PJ + additions * ADDITION_PJ)


def with_memory(energy_uj: float, bytes_: float) -> dict[str, float]:
    """Microjoules of operations and of so many bytes, by where all of these lie: two bounds.

    What stays in registers costs less than "sram", and no machine has everything in "dram".
    """
    return {place: energy_uj + 1e-6 * pj * bytes_ for place, pj in BYTE_PJ.items()}


@dataclass
class LayerOperations:
    """What one convolution, linear layer or identity shortcut did, summed over the images counted.

    Attributes:
        name: of the module.
        multiplications: multiply-accumulates, all timesteps.
        additions: one per spike and output it reaches, all timesteps, sub-spikes of a pool each.
        additions_pooled_once: the same with an average-pooled value counted as one spike.
        values: real values read and written, where it sees no spikes.
    """

    name: str
    multiplications: int = 0
    additions: int = 0
    additions_pooled_once: int = 0
    values: int = 0

    @property
    def energy_uj(self) -> float:
        return microjoules(self.multiplications, self.additions)

    @property
    def dense_bytes(self) -> int:
        """Of values in float32, and a weight for each multiplication."""
        return 4 * (self.multiplications + self.values)


class _Observer:
    """Sees each layer's input in the forward passes of a model, and knows what its values are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._spiking = False
        self._pool_area = 1.0

    def _start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._spiking = False
        self._pool_area = 1.0

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A Conv2d or Linear took `x`; `_pool_area` sub-spikes at most to a value if `_spiking`."""
        raise NotImplementedError

    def _neuron(self, name: str, spikes: Tensor) -> None:
        """A neuron layer gave `spikes` [T, B, ...]."""

    def _shortcut(self, name: str, x: Tensor, currents: bool) -> None:
        """The identity shortcut of a residual block carried `x` [T, B, ...], currents or spikes."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every forward pass of the model inside the context.

        Raises:
            ValueError: a pool whose sub-spikes cannot be counted.
        """
        hooks = [self.model.register_forward_pre_hook(self._start)]
        spiking = list(spiking_layers(self.model))
        for name, module in spiking:
            hooks.append(module.register_forward_hook(self._neuron_hook(name)))
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.append(module.register_forward_hook(self._layer_hook(name)))
            elif isinstance(module, nn.AvgPool2d):
                hooks.append(module.register_forward_hook(self._pool))
            elif isinstance(module, _BLOCKS) and not len(module.shortcut):
                hook = self._shortcut_hook(name, isinstance(module, MembraneBlock))
                hooks.append(module.register_forward_pre_hook(hook))
            elif spiking and isinstance(module, (nn.AdaptiveAvgPool2d, nn.LPPool2d)):
                raise ValueError(f"{name}: expected AvgPool2d or MaxPool2d as a pool, got {module}")
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pool(self, module: nn.AvgPool2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        size = module.kernel_size
        self._pool_area *= size * size if isinstance(size, int) else size[0] * size[1]

    def _neuron_hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
            self._spiking = True
            self._pool_area = 1.0
            self._neuron(name, spikes)

        return hook

    def _shortcut_hook(self, name: str, currents: bool):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._shortcut(f"{name}.shortcut", inputs[0], currents)

        return hook

    def _layer_hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._layer(name, module, inputs[0], output)

        return hook


class OperationCounter(_Observer):
    """Counts operations and spikes of all forward passes of a model while `watching()`.

    Attributes:
        images: images seen.
        layers: operations by layer, in forward order.
        spikes: spikes of each neuron layer by name, in forward order, all timesteps.
        neurons: number of neurons (one image's) of each neuron layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.images = 0
        self.layers: dict[str, LayerOperations] = {}
        self.spikes: dict[str, float] = {}
        self.neurons: dict[str, int] = {}

    @property
    def spike_rates(self) -> list[float]:
        """Spikes per neuron and image, summed over the timesteps, of each neuron layer."""
        return [self.spikes[n] / (self.neurons[n] * self.images) for n in self.spikes]

    @property
    def multiplications(self) -> float:
        """Multiply-accumulates per image."""
        return sum(layer.multiplications for layer in self.layers.values()) / self.images

    @property
    def additions(self) -> float:
        """Additions per image, each sub-spike of an average-pooled value counted."""
        return sum(layer.additions for layer in self.layers.values()) / self.images

    @property
    def additions_pooled_once(self) -> float:
        """Additions per image with an average-pooled value counted as one spike."""
        return sum(layer.additions_pooled_once for layer in self.layers.values()) / self.images

    @property
    def dense_bytes(self) -> float:
        """Bytes per image that layers without spikes read and write."""
        return sum(layer.dense_bytes for layer in self.layers.values()) / self.images

    @property
    def energy_uj(self) -> float:
        """Energy per image in microjoules."""
        return sum(layer.energy_uj for layer in self.layers.values()) / self.images

    def _start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super()._start(model, inputs)
        self.images += len(inputs[0])

    @torch.no_grad()
    def _neuron(self, name: str, spikes: Tensor) -> None:
        self.spikes[name] = self.spikes.get(name, 0.0) + float(spikes.sum(dtype=torch.float64))
        self.neurons[name] = spikes[0, 0].numel()

    @torch.no_grad()
    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        layer = self.layers.setdefault(name, LayerOperations(name))
        if self._spiking:
            layer.additions += fan_out(module, (x * self._pool_area).round())
            layer.additions_pooled_once += fan_out(module, (x != 0).to(x.dtype))
        else:
            layer.multiplications += dense_operations(module, output)
            layer.values += x.numel() + output.numel()

    @torch.no_grad()
    def _shortcut(self, name: str, x: Tensor, currents: bool) -> None:
        layer = self.layers.setdefault(name, LayerOperations(name))
        if self._spiking and not currents:
            sub_spikes = (x * self._pool_area).round().sum(dtype=torch.float64)
            layer.additions += round(float(sub_spikes))
            layer.additions_pooled_once += int((x != 0).sum())
            return
        # before any neuron a block of spikes adds the same at every timestep
        carried = x.numel() if currents else x[0].numel()
        layer.additions += carried
        layer.additions_pooled_once += carried
        layer.values += carried


class EnergyPenalty(_Observer):
    """What a spiking network's energy adds to its loss: additions per operation of its ANN.

    T * sum_l mean(x_l) area_l m_l / sum_l m_l over its layers, where x_l are the spikes that layer
    l takes, area_l the sub-spikes of a pooled value and m_l the operations of the dense layer. 0.1
    means one addition for ten multiply-accumulates of the ANN, 4.6 / (0.1 * 0.9) = 51x less energy
    but for the first layer. Its gradient reaches weights and thresholds through the surrogate.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._additions: Tensor | float = 0.0
        self._operations = 0

    def value(self, timesteps: int) -> Tensor:
        """Of the latest forward pass while `watching()`, at `timesteps`: a scalar with gradient."""
        return torch.as_tensor(timesteps * self._additions / self._operations)

    def _start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super()._start(model, inputs)
        self._additions, self._operations = 0.0, 0

    def _layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        operations = dense_operations(module, output[:1])
        self._operations += operations
        if self._spiking:
            rate = x.mean(dtype=torch.float32) * self._pool_area
            self._additions = self._additions + rate * operations


def dense_operations(module: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of a Conv2d or Linear that gave `output` ([B, C, H, W] or [..., N])."""
    if isinstance(module, nn.Conv2d):
        taps = module.kernel_size[0] * module.kernel_size[1]
        return output.numel() * taps * module.in_channels // module.groups
    assert isinstance(module, nn.Linear)
    return output.numel() * module.in_features


def fan_out(module: nn.Module, spikes: Tensor) -> int:
    """Outputs that the spikes reach, summed: one addition each.

    Args:
        module: a Conv2d or Linear.
        spikes: its input as counts: [B, C, H, W] or [..., N].
    """
    if isinstance(module, nn.Conv2d):
        counts = spikes.sum((0, 1), keepdim=True, dtype=torch.float64)  # exact, unlike TF32
        ones = counts.new_ones(1, 1, *module.kernel_size)
        reached = F.conv2d(counts, ones, None, module.stride, module.padding, module.dilation)
        return round(float(reached.sum())) * (module.out_channels // module.groups)
    assert isinstance(module, nn.Linear)
    return round(float(spikes.sum(dtype=torch.float64))) * module.out_features
