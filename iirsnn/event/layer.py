"""A layer of the engine: what `model_reader` makes of a model, and what a file holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UsageError

#: What a layer is, and what it gives: spikes, counts of spikes, or real values.
KINDS = {
    "neurons": "spikes: where the sum of its inputs and its bias is above the threshold",
    "currents": "real values: that sum itself, where no neurons take it",
    "readout": "the logits: that sum, over the timesteps",
    "max_pool": "spikes where any is, or the largest values",
    "average_pool": "counts of spikes, or averages of values",
    "adaptive_pool": "averages over as many windows as asked for; of spikes: counts",
    "channels": "channels of its inputs, side by side",
    "sum": "counts: of all its inputs together",
    "output": "the logits: what its input gives, over the timesteps",
}


@dataclass
class Window:
    """Where a kernel looks: each a pair (rows, columns); padding is zeros, before and after."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)

    def numbers(self) -> list[int]:
        return [*self.kernel, *self.stride, *self.dilation, *self.before, *self.after]


@dataclass(eq=False)
class Input:
    """What a layer reads, and how.

    Attributes:
        source: 0, the image; n, what layer n - 1 gives.
        weight: of a convolution [outputs, channels / groups, *kernel], or of a linear layer
            [outputs, features] in the order of nn.Flatten; float32, bfloat16 or int8. None: each
            count or value adds `unit` to the current of its own neuron.
        window: of a convolution; None: linear.
        groups: of a convolution.
        unit: what a count of one, or a value, is multiplied by; without a weight.
        first, channels: those of the source that a `channels` layer takes.
        times: how often a `sum` counts it.
    """

    source: int
    weight: Tensor | None = None
    window: Window | None = None
    groups: int = 1
    unit: float = 1.0
    first: int = 0
    channels: int = 0
    times: int = 1

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, tensors bit for bit."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return all(_same(value, vars(other)[key]) for key, value in vars(self).items())


@dataclass(eq=False, repr=False)
class Layer:
    """A layer of the engine. What is None is not of its kind.

    Attributes:
        kind: one of KINDS.
        name: of the module in the model.
        inputs: in the order in which they are added; one alone for pools, readout and output.
        window: of a max or average pool.
        size: (rows, columns) that an adaptive pool gives.
        scale: [outputs], of int8 weights.
        bias, threshold, leak: float32 [outputs].
        reset, v_reset: of the neurons.
    """

    kind: str
    name: str
    inputs: list[Input] = field(default_factory=list)
    window: Window | None = None
    size: tuple[int, int] | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    leak: Tensor | None = None
    reset: str = "soft"
    v_reset: float = 0.0

    TENSORS = ("scale", "bias", "threshold", "leak")

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, tensors bit for bit."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return all(_same(value, vars(other)[key]) for key, value in vars(self).items())

    def __repr__(self) -> str:
        reads = ", ".join(
            str(each.source)
            if each.weight is None
            else f"{each.source}: {str(each.weight.dtype)[6:]}{list(each.weight.shape)}"
            for each in self.inputs
        )
        return f"Layer({self.kind}, {self.name!r}, [{reads}])"

    @property
    def weights(self) -> list[Tensor]:
        """Those of its inputs that have any."""
        return [each.weight for each in self.inputs if each.weight is not None]


def give_values(layers: Iterable[Layer]) -> list[bool]:
    """Of each source number, 0 the image's, whether it gives real values."""
    found = [True]
    for layer in layers:
        inherits = layer.kind not in ("neurons", "currents")
        values = inherits and any(found[each.source] for each in layer.inputs)
        found.append(layer.kind == "currents" or values)
    return found


def check_finite(layer: Layer) -> None:
    """Raises UsageError for a tensor that is not finite, or a threshold that is not above 0."""
    tensors = [("weight", weight) for weight in layer.weights]
    tensors += [(key, getattr(layer, key)) for key in Layer.TENSORS]
    for key, tensor in tensors:
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UsageError(f"{layer.name}: expected a finite {key}, got inf or NaN")
    if layer.threshold is not None and not bool((layer.threshold > 0).all()):
        raise UsageError(f"{layer.name}: expected thresholds > 0")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
