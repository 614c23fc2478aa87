"""A layer of the engine: what `model_reader` makes of a model's modules, and what a file holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UsageError


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


@dataclass
class Layer:
    """A layer of the engine. Tensors are those of the file; what is None is not of its kind.

    Attributes:
        kind: conv or linear (with neurons), readout (a linear without), max_pool, average_pool.
        name: of the module in the model.
        weight: [outputs, channels / groups, *kernel], or [outputs, features] in the order of
            nn.Flatten; float32, bfloat16 or int8.
        scale: [outputs], of int8 weights.
        bias, threshold, leak: float32 [outputs].
        reset, v_reset: of the neurons.
        shortcut: index of the layer whose spikes, or counts of an average pool, also reach these
            neurons: the input of the residual block that ends here.
        shortcut_weight, shortcut_window: of a convolution on that way, of the same scale; None:
            each count adds `shortcut_unit` to the current.
    """

    kind: str
    name: str
    window: Window | None = None
    groups: int = 1
    weight: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    leak: Tensor | None = None
    reset: str = "soft"
    v_reset: float = 0.0
    shortcut: int | None = None
    shortcut_weight: Tensor | None = None
    shortcut_window: Window | None = None
    shortcut_unit: float = 1.0

    TENSORS = ("weight", "scale", "bias", "threshold", "leak", "shortcut_weight")
    WINDOWS = ("window", "shortcut_window")


def check_finite(layer: Layer) -> None:
    """Raises UsageError for a tensor that is not finite, or a threshold that is not above 0."""
    for key in Layer.TENSORS:
        tensor = getattr(layer, key)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UsageError(f"{layer.name}: expected a finite {key}, got inf or NaN")
    if layer.threshold is not None and not bool((layer.threshold > 0).all()):
        raise UsageError(f"{layer.name}: expected thresholds > 0")
