"""A network as a graph, by torch.fx, with the shape of every value known while it is traced.

Python that asks for shapes (`if x.shape[-1] < 7`, `x.view(x.size(0), -1)`) therefore runs as it
stands; only a branch on the values of a tensor cannot be traced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves, tree_map

#: A prime that is no layer's size, so that an axis of this length is the batch.
BATCH = 7919

#: What Python may ask of a tensor without touching its values.
_FACTS = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_meta", "requires_grad")


class _Whole(nn.Module):
    """The network with one input; its other arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


def trace(ann: nn.Module, image_shape: tuple[int, ...], dtype: torch.dtype) -> fx.GraphModule:
    """The graph of the ANN in its present mode; names in it begin with `model.`.

    Each node's meta["value"] is what it gives for BATCH images, on the meta device.

    Raises:
        ValueError: a network that branches on the values of a tensor, or that fails on such images.
    """
    whole = _Whole(ann).train(ann.training)
    tracer = _Tracer(torch.empty(BATCH, *image_shape, dtype=dtype, device="meta"), whole)
    try:
        graph = tracer.trace(whole)
    except TraceError as error:
        raise ValueError(
            f"ann: expected a network whose path does not depend on its values, got one that "
            f"torch.fx cannot trace in {tracer.place or type(ann).__name__} ({error})"
        ) from error
    except Exception as error:
        raise ValueError(
            f"ann: cannot run on images {list(image_shape)}: {type(error).__name__} in "
            f"{tracer.place or type(ann).__name__} ({error})"
        ) from error
    return fx.GraphModule(whole, graph)


class _Tracer(fx.Tracer):
    """Attributes: place: the module that is being traced."""

    def __init__(self, images: Tensor, whole: nn.Module) -> None:
        super().__init__()
        self.images = images
        parameters = whole.named_parameters(remove_duplicate=False)
        self.parameters = {name: parameter.to("meta") for name, parameter in parameters}
        self.place = ""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__.startswith("iirsnn.")
        return ours or super().is_leaf_module(module, name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict
    ) -> Any:
        self.place = self.path_of_module(m).removeprefix("model").removeprefix(".")
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **rest: Any):
        value = self._value(kind, target, args, kwargs)
        if kind != "output" and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return value  # a size or the like: known now
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *more, **rest)
        proxy.value = proxy.node.meta["value"] = value
        return proxy

    @torch.no_grad()
    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(_known, args), tree_map(_known, kwargs)
        if kind == "placeholder":
            return self.images
        if kind == "get_attr":
            return self.parameters[target]
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_module":
            return on_meta(self.root.get_submodule(target), *args, **kwargs)
        return None


class _ShapedProxy(fx.Proxy):
    value: Any = None

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS and isinstance(self.value, Tensor):
            return getattr(self.value, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        whole: Any = self
        return iter([whole[index] for index in range(len(self.value))])


def on_meta(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module gives for tensors on the meta device: shapes and dtypes alone."""
    tensors = [*module.parameters(), *module.buffers()]
    double = copy.deepcopy(module, {id(tensor): tensor.to("meta") for tensor in tensors})
    return double.forward(*args, **kwargs)  # torch.fx takes the place of __call__ while it traces


def _known(value: Any) -> Any:
    if isinstance(value, _ShapedProxy):
        return value.value
    return value.to("meta") if isinstance(value, Tensor) else value
