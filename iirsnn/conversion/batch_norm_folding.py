"""BatchNorm folded into the weights of the layer before it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..models.graph import Affine

_transposed = functools.partial(fuse_conv_bn_eval, transpose=True)
_FUSE: dict[tuple[type, type], Callable[..., nn.Module]] = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.ConvTranspose1d, nn.BatchNorm1d): _transposed,
    (nn.ConvTranspose2d, nn.BatchNorm2d): _transposed,
    (nn.ConvTranspose3d, nn.BatchNorm3d): _transposed,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}
_FUSE |= {(layer, nn.SyncBatchNorm): fuse for (layer, _), fuse in _FUSE.items()}


def fold_batch_norm(model: nn.Module) -> None:
    """Fold, in place, each BatchNorm that follows a layer of a Sequential into that layer.

    Uses the running statistics, so the result equals the model in eval mode.
    """
    for parent in list(model.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        kept: list[nn.Module] = []
        for module in parent:
            both = folded(kept[-1], module) if kept else None
            if both is None:
                kept.append(module)
            else:
                kept[-1] = both
        if len(kept) < len(parent):
            del parent[:]
            parent.extend(kept)


def fold_graph(graph_module: fx.GraphModule) -> None:
    """Fold, in place, each BatchNorm of a graph: into the layer before it, where that feeds nothing
    else; any other becomes an Affine of its own.

    Raises:
        ValueError: a BatchNorm without running statistics.
    """
    for node in list(graph_module.graph.nodes):
        norm = module_at(graph_module, node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        before = node.args[0]
        layer = module_at(graph_module, before)
        alone = len(before.users) == 1 and before.meta["value"].dim() == node.meta["value"].dim()
        both = folded(layer, norm) if layer is not None and alone else None
        if both is None:
            graph_module.set_submodule(node.target, affine(norm))
            continue
        graph_module.set_submodule(before.target, both)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(node.target)
    graph_module.recompile()


def module_at(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None for other nodes."""
    if node.op != "call_module":
        return None
    return graph_module.get_submodule(str(node.target))


def folded(layer: Any, norm: Any) -> nn.Module | None:
    """A copy of a layer with the BatchNorm after it folded in; None for other pairs.

    A convolution, a transposed one or a linear layer of 1 to 3 dimensions. What was frozen stays
    so: the weight as the layer's was; the bias as the layer's was, else as the norm's.

    Raises:
        ValueError: a BatchNorm without running statistics.
    """
    fuse = _FUSE.get((type(layer), type(norm)))
    if fuse is None:
        return None
    _check_statistics(norm)
    # torch folds in eval mode alone
    both: Any = fuse(copy.deepcopy(layer).eval(), copy.deepcopy(norm).eval())
    both.weight.requires_grad_(layer.weight.requires_grad)
    leader = next((b for b in (layer.bias, norm.bias) if b is not None), layer.weight)
    both.bias.requires_grad_(leader.requires_grad)
    return both.train(norm.training)


def affine(norm: Any) -> Affine:
    """What a BatchNorm does in eval mode, by channel.

    Raises:
        ValueError: one without running statistics.
    """
    _check_statistics(norm)
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        weight = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * weight
        bias = shift if norm.bias is None else shift + norm.bias
    module: Any = Affine(weight, bias)
    if norm.weight is not None:
        module.weight.requires_grad_(norm.weight.requires_grad)
        module.bias.requires_grad_(norm.bias.requires_grad)
    return module.train(norm.training)


def _check_statistics(norm: Any) -> None:
    if norm.running_mean is None:
        raise ValueError(f"expected running statistics to fold, got {norm}")
