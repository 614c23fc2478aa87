"""A network at T = 1 as an ONNX model of plain operators: a neuron is Greater and Cast.

Needs the package onnx; ONNX Runtime and other engines run the result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..models.graph import Affine
from ..nn import BatchNormLIF, FusedLIF
from .batch_norm_folding import affine
from .node_kinds import NORMS
from .plain_graph import Step, as_graph, steps

OPSET = 17


def to_onnx(snn: nn.Module, path: Path | str, image_shape: tuple[int, ...] | None = None) -> None:
    """Write a network at T = 1, float32, as an ONNX file: "images" [batch, C, H, W] -> "logits".

    Conv, MatMul, Add, Greater, Cast; pools, Flatten, Concat and Slice, Reshape, Transpose where the
    network has them. BatchNorm is folded, or Mul and Add where norms were kept.

    Args:
        snn: a Network or GraphNetwork.
        path: of the file; replaced.
        image_shape: [C, H, W] of an image; None for the network's.

    Raises:
        TypeError: another module.
        ValueError: T > 1; a node that has no such operators, by its name.
    """
    import onnx

    network = as_graph(snn)
    if snn.timesteps != 1:
        raise ValueError(f"timesteps: expected 1 for ONNX, got {snn.timesteps}")
    writer = _Writer()
    step = None
    for step in steps(network, image_shape):
        writer.write(step)
    assert step is not None
    writer.emit("Identity", [writer.known[step.name]], output="logits")
    shape = image_shape or network.image_shape
    value, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        writer.nodes,
        "iirsnn",
        [value("images", real, ["batch", *(shape or ())])],
        [value("logits", real, ["batch", *step.shape])],
        writer.tensors,
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="iirsnn"
    )
    model.ir_version = 8  # of that opset's time, so that older engines load it
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


class _Writer:
    """Attributes: nodes, tensors: of the ONNX graph; known: the ONNX value of each step."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.known: dict[str, str] = {"images": "images"}

    def emit(self, kind: str, inputs: list[str], output: str | None = None, **options: Any) -> str:
        import onnx

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], **options))
        return output

    def tensor(self, value: Any) -> str:
        import onnx

        if isinstance(value, Tensor):
            value = value.detach().cpu().float().numpy()
        name = f"tensor_{len(self.tensors)}"
        self.tensors.append(onnx.numpy_helper.from_array(np.array(value), name))
        return name

    def by_channel(self, value: Tensor, shape: tuple[int, ...]) -> str:
        """A value of 1 or C elements in a shape that meets [N, C, ...]."""
        return self.tensor(value.detach().reshape(-1, *[1] * (len(shape) - 1)))

    def write(self, step: Step) -> None:
        inputs = [self.known[name] for name in step.inputs]
        for kinds, write in _WRITERS.items():
            if step.module is not None and type(step.module) in kinds:
                self.known[step.name] = write(self, inputs[0], step)
                return
        function = _FUNCTIONS.get(step.kind) if step.module is None else None
        if function is None:
            kind = step.kind if step.module is None else type(step.module).__name__
            raise ValueError(f"{step.name} ({kind}): has no plain ONNX operators")
        self.known[step.name] = function(self, inputs, step)


def _refused(step: Step, why: str) -> ValueError:
    return ValueError(f"{step.name} ({type(step.module).__name__}): {why}")


def _neuron(to: _Writer, x: str, step: Step) -> str:
    import onnx

    fires = to.emit("Greater", [x, to.by_channel(step.module.threshold, step.shape)])
    return to.emit("Cast", [fires], to=onnx.TensorProto.FLOAT)


def _affine(to: _Writer, x: str, step: Step, module: Affine | None = None) -> str:
    module = module or step.module
    y = to.emit("Mul", [x, to.by_channel(module.weight, step.shape)])
    if module.bias is None:
        return y
    return to.emit("Add", [y, to.by_channel(module.bias, step.shape)])


def _norm(to: _Writer, x: str, step: Step) -> str:
    return _affine(to, x, step, affine(step.module))


def _norm_and_neuron(to: _Writer, x: str, step: Step) -> str:
    block = step.module
    y = _affine(to, x, step, affine(block.norm))
    inner = Step(step.name, "module", block.neuron, (), (), step.shape, step.input_shape)
    return _neuron(to, y, inner)


def _linear(to: _Writer, x: str, step: Step) -> str:
    y = to.emit("MatMul", [x, to.tensor(step.module.weight.t())])
    bias = step.module.bias
    return y if bias is None else to.emit("Add", [y, to.tensor(bias)])


def _convolution(to: _Writer, x: str, step: Step) -> str:
    conv = step.module
    if conv.padding_mode != "zeros":
        raise _refused(step, f"expected padding with zeros, got {conv.padding_mode}")
    pairs = conv._reversed_padding_repeated_twice  # last axis first: before, after
    before, after = pairs[0::2][::-1], pairs[1::2][::-1]
    inputs = [x, to.tensor(conv.weight), *([] if conv.bias is None else [to.tensor(conv.bias)])]
    options = {
        **{"strides": list(conv.stride), "pads": [*before, *after], "group": conv.groups},
        **{"dilations": list(conv.dilation), "kernel_shape": list(conv.kernel_size)},
    }
    if not conv.transposed:
        return to.emit("Conv", inputs, **options)
    extra = list(conv.output_padding)
    pads = list(conv.padding) * 2
    return to.emit("ConvTranspose", inputs, **{**options, "pads": pads, "output_padding": extra})


def _pool(to: _Writer, x: str, step: Step) -> str:
    pool, rank = step.module, len(step.input_shape) - 1
    sizes = {
        name: list(np.broadcast_to(np.asarray(value), rank).tolist())
        for name, value in (
            *(("kernel_shape", pool.kernel_size), ("strides", pool.stride or pool.kernel_size)),
            *(("pads", pool.padding),),
        )
    }
    sizes["pads"] = sizes["pads"] * 2
    options: dict[str, Any] = {**sizes, "ceil_mode": int(pool.ceil_mode)}
    if isinstance(pool, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
        options["dilations"] = np.broadcast_to(np.asarray(pool.dilation), rank).tolist()
        return to.emit("MaxPool", [x], **options)
    if getattr(pool, "divisor_override", None) is not None or pool.ceil_mode:
        raise _refused(step, "expected ceil_mode=False and no divisor_override")
    return to.emit("AveragePool", [x], **options, count_include_pad=int(pool.count_include_pad))


def _adaptive(to: _Writer, x: str, step: Step) -> str:
    given, wanted = step.input_shape[1:], step.shape[1:]
    highest = "Max" in type(step.module).__name__
    if set(wanted) == {1}:
        return to.emit("GlobalMaxPool" if highest else "GlobalAveragePool", [x])
    if any(g % w for g, w in zip(given, wanted, strict=True)):
        raise _refused(step, f"expected maps that divide evenly, got {given} to {wanted}")
    kernel = [g // w for g, w in zip(given, wanted, strict=True)]
    return to.emit(
        "MaxPool" if highest else "AveragePool", [x], kernel_shape=kernel, strides=kernel
    )


def _reshaped(to: _Writer, x: str, shape: tuple[int, ...]) -> str:
    return to.emit("Reshape", [x, to.tensor(np.array([-1, *shape], np.int64))])


def _flatten(to: _Writer, x: str, step: Step) -> str:
    return to.emit("Flatten", [x]) if len(step.shape) == 1 else _reshaped(to, x, step.shape)


def _shuffle(to: _Writer, x: str, step: Step) -> str:
    channels, *rest = step.shape
    groups = step.module.groups
    split = _reshaped(to, x, (groups, channels // groups, *rest))
    swapped = to.emit("Transpose", [split], perm=[0, 2, 1, *range(3, 3 + len(rest))])
    return _reshaped(to, swapped, step.shape)


def _zeros(to: _Writer, x: str, pad: Any, rank: int) -> str:
    """Padding as torch gives it: last axis first, before and after."""
    before = [0] * rank
    after = [0] * rank
    for place in range(len(pad) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = pad[2 * place], pad[2 * place + 1]
    return to.emit("Pad", [x, to.tensor(np.array([*before, *after], np.int64))])


def _zero_pad(to: _Writer, x: str, step: Step) -> str:
    return _zeros(to, x, step.module.padding, len(step.shape) + 1)


def _add(to: _Writer, inputs: list[str], step: Step) -> str:
    return to.emit("Add", inputs)


def _cat(to: _Writer, inputs: list[str], step: Step) -> str:
    return to.emit("Concat", inputs, axis=step.arguments[0])


def _slice(to: _Writer, inputs: list[str], step: Step) -> str:
    slices = step.arguments[0]
    bounds = [s.indices(n) for s, n in zip(slices[1:], step.input_shape, strict=False)]
    columns = [np.array(column, np.int64) for column in zip(*bounds, strict=True)]
    axes = np.arange(1, len(bounds) + 1, dtype=np.int64)
    starts, ends, strides = columns
    return to.emit("Slice", [inputs[0], *(to.tensor(v) for v in (starts, ends, axes, strides))])


def _reshape(to: _Writer, inputs: list[str], step: Step) -> str:
    return _reshaped(to, inputs[0], step.shape)


def _permute(to: _Writer, inputs: list[str], step: Step) -> str:
    return to.emit("Transpose", inputs, perm=list(step.arguments))


def _pad(to: _Writer, inputs: list[str], step: Step) -> str:
    return _zeros(to, inputs[0], step.arguments[0], len(step.shape) + 1)


_WRITERS: dict[tuple[type, ...], Callable[[_Writer, str, Step], str]] = {
    (FusedLIF,): _neuron,
    (BatchNormLIF,): _norm_and_neuron,
    (Affine,): _affine,
    NORMS: _norm,
    (nn.Linear,): _linear,
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _convolution,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _convolution,
    (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d): _pool,
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d): _pool,
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d): _adaptive,
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d): _adaptive,
    (nn.Flatten, nn.Unflatten): _flatten,
    (nn.ChannelShuffle,): _shuffle,
    (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d): _zero_pad,
}
_FUNCTIONS: dict[str, Callable[[_Writer, list[str], Step], str]] = {
    **{"add": _add, "cat": _cat, "getitem": _slice, "reshape": _reshape},
    **{"permute": _permute, "pad": _pad},
}
