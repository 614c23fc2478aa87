"""The functions and methods of torch that a network in normal form may call, by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .node_kinds import LINEAR_UPSAMPLING, Constant, Refused, value_of

if TYPE_CHECKING:
    from .normal_form import Normaliser

_Operation = Callable[..., Any]
_OPERATIONS: dict[str, _Operation] = {}


def _operation(*names: str) -> Callable[[_Operation], _Operation]:
    def register(operation: _Operation) -> _Operation:
        _OPERATIONS.update(dict.fromkeys(names, operation))
        return operation

    return register


@_operation("relu")
def _relu(to: Normaliser, x: fx.Node, inplace: bool = False) -> fx.Node:
    return to.activation(x, float("inf"))


@_operation("relu6")
def _relu6(to: Normaliser, x: fx.Node, inplace: bool = False) -> fx.Node:
    return to.activation(x, 6.0)


@_operation("hardtanh")
def _hardtanh(
    to: Normaliser, x: fx.Node, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> fx.Node:
    if min_val != 0 or not max_val > 0:
        raise Refused(f"hardtanh({min_val:g}, {max_val:g})")
    return to.activation(x, float(max_val))


@_operation("clamp", "clip")
def _clamp(to: Normaliser, x: fx.Node, min: Any = None, max: Any = None) -> fx.Node:
    known = isinstance(min, (int, float)) and (max is None or isinstance(max, (int, float)))
    if not known or min != 0 or not (max is None or max > 0):
        raise Refused(f"clamp({min}, {max})")
    return to.activation(x, float("inf") if max is None else float(max))


@_operation("clamp_min")
def _clamp_min(to: Normaliser, x: fx.Node, min: Any) -> fx.Node:
    return _clamp(to, x, min)


@_operation("add")
def _add(to: Normaliser, x: Any, other: Any, alpha: Any = 1) -> Any:
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
def _sub(to: Normaliser, x: Any, other: Any, alpha: Any = 1) -> Any:
    if isinstance(other, fx.Node):
        return _add(to, x, to.affine(other, -1.0), alpha)
    return _add(to, x, -_constant(other), alpha)


@_operation("mul")
def _mul(to: Normaliser, x: Any, other: Any) -> Any:
    if not isinstance(x, fx.Node):
        x, other = other, x
    if not isinstance(x, fx.Node) or isinstance(other, fx.Node):
        raise Refused("mul of two values")
    return to.affine(x, _constant(other))


@_operation("div", "truediv")
def _div(to: Normaliser, x: Any, other: Any) -> Any:
    if not isinstance(x, fx.Node) or isinstance(other, fx.Node):
        raise Refused("div by a value")
    return to.affine(x, 1 / _constant(other))


@_operation("neg")
def _neg(to: Normaliser, x: Any) -> Any:
    return to.affine(x, -1.0)


def _constant(given: Any) -> Any:
    return given.value if isinstance(given, Constant) else given


@_operation("cat")
def _cat(to: Normaliser, tensors: Any, dim: int = 0) -> fx.Node:
    if not all(isinstance(each, fx.Node) for each in tensors):
        raise Refused("cat with a constant")
    dim = dim % value_of(tensors[0]).dim()
    if dim == 0:
        raise Refused("cat over the batch")
    if len(tensors) == 1:
        return tensors[0]
    return to.call(torch.cat, list(tensors), dim)


@_operation("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze")
def _reshape(to: Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return to.reshaped(x, to.node.meta["value"].shape)


@_operation("contiguous", "clone")
def _same(to: Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return x


@_operation("to", "float", "double")
def _to(to: Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    if to.node.meta["value"].dtype != value_of(x).dtype:
        raise Refused("a change of dtype")
    return x


@_operation("permute")
def _permute(to: Normaliser, x: fx.Node, *dims: Any, **kwargs: Any) -> fx.Node:
    dims = kwargs.get("dims", dims)
    order = dims[0] if isinstance(dims[0], (list, tuple)) else dims
    return to.permuted(x, [dim % value_of(x).dim() for dim in order])


@_operation("transpose", "swapaxes", "swapdims")
def _transpose(to: Normaliser, x: fx.Node, dim0: int, dim1: int) -> fx.Node:
    order = list(range(value_of(x).dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return to.permuted(x, order)


@_operation("chunk", "split", "tensor_split")
def _chunk(to: Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> list[fx.Node]:
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
def _getitem(to: Normaliser, x: Any, index: Any) -> Any:
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
def _mean(to: Normaliser, x: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node:
    rank = value_of(x).dim()
    dims = (dim,) if isinstance(dim, int) else dim
    if dims is None or sorted(each % rank for each in dims) != list(range(2, rank)):
        raise Refused(f"{to.node.name}: expected the mean of whole maps")
    pool = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}[rank](1)
    pooled = to.emit(pool, x)
    return pooled if keepdim else to.emit(nn.Flatten(), pooled)


@_operation("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def _dropout(
    to: Normaliser, x: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False
) -> fx.Node:
    if training:  # in a network that is in eval mode
        raise Refused("a dropout that is always on")
    return to.dropout(x, p)


@_operation("interpolate")
def _interpolate(to: Normaliser, x: fx.Node, **kwargs: Any) -> fx.Node:
    antialias = kwargs.pop("antialias", False)
    mode = kwargs.get("mode", "nearest")
    if antialias or mode not in LINEAR_UPSAMPLING:
        raise Refused(f"interpolate of mode {mode}")
    return to.emit(nn.Upsample(**kwargs), x)


@_operation("pad")
def _pad(to: Normaliser, x: fx.Node, pad: Any, mode: str = "constant", value: Any = 0) -> fx.Node:
    if mode != "constant" or value not in (None, 0):
        raise Refused(f"pad of mode {mode} with {value}")
    rank = value_of(x).dim()
    if len(pad) != 2 * (rank - 2):
        return to.kept_apart(to.call(F.pad, x, list(pad)))
    maker: Any = {3: nn.ZeroPad1d, 4: nn.ZeroPad2d, 5: nn.ZeroPad3d}[rank]
    return to.emit(maker(tuple(pad)), x)


def _pool(maker: Any) -> _Operation:
    """A pool by function as the module of the same name."""

    def operation(to: Normaliser, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
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
    if parameter is not None and not isinstance(parameter, Constant):
        raise Refused("a layer whose weights are computed")
    return None if parameter is None else parameter.value


def _owned(parameter: Any) -> Any:
    """A copy of a parameter or buffer."""
    given = _given(parameter)
    if isinstance(given, nn.Parameter):
        return nn.Parameter(given.detach().clone(), given.requires_grad)
    return None if given is None else given.detach().clone()


@_operation("linear")
def _linear(to: Normaliser, x: fx.Node, weight: Any, bias: Any = None) -> fx.Node:
    kernel = _given(weight)
    assert kernel is not None
    module = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None, device="meta")
    module.weight, module.bias = _owned(weight), _owned(bias)
    return to.emit(module, x, to.place())


def _convolution(maker: Any) -> _Operation:
    def operation(
        to: Normaliser,
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
        return to.emit(module, x, to.place())

    return operation


for _n in (1, 2, 3):
    _operation(f"conv{_n}d")(_convolution(getattr(nn, f"Conv{_n}d")))


@_operation("batch_norm")
def _batch_norm(
    to: Normaliser,
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
    return to.emit(norm.eval(), x, to.place())


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


def run_function(to: Normaliser, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node that calls a function or a method becomes, written by `to`.

    Raises:
        Refused: it has no place in a spiking network, or not with these arguments.
    """
    name = node.target if node.op == "call_method" else _NAME_OF.get(node.target)
    operation = _OPERATIONS.get(_CANONICAL.get(str(name), str(name)))
    if name is None or operation is None:
        raise Refused(getattr(node.target, "__name__", str(node.target)))
    try:
        return operation(to, *args, **kwargs)
    except TypeError as error:  # an argument that the operation does not have
        raise Refused(f"{name}: {error}") from error
