"""A traced network in few kinds of nodes: those that `iirsnn.models.graph` lists.

Activations stand as nn.ReLU, or nn.Hardtanh(0, a) where they saturate; each call of a module or a
function is a module of its own, so that what is used in two places is two things from here on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..models.graph import Affine, GraphTracer
from ..nn import SharedDropout
from .node_kinds import (
    DROPOUTS,
    EXPECTED,
    LAYERS,
    LINEAR_UPSAMPLING,
    MOVING,
    NORMS,
    SPATIAL,
    Constant,
    Refused,
    value_of,
)
from .torch_functions import run_function
from .tracing import BATCH, on_meta


def normal_form(traced: fx.GraphModule, kind: str) -> fx.GraphModule:
    """The same network in the kinds of nodes that `iirsnn.models.graph` lists.

    Args:
        traced: what `trace` gives.
        kind: the network's class, for messages.

    Raises:
        ValueError: nodes that are not linear and no ReLU, all named with their places.
    """
    normaliser = Normaliser(traced)
    normaliser.run(kind)
    return fx.GraphModule(normaliser.modules, normaliser.graph)


class Normaliser:
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
                self.refused.append(f"{self.place() or kind} ({error})")
                self.known[node] = self._stand_in(node)
        if self.refused:
            shown = ", ".join(self.refused[:6])
            more = f" and {len(self.refused) - 6} more" if len(self.refused) > 6 else ""
            raise ValueError(f"ann: expected {EXPECTED}, got {shown}{more}")
        self.graph.lint()

    # ---- Writing ----

    def emit(self, module: nn.Module, x: fx.Node, name: str | None = None) -> fx.Node:
        """A node that calls `module`, under a free name."""
        name = self._free(name or ".".join(filter(None, [self.place(), _lower(module)])))
        self.modules[name] = module
        return self.written(self.graph.call_module(name, (x,)), on_meta(module, value_of(x)))

    def call(self, function: Callable, *args: Any) -> fx.Node:
        value = function(*map_arg(args, value_of))
        return self.written(self.graph.call_function(function, args), value)

    def written(self, node: fx.Node, value: Tensor) -> fx.Node:
        node.meta["value"] = value
        return node

    def _free(self, name: str) -> str:
        parent = self._taken_parent(name)
        while parent:  # a module of its own by now, as where a norm's forward calls an activation
            name = f"{parent}_{name.removeprefix(f'{parent}.')}"
            parent = self._taken_parent(name)
        taken, free, number = self.modules, name, 0
        while any(free == other or other.startswith(f"{free}.") for other in taken):
            number += 1
            free = f"{name}_{number}"
        return free

    def _taken_parent(self, name: str) -> str | None:
        return next((taken for taken in self.modules if name.startswith(f"{taken}.")), None)

    def place(self) -> str:
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
            return Constant(_attribute(self.traced, str(node.target)))
        args, kwargs = map_known((node.args, node.kwargs), self.known)
        if node.op == "output":
            return self._output(args[0])
        if node.op == "call_module":
            return self._module(self.traced.get_submodule(str(node.target)), *args, **kwargs)
        result = run_function(self, node, args, kwargs)
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
            result = self.activation(x, ceiling, self.place())
            if getattr(module, "inplace", False):
                self._now(self.node, result)
            return result
        if kind in DROPOUTS:
            return self.dropout(x, module.p)
        if kind is nn.Upsample and module.mode not in LINEAR_UPSAMPLING:
            raise Refused(f"Upsample of mode {module.mode}")
        module = copy.deepcopy(module)
        module._forward_hooks.clear()
        return self.kept_apart(self.emit(module, x, self.place()))

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

    def permuted(self, x: fx.Node, order: list[int]) -> fx.Node:
        if order[0] != 0:
            raise Refused(f"{self.node.name}: mixes the images of a batch")
        return self.written(
            self.graph.call_method("permute", (x, *order)), value_of(x).permute(order)
        )


def _refuse(what: str) -> Any:
    raise Refused(what)


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
