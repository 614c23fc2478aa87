"""A trained model as the engine's layers: module by module, or node by node of its graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..errors import UsageError
from ..models import MembraneBlock, Network, ResidualBlock
from ..models.graph import TIME_FUNCTIONS, Affine, GraphNetwork, mean_over_time, split_time
from ..nn import BatchNormLIF, FusedLIF, Readout, SharedDropout, TimeSequential, direct
from ..nn.hooks import changed_by_hooks
from .builder import Builder, Shape, Value, pair, unsupported
from .layer import Layer, Window

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, SharedDropout)
_SEQUENTIAL = (nn.Sequential.forward, TimeSequential.forward)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def layers_of(
    model: nn.Module, image_shape: Shape | None = None, timesteps: int = 1
) -> list[Layer]:
    """The engine's layers of a model in eval mode, float32.

    Raises:
        UsageError: an operation that the engine does not have, by its name; weights that are not
            finite; a graph without image_shape.
    """
    builder = Builder(image_shape, timesteps)
    reader = _Reader(builder)
    if isinstance(model, GraphNetwork):
        value = reader.graph(model.graph_module, builder.image, "", model.graph_module.graph)
    else:
        value = reader.module("", model, builder.image)
    summed = isinstance(model, (Network, nn.Sequential))
    if timesteps > 1 and not summed and not reader.averages:
        raise UsageError(
            f"timesteps: expected 1 for a graph that ends without mean_over_time, got {timesteps}"
        )
    builder.output(value, timesteps if reader.averages else 1)
    return builder.layers


class _Reader:
    """Hands the operations of a model to a builder.

    Attributes:
        averages: the logits are means over time, not sums.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.averages = False

    def module(self, name: str, module: nn.Module, value: Value) -> Value:
        """What a module makes of a value."""
        if changed_by_hooks(module):
            raise unsupported(
                name or "model", module, "expected no hooks and no forward of its own"
            )
        if isinstance(module, Network) or type(module).forward in _SEQUENTIAL:
            for child, each in _children(module, name):
                value = self.module(child, each, value)
            return value
        name = name or "model"
        if type(module) in _MODULES:
            return _MODULES[type(module)](self, name, module, value)
        graph = module.graph if isinstance(module, fx.GraphModule) else _traced(name, module)
        return self.graph(module, value, "" if name == "model" else name, graph)

    def graph(self, root: nn.Module, value: Value, name: str, graph: fx.Graph) -> Value:
        """What the nodes of a module's graph make of a value."""
        known: dict[fx.Node, Any] = {}
        images = next(node for node in graph.nodes if node.op == "placeholder")
        for node in graph.nodes:
            if node.op == "output":
                result = map_arg(node.args[0], known.__getitem__)
                if not isinstance(result, Value):
                    raise UsageError(f"{name or 'model'}: expected one output, got {result}")
                return result
            if node.op == "placeholder":
                known[node] = value if node is images else None
                continue
            place = f"{name}.{node.name}" if name else node.name
            args: Any = map_arg(node.args, known.__getitem__)
            kwargs: Any = map_arg(node.kwargs, known.__getitem__)
            if node.op == "call_module" and len(args) == 1 and not kwargs:
                child = root.get_submodule(str(node.target))
                self._check_time(place, child, node.args[0])
                inner = f"{name}.{node.target}" if name else str(node.target)
                made = self.module(inner, child, args[0])
            else:
                made = self._call(place, node, args, kwargs)
            if _uses(node) > 1 and isinstance(made, Value):
                made = self.builder.settle(made, place)
            known[node] = made
        raise UsageError(f"{name or 'model'}: expected a graph with an output")

    def _check_time(self, place: str, module: nn.Module, given: Any) -> None:
        """A FusedLIF reads its first axis as time: that of a batch would be another network."""
        if not isinstance(module, (FusedLIF, BatchNormLIF)):
            return
        if given.target not in (direct, split_time, "unflatten"):
            raise unsupported(place, module, f"expected [T, B, ...] of split_time, got {given}")

    def _call(self, place: str, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, place, *args, **kwargs)
        if node.op == "call_method" and node.target in _METHODS:
            return _METHODS[node.target](self, place, *args, **kwargs)
        what = getattr(node.target, "__name__", str(node.target))
        raise UsageError(f"{place} ({what}): the event engine has no such operation")

    # ---- Modules ----

    def _block(self, name: str, block: ResidualBlock, value: Value) -> Value:
        value = self.builder.settle(value, name)
        main = self.module(f"{name}.main", block.main, value)
        both = self.builder.add(main, self.module(f"{name}.shortcut", block.shortcut, value), name)
        return self.module(f"{name}.neuron", block.neuron, both)

    def _membrane_block(self, name: str, block: MembraneBlock, value: Value) -> Value:
        value = self.builder.settle(value, name)
        spikes = self.module(f"{name}.neuron", block.neuron, value)
        main = self.module(f"{name}.main", block.main, spikes)
        if len(block.shortcut):
            value = self.module(f"{name}.shortcut", block.shortcut, spikes)
        return self.builder.add(main, value, name)

    def _norm_and_neurons(self, name: str, module: BatchNormLIF, value: Value) -> Value:
        value = self.module(f"{name}.norm", module.norm, value)
        return self.module(f"{name}.neuron", module.neuron, value)

    def _batch_norm(self, name: str, norm: nn.Module, value: Value) -> Value:
        if type(norm) is not nn.SyncBatchNorm and value.flat != (type(norm) is nn.BatchNorm1d):
            wanted = "no" if value.flat else "a"
            raise unsupported(name, norm, f"expected {wanted} Flatten before")
        return self.builder.batch_norm(value, name, norm)

    def _flatten(self, name: str, module: nn.Flatten, value: Value) -> Value:
        if module.start_dim != 1 or module.end_dim not in (-1, 3):
            raise unsupported(name, module, "expected start_dim=1 and end_dim=-1")
        return self.builder.flatten(value)

    def _max_pool(self, name: str, module: nn.MaxPool2d, value: Value) -> Value:
        if module.return_indices:
            raise unsupported(name, module, "expected return_indices=False")
        window = self._window(name, module, value, pair(module.dilation))
        return self.builder.max_pool(value, name, window)

    def _average_pool(self, name: str, module: nn.AvgPool2d, value: Value) -> Value:
        kernel = pair(module.kernel_size)
        if module.divisor_override not in (None, math.prod(kernel)):
            raise unsupported(name, module, "expected no divisor_override")
        if pair(module.padding) != (0, 0) and not module.count_include_pad:
            raise unsupported(name, module, "expected count_include_pad=True")
        window = self._window(name, module, value, (1, 1))
        if window.after != window.before:
            raise unsupported(name, module, "expected ceil_mode=False")
        return self.builder.average_pool(value, name, window)

    def _adaptive_pool(self, name: str, module: nn.AdaptiveAvgPool2d, value: Value) -> Value:
        return self.builder.adaptive_pool(value, name, self._size(name, module, value))

    def _adaptive_max_pool(self, name: str, module: nn.AdaptiveMaxPool2d, value: Value) -> Value:
        size = self._size(name, module, value)
        assert value.shape is not None
        if value.shape[1] % size[0] or value.shape[2] % size[1]:
            raise unsupported(name, module, f"expected a divisor of {value.shape[1:]}, got {size}")
        kernel = (value.shape[1] // size[0], value.shape[2] // size[1])
        return self.builder.max_pool(value, name, Window(kernel, kernel))

    def _size(self, name: str, module: Any, value: Value) -> tuple[int, int]:
        if value.shape is None:
            raise unsupported(name, module, "needs image_shape=(channels, height, width)")
        size = module.output_size
        size = size if isinstance(size, tuple) else (size, size)
        if getattr(module, "return_indices", False):
            raise unsupported(name, module, "expected return_indices=False")
        rows, columns = (
            have if want is None else want for have, want in zip(value.shape[1:], size, strict=True)
        )
        return rows, columns

    def _pad(self, name: str, module: nn.ZeroPad2d, value: Value) -> Value:
        left, right, top, bottom = module.padding
        if min(module.padding) < 0:
            raise unsupported(name, module, f"expected no negative padding, got {module.padding}")
        window = Window((1, 1), before=(top, left), after=(bottom, right))
        return self.builder.average_pool(value, name, window)

    def _shuffle(self, name: str, module: Any, value: Value) -> Value:
        if value.shape is None or value.shape[0] % module.groups:
            raise unsupported(name, module, f"expected channels in {module.groups} groups")
        order = torch.arange(value.shape[0]).view(module.groups, -1).T.flatten()
        return self.builder.channels(value, name, order.tolist())

    def _window(self, name: str, module: Any, value: Value, dilation: tuple[int, int]) -> Window:
        """Of a pool; in ceil_mode the last windows reach beyond the padding."""
        kernel, stride, padding = map(pair, (module.kernel_size, module.stride, module.padding))
        after = padding
        if module.ceil_mode:
            if value.shape is None:
                raise unsupported(name, module, "ceil_mode needs image_shape=(channels, ...)")
            after = tuple(
                _ceil_padding(*each)
                for each in zip(value.shape[1:], kernel, stride, dilation, padding, strict=True)
            )  # type: ignore[assignment]
        return Window(kernel, stride, dilation, padding, after)

    # ---- Functions and methods ----

    def _same(self, place: str, value: Value, *args: Any, **kwargs: Any) -> Value:
        return value

    def _mean_over_time(self, place: str, value: Value, *args: Any, **kwargs: Any) -> Value:
        self.averages = True
        return value

    def _add(self, place: str, a: Any, b: Any, *, alpha: float = 1) -> Value:
        if isinstance(a, (int, float)) or isinstance(b, (int, float)) or alpha != 1:
            raise UsageError(f"{place} (add): expected two values of the network")
        return self.builder.add(a, b, place)

    def _cat(self, place: str, tensors: list[Value], dim: int = 0) -> Value:
        if dim != 1 and not (dim == -3 and not tensors[0].flat):
            raise UsageError(f"{place} (cat): expected dim=1, got {dim}")
        return self.builder.concat(tensors, place)

    def _getitem(self, place: str, value: Any, index: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return value[index]
        every = slice(None)
        right = isinstance(index, tuple) and len(index) >= 2 and index[0] == every
        if not right or any(each != every for each in index[2:]) or not isinstance(index[1], slice):
            raise UsageError(f"{place} (getitem): expected a slice of channels, got {index}")
        if value.shape is None:
            raise UsageError(f"{place} (getitem): needs image_shape=(channels, height, width)")
        return self.builder.channels(value, place, list(range(value.shape[0]))[index[1]])

    def _chunk(self, place: str, value: Value, chunks: int, dim: int = 0) -> list[Value]:
        if dim != 1 or value.shape is None:
            raise UsageError(f"{place} (chunk): expected dim=1 and a known image_shape, got {dim}")
        source = self.builder.settle(value, place)
        order = torch.arange(value.shape[0]).chunk(chunks)
        return [self.builder.channels(source, place, each.tolist()) for each in order]

    def _flattened(self, place: str, value: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        if (start_dim, end_dim) == (0, 1):
            return value  # time joins the batch
        if start_dim != 1 or end_dim not in (-1, 3):
            raise UsageError(f"{place} (flatten): expected start_dim=1, got {start_dim}")
        return self.builder.flatten(value)

    def _unflatten(self, place: str, value: Value, dim: int, sizes: Any) -> Value:
        if dim != 0 or len(sizes) != 2:
            raise UsageError(f"{place} (unflatten): expected to part time from the batch")
        return value

    def _sizes(self, place: str, value: Value, dim: int | None = None) -> Any:
        if value.shape is None:
            raise UsageError(f"{place} (size): needs image_shape=(channels, height, width)")
        sizes = (-1, math.prod(value.shape)) if value.flat else (-1, *value.shape)
        return sizes if dim is None else sizes[dim]

    def _getattr(self, place: str, value: Value, name: str) -> Any:
        if name != "shape":
            raise UsageError(f"{place} (getattr): expected shape, got {name}")
        return self._sizes(place, value)

    def _reshape(self, place: str, value: Value, *sizes: Any) -> Value:
        shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        have = value.shape
        flat = have is not None and len(shape) == 2 and shape[1] in (-1, math.prod(have))
        if flat:
            return self.builder.flatten(value)
        if have is None or tuple(shape[1:]) != (have[:1] if value.flat else have):
            raise UsageError(f"{place} (reshape): expected to flatten, got {tuple(shape)}")
        return value

    def _mean(self, place: str, value: Value, dim: Any = None, keepdim: bool = False) -> Value:
        dims = dim if isinstance(dim, (list, tuple)) else ()
        if value.flat or sorted(d % 4 for d in dims) != [2, 3]:
            raise UsageError(f"{place} (mean): expected the mean over rows and columns, got {dim}")
        pooled = self.builder.adaptive_pool(value, place, (1, 1))
        return pooled if keepdim else self.builder.flatten(pooled)


def _function_of(kind: Callable[..., nn.Module]) -> Callable[..., Value]:
    def call(reader: _Reader, place: str, value: Value, *args: Any, **kwargs: Any) -> Value:
        return reader.module(place, kind(*args, **kwargs), value)

    return call


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.MaxPool2d:
    """In the order of torch's function, which is not the module's."""
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _neurons(reader: _Reader, name: str, module: FusedLIF, value: Value) -> Value:
    return reader.builder.neurons(value, name, module)


def _weighted(reader: _Reader, name: str, module: nn.Module, value: Value) -> Value:
    return reader.builder.weighted(value, name, module)


def _affine(reader: _Reader, name: str, module: Affine, value: Value) -> Value:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return reader.builder.affine(value, name, module.weight, bias)


def _identity(reader: _Reader, name: str, module: nn.Module, value: Value) -> Value:
    return value


#: Exactly these, for a subclass may do something else.
_MODULES: dict[type, Callable[..., Value]] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_BATCH_NORMS, _Reader._batch_norm),
    **dict.fromkeys((nn.Conv2d, nn.Linear, Readout), _weighted),
    FusedLIF: _neurons,
    BatchNormLIF: _Reader._norm_and_neurons,
    ResidualBlock: _Reader._block,
    MembraneBlock: _Reader._membrane_block,
    Affine: _affine,
    nn.Flatten: _Reader._flatten,
    nn.MaxPool2d: _Reader._max_pool,
    nn.AvgPool2d: _Reader._average_pool,
    nn.AdaptiveAvgPool2d: _Reader._adaptive_pool,
    nn.AdaptiveMaxPool2d: _Reader._adaptive_max_pool,
    nn.ZeroPad2d: _Reader._pad,
    nn.ChannelShuffle: _Reader._shuffle,
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(TIME_FUNCTIONS, _Reader._same),
    mean_over_time: _Reader._mean_over_time,
    getattr: _Reader._getattr,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _Reader._add),
    **dict.fromkeys((torch.cat, torch.concat), _Reader._cat),
    operator.getitem: _Reader._getitem,
    torch.flatten: _Reader._flattened,
    torch.chunk: _Reader._chunk,
    torch.mean: _Reader._mean,
    F.dropout: _Reader._same,
    F.max_pool2d: _function_of(_max_pool),
    F.avg_pool2d: _function_of(nn.AvgPool2d),
    F.adaptive_avg_pool2d: _function_of(nn.AdaptiveAvgPool2d),
}

_METHODS: dict[str, Callable[..., Any]] = {
    "add": _Reader._add,
    "add_": _Reader._add,
    "flatten": _Reader._flattened,
    "chunk": _Reader._chunk,
    "mean": _Reader._mean,
    "reshape": _Reader._reshape,
    "view": _Reader._reshape,
    "contiguous": _Reader._same,
    "unflatten": _Reader._unflatten,
    "size": _Reader._sizes,
}


class _Tracer(fx.Tracer):
    """Modules that the reader knows are nodes; the rest is looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = type(module) in _MODULES or isinstance(module, (Network, TimeSequential))
        return known or super().is_leaf_module(module, name)


def _traced(name: str, module: nn.Module) -> fx.Graph:
    if type(module).__module__.startswith("torch.nn") or not list(module.children()):
        raise unsupported(name, module, "the event engine has no such module")
    try:
        return _Tracer(autowrap_functions=TIME_FUNCTIONS).trace(module)
    except Exception as error:  # whatever its forward raises for a proxy
        raise unsupported(name, module, f"torch.fx cannot trace it ({error})") from error


def _uses(node: fx.Node) -> int:
    """How often other nodes read it: one of them may read it twice, as torch.cat([x, x]) does."""
    reads: list[fx.Node] = []
    for user in node.users:
        map_arg((user.args, user.kwargs), reads.append)
    return reads.count(node)


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Network):
        yield "layers", module.layers
        return
    for key, child in module.named_children():
        yield f"{name}.{key}" if name else key, child


def _ceil_padding(size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """Padding at the end that gives torch's ceil_mode: no window begins beyond the first one."""
    reach = dilation * (kernel - 1) + 1
    positions = -(-(size + 2 * padding - reach) // stride) + 1
    if (positions - 1) * stride >= size + padding:
        positions -= 1
    return max(padding, (positions - 1) * stride + reach - size - padding)
