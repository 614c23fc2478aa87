"""Any converted network: a graph of plain modules and neurons over T timesteps.

The contract of `GraphNetwork.graph_module`, for whoever reads it (engine, exporters, counters).

Placeholders, in this order: `images` [B, C, H, W] and `timesteps`, an int. One output: logits
[B, classes], the mean over time.

Values. Before the first neurons a value is the same at every timestep and stands once, [B, ...];
behind them time is merged into the batch, [T*B, ...], time outermost. Four functions lead from one
to the other; each is the identity for a reader of one timestep:

    direct(x, timesteps)          [B, ...]   -> [T, B, ...]   a view, stride 0 in time
    split_time(x, timesteps)      [T*B, ...] -> [T, B, ...]   a view
    merge_time(x)                 [T, B, ...] -> [T*B, ...]
    mean_over_time(x, timesteps)  [T*B, ...] -> [B, ...]      the last node before the output

Neurons: `call_module` of a FusedLIF, or of a BatchNormLIF (only where norms are kept), takes
[T, B, C, ...]: `direct` or `split_time` stands before it, `merge_time` behind it. A spike is 1.
So does a SharedDropout. Every activation of the ANN is one such node with a module of its own.

Other nodes, all on [N, C, ...]:

    call_module    Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear: each module at one node alone;
                   BatchNorm1d/2d/3d (only where norms are kept); Affine; MaxPool, AvgPool,
                   AdaptiveAvgPool, AdaptiveMaxPool of 1 to 3 dimensions; Flatten (start_dim=1
                   as a rule); ChannelShuffle; Upsample, ZeroPad2d; Dropout before any neuron
    call_function  operator.add of two values; torch.cat([...], dim); operator.getitem(x, (slice(
                   None), slice(a, b), ...)), channels a to b; functional.pad where channels are
                   padded too
    call_method    reshape(-1, ...), permute, where a network has more than the above

Functions of torch with a module of the same name stand as that module (F.max_pool2d, x.mean((2, 3))
as AdaptiveAvgPool2d(1), torch.flatten, F.batch_norm); chunk and split as channel slices; x * 2,
x + 1 and x - y by Affine.

Units. A neuron of threshold V stands for a value of V (a rate of r for r V): conversion multiplies
the weights that a spike meets next by V, column by column, through pools, concats, slices and
shuffles. So every layer's output, and every threshold, is in the units of the ANN. Where spikes
meet an addition, a kept norm, other neurons or the output instead of weights, an Affine without
bias stands before it and gives them their unit.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx, nn

from ..nn import direct


class GraphNetwork(nn.Module):
    """A converted network of any shape that sees the same image at every timestep.

    Args:
        graph_module: see the contract in the text of this module.
        timesteps: T, at least 1.
        image_shape: of an image, [C, H, W] as a rule; None accepts any.
        ceilings: the highest threshold of each neuron, by its name in the graph module: where its
            activation saturated, else infinity.

    Attributes:
        timesteps: T of the next forward pass; may be set at any time.
        graph_module: the graph, torch.fx.
        image_shape, ceilings: as given.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        timesteps: int = 1,
        image_shape: tuple[int, ...] | None = None,
        *,
        ceilings: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.ceilings = ceilings or {}
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.graph_module = graph_module

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, C, H, W], the input current of every timestep -> logits [B, classes].

        The logits are the mean over time, in the units of the ANN's.

        Raises:
            ValueError: images of another shape than the network was built for, or T < 1.
        """
        if self.timesteps < 1:
            raise ValueError(f"timesteps: expected at least 1, got {self.timesteps}")
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images: expected [B, {expected}], got {list(images.shape)}")
        return self.graph_module(images, self.timesteps)

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


class Affine(nn.Module):
    """x * weight + bias by channel, along dim 1 of [N, C, ...].

    A norm that no layer could take in, or the unit of spikes that meet no weights.

    weight: [C]. bias: [C] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] -> the same shape."""
        shape = (-1, *[1] * (x.dim() - 2))
        y = x * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, bias={self.bias is not None}"


def split_time(x: Tensor, timesteps: int) -> Tensor:
    """[T*B, ...] -> [T, B, ...], a view."""
    return x.unflatten(0, (timesteps, -1))


def merge_time(x: Tensor) -> Tensor:
    """[T, B, ...] -> [T*B, ...]: a view where x is dense, a copy of a repeated value."""
    return x.flatten(0, 1)


def mean_over_time(x: Tensor, timesteps: int) -> Tensor:
    """[T*B, ...] -> [B, ...]."""
    return split_time(x, timesteps).mean(0)


#: What only leads values into and out of time: the identity where T = 1.
TIME_FUNCTIONS = (direct, split_time, merge_time, mean_over_time)


class GraphTracer(fx.Tracer):
    """Traces a graph module again, as unpickling does, with its time functions left whole."""

    def __init__(self, autowrap_modules: Any = (math,), autowrap_functions: Any = ()) -> None:
        super().__init__(autowrap_modules, (*autowrap_functions, *TIME_FUNCTIONS))
