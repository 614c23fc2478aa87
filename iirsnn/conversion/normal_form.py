"""A traced network in few kinds of nodes: those that `iirsnn.models.graph` lists.

Activations stand as nn.ReLU, or nn.Hardtanh(0, a) where they saturate; each call of a module or a
function is a module of its own, so that what is used in two places is two things from here on.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.graph import Affine, GraphTracer
from ..nn import SharedDropout
from .tracing import BATCH, on_meta

#: The only functions that are not linear and can become something that spikes.
EXPECTED = "ReLU, ReLU6, Hardtanh(0, a) and clamp(0, a) as the only functions that are not linear"

LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: What works on each channel's map alone, and leaves a channel its unit.
SPATIAL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
#: What only moves values.
MOVING = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

_LINEAR_UPSAMPLING = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")


class Refused(Exception):
    """A node that has no place in a spiking network; says what it is."""


def normal_form(traced: fx.GraphModule, kind: str) -> fx.GraphModule:
    """The same network in the kinds of nodes that `iirsnn.models.graph` lists.

    Args:
        traced: what `trace` gives.
        kind: the network's class, for messages.

    Raises:
        ValueError: nodes that are not linear and no ReLU, all named with their places.
    """
    normaliser = _Normaliser(traced)
    normaliser.run(kind)
    return fx.GraphModule(normaliser.modules, normaliser.graph)


class _Normaliser:
    """Writes the new graph node by node.

    Attributes:
        modules: of the new graph, by name.
        known: the new node of each old one; a list for what gives several.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.graph = fx.Graph(tracer_cls=GraphTracer)
        self.modules: dict[str, nn.Module] = {}
        self.known: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(traced.graph.nodes))
        self.refused: list[str] = []

    def run(self, kind: str) -> None:
        for node in self.traced.graph.nodes:
            self.node = node
            try:
                self.known[node] = self._new(node)
            except Refused as error:
                self.refused.append(f"{self._place() or kind} ({error})")
                self.known[node] = self._stand_in(node)
        if self.refused:
            shown = ", ".join(self.refused[:6])
            more = f" and {len(self.refused) - 6} more" if len(self.refused) > 6 else ""
            raise ValueError(f"ann: expected {EXPECTED}, got {shown}{more}")
        self.graph.lint()

    # ---- Writing ----

    def emit(self, module: nn.Module, x: fx.Node, name: str | None = None) -> fx.Node:
        """A node that calls `module`, under a free name."""
        name = self._free(name or ".".join(filter(None, [self._place(), _lower(module)])))
        self.modules[name] = module
        return self.written(self.graph.call_module(name, (x,)), on_meta(module, value_of(x)))

    def call(self, function: Callable, *args: Any) -> fx.Node:
        value = function(*map_arg(args, value_of))
        return self.written(self.graph.call_function(function, args), value)

    def written(self, node: fx.Node, value: Tensor) -> fx.Node:
        node.meta["value"] = value
        return node

    def _free(self, name: str) -> str:
        taken, free, number = self.modules, name, 0
        while any(free == t or t.startswith(f"{free}.") or free.startswith(f"{t}.") for t in taken):
            number += 1
            free = f"{name}_{number}"
        return free

    def _place(self) -> str:
        """The module whose forward made the present node, or the module that it calls."""
        if self.node.op == "call_module":
            return _stripped(str(self.node.target))
        stack: Any = (self.node.meta.get("nn_module_stack") or {}).values()
        return _stripped([path for path, _ in stack][-1]) if stack else ""

    def _stand_in(self, node: fx.Node) -> Any:
        """Something of the right shape in place of a node that was refused."""
        value = node.meta.get("value")
        parts = [value] if isinstance(value, Tensor) else list(value or ())
        found = [self.written(self.graph.placeholder("refused"), part) for part in parts]
        return found[0] if isinstance(value, Tensor) else found

    # ---- Reading ----

    def _new(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.written(self.graph.placeholder("images"), node.meta["value"])
        if node.op == "get_attr":
            return _Constant(_attribute(self.traced, str(node.target)))
        args, kwargs = map_known((node.args, node.kwargs), self.known)
        if node.op == "output":
            return self._output(args[0])
        if node.op == "call_module":
            return self._module(self.traced.get_submodule(str(node.target)), *args, **kwargs)
        name = node.target if node.op == "call_method" else _NAME_OF.get(node.target)
        operation = _OPERATIONS.get(_CANONICAL.get(str(name), str(name)))
        if name is None or operation is None:
            raise Refused(getattr(node.target, "__name__", str(node.target)))
        try:
            result = operation(self, *args, **kwargs)
        except TypeError as error:  # an argument that the operation does not have
            raise Refused(f"{name}: {error}") from error
        if _in_place(node):
            self._now(node, result)
        return result

    def _now(self, node: fx.Node, result: Any) -> None:
        """What was changed in place has its new value from here on."""
        self.known[node.args[0]] = result  # type: ignore[index]

    def _output(self, result: Any) -> fx.Node:
        if not isinstance(result, fx.Node):
            raise Refused(f"output {type(result).__name__}, expected one tensor of logits")
        return self.graph.output(result)

    def _module(self, module: Any, x: Any, *more: Any, **rest: Any) -> Any:
        kind, ceiling = type(module), _ceiling_of(module)
        allowed = (*LAYERS, *NORMS, *SPATIAL, *MOVING, *DROPOUTS, nn.Identity)
        if ceiling is None and (kind not in allowed or getattr(module, "return_indices", False)):
            raise Refused(kind.__name__)
        if more or rest or not isinstance(x, fx.Node):
            raise Refused(f"{kind.__name__} with several inputs")
        if module._forward_pre_hooks:
            raise Refused(f"{kind.__name__} whose weight a hook computes")
        if kind is nn.Identity:
            return x
        if ceiling is not None:
            result = self.activation(x, ceiling, self._place())
            if getattr(module, "inplace", False):
                self._now(self.node, result)
            return result
        if kind in DROPOUTS:
            return self.dropout(x, module.p)
        if kind is nn.Upsample and module.mode not in _LINEAR_UPSAMPLING:
            raise Refused(f"Upsample of mode {module.mode}")
        module = copy.deepcopy(module)
        module._forward_hooks.clear()
        return self.kept_apart(self.emit(module, x, self._place()))

    def kept_apart(self, node: fx.Node) -> fx.Node:
        """The node, whose first axis is still the batch."""
        if value_of(node).shape[:1] != (BATCH,):
            raise Refused(f"{self.node.name}: mixes the images of a batch")
        return node

    # ---- Operations ----

    def activation(self, x: fx.Node, ceiling: float, name: str | None = None) -> fx.Node:
        finite = ceiling != float("inf")
        return self.emit(nn.Hardtanh(0.0, ceiling) if finite else nn.ReLU(), x, name)

    def dropout(self, x: fx.Node, p: float) -> fx.Node:
        return self.emit(SharedDropout(p), x) if p < 1 else _refuse("dropout of everything")

    def affine(self, x: fx.Node, weight: float | Tensor, bias: Any = None) -> fx.Node:
        """x * weight + bias, each a number or a constant that is one value a channel."""
        value = value_of(x)
        scale = _by_channel(weight, value)
        module = Affine(scale, None if bias is None else _by_channel(bias, value))
        module.requires_grad_(False)
        for name, given in (("weight", weight), ("bias", bias)):
            if isinstance(given, nn.Parameter):
                getattr(module, name).requires_grad_(given.requires_grad)
        return self.emit(module, x)

    def reshaped(self, x: fx.Node, shape: torch.Size) -> fx.Node:
        """x [N, ...] as [N, *shape[1:]]."""
        if shape[:1] != (BATCH,):
            raise Refused(f"{self.node.name}: mixes the images of a batch")
        before = value_of(x).shape
        if before == shape:
            return x
        if len(shape) == 2:
            return self.emit(nn.Flatten(), x)
        shuffle = _channel_shuffle(x, shape)
        if shuffle is not None:
            source, groups = shuffle
            return self.emit(nn.ChannelShuffle(groups), source)
        new = self.graph.call_method("reshape", (x, -1, *shape[1:]))
        return self.written(new, value_of(x).reshape(shape))

    def like(self, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """A function that gives the values of x in another shape."""
        return self.reshaped(x, self.node.meta["value"].shape)

    def permuted(self, x: fx.Node, order: list[int]) -> fx.Node:
        if order[0] != 0:
            raise Refused(f"{self.node.name}: mixes the images of a batch")
        return self.written(
            self.graph.call_method("permute", (x, *order)), value_of(x).permute(order)
        )


class _Constant:
    """A parameter or buffer of the network."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _refuse(what: str) -> Any:
    raise Refused(what)


def value_of(node: fx.Node) -> Tensor:
    return node.meta["value"]


def map_known(arguments: Any, known: dict[fx.Node, Any]) -> Any:
    """Arguments with each old node exchanged for what is known of it, lists included."""
    if isinstance(arguments, fx.Node):
        return known[arguments]
    if isinstance(arguments, (list, tuple)) and type(arguments) is not torch.Size:
        return type(arguments)(map_known(each, known) for each in arguments)
    if isinstance(arguments, dict):
        return {key: map_known(each, known) for key, each in arguments.items()}
    return arguments


def _lower(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _stripped(target: str) -> str:
    return target.removeprefix("model").removeprefix(".")


def _attribute(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    inner = name.endswith("_") and not name.endswith("__")
    return inner or node.kwargs.get("inplace") is True


def _ceiling_of(module: Any) -> float | None:
    """Where an activation saturates, infinity for a ReLU; None for what is no such activation."""
    if type(module) is nn.ReLU:
        return float("inf")
    if type(module) in (nn.ReLU6, nn.Hardtanh) and module.min_val == 0 and module.max_val > 0:
        return float(module.max_val)
    return None


def _by_channel(given: float | Tensor, value: Tensor) -> Tensor:
    """[C]: a number, or a constant that does not vary but along dim 1 of `value`."""
    if not isinstance(given, Tensor):
        return torch.full((value.shape[1],), float(given), dtype=value.dtype)
    tensor = given.detach().to(value.dtype)
    if tensor.numel() == 1:
        return tensor.reshape(1).repeat(value.shape[1])
    shape = [1] * (value.dim() - tensor.dim()) + list(tensor.shape)
    if tensor.numel() != value.shape[1] or len(shape) < 2 or shape[1] != tensor.numel():
        raise Refused(f"a constant of shape {list(given.shape)}, expected one value a channel")
    return tensor.reshape(-1).clone()


def _channel_shuffle(x: fx.Node, shape: torch.Size) -> tuple[fx.Node, int] | None:
    """(source, groups) where [N, C, ...] -> [N, g, C/g, ...] -> [N, C/g, g, ...] -> [N, C, ...]."""
    if x.op != "call_method" or x.target != "permute":
        return None
    split, *order = x.args
    assert isinstance(split, fx.Node)
    if split.op != "call_method" or split.target != "reshape":
        return None
    source = split.args[0]
    assert isinstance(source, fx.Node)
    groups = value_of(split).shape[1]
    swapped = order == [0, 2, 1, *range(3, value_of(split).dim())]
    if not swapped or value_of(source).shape != shape or value_of(split).shape[3:] != shape[2:]:
        return None
    return source, groups


# ---- The functions and methods of torch, by name ----

_Operation = Callable[..., Any]
_OPERATIONS: dict[str, _Operation] = {}


def _operation(*names: str) -> Callable[[_Operation], _Operation]:
    def register(operation: _Operation) -> _Operation:
        _OPERATIONS.update(dict.fromkeys(names, operation))
        return operation

    return register


@_operation("relu")
def _relu(to: _Normaliser, x: fx.Node, inplace: bool = False) -> fx.Node:
    return to.activation(x, float("inf"))


@_operation("relu6")
def _relu6(to: _Normaliser, x: fx.Node, inplace: bool = False) -> fx.Node:
    return to.activation(x, 6.0)


@_operation("hardtanh")
def _hardtanh(
    to: _Normaliser, x: fx.Node, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> fx.Node:
    if min_val != 0 or not max_val > 0:
        raise Refused(f"hardtanh({min_val:g}, {max_val:g})")
    return to.activation(x, float(max_val))


@_operation("clamp", "clip")
def _clamp(to: _Normaliser, x: fx.Node, min: Any = None, max: Any = None) -> fx.Node:
    known = isinstance(min, (int, float)) and (max is None or isinstance(max, (int, float)))
    if not known or min != 0 or not (max is None or max > 0):
        raise Refused(f"clamp({min}, {max})")
    return to.activation(x, float("inf") if max is None else float(max))


@_operation("clamp_min")
def _clamp_min(to: _Normaliser, x: fx.Node, min: Any) -> fx.Node:
    return _clamp(to, x, min)


@_operation("add")
def _add(to: _Normaliser, x: Any, other: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        raise Refused(f"add with alpha={alpha}")
    if not isinstance(x, fx.Node):
        x, other = other, x
    if not isinstance(x, fx.Node):
        raise Refused("a sum of constants")
    if not isinstance(other, fx.Node):
        return to.affine(x, 1.0, _constant(other))
    if value_of(x).shape != value_of(other).shape:
        shapes = f"{list(value_of(x).shape[1:])} and {list(value_of(other).shape[1:])}"
        raise Refused(f"add of shapes {shapes}, expected equal ones")
    return to.call(operator.add, x, other)


@_operation("sub")
def _sub(to: _Normaliser, x: Any, other: Any, alpha: Any = 1) -> Any:
    if isinstance(other, fx.Node):
        return _add(to, x, to.affine(other, -1.0), alpha)
    return _add(to, x, -_constant(other), alpha)


@_operation("mul")
def _mul(to: _Normaliser, x: Any, other: Any) -> Any:
    if not isinstance(x, fx.Node):
        x, other = other, x
    if not isinstance(x, fx.Node) or isinstance(other, fx.Node):
        raise Refused("mul of two values")
    return to.affine(x, _constant(other))


@_operation("div", "truediv")
def _div(to: _Normaliser, x: Any, other: Any) -> Any:
    if not isinstance(x, fx.Node) or isinstance(other, fx.Node):
        raise Refused("div by a value")
    return to.affine(x, 1 / _constant(other))


@_operation("neg")
def _neg(to: _Normaliser, x: Any) -> Any:
    return to.affine(x, -1.0)


def _constant(given: Any) -> Any:
    return given.value if isinstance(given, _Constant) else given


@_operation("cat")
def _cat(to: _Normaliser, tensors: Any, dim: int = 0) -> fx.Node:
    if not all(isinstance(each, fx.Node) for each in tensors):
        raise Refused("cat with a constant")
    dim = dim % value_of(tensors[0]).dim()
    if dim == 0:
        raise Refused("cat over the batch")
    if len(tensors) == 1:
        return tensors[0]
    return to.call(torch.cat, list(tensors), dim)


for _name in ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"):
    _operation(_name)(_Normaliser.like)


@_operation("contiguous", "clone")
def _same(to: _Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return x


@_operation("to", "float", "double")
def _to(to: _Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    if to.node.meta["value"].dtype != value_of(x).dtype:
        raise Refused("a change of dtype")
    return x


@_operation("permute")
def _permute(to: _Normaliser, x: fx.Node, *dims: Any, **kwargs: Any) -> fx.Node:
    dims = kwargs.get("dims", dims)
    order = dims[0] if isinstance(dims[0], (list, tuple)) else dims
    return to.permuted(x, [dim % value_of(x).dim() for dim in order])


@_operation("transpose", "swapaxes", "swapdims")
def _transpose(to: _Normaliser, x: fx.Node, dim0: int, dim1: int) -> fx.Node:
    order = list(range(value_of(x).dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return to.permuted(x, order)


@_operation("chunk", "split", "tensor_split")
def _chunk(to: _Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> list[fx.Node]:
    parts = to.node.meta["value"]
    if any(part.shape[2:] != value_of(x).shape[2:] for part in parts):
        raise Refused(f"{to.node.name}: expected parts of the channels, dim=1")
    slices, first = [], 0
    for part in parts:
        last = first + part.shape[1]
        slices.append(to.call(operator.getitem, x, (slice(None), slice(first, last))))
        first = last
    return slices


@_operation("getitem")
def _getitem(to: _Normaliser, x: Any, index: Any) -> Any:
    if isinstance(x, list):
        return x[index]
    if not isinstance(x, fx.Node) or not isinstance(index, tuple) or index[0] != slice(None):
        raise Refused(f"{to.node.name}: expected x[:, ...]")
    if not all(isinstance(each, (int, slice)) for each in index):
        raise Refused(f"{to.node.name}: expected slices and numbers")
    sizes = value_of(x).shape
    slices = tuple(
        each if isinstance(each, slice) else slice(each % size, each % size + 1)
        for each, size in zip(index, sizes, strict=False)
    )
    part = to.call(operator.getitem, x, slices)
    return to.reshaped(part, to.node.meta["value"].shape)


@_operation("mean")
def _mean(to: _Normaliser, x: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node:
    rank = value_of(x).dim()
    dims = (dim,) if isinstance(dim, int) else dim
    if dims is None or sorted(each % rank for each in dims) != list(range(2, rank)):
        raise Refused(f"{to.node.name}: expected the mean of whole maps")
    pool = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}[rank](1)
    pooled = to.emit(pool, x)
    return pooled if keepdim else to.emit(nn.Flatten(), pooled)


@_operation("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def _dropout(
    to: _Normaliser, x: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False
) -> fx.Node:
    if training:  # in a network that is in eval mode
        raise Refused("a dropout that is always on")
    return to.dropout(x, p)


@_operation("interpolate")
def _interpolate(to: _Normaliser, x: fx.Node, **kwargs: Any) -> fx.Node:
    antialias = kwargs.pop("antialias", False)
    mode = kwargs.get("mode", "nearest")
    if antialias or mode not in _LINEAR_UPSAMPLING:
        raise Refused(f"interpolate of mode {mode}")
    return to.emit(nn.Upsample(**kwargs), x)


@_operation("pad")
def _pad(to: _Normaliser, x: fx.Node, pad: Any, mode: str = "constant", value: Any = 0) -> fx.Node:
    if mode != "constant" or value not in (None, 0):
        raise Refused(f"pad of mode {mode} with {value}")
    rank = value_of(x).dim()
    if len(pad) != 2 * (rank - 2):
        return to.kept_apart(to.call(F.pad, x, list(pad)))
    maker: Any = {3: nn.ZeroPad1d, 4: nn.ZeroPad2d, 5: nn.ZeroPad3d}[rank]
    return to.emit(maker(tuple(pad)), x)


def _pool(maker: Any) -> _Operation:
    """A pool by function as the module of the same name."""

    def operation(to: _Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        if kwargs.pop("return_indices", False):
            raise Refused(f"{maker.__name__} with indices")
        return to.emit(maker(*args, **kwargs), x)

    return operation


for _n in (1, 2, 3):
    for _kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        _snake = _kind.replace("Pool", "_pool").replace("AdaptiveA", "adaptive_a")
        _snake = _snake.replace("AdaptiveM", "adaptive_m").lower()
        _operation(f"{_snake}{_n}d")(_pool(getattr(nn, f"{_kind}{_n}d")))


def _given(parameter: Any) -> Tensor | None:
    if parameter is not None and not isinstance(parameter, _Constant):
        raise Refused("a layer whose weights are computed")
    return None if parameter is None else parameter.value


def _owned(parameter: Any) -> Any:
    """A copy of a parameter or buffer."""
    given = _given(parameter)
    if isinstance(given, nn.Parameter):
        return nn.Parameter(given.detach().clone(), given.requires_grad)
    return None if given is None else given.detach().clone()


@_operation("linear")
def _linear(to: _Normaliser, x: fx.Node, weight: Any, bias: Any = None) -> fx.Node:
    kernel = _given(weight)
    assert kernel is not None
    module = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None, device="meta")
    module.weight, module.bias = _owned(weight), _owned(bias)
    return to.emit(module, x, to._place())


def _convolution(maker: Any) -> _Operation:
    def operation(
        to: _Normaliser,
        x: fx.Node,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> fx.Node:
        kernel = _given(weight)
        assert kernel is not None
        module = maker(
            *(kernel.shape[1] * groups, kernel.shape[0], tuple(kernel.shape[2:])),
            *(stride, padding, dilation, groups, bias is not None),
            device="meta",
        )
        module.weight, module.bias = _owned(weight), _owned(bias)
        return to.emit(module, x, to._place())

    return operation


for _n in (1, 2, 3):
    _operation(f"conv{_n}d")(_convolution(getattr(nn, f"Conv{_n}d")))


@_operation("batch_norm")
def _batch_norm(
    to: _Normaliser,
    x: fx.Node,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> fx.Node:
    mean = _given(running_mean)
    if training or mean is None:
        raise Refused("batch_norm without running statistics")
    maker = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(
        value_of(x).dim(), nn.BatchNorm2d
    )
    norm: _BatchNorm = maker(len(mean), eps, momentum, affine=weight is not None)
    norm.running_mean, norm.running_var = _owned(running_mean), _owned(running_var)
    if weight is not None:
        norm.weight, norm.bias = _owned(weight), _owned(bias)
    return to.emit(norm.eval(), x, to._place())


#: Other names of the same operation.
_CANONICAL = {
    "concat": "cat",
    "concatenate": "cat",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
}
_CANONICAL |= {f"{name}_": _CANONICAL.get(name, name) for name in [*_OPERATIONS, *_CANONICAL]}

#: The name of each function object; a function of another library has none, whatever it is called.
_NAME_OF: dict[Any, str] = {
    getattr(room, name): name
    for room in (torch, F, operator)
    for name in [*_OPERATIONS, *_CANONICAL]
    if hasattr(room, name)
}
